"""The folder of a run while it goes: going on from what lies there, saving, and what to do where that fails."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from flaxmnist import events, folders, hosts, manifest
from flaxmnist.checkpoints import Checkpoints, restore
from flaxmnist.config import Config
from flaxmnist.errors import UserError
from flaxmnist.evaluation import Evaluation
from flaxmnist.lock import Lock
from flaxmnist.logs import Clock, Records, logger
from flaxmnist.state import TrainState

# Seconds until saving is tried again after it failed, while training goes on.
RETRY_SECONDS = 30.0


class Archive:
    """Records, events and checkpoints in the folder of a run. One process of several writes the former; all save."""

    def __init__(
        self, folder: Path, lock: Lock, described: dict[str, Any], config: Config, state: TrainState, clock: Clock
    ):
        """Goes on from the newest checkpoint that is whole, or from ``state``, which is that before the first step.

        ``described`` is what ``config.json`` shall hold. Raises UserError where ``folder`` cannot be written to or has
        more steps than ``config`` wants.
        """
        self.folder, self.lock, self.described, self.clock = folder, lock, described, clock
        self.state, text = state, b""
        self.retry_at: float | None = None  # when to try to save again; None where the last time went well
        kept = folder / "checkpoints"
        last = hosts.on_first(lambda: folders.newest_step(folder, config))
        if last is not None:
            saved = manifest.find(kept, str(last))
            assert saved is not None
            self.state, text = restore(kept, last, state), saved.records
            clock.resume(saved.about["seconds"])
            logger.info("going on from the checkpoint at step %d", last)
        self.checkpoints = Checkpoints(kept, config.train.keep, last)
        try:
            self.records = Records(folder / "metrics.jsonl" if hosts.is_first() else None, text)
            self.events: events.Events | None = None
            if hosts.is_first():
                self.events = events.Events(folder / "tensorboard", self.records, last or 0, config)
                self.checkpoints.clear()
                folders.begin(folder, described)
        except OSError as error:
            raise folders.unwritable(folder, error) from None

    def save(self, state: TrainState, accuracy: float | None) -> None:
        """Saves in the background. ``accuracy`` is the validation accuracy, where this state has been evaluated.

        A failure is told, and the next call is heard after RETRY_SECONDS.
        """
        if self.retry_at is None or time.monotonic() > self.retry_at:
            self.retry_at = None
            with self.clock("checkpoint"):
                self.attempt(partial(self.save_to, self.checkpoints, state, accuracy))

    def watch(self) -> None:
        """Writes new records, and tells where saving has failed in the meantime."""
        if self.retry_at is None:
            self.attempt(self.checkpoints.check)

    def is_retry_due(self) -> bool:
        return self.retry_at is not None and time.monotonic() > self.retry_at

    def last(self) -> int | None:
        """The step of the newest checkpoint, once it is on the disk; None where there is none."""
        self.attempt(self.checkpoints.wait)
        return self.checkpoints.last

    def settle(self, state: TrainState, accuracy: float | None) -> None:
        """Returns when records and ``state`` are on the disk; else keeps them elsewhere and raises UserError."""

        def save() -> None:
            self.write(self.checkpoints.wait)
            if self.checkpoints.last != int(state.step):
                self.write(partial(self.save_to, self.checkpoints, state, accuracy))
                self.write(self.checkpoints.wait)

        folders.persist(self.folder, save, partial(self.rescue, state, accuracy))

    def draw(self, step: int, split: str, seen: Evaluation, weights: Float[np.ndarray, "n h w"] | None) -> None:
        """Pictures of what was ``seen`` on ``split`` after ``step`` updates, and of the model's first ``weights``."""
        if self.events is not None:
            self.events.draw(step, f"{split}/confusion", events.confusion_picture(seen.confusion))
            if weights is not None:
                self.events.draw(step, "weights", events.mosaic(weights))

    def end(self) -> None:
        """Writes what is new, and that the run is finished. Raises OSError."""
        if self.events is not None:
            self.events.end()
            self.write(lambda: None)

    def close(self) -> None:
        self.checkpoints.close()

    # --- Writing ----------------------------------------------------------------------------------------------------

    def attempt(self, action: Callable[[], None]) -> None:
        """Does what ``write`` does; a failure is told, and training goes on."""
        try:
            self.write(action)
        except OSError as error:
            self.retry_at = time.monotonic() + RETRY_SECONDS
            reason = error.strerror or error
            logger.warning("cannot save to %s (%s): tried again in %.0f s", self.folder, reason, RETRY_SECONDS)

    def write(self, action: Callable[[], None]) -> None:
        """Writes new records and events, and does ``action``. Raises OSError where either fails.

        In one process of several it raises UserError, for the others wait for what this one cannot do.
        """
        try:
            if hosts.is_first():
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
        """Begins to save in ``checkpoints``. Raises OSError."""
        known = {"accuracy": accuracy, "seconds": dict(self.clock.seconds), "run": self.described}
        checkpoints.save(state, known, bytes(self.records.text))

    def rescue(self, state: TrainState, accuracy: float | None, elsewhere: Path) -> str:
        """Keeps the run in ``elsewhere``; returns how to go on. Raises OSError."""
        checkpoints = Checkpoints(elsewhere / "checkpoints", keep=1)
        self.save_to(checkpoints, state, accuracy)
        checkpoints.wait()
        folders.begin(elsewhere, self.described)
        return f"step {int(state.step)} is kept in {elsewhere}, --workdir {elsewhere} --resume goes on from there"
