"""One run in a folder at a time."""

import contextlib
import fcntl
import os
import socket
from pathlib import Path

from flaxmnist.errors import UserError
from flaxmnist.logs import logger

NAME = "lock"


class Lock:
    """A file that is locked while it is open, so that a killed process leaves none behind."""

    def __init__(self):
        self.path = Path()
        self.file: int | None = None

    def take(self, folder: Path) -> None:
        """Locks ``folder``. Raises UserError where another run holds it, and OSError."""
        self.path = folder / NAME
        while not self.holds():
            self.close()
            self.file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                who = os.pread(self.file, 200, 0).decode(errors="replace") or "another process"
                self.close()
                raise UserError(
                    f"{folder} is in use by {who}: wait until it ends, stop it, or give another --workdir"
                ) from None
            except OSError as error:
                logger.warning("%s cannot be locked (%s): start no other run there", folder, error.strerror)
        assert self.file is not None
        os.ftruncate(self.file, 0)
        os.pwrite(self.file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)

    def holds(self) -> bool:
        """Whether the file is still where it was made: not if its folder has vanished or been replaced."""
        try:
            return self.file is not None and os.path.samestat(os.fstat(self.file), os.stat(self.path))
        except OSError:
            return False

    def check(self) -> None:
        """Raises OSError where the folder is no longer that which was locked."""
        if not self.holds():
            raise OSError(f"{self.path.parent} has vanished")

    def release(self) -> None:
        if self.holds():
            with contextlib.suppress(OSError):
                self.path.unlink()
        self.close()

    def close(self) -> None:
        if self.file is not None:
            os.close(self.file)
            self.file = None
