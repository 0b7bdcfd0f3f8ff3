"""Saving and restoring a run with orbax; nothing else in the package knows it.

A checkpoint is one folder a step: the arrays of the ``TrainState``, the records up to there, and a manifest. It is
whole once its name is there, for orbax writes beside it and renames; what happened to it since, the manifest tells.
"""

import contextlib
import ctypes
import errno
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from flaxmnist import hosts, manifest
from flaxmnist.errors import UserError
from flaxmnist.manifest import Saved, best, steps
from flaxmnist.state import TrainState

ARRAYS = ("step", "params", "opt_state", "ema", "epoch")

LIBC = ctypes.CDLL(None)

# Orbax tells of each failure with a traceback, before it raises it.
logging.getLogger("absl").setLevel(logging.CRITICAL)


def restore(folder: Path, step: int, like: TrainState) -> TrainState:
    """The state saved at ``step``, with the shapes, types and shardings of ``like``. Raises UserError."""
    arrays = {name: getattr(like, name) for name in ARRAYS}
    try:
        with contextlib.closing(ocp.Checkpointer(ocp.StandardCheckpointHandler())) as checkpointer:
            found = checkpointer.restore(folder.absolute() / str(step), args=ocp.args.StandardRestore(arrays))
    except Exception as error:  # Orbax raises all kinds
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"checkpoint {folder / str(step)} is of another model: give the experiment it was saved of, or --overwrite "
            f"to begin anew ({reason})"
        ) from error
    return TrainState(graphdef=like.graphdef, **found)


class Checkpoints:
    """The checkpoints of a run that is going: the newest few, and the best by validation accuracy."""

    def __init__(self, folder: Path, keep: int, last: int | None = None):
        """``keep`` is how many of the newest to keep, ``last`` the step of the newest that is whole."""
        self.folder, self.keep, self.last = folder, keep, last
        self.checkpointer: ocp.AsyncCheckpointer | None = None
        self.saving: Saved | None = None

    def clear(self) -> None:
        """Removes what a killed run left unfinished, and puts aside what is newer than ``last``, which is damaged."""
        for path in self.folder.glob("*"):
            if path.name.isdecimal() and (self.last is None or int(path.name) > self.last):
                aside = path.with_name(f"{path.name}.damaged")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
        self.remove_unfinished()

    def remove_unfinished(self) -> None:
        for path in self.folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(path, ignore_errors=True)

    def save(self, state: TrainState, about: dict[str, Any], records: bytes) -> None:
        """Begins to save in the background, once the one before is on the disk. Raises OSError."""
        self.wait()
        # A copy, since the training program takes over the buffers of the state itself.
        arrays = {name: jax.tree.map(jnp.copy, getattr(state, name)) for name in ARRAYS}
        self.saving = Saved(int(state.step), about, records)
        needed = len(records) + sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
        try:
            # Orbax would find out only in the middle, and leave tracebacks of its threads.
            if shutil.disk_usage(self.folder.parent).free < needed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if self.checkpointer is None:
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
        """Adds to what orbax has written, in its thread and before it gives the checkpoint its name."""
        assert self.saving is not None
        (unfinished,) = self.folder.glob(f"{self.saving.step}.orbax-checkpoint-tmp*")
        (unfinished / manifest.RECORDS).write_bytes(self.saving.records)
        manifest.write(unfinished, self.saving.about)

    def check(self) -> None:
        """Raises OSError where saving has failed in the meantime."""
        if self.checkpointer is not None:
            try:
                self.checkpointer.check_for_errors()
            except Exception as error:
                self.fail(error)

    def wait(self) -> None:
        """Returns when everything saved is on the disk, and what need not be kept removed. Raises OSError."""
        if self.checkpointer is None or self.saving is None:
            return
        try:
            self.checkpointer.wait_until_finished()
        except Exception as error:
            self.fail(error)
        self.last, self.saving = self.saving.step, None
        # What orbax's threads have freed, glibc keeps for them: 50 kB more with every checkpoint.
        if hasattr(LIBC, "malloc_trim"):
            LIBC.malloc_trim(0)
        if hosts.is_first():
            with contextlib.suppress(UserError):
                there = steps(self.folder)
                for step in set(there) - {*there[: self.keep], best(self.folder, there)}:
                    shutil.rmtree(self.folder / str(step), ignore_errors=True)

    def fail(self, error: Exception) -> NoReturn:
        """Raises as OSError what orbax raised, and forgets the checkpointer, which is of no use afterwards."""
        self.checkpointer, self.saving = None, None
        if hosts.is_first():
            self.remove_unfinished()
        told = " ".join(str(error).split())
        code = re.search(r"os_error_code='(\d+)'", told)
        if code:
            raise OSError(int(code[1]), os.strerror(int(code[1]))) from error
        if isinstance(error, OSError) and not isinstance(error, TimeoutError):
            raise error
        if jax.process_count() > 1:
            # No disk has failed, but the exchange with another process.
            raise RuntimeError(told) from error
        raise OSError(told[:300]) from error

    def close(self) -> None:
        """Waits for what is being saved; whether it could be no longer matters."""
        with contextlib.suppress(OSError):
            self.wait()
        if self.checkpointer is not None:
            self.checkpointer.close()
