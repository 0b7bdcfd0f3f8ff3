"""Saving and restoring a run with orbax; nothing else in the package knows it.

A checkpoint is one folder a step, whole once its name is there: orbax writes beside it and renames. It holds the
arrays of the ``TrainState`` and a JSON object ``about``.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

from flaxmnist.errors import UserError
from flaxmnist.state import TrainState

ARRAYS = ("step", "params", "opt_state", "ema", "epoch")

# What stands for the validation accuracy of a checkpoint saved between evaluations: less than any.
NOT_EVALUATED = -1.0


def validation_accuracy(metrics: dict[str, float]) -> float:
    return metrics.get("accuracy", NOT_EVALUATED)


class Checkpoints:
    """The checkpoints under one folder: the newest few, and the best by validation accuracy."""

    def __init__(self, folder: Path, keep: int = 2, read_only: bool = False):
        """``keep`` is how many of the newest to keep. ``read_only`` leaves a run that is still going in peace."""
        newest, best = managers.LatestN(keep), managers.BestN(get_metric_fn=validation_accuracy, n=1)
        self.folder = folder
        self.manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                best_fn=validation_accuracy,
                preservation_policy=managers.AnyPreservationPolicy([newest, best]),
                cleanup_tmp_directories=not read_only,
                create=not read_only,
            ),
        )

    def save(self, state: TrainState, about: dict[str, Any], accuracy: float | None) -> None:
        """Saves in the background. ``accuracy`` is the validation accuracy, where this state has been evaluated."""
        # A copy, since the training program takes over the buffers of the state itself.
        arrays = {name: jax.tree.map(jnp.copy, getattr(state, name)) for name in ARRAYS}
        self.manager.save(
            int(state.step),
            args=ocp.args.Composite(state=ocp.args.StandardSave(arrays), about=ocp.args.JsonSave(about)),
            metrics={"accuracy": NOT_EVALUATED if accuracy is None else accuracy},
        )

    def find(self, which: str = "latest") -> int | None:
        """The step of the checkpoint called ``which``: "latest", "best" or a step. None where there is none at all.

        Raises UserError where there are some but not that one.
        """
        steps = sorted(self.manager.all_steps())
        if not steps or which == "latest":
            return steps[-1] if steps else None
        if which == "best":
            best = self.manager.best_step()
            if best is None or validation_accuracy(self.manager.metrics(best) or {}) == NOT_EVALUATED:
                raise UserError(
                    f"{self.folder} has no best checkpoint: none was saved at a step evaluated on validation images "
                    "(data.validation, train.evaluate_every); take --step latest"
                )
            return best
        if not which.isdecimal() or int(which) not in steps:
            raise UserError(f"{self.folder} has no checkpoint {which}: give latest, best or one of {steps}")
        return int(which)

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state and ``about`` saved at ``step``, with the shapes, types and shardings of ``like``."""
        arrays = {name: getattr(like, name) for name in ARRAYS}
        try:
            saved = self.manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(arrays), about=ocp.args.JsonRestore())
            )
        except Exception as error:  # Orbax raises all kinds for a damaged file
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"checkpoint {self.folder / str(step)} is damaged or of another model: remove that folder to go on "
                f"from the one before it, or give --overwrite to begin anew ({reason})"
            ) from error
        return TrainState(graphdef=like.graphdef, **saved["state"]), saved["about"]

    def wait(self) -> None:
        """Returns when everything saved is on the disk; raises what went wrong in the background."""
        self.manager.wait_until_finished()

    def close(self) -> None:
        self.manager.close()
