"""A web page in headless Chromium: what a script finds there, and screenshots."""

import html
import http.server
import json
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr")


def browse(page: Path, *options: str) -> str:
    """Open ``page``, which must log nothing to the console, and return the standard output."""
    assert CHROMIUM is not None
    command = [CHROMIUM, *OPTIONS, *options, page.as_uri()]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert "CONSOLE" not in ended.stderr, ended.stderr
    return ended.stdout


def with_script(page: Path, script: str) -> Path:
    """Return a copy of ``page`` that ends with ``script``, the body of an asynchronous function."""
    copy = page.with_name("with_script.html")
    copy.write_text(f'{page.read_text()}<script type="module">await (async () => {{ {script} }})();</script>')
    return copy


def evaluate(page: Path, script: str) -> Any:
    """Return what ``script``, the body of an asynchronous function, returns as JSON after ``page`` is loaded.

    Timers run at once, so times mean nothing.
    """
    result = 'const result = Object.assign(document.createElement("pre"), {id: "result"});'
    show = f"{result} result.textContent = JSON.stringify(await (async () => {{ {script} }})());"
    copy = with_script(page, f"{show} document.body.append(result);")
    # Milliseconds of the timers' time, after which the page is printed.
    printed = browse(copy, "--virtual-time-budget=600000", "--dump-dom")
    found = re.search(r'<pre id="result">(.*?)</pre>', printed, re.DOTALL)
    assert found, printed[-1000:]
    return json.loads(html.unescape(found[1]))


def evaluate_in_real_time(page: Path, script: str) -> Any:
    """Evaluate ``script`` as ``evaluate`` does, in real time: the page sends its result to a server of ours."""
    assert CHROMIUM is not None
    answers = []

    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = 5  # seconds: a browser may open a connection that it does not use

        def do_POST(self) -> None:
            answers.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    # The browser's other processes may still write to its profile.
    folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server, folder as profile:
        server.timeout = 300
        send = f'fetch("http://127.0.0.1:{server.server_port}", {{ method: "POST", mode: "no-cors", body }})'
        copy = with_script(page, f"const body = JSON.stringify(await (async () => {{ {script} }})()); await {send};")
        kept_open = "--headless", "--no-sandbox", "--remote-debugging-port=0", f"--user-data-dir={profile}"
        command = [CHROMIUM, *kept_open, copy.as_uri()]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as browser:
            deadline = time.monotonic() + server.timeout
            while not answers and time.monotonic() < deadline:
                server.handle_request()
            browser.kill()
    assert answers, "the page sent no result within 5 minutes"
    return answers[0]
