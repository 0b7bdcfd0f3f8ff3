"""The folder of a run in progress: resume from it, save to it, and handle write errors.

``RunFolder`` and ``NoFolder``, for a run that writes nothing to disk, have the same methods.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from flaxmnist import fields
from flaxmnist.console import Clock, logger
from flaxmnist.core import models
from flaxmnist.core.metrics import goodness
from flaxmnist.core.state import TrainState
from flaxmnist.devices import parallel, processes
from flaxmnist.devices.evaluation import Evaluation
from flaxmnist.errors import Diverged, UserError
from flaxmnist.store import manifest, tensorboard
from flaxmnist.store.claim import claim_run
from flaxmnist.store.files import write_error, write_json
from flaxmnist.store.lock import Lock
from flaxmnist.store.manifest import CheckpointInfo
from flaxmnist.store.provenance import RunInfo
from flaxmnist.store.records import Records
from flaxmnist.store.rescue import save_or_rescue
from flaxmnist.store.result import Result

if TYPE_CHECKING:  # importing Orbax takes a third of a second, which a run without a folder can save
    from flaxmnist.store.checkpoints import Checkpoints

# Seconds of training between checkpoints, unless the config gives a number of steps; so much may be lost.
SAVE_SECONDS = 60.0

# Seconds of training between a failed save and the next attempt.
RETRY_SECONDS = 30.0


@contextlib.contextmanager
def open_folder(
    workdir: str | Path | None, run: RunInfo, clock: Clock, resume: bool, overwrite: bool, allow_config_change: bool
) -> "Iterator[RunFolder | NoFolder]":
    """Claim and lock ``workdir`` for ``run`` within the block. Raise UserError as ``claim_run`` does."""
    if workdir is None:
        yield NoFolder()
        return
    path, lock = Path(workdir), Lock()
    claim = partial(claim_run, path, lock, run, resume, overwrite, allow_config_change)
    try:
        finished, step = processes.on_first_process(claim)
        folder = RunFolder(path, lock, run, finished, step, clock)
        with contextlib.closing(folder.checkpoints):
            yield folder
    finally:
        lock.release()


class NoFolder:
    """The records of a run that writes nothing to disk."""

    finished = False
    advice = "nothing was saved without a workdir"  # after a stop

    def __init__(self):
        self.records = Records(None)

    def begin(self, like: TrainState) -> TrainState | None:
        """Return the state to resume from, with the shapes and shardings of ``like``, or None to start from scratch.

        From now on the folder contains this run, unfinished. Raise UserError if the state has other shapes, or if the
        folder is not writable.
        """

    def update(self) -> None:
        """Write new records, and warn if saving in the background has failed."""

    def draw(self, state: TrainState, split: str, evaluation: Evaluation, shape: tuple[int, ...]) -> None:
        """Write pictures of the confusion matrix of ``split`` and of the first layer's weights as events."""

    def save(self, state: TrainState) -> None:
        """Save a checkpoint, with the records up to it, in the background. Raise Diverged if it is not finite."""

    def is_save_due(self) -> bool:
        """Return True if a checkpoint should be saved now: the last one is old, or saving it has failed."""
        return False

    def flush(self, state: TrainState) -> None:
        """Save ``state`` and wait until it is on the disk; if that fails, save it elsewhere and raise UserError."""

    def finish(self, result: Result) -> None:
        """Write the result. Raise UserError on failure."""

    def last_checkpoint(self) -> int | None:
        """Return the step of the newest checkpoint on the disk, or None."""


