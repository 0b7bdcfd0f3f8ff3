"""Saving and restoring of checkpoints with Orbax, which no other module uses.

A checkpoint is a folder named after its step: the arrays of the ``TrainState``, the records so far, and a manifest with
the config, the validation accuracy and the SHA-256 of each file (``store.manifest``, which also finds checkpoints).
Orbax writes to a temporary folder and renames it when it is complete; the manifest reveals later damage.
"""

import contextlib
import ctypes
import errno
import logging
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from flaxmnist.core.state import TrainState
from flaxmnist.devices import processes
from flaxmnist.errors import UserError
from flaxmnist.store import manifest
from flaxmnist.store.manifest import CheckpointInfo, Saved, best, steps

ARRAYS = ("step", "params", "opt_state", "ema", "epoch")


def arrays_of(state: TrainState) -> dict[str, Any]:
    """Return the arrays of a state by name, without those that it lacks, as before there were any."""
    optional = {"buffers": state.buffers, "statistics": state.statistics}
    return {name: getattr(state, name) for name in ARRAYS} | {name: tree for name, tree in optional.items() if tree}


LIBC = ctypes.CDLL(None)


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Suppress the messages of Orbax within the block: it logs a traceback of each failure before it raises it."""

    def is_from_others(record: logging.LogRecord) -> bool:
        return "orbax" not in Path(record.pathname).parts

    logger = logging.getLogger("absl")
    logger.addFilter(is_from_others)
    try:
        yield
    finally:
        logger.removeFilter(is_from_others)


@quiet_orbax()
def restore(folder: Path, step: int, like: TrainState) -> TrainState:
    """Load the state at ``step`` with the shardings of ``like``. Raise UserError if shapes or types differ from it."""
    arrays, path = arrays_of(like), folder / str(step)
    try:
        with contextlib.closing(ocp.Checkpointer(ocp.StandardCheckpointHandler())) as checkpointer:
            restored = checkpointer.restore(path.absolute(), args=ocp.args.StandardRestore(arrays))
    except Exception as error:  # Orbax raises exceptions of all kinds
        if not path.exists():
            raise UserError(f"checkpoint {path} was removed by the run that saves there: try again") from None
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"checkpoint {path} cannot be restored as this model: use the experiment it was trained with ({reason})"
        ) from error
    return replace(like, **restored)


class Checkpoints:
    """The checkpoints of a run in progress. Only the newest few and the best by ``train.monitor`` are kept."""

    def __init__(self, folder: Path, keep: int, last: int | None = None):
        """Keep the ``keep`` newest checkpoints; ``last`` is the step of the newest intact one."""
        self.folder, self.keep, self.last = folder, keep, last
        self.checkpointer: ocp.AsyncCheckpointer | None = None
        self.saving: Saved | None = None
        self.quiet = contextlib.ExitStack()  # from the first save until ``close``, for Orbax's threads log too

    def clear(self) -> None:
        """Remove unfinished checkpoints of a killed run, and rename damaged ones, which are newer than ``last``."""
        for path in self.folder.glob("*"):
            if path.name.isdecimal() and (self.last is None or int(path.name) > self.last):
                damaged = path.with_name(f"{path.name}.damaged")
                shutil.rmtree(damaged, ignore_errors=True)
                path.rename(damaged)
        self.remove_unfinished()

    def remove_unfinished(self) -> None:
        for path in self.folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(path, ignore_errors=True)

    def save(self, state: TrainState, info: CheckpointInfo, records: bytes) -> None:
        """Wait for the previous checkpoint, then start to save in the background. Raise OSError on failure."""
        self.wait()
        # A copy, because the state is donated to the next call of the training program.
        arrays = jax.tree.map(jnp.copy, arrays_of(state))
        self.saving = Saved(int(state.step), info, records)
        needed = len(records) + sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
        try:
            # Orbax would fail halfway and print tracebacks of its threads.
            if shutil.disk_usage(self.folder.parent).free < needed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if self.checkpointer is None:
                self.quiet.enter_context(quiet_orbax())
                options = ocp.AsyncOptions(
                    post_finalization_callback=self.complete, create_directories_asynchronously=False
                )
                self.checkpointer = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler(), async_options=options)
            self.checkpointer.save(
                self.folder.absolute() / str(self.saving.step), args=ocp.args.StandardSave(arrays), force=True
            )
        except Exception as error:
            self.fail(error)

    def complete(self) -> None:
        """Add the records and the manifest. Called in Orbax's thread, before it renames the finished checkpoint."""
        assert self.saving is not None
        (unfinished,) = self.folder.glob(f"{self.saving.step}.orbax-checkpoint-tmp*")
        (unfinished / manifest.RECORDS).write_bytes(self.saving.records)
        manifest.write(unfinished, self.saving.info)

    def check(self) -> None:
        """Raise OSError if saving in the background has failed."""
        if self.checkpointer is not None:
            try:
                self.checkpointer.check_for_errors()
            except Exception as error:
                self.fail(error)

    def wait(self) -> None:
        """Wait until the checkpoint is on the disk, then remove those not to keep. Raise OSError on failure."""
        if self.checkpointer is None or self.saving is None:
            return
        try:
            self.checkpointer.wait_until_finished()
        except Exception as error:
            self.fail(error)
        self.last, self.saving = self.saving.step, None
        # Return memory freed by Orbax's threads to the system: glibc keeps 50 kB more with every checkpoint.
        if hasattr(LIBC, "malloc_trim"):
            LIBC.malloc_trim(0)
        if processes.is_first_process():
            with contextlib.suppress(UserError):
                saved_steps = steps(self.folder)
                for step in set(saved_steps) - {*saved_steps[: self.keep], best(self.folder, saved_steps)}:
                    shutil.rmtree(self.folder / str(step), ignore_errors=True)

    def fail(self, error: Exception) -> NoReturn:
        """Raise the OSError behind Orbax's ``error``, and discard the checkpointer, which is unusable after it."""
        self.checkpointer, self.saving = None, None
        if processes.is_first_process():
            self.remove_unfinished()
        message = " ".join(str(error).split())
        code = re.search(r"os_error_code='(\d+)'", message)
        if code:
            raise OSError(int(code[1]), os.strerror(int(code[1]))) from error
        if isinstance(error, OSError) and not isinstance(error, TimeoutError):
            raise error
        if jax.process_count() > 1:
            # The disk is fine: communication with another process has failed.
            raise RuntimeError(message) from error
        raise OSError(message[:300]) from error

    def close(self) -> None:
        """Wait for the checkpoint in progress, and ignore its failure."""
        with contextlib.suppress(OSError):
            self.wait()
        if self.checkpointer is not None:
            self.checkpointer.close()
        self.quiet.close()
