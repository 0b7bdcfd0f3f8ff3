"""A lock that allows only one run at a time in a folder."""

import contextlib
import fcntl
import os
import socket
from pathlib import Path

from flaxmnist.console import logger
from flaxmnist.errors import UserError

NAME = "lock"


class Lock:
    """A file locked with ``flock``, so that the system releases the lock of a killed process."""

    def __init__(self):
        self.path = Path()
        self.file: int | None = None

    def take(self, folder: Path) -> None:
        """Lock ``folder``. Raise UserError if another run holds the lock, OSError if the file cannot be created."""
        self.path = folder / NAME
        while not self.holds():
            self.close()
            self.file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.pread(self.file, 200, 0).decode(errors="replace") or "another process"
                self.close()
                raise UserError(
                    f"{folder} is in use by {owner}: wait until it ends, stop it, or use another --workdir"
                ) from None
            except OSError as error:
                logger.warning("cannot lock %s (%s): do not start another run there", folder, error.strerror)
        assert self.file is not None
        os.ftruncate(self.file, 0)
        os.pwrite(self.file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)

    def holds(self) -> bool:
        """Return True if the open file is the lock file: False once its folder was removed or replaced."""
        try:
            return self.file is not None and os.path.samestat(os.fstat(self.file), os.stat(self.path))
        except OSError:
            return False

    def check(self) -> None:
        """Raise OSError if the locked folder was removed or replaced."""
        if not self.holds():
            raise OSError(f"{self.path.parent} was removed or replaced")

    def release(self) -> None:
        if self.holds():
            with contextlib.suppress(OSError):
                self.path.unlink()
        self.close()

    def close(self) -> None:
        if self.file is not None:
            os.close(self.file)
            self.file = None
