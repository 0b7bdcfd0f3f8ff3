"""The download code against well-behaved and misbehaving servers on the loopback interface."""

import contextlib
import hashlib
import http.server
import os
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import user_error

from flaxmnist.data import downloads
from flaxmnist.data.downloads import fetch, obtain, sha256
from flaxmnist.errors import UserError

BODY = bytes(range(256)) * 4096  # 1 MiB, so that it comes in several blocks
CHECKSUM = hashlib.sha256(BODY).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """A handler in which each path is one behaviour of a server."""

    done = threading.Event()

    def do_GET(self):
        if self.path == "/missing":
            return self.send_error(404)
        self.send_response(200)
        if self.path == "/endless":
            self.end_headers()
            # Ends when writing fails because the client has closed the connection.
            while True:
                self.wfile.write(BODY)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        match self.path:
            case "/good":
                self.wfile.write(BODY)
            case "/altered":
                self.wfile.write(BODY[:-1] + b"!")
            case "/cut":
                self.wfile.write(BODY[: len(BODY) // 2])
            case "/stalled" | "/interrupted":
                self.wfile.write(BODY[: len(BODY) // 2])
                self.wfile.flush()
                if self.path == "/interrupted":
                    # Not os.kill, by which any thread may get the signal, and the main one would not wake up.
                    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
                self.done.wait(30)

    def log_message(self, format: str, *args):
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        assert isinstance(sys.exception(), ConnectionError)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server() -> Iterator[str]:
    """Yield the address of a server that behaves as the path says."""
    Handler.done.clear()
    with Server(("127.0.0.1", 0), Handler) as served:
        thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{served.server_port}"
        Handler.done.set()
        served.shutdown()
        thread.join()


@pytest.fixture
def silent() -> Iterator[str]:
    """Yield the address of a server that accepts connections and sends nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/silent"


def assert_error(url: str, target: Path, *words: str):
    """Assert that ``fetch`` raises an error with the URL, ``words`` and a remedy, and leaves no files behind."""
    before = sorted(target.parent.iterdir()) if target.parent.is_dir() else None
    with user_error(url, str(target), "--data.name digits", *words):
        fetch(url, target, CHECKSUM, len(BODY))
    assert before is None or sorted(target.parent.iterdir()) == before


def test_download_creates_the_folder_and_only_the_file(server: str, tmp_path: Path):
    target = tmp_path / "a" / "b" / "file.gz"
    fetch(f"{server}/good", target, CHECKSUM, len(BODY))
    assert target.read_bytes() == BODY
    assert list(target.parent.iterdir()) == [target]


def test_download_has_the_permissions_of_any_new_file(server: str, tmp_path: Path):
    (tmp_path / "ordinary").touch()
    fetch(f"{server}/good", tmp_path / "file", CHECKSUM, len(BODY))
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("altered", ["not the expected file", CHECKSUM]),
        ("cut", ["received 524,288 bytes instead of 1,048,576"]),
        ("missing", ["404"]),
        ("endless", ["received over 1,048,576 bytes"]),
    ],
)
def test_bad_response(server: str, tmp_path: Path, path: str, words: list[str]):
    (tmp_path / "file").write_bytes(b"older")
    assert_error(f"{server}/{path}", tmp_path / "file", *words)
    assert (tmp_path / "file").read_bytes() == b"older"


def test_connection_refused(tmp_path: Path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert_error(f"http://127.0.0.1:{unused.getsockname()[1]}/file", tmp_path / "file", "refused")


def test_server_that_closes_the_connection(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=lambda: listener.accept()[0].close())
        thread.start()
        assert_error(f"http://127.0.0.1:{listener.getsockname()[1]}/file", tmp_path / "file", "onnection")
        thread.join()


def test_silent_server_times_out(silent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(downloads, "TIMEOUT", 0.3)
    assert_error(silent, tmp_path / "file", "silent for 0.3 seconds")


def test_server_that_stalls_half_way_times_out(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(downloads, "TIMEOUT", 0.3)
    assert_error(f"{server}/stalled", tmp_path / "file", "silent for 0.3 seconds")


def test_timeout_covers_the_whole_connection_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # As for a host with several addresses behind a firewall: the socket's own timeout would restart for each.
    monkeypatch.setattr(downloads, "TIMEOUT", 0.3)
    monkeypatch.setattr(downloads.urllib.request, "urlopen", lambda url, timeout: time.sleep(1.5))
    start = time.monotonic()
    assert_error("http://firewalled.example/file", tmp_path / "file", "silent for 0.3 seconds")
    assert time.monotonic() - start < 1.2


@pytest.mark.slow
def test_silent_server_times_out_within_20_seconds(silent: str, tmp_path: Path):
    start = time.monotonic()
    assert_error(silent, tmp_path / "file", "silent for 15 seconds")
    assert time.monotonic() - start < 20


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_read_only_folder(server: str, tmp_path: Path):
    # Not by permissions, because root ignores them.
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", tmp_path], check=True)
    try:
        assert_error(f"{server}/good", tmp_path / "file", "cannot write", "Read-only file system")
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


def test_folder_that_cannot_be_created(server: str, tmp_path: Path):
    (tmp_path / "downloads").write_text("a file where the folder should be")
    assert_error(f"{server}/good", tmp_path / "downloads" / "file", "cannot write")


def test_partial_file_is_removed_on_interruption(server: str, tmp_path: Path):
    """The process gets Ctrl-C half way."""
    # A shell starts background jobs with this signal ignored.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            fetch(f"{server}/interrupted", tmp_path / "file", CHECKSUM, len(BODY))
    finally:
        signal.signal(signal.SIGINT, handler)
    assert list(tmp_path.iterdir()) == []


def test_without_a_terminal_one_line_shows_the_progress(
    server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    fetch(f"{server}/good", tmp_path / "file", CHECKSUM, len(BODY))
    assert capsys.readouterr() == ("", f"downloading {server}/good (1,048,576 bytes)\n")


def test_a_terminal_shows_a_progress_bar(
    server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    reader, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    with os.fdopen(terminal, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        fetch(f"{server}/good", tmp_path / "file", CHECKSUM, len(BODY))
    shown = ""
    with contextlib.suppress(OSError):  # the end, since the terminal is closed
        while chunk := os.read(reader, 10_000):
            shown += chunk.decode()
    os.close(reader)
    assert "100%" in shown
    assert "downloading" not in shown
    assert capsys.readouterr().out == ""


def test_intact_cached_file_needs_no_server(tmp_path: Path):
    (tmp_path / "file").write_bytes(BODY)
    obtain("http://127.0.0.1:9/file", tmp_path / "file", CHECKSUM, len(BODY))
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


@pytest.mark.parametrize("cached", [None, b"", BODY[:-1], BODY[:-1] + b"!"])
def test_missing_or_damaged_cached_file_is_downloaded(server: str, tmp_path: Path, cached: bytes | None):
    if cached is not None:
        (tmp_path / "file").write_bytes(cached)
    obtain(f"{server}/good", tmp_path / "file", CHECKSUM, len(BODY))
    assert (tmp_path / "file").read_bytes() == BODY


def test_damaged_file_that_cannot_be_downloaded_again_is_kept(server: str, tmp_path: Path):
    (tmp_path / "file").write_bytes(b"damaged")
    with pytest.raises(UserError, match="is damaged") as error:
        obtain(f"{server}/missing", tmp_path / "file", CHECKSUM, len(BODY))
    assert str(error.value).startswith(str(tmp_path / "file"))
    assert f"{server}/missing: the server responded 404" in str(error.value)
    assert (tmp_path / "file").read_bytes() == b"damaged"


def test_sha256_of_a_file(tmp_path: Path):
    (tmp_path / "file").write_bytes(BODY)
    assert sha256(tmp_path / "file") == CHECKSUM
    with pytest.raises(UserError, match="cannot read"):
        sha256(tmp_path / "none")
