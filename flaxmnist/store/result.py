"""The result of a finished run: result.json."""

import hashlib
import resource
import sys
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import numpy as np

from flaxmnist.console import ACTIVITIES, Clock
from flaxmnist.core.state import TrainState
from flaxmnist.devices.evaluation import Evaluation
from flaxmnist.errors import UserError
from flaxmnist.fields import In
from flaxmnist.store.provenance import RunInfo


@dataclass(frozen=True, kw_only=True)
class Result:
    """The content of result.json."""

    experiment: str
    seed: int
    backend: str
    devices: int
    device_kind: str
    steps: int
    epochs: float
    test_accuracy: float  # fraction
    test_loss: float  # mean cross-entropy in nats
    test_count: Annotated[int, In(1)]  # images
    validation_accuracy: float | None  # fraction; None if there are no validation images
    test: dict[str, float] | None = None  # all metrics; None in old files
    validation: dict[str, float] | None = None
    params: int  # number of parameters
    params_sha256: str
    steps_per_second: float | None
    seconds: dict[str, float]  # by activity, and in total
    peak_memory_bytes: int
    versions: dict[str, str]

    def __post_init__(self):
        if not (self.seconds.keys() >= {*ACTIVITIES, "total"} and self.seconds["total"] > 0):
            raise UserError("seconds must contain every activity, and a total above 0")

    @classmethod
    def of(
        cls,
        run: RunInfo,
        state: TrainState,
        clock: Clock,
        epochs: float,
        validation: dict[str, float] | None,
        test: Evaluation,
    ) -> "Result":
        """Collect the result of a run that ends now with ``state``, whose arrays must be on this process's devices."""
        steps, train_seconds = int(state.step), clock.seconds.get("train", 0.0)
        return cls(
            experiment=run.config.name,
            seed=run.config.seed,
            backend=run.devices.backend,
            devices=run.devices.count,
            device_kind=run.devices.kind,
            steps=steps,
            epochs=epochs,
            test_accuracy=test.accuracy,
            test_loss=test.loss,
            test_count=test.count,
            validation_accuracy=None if validation is None else validation["accuracy"],
            test=test.scores,
            validation=validation,
            params=sum(leaf.size for leaf in jax.tree.leaves(state.params)),
            params_sha256=params_sha256(state.params),
            steps_per_second=steps / train_seconds if train_seconds else None,
            seconds={name: clock.seconds.get(name, 0.0) for name in ACTIVITIES} | {"total": clock.total()},
            peak_memory_bytes=peak_memory(),
            versions=run.versions,
        )


def params_sha256(params: Any) -> str:
    """Return the SHA-256 of the bytes of all parameters, in the order of their paths."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def peak_memory() -> int:
    """Return the peak memory of the first local device if it reports that, else of the process, in bytes."""
    stats = jax.local_devices()[0].memory_stats() or {}
    unit = 1 if sys.platform == "darwin" else 1024
    return stats.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
