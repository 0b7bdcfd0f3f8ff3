"""Files of run folders: atomic writes."""

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` to ``path`` atomically. Raise OSError on failure."""
    write_file(path, json.dumps(value, indent=2, allow_nan=False).encode() + b"\n")


def write_file(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` atomically, and flush it to the disk. Raise OSError on failure."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
