"""The folder of a run in progress: resume from it, save to it, and handle write errors."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from flaxmnist.config import Config
from flaxmnist.console import Clock, logger
from flaxmnist.core.state import TrainState
from flaxmnist.devices import processes
from flaxmnist.devices.evaluation import Evaluation
from flaxmnist.errors import UserError
from flaxmnist.store import folders, manifest, tensorboard
from flaxmnist.store.checkpoints import Checkpoints, restore
from flaxmnist.store.lock import Lock
from flaxmnist.store.records import Records

# Seconds of training between a failed save and the next attempt.
RETRY_SECONDS = 30.0


class Archive:
    """Records, events and checkpoints of a run. With several processes all save, but only the first writes the rest."""

    def __init__(
        self, folder: Path, lock: Lock, description: dict[str, Any], config: Config, state: TrainState, clock: Clock
    ):
        """Resume from the newest intact checkpoint, or start from ``state``, the initial one.

        ``description`` is the content of ``config.json``. Raise UserError if ``folder`` is not writable or has more
        steps than ``config``.
        """
        self.folder, self.lock, self.description, self.clock = folder, lock, description, clock
        self.state, records = state, b""
        self.retry_at: float | None = None  # time of the next attempt to save; None if the last save succeeded
        checkpoints = folder / "checkpoints"
        last = processes.on_first_process(lambda: folders.resume_step(folder, config))
        if last is not None:
            saved = manifest.find(checkpoints, str(last))
            assert saved is not None
            self.state, records = restore(checkpoints, last, state), saved.records
            clock.resume(saved.metadata["seconds"])
            logger.info("resuming from the checkpoint at step %d", last)
        self.checkpoints = Checkpoints(checkpoints, config.train.keep, last)
        try:
            self.records = Records(folder / "metrics.jsonl" if processes.is_first_process() else None, records)
            self.events: tensorboard.EventWriter | None = None
            if processes.is_first_process():
                self.events = tensorboard.EventWriter(folder / "tensorboard", self.records, last or 0, config)
                self.checkpoints.clear()
                folders.begin_run(folder, description)
        except OSError as error:
            raise folders.write_error(folder, error) from None

    def save(self, state: TrainState, accuracy: float | None) -> None:
        """Save in the background. ``accuracy`` is the validation accuracy of ``state``, or None if not evaluated.

        On failure, warn and ignore further calls for RETRY_SECONDS.
        """
        if self.retry_at is None or time.monotonic() > self.retry_at:
            self.retry_at = None
            with self.clock("checkpoint"):
                self.attempt(partial(self.save_to, self.checkpoints, state, accuracy))

    def watch(self) -> None:
        """Write new records, and warn if saving in the background has failed."""
        if self.retry_at is None:
            self.attempt(self.checkpoints.check)

    def is_retry_due(self) -> bool:
        return self.retry_at is not None and time.monotonic() > self.retry_at

    def last(self) -> int | None:
        """Wait for the checkpoint in progress, and return the step of the newest one, or None."""
        self.attempt(self.checkpoints.wait)
        return self.checkpoints.last

    def settle(self, state: TrainState, accuracy: float | None) -> None:
        """Save the records and ``state`` and wait; if that fails, save them elsewhere and raise UserError."""

        def save() -> None:
            self.write(self.checkpoints.wait)
            if self.checkpoints.last != int(state.step):
                self.write(partial(self.save_to, self.checkpoints, state, accuracy))
                self.write(self.checkpoints.wait)

        folders.save_or_rescue(self.folder, save, partial(self.rescue, state, accuracy))

    def draw(self, step: int, split: str, evaluation: Evaluation, weights: Float[np.ndarray, "n h w"] | None) -> None:
        """Write pictures of the confusion matrix of ``split`` and of the ``weights`` of the first layer as events."""
        if self.events is not None:
            self.events.draw(step, f"{split}/confusion", tensorboard.confusion_picture(evaluation.confusion))
            if weights is not None:
                self.events.draw(step, "weights", tensorboard.mosaic(weights))

    def end(self) -> None:
        """Write the last records and events, and mark the run as finished. Raise OSError on failure."""
        if self.events is not None:
            self.events.end()
            self.write(lambda: None)

    def close(self) -> None:
        self.checkpoints.close()

    # --- Writing ----------------------------------------------------------------------------------------------------

    def attempt(self, action: Callable[[], None]) -> None:
        """Call ``write``. On failure, warn, and schedule the next attempt."""
        try:
            self.write(action)
        except OSError as error:
            self.retry_at = time.monotonic() + RETRY_SECONDS
            reason = error.strerror or error
            logger.warning("cannot save to %s (%s): retrying in %.0f s", self.folder, reason, RETRY_SECONDS)

    def write(self, action: Callable[[], None]) -> None:
        """Write new records and events, then call ``action``. Raise OSError on failure.

        With several processes an OSError becomes a UserError, because the others would wait for this one forever.
        """
        try:
            if processes.is_first_process():
                self.lock.check()
            self.records.write()
            if self.events is not None:
                self.events.write()
            action()
        except OSError as error:
            if jax.process_count() > 1:
                raise UserError(f"cannot save to {self.folder}: {error.strerror or error}") from error
            raise

    def save_to(self, checkpoints: Checkpoints, state: TrainState, accuracy: float | None) -> None:
        metadata = {"accuracy": accuracy, "seconds": dict(self.clock.seconds), "run": self.description}
        checkpoints.save(state, metadata, bytes(self.records.text))

    def rescue(self, state: TrainState, accuracy: float | None, elsewhere: Path) -> str:
        """Save the run in ``elsewhere``, and return advice on how to continue. Raise OSError on failure."""
        checkpoints = Checkpoints(elsewhere / "checkpoints", keep=1)
        self.save_to(checkpoints, state, accuracy)
        checkpoints.wait()
        folders.begin_run(elsewhere, self.description)
        return f"step {int(state.step)} is saved in {elsewhere}; pass --workdir {elsewhere} --resume to continue"
