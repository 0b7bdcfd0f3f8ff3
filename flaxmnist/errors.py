"""The ways a command may end other than well, and the exit code of each."""

import os
import sys
from collections.abc import Callable


class UserError(ValueError):
    """The caller can mend it: the message is one line that says what is wrong and how to mend it."""

    exit_code = 2


class Diverged(ArithmeticError):
    """The loss is no longer finite; the last good checkpoint is kept."""

    exit_code = 3


class BelowTarget(Exception):
    """Training finished, but under the accuracy that was asked for."""

    exit_code = 4


class Stopped(Exception):
    """Told to stop before the end; ``--resume`` goes on."""

    exit_code = 75


def exit_code(command: Callable[[], None]) -> int:
    """Runs ``command`` and returns the exit code of how it ended, its message on standard error.

    Anything but the four endings above is a defect of ours and keeps its traceback.
    """
    try:
        command()
        sys.stdout.flush()
    except (UserError, Diverged, BelowTarget, Stopped) as ending:
        print(f"flaxmnist: {ending}", file=sys.stderr)
        return ending.exit_code
    except KeyboardInterrupt:
        print("flaxmnist: stopped", file=sys.stderr)
        return Stopped.exit_code
    except SystemExit as ending:
        # The argument parser has said what it had to say.
        return ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BrokenPipeError:
        # The reader of our output went away (`… | head`): nothing is left to tell it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
