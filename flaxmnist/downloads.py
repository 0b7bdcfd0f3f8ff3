"""Files from the network, taken for good only when their SHA-256 is right.

``tensorflow_datasets`` has a download manager of its own. It takes a damaged file of its cache for good and waits on a
silent server for ever, so this is the standard library's, with a time-out and the hash taken while reading.
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

from flaxmnist.errors import UserError

TIMEOUT = 15.0  # seconds that a server may keep silent, from the address being looked up to the last byte
BLOCK = 1 << 18  # most bytes taken from the network or the disk at a time


def obtain(url: str, target: Path, checksum: str, size: int) -> None:
    """Makes sure that ``target`` is the file at ``url``, of ``size`` bytes and SHA-256 ``checksum`` in hexadecimal.

    A file that lies there already is hashed, never trusted, and fetched anew where it is damaged. Nothing is written
    where it is right. Raises UserError where it is damaged or missing and cannot be fetched.
    """
    # Unlike Path.is_file, this answers no, and raises nothing, in a folder that may not be entered.
    if not os.path.isfile(target):
        return fetch(url, target, checksum, size)
    if sha256(target) != checksum:
        try:
            fetch(url, target, checksum, size)
        except UserError as error:
            raise UserError(f"{target} is damaged (its SHA-256 is not {checksum}): {error}") from error


def fetch(url: str, target: Path, checksum: str, size: int) -> None:
    """Downloads the file at ``url``, of ``size`` bytes and SHA-256 ``checksum`` in hexadecimal, to ``target``.

    ``target`` appears whole or not at all; a file that was there is replaced. A silent server is given up after
    ``TIMEOUT`` seconds. Shows a bar where standard error is a terminal, and one line where it is not. Raises UserError,
    naming ``url`` and what to do, where the file cannot be had or written, or is another than expected.
    """
    otherwise = "or use --data.name digits, which needs no download"
    # In the same folder, because a file is replaced at once only within one file system; a name of its own, because
    # several processes may fetch the same file.
    part = target.with_name(f"{target.name}.{secrets.token_hex(4)}.part")
    terminal = sys.stderr.isatty()
    digest = hashlib.sha256()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in target.parent.glob(f"{target.name}.*.part"):
            # Of a download that was killed. Another one may be going on.
            if time.time() - left.stat().st_mtime > 3600:
                left.unlink(missing_ok=True)
        with open(part, "xb") as file:
            if not terminal:
                print(f"downloading {url} ({size:,} bytes)", file=sys.stderr, flush=True)
            with tqdm(total=size, desc=url.rsplit("/", 1)[-1], unit="B", unit_scale=True, disable=not terminal) as bar:
                for block in receive(url, size):
                    file.write(block)
                    digest.update(block)
                    bar.update(len(block))
        if (found := digest.hexdigest()) != checksum:
            raise UnusableError(f"it is another file than expected (its SHA-256 is {found}, not {checksum})")
        os.replace(part, target)
    except UnusableError as error:
        raise UserError(f"cannot download {url}: {error}; put the file at {target} yourself, {otherwise}") from error
    except OSError as error:
        what = f"cannot write {target}, to hold {url}: {error.strerror or error}"
        raise UserError(f"{what}; name a folder that can be written to with --data-dir, {otherwise}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


class UnusableError(Exception):
    """What came from the network is not the file, for the reason in the message."""


def receive(url: str, size: int) -> Iterator[bytes]:
    """The bytes at ``url`` in blocks, one more than ``size`` at most.

    Raises UnusableError where the server does not send them, or not exactly ``size``.
    """
    received = 0
    try:
        with open_url(url) as response:
            while received <= size and (block := response.read1(min(BLOCK, size + 1 - received))):
                received += len(block)
                yield block
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        raise UnusableError(describe(error)) from error
    if received != size:
        raise UnusableError(f"{'over ' * (received > size)}{min(received, size):,} bytes came instead of {size:,}")


def describe(error: OSError | http.client.HTTPException) -> str:
    """What went wrong with a request, on one line."""
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answers {error.code} {error.reason}"
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, TimeoutError):
        return f"the server keeps silent for {TIMEOUT:g} seconds"
    return " ".join(str(reason).split()) or type(reason).__name__


def open_url(url: str) -> http.client.HTTPResponse:
    """The answer to a GET of ``url``, its body unread. Raises TimeoutError after ``TIMEOUT`` seconds without one.

    The socket's own time-out begins anew for each address of a name and leaves out looking the name up, which adds up
    to minutes behind a firewall that drops packets; so a thread opens, and is left to end by itself where it is late.
    """
    outcome: list[http.client.HTTPResponse | Exception] = []

    def attempt():
        try:
            outcome.append(urllib.request.urlopen(url, timeout=TIMEOUT))
        except (OSError, http.client.HTTPException, ValueError) as error:
            outcome.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(TIMEOUT)
    if not outcome:
        raise TimeoutError
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def sha256(path: Path) -> str:
    """The SHA-256 of the file ``path``, in hexadecimal. Raises UserError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; allow it, or use --data.name digits") from error
