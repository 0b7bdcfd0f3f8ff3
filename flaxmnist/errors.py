"""Errors that end a command, and their exit codes."""

import contextlib
import errno
import io
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path


class UserError(ValueError):
    """An error that the user can fix. The message is one line: what is wrong and how to fix it."""

    exit_code = 2


class Diverged(ArithmeticError):
    """Loss, gradient or weights are not finite; the last good checkpoint is kept."""

    exit_code = 3


class BelowTarget(Exception):
    """Training finished below the required accuracy."""

    exit_code = 4


class Stopped(BaseException):
    """The run was stopped before its end; ``--resume`` continues it. Not an error, like KeyboardInterrupt."""

    exit_code = 75


def check_local(path: str | Path) -> None:
    """Raise UserError for a path with a scheme, such as gs://bucket/run, which would become a local folder "gs:"."""
    if re.match(r"[A-Za-z][\w+.-]+:/", str(path)):
        raise UserError(
            f"{path} is not on a file system: mount the storage, for example with gcsfuse, and pass that path"
        )


def one_line(error: Exception) -> str:
    """Return the type and the message of an error of someone else's in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def print_message(message: str) -> None:
    """Print to standard error, if it can be written to: it may be a file on a full disk."""
    with contextlib.suppress(OSError):
        print(f"flaxmnist: {message}", file=sys.stderr, flush=True)


def exit_code(command: Callable[[], None]) -> int:
    """Run ``command``, print the message of the error that ends it, and return the exit code.

    Any exception but those of ``run_command``, and of writing the output, is a bug and propagates with its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        # Replace characters that the terminal's encoding lacks.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    code = 0
    try:
        code = run_command(command)
        sys.stdout.flush()
    except OSError as error:
        if error.filename is not None or error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EIO):
            raise
        # Prevent a second error when Python flushes standard output at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno != errno.EPIPE:  # otherwise its reader is gone, as in `… | head`
            print_message(f"cannot write the output: {error.strerror}; write it elsewhere")
            code = UserError.exit_code
    return code


def run_command(command: Callable[[], None]) -> int:
    """Run ``command``, print the message of the error that ends it, and return the exit code."""
    try:
        command()
    except (UserError, Diverged, BelowTarget, Stopped) as error:
        print_message(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        print_message("stopped")
        return Stopped.exit_code
    except SystemExit as error:
        # The argument parser has printed its message.
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 0
