"""HTML pages in one file, without network access: templates, styles and scripts from the folder ``page``."""

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "page"


def fill(name: str, **values: str) -> str:
    """Return the template ``name``.html with its style, its script, and ``values``, which must be HTML."""
    style = read("page.css") + read(f"{name}.css")
    return read(f"{name}.html").format(style=style, script=read(f"{name}.js"), **values)


def read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def to_script(value: Any) -> str:
    """Return ``value`` as JSON that may stand in a script element."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")
