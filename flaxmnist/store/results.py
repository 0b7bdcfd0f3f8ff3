"""Results of finished runs: result.json, and the summary printed at the end."""

import hashlib
import resource
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from flaxmnist.config import Config
from flaxmnist.console import ACTIVITIES, Clock
from flaxmnist.core.state import TrainState
from flaxmnist.devices.evaluation import Evaluation
from flaxmnist.store import folders
from flaxmnist.store.records import read_records
from flaxmnist.store.trained import Trained, load_checkpoint


@dataclass(frozen=True)
class Run(Trained):
    """A run with its records and result. Its model has the averaged weights if the config asks for averaging."""

    history: list[dict[str, Any]] = field(repr=False)  # the records of metrics.jsonl
    result: dict[str, Any] = field(repr=False)  # the content of result.json; empty unless the run ended with this state


def load_run(workdir: str | Path, which: str = "latest") -> Run:
    """Load the run in ``workdir`` with the checkpoint ``which``: "latest", "best" or a step.

    Only the run folder is needed. Raise UserError if it has no such checkpoint, or if its files are damaged.
    """
    folder, trained = Path(workdir), load_checkpoint(workdir, which)
    result = folders.read_result(folder) if (folder / "result.json").exists() else {}
    if result and result["steps"] != trained.state.step:
        result = {}
    return Run(trained.config, trained.state, trained.data, read_records(folder / "metrics.jsonl"), result)


def make_result(
    config: Config,
    state: TrainState,
    mesh: Mesh,
    backend: str,
    clock: Clock,
    *,
    epochs: float,
    validation_accuracy: float | None,
    test: Evaluation,
) -> dict[str, Any]:
    """Return the content of ``result.json``."""
    seconds = {name: clock.seconds.get(name, 0.0) for name in ACTIVITIES} | {"total": clock.total()}
    steps = int(state.step)
    return {
        "experiment": config.name,
        "seed": config.seed,
        "backend": backend,
        "devices": mesh.size,
        "device_kind": mesh.devices.flat[0].device_kind,
        "steps": steps,
        "epochs": epochs,
        "test_accuracy": test.accuracy,
        "test_loss": test.loss,
        "test_count": test.count,
        "validation_accuracy": validation_accuracy,
        "params": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "params_sha256": params_sha256(state.params),
        "steps_per_second": steps / seconds["train"] if seconds["train"] else None,
        "seconds": seconds,
        "peak_memory_bytes": peak_memory(),
        "versions": folders.versions(),
    }


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
