"""The ways a command may end other than well, and the exit code of each."""

import contextlib
import io
import os
import sys
from collections.abc import Callable


class UserError(ValueError):
    """The caller can mend it: the message is one line that says what is wrong and how to mend it."""

    exit_code = 2


class Diverged(ArithmeticError):
    """Loss, gradient or weights are no longer finite; the last good checkpoint is kept."""

    exit_code = 3


class BelowTarget(Exception):
    """Training finished, but under the accuracy that was asked for."""

    exit_code = 4


class Stopped(BaseException):
    """Told to stop before the end; ``--resume`` goes on. Like KeyboardInterrupt no error, that nobody mends it."""

    exit_code = 75


def tell(message: str) -> None:
    """Says it on standard error, if that can be written to: it may be a file on a full disk."""
    with contextlib.suppress(OSError):
        print(f"flaxmnist: {message}", file=sys.stderr, flush=True)


def exit_code(command: Callable[[], None]) -> int:
    """Runs ``command`` and returns the exit code of how it ended, its message on standard error.

    Anything but the endings above, a keyboard's interrupt and a reader gone is a defect of ours, with its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        # A terminal that does not know a character shows another.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        command()
        sys.stdout.flush()
    except (UserError, Diverged, BelowTarget, Stopped) as ending:
        tell(str(ending))
        return ending.exit_code
    except KeyboardInterrupt:
        tell("stopped")
        return Stopped.exit_code
    except SystemExit as ending:
        # The argument parser has said what it had to say.
        return ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BrokenPipeError:
        # The reader of our output went away (`… | head`): nothing is left to tell it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
