"""The last attempts to save at the end of a run or sweep, and a place elsewhere if they fail."""

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from flaxmnist.console import logger
from flaxmnist.errors import UserError

# Seconds to wait before each further attempt.
RETRY_PAUSES = (0.5, 2.0, 5.0)


def save_or_rescue(folder: Path, save: Callable[[], None], rescue: Callable[[Path], str]) -> None:
    """Call ``save``, which writes to ``folder``, until it succeeds or all attempts have raised OSError.

    In the latter case call ``rescue`` with a new folder elsewhere, and raise UserError with the advice it returns.
    """
    reason = None
    for pause in (0.0, *RETRY_PAUSES):
        time.sleep(pause)
        try:
            return save()
        except OSError as error:
            reason = error.strerror or error
            logger.warning("cannot save to %s (%s)", folder, reason)
    for find_parent in (tempfile.gettempdir, Path.home, Path.cwd):
        elsewhere = None
        try:
            elsewhere = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=find_parent()))
            advice = rescue(elsewhere)
        except (OSError, RuntimeError):  # Path.home raises RuntimeError if the user has no home directory
            if elsewhere is not None:
                shutil.rmtree(elsewhere, ignore_errors=True)
        else:
            raise UserError(f"cannot save to {folder} ({reason}): {advice}")
    raise UserError(f"cannot save to {folder} ({reason}) or anywhere else: only earlier checkpoints are kept")