class RunFolder(NoFolder):
    """Records, events and checkpoints of a run. With several processes all save, but only the first writes the rest."""

    def __init__(self, path: Path, lock: Lock, run: RunInfo, finished: bool, step: int | None, clock: Clock):
        """Prepare to resume from the intact checkpoint at ``step``, without changing anything."""
        from flaxmnist.store.checkpoints import Checkpoints

        super().__init__()
        self.path, self.lock, self.run, self.finished, self.clock = path, lock, run, finished, clock
        self.advice = f"--resume continues {path}"
        self.checkpoints = Checkpoints(path / "checkpoints", run.config.train.keep, step)
        self.retry_at: float | None = None  # time of the next attempt to save; None if the last save succeeded
        self.saved_at = time.monotonic()
        self.events: tensorboard.EventWriter | None = None  # in the first process

    def begin(self, like: TrainState) -> TrainState | None:
        from flaxmnist.store.checkpoints import restore

        folder, step, state, records = self.checkpoints.folder, self.checkpoints.last, None, b""
        if step is not None:
            saved = manifest.read(folder, step, verify=False)
            state, records = restore(folder, step, like), saved.records
            self.clock.resume(saved.info.seconds)
            logger.info("resuming from the checkpoint at step %d", step)
        if processes.is_first_process():
            try:
                self.records = Records(self.path / "metrics.jsonl", records)
                folder = self.path / "tensorboard"
                self.events = tensorboard.EventWriter(folder, self.records, step or 0, self.run.config)
                self.checkpoints.clear()
                mark_unfinished(self.path, self.run)
            except OSError as error:
                raise write_error(self.path, error) from None
        else:
            self.records = Records(None, records)
        return state

    def update(self) -> None:
        if self.retry_at is None:
            self.attempt(self.checkpoints.check)

    def draw(self, state: TrainState, split: str, evaluation: Evaluation, shape: tuple[int, ...]) -> None:
        step = int(state.step)
        if jax.process_count() > 1:
            mesh = parallel.mesh_of(state.params)
            assert mesh is not None
            state = parallel.gather(state, mesh)
        if self.events is not None:
            self.events.draw(step, f"{split}/confusion", tensorboard.confusion_picture(evaluation.confusion))
            pictures = models.first_weights(state.model, shape)
            if pictures is not None:
                self.events.draw(step, "weights", tensorboard.mosaic(pictures))

    def save(self, state: TrainState) -> None:
        if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state.params)):
            raise Diverged(f"the weights after step {int(state.step)} are not finite")
        if self.retry_at is None or self.is_save_due():
            self.retry_at, self.saved_at = None, time.monotonic()
            self.attempt(partial(self.save_to, self.checkpoints, state))

    def is_save_due(self) -> bool:
        if self.retry_at is not None:
            return time.monotonic() > self.retry_at
        return self.run.config.train.checkpoint_every is None and time.monotonic() > self.saved_at + SAVE_SECONDS

    def flush(self, state: TrainState) -> None:
        def save() -> None:
            self.write(self.checkpoints.wait)
            if self.checkpoints.last != int(state.step):
                self.write(partial(self.save_to, self.checkpoints, state))
                self.write(self.checkpoints.wait)

        save_or_rescue(self.path, save, partial(self.rescue, state))

    def finish(self, result: Result) -> None:
        if self.events is None:
            return
        try:
            self.events.end()
            self.write()
            write_json(self.path / "result.json", result)
        except OSError as error:
            raise write_error(self.path, error) from None

    def last_checkpoint(self) -> int | None:
        self.attempt(self.checkpoints.wait)
        return self.checkpoints.last

    # --- Writing ----------------------------------------------------------------------------------------------------

    def attempt(self, action: Callable[[], None]) -> None:
        """Call ``write``. On failure, warn, and schedule the next attempt after RETRY_SECONDS."""
        try:
            self.write(action)
        except OSError as error:
            self.retry_at = time.monotonic() + RETRY_SECONDS
            reason = error.strerror or error
            logger.warning("cannot save to %s (%s): retrying in %.0f s", self.path, reason, RETRY_SECONDS)

    def write(self, action: Callable[[], None] = lambda: None) -> None:
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
                raise UserError(f"cannot save to {self.path}: {error.strerror or error}") from error
            raise

    def save_to(self, checkpoints: "Checkpoints", state: TrainState) -> None:
        last = self.records.last("validation")
        accuracy, good = None, None
        if last and last["step"] == int(state.step):
            accuracy, good = last["accuracy"], goodness(self.run.config.train.monitor, last)
        seconds, run = self.clock.seconds | {"total": self.clock.total()}, fields.to_json(self.run)
        info = CheckpointInfo(accuracy=accuracy, goodness=good, seconds=seconds, run=run)
        checkpoints.save(state, info, bytes(self.records.text))

    def rescue(self, state: TrainState, elsewhere: Path) -> str:
        """Save the run in ``elsewhere``, and return advice on how to continue. Raise OSError on failure."""
        from flaxmnist.store.checkpoints import Checkpoints

        with contextlib.closing(Checkpoints(elsewhere / "checkpoints", keep=1)) as checkpoints:
            self.save_to(checkpoints, state)
            checkpoints.wait()
        mark_unfinished(elsewhere, self.run)
        return f"step {int(state.step)} is saved in {elsewhere}; pass --workdir {elsewhere} --resume to continue"


def mark_unfinished(folder: Path, run: RunInfo) -> None:
    """Write ``config.json``, and remove the result of an earlier run."""
    (folder / "result.json").unlink(missing_ok=True)
    write_json(folder / "config.json", run)
