"""HTML pages in one file, without network access: templates, styles and scripts from the folder ``page``."""

import html
import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "page"


def fill(name: str, title: str, heading: str, **values: str) -> str:
    """Return the page ``name``.html with its style and script. ``title`` and ``heading`` are text, ``values`` HTML."""
    values |= {"title": html.escape(title), "heading": html.escape(heading)}
    values |= {"style": read("page.css") + read(f"{name}.css"), "script": read(f"{name}.js")}
    return (read("head.html") + read(f"{name}.html")).format(**values)


def read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def to_script(value: Any) -> str:
    """Return ``value`` as JSON that may stand in a script element."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")
