"""Downloads that are accepted only if their SHA-256 is right.

The download manager of ``tensorflow_datasets`` accepts damaged files from its cache and waits forever for a silent
server. This one uses the standard library, with a timeout, and hashes the data as it arrives.
"""

import contextlib
import hashlib
import http.client
import os
import secrets
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from flaxmnist.data.idx import ALTERNATIVE
from flaxmnist.errors import UserError

TIMEOUT = 15.0  # seconds that a server may stay silent, from the DNS lookup to the last byte
BLOCK_SIZE = 1 << 18  # most bytes to read from the network at a time


def obtain(url: str, target: Path, checksum: str, size: int) -> None:
    """Ensure that ``target`` is the file at ``url``, of ``size`` bytes and with SHA-256 ``checksum`` in hexadecimal.

    An existing file is always hashed: a damaged one is downloaded again, an intact one is left untouched.
    """
    # Unlike Path.is_file, this returns False, and does not raise, in a folder without search permission.
    if not os.path.isfile(target):
        return fetch(url, target, checksum, size)
    if sha256(target) != checksum:
        try:
            fetch(url, target, checksum, size)
        except UserError as error:
            raise UserError(f"{target} is damaged (its SHA-256 is not {checksum}): {error}") from error


def fetch(url: str, target: Path, checksum: str, size: int) -> None:
    """Download the file at ``url`` and put it at ``target`` atomically; the arguments are those of ``obtain``.

    Show a progress bar if standard error is a terminal, and print one line otherwise. Raise UserError if the download
    fails, ``target`` cannot be written, or the file is not the expected one.
    """
    # In the same folder, so that the rename is atomic; randomly named, because several processes may download it.
    partial = target.with_name(f"{target.name}.{secrets.token_hex(4)}.part")
    terminal = sys.stderr.isatty()
    digest = hashlib.sha256()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for leftover in target.parent.glob(f"{target.name}.*.part"):
            # Remove what killed downloads left, but not the files of downloads in progress, which may end now.
            with contextlib.suppress(FileNotFoundError):
                if time.time() - leftover.stat().st_mtime > 3600:
                    leftover.unlink()
        with open(partial, "xb") as file:
            if not terminal:
                print(f"downloading {url} ({size:,} bytes)", file=sys.stderr, flush=True)
            with tqdm(total=size, desc=url.rsplit("/", 1)[-1], unit="B", unit_scale=True, disable=not terminal) as bar:
                for block in receive(url, size):
                    file.write(block)
                    digest.update(block)
                    bar.update(len(block))
        if (found := digest.hexdigest()) != checksum:
            raise DownloadError(f"it is not the expected file (its SHA-256 is {found}, not {checksum})")
        os.replace(partial, target)
    except DownloadError as error:
        raise UserError(f"cannot download {url}: {error}; put the file at {target} yourself, {ALTERNATIVE}") from error
    except OSError as error:
        problem = f"cannot write {target}, downloaded from {url}: {error.strerror or error}"
        raise UserError(f"{problem}; pass a writable folder as --data-dir, {ALTERNATIVE}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


class DownloadError(Exception):
    """A failed download, with the reason as its message, on one line."""


def receive(url: str, size: int) -> Iterator[bytes]:
    """Yield the bytes at ``url`` in blocks, at most ``size`` + 1 bytes in all.

    Raise DownloadError if the request fails or the response is not exactly ``size`` bytes long.
    """
    received = 0
    try:
        with open_url(url) as response:
            while received <= size and (block := response.read1(min(BLOCK_SIZE, size + 1 - received))):
                received += len(block)
                yield block
    except urllib.error.HTTPError as error:
        error.close()
        raise DownloadError(f"the server responded {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, TimeoutError):
            raise DownloadError(f"the server was silent for {TIMEOUT:g} seconds") from error
        raise DownloadError(" ".join(str(reason).split()) or type(reason).__name__) from error
    if received != size:
        raise DownloadError(f"received {'over ' * (received > size)}{min(received, size):,} bytes instead of {size:,}")


def open_url(url: str) -> http.client.HTTPResponse:
    """Return the response to a GET of ``url``, its body unread. Raise TimeoutError if none comes within ``TIMEOUT``.

    The socket's own timeout excludes the DNS lookup and restarts for each address of a host, which adds up to minutes
    behind a firewall that drops packets. So a daemon thread opens the connection, and is abandoned if it is late.
    """
    outcome: list[http.client.HTTPResponse | Exception] = []

    def connect():
        try:
            outcome.append(urllib.request.urlopen(url, timeout=TIMEOUT))
        except (OSError, http.client.HTTPException, ValueError) as error:
            outcome.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(TIMEOUT)
    result = outcome[0] if outcome else TimeoutError()
    if isinstance(result, Exception):
        raise result
    return result


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal. Raise UserError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the permissions, {ALTERNATIVE}") from error
