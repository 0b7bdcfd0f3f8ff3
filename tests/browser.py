"""A web page in headless Chromium: what a script finds there, and screenshots."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


def browse(page: Path, *options: str) -> subprocess.CompletedProcess:
    """Open ``page``, which must log nothing to the console."""
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", *options]
    ended = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=300, check=True)
    assert "CONSOLE" not in ended.stderr, ended.stderr
    return ended


def evaluate(page: Path, script: str, *options: str) -> Any:
    """Return what ``script``, the body of an asynchronous function, returns as JSON after ``page`` is loaded."""
    copy = page.with_name("evaluated.html")
    copy.write_text(f"""{page.read_text()}<script type="module">
        const result = document.createElement("pre");
        result.id = "result";
        result.textContent = JSON.stringify(await (async () => {{ {script} }})());
        document.body.append(result);
    </script>""")
    # Timers run at once, until this many milliseconds of their time have passed.
    ended = browse(copy, "--virtual-time-budget=600000", *options, "--dump-dom")
    found = re.search(r'<pre id="result">(.*?)</pre>', ended.stdout, re.DOTALL)
    assert found, ended.stdout[-1000:]
    return json.loads(html.unescape(found[1]))
