"""What a run ended with."""

import hashlib
import resource
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from flaxmnist import folders, inspection
from flaxmnist.config import Config
from flaxmnist.evaluation import Evaluation
from flaxmnist.logs import SECONDS, Clock, read_records
from flaxmnist.state import TrainState
from flaxmnist.trained import Trained, load


@dataclass(frozen=True)
class Run(Trained):
    """A run and what it told; its model has averaged weights where the config has such."""

    history: list[dict[str, Any]] = field(repr=False)  # the records of metrics.jsonl
    result: dict[str, Any] = field(repr=False)  # what result.json holds; empty unless the run ended with this state


def load_run(workdir: str | Path, which: str = "latest") -> Run:
    """The run in ``workdir``, with its checkpoint called ``which``: "latest", "best" or a step.

    Needs the run folder alone. Raises UserError where it holds no such checkpoint, and where its files are damaged.
    """
    folder, trained = Path(workdir), load(workdir, which)
    result = folders.read_result(folder) if (folder / "result.json").exists() else {}
    if result and result["steps"] != trained.state.step:
        result = {}
    return Run(trained.config, trained.state, trained.data, read_records(folder / "metrics.jsonl"), result)


def result_of(
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
    """What ``result.json`` holds."""
    seconds = {name: clock.seconds.get(name, 0.0) for name in SECONDS} | {"total": clock.total()}
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


def summary(run: Run, workdir: Path, data_dir: Path | None) -> str:
    """How the run ended, where its time went, what it trained, where it lies, and what to try next."""
    result = run.result
    accuracy = f"{result['test_accuracy']:.4f} of {result['test_count']} images"
    there, where = shlex.quote(str(workdir)), "" if data_dir is None else f" --data-dir {shlex.quote(str(data_dir))}"
    return "\n".join(
        [
            f"test accuracy {accuracy}, loss {result['test_loss']:.4f}, after {result['steps']} steps",
            "",
            time_table(result["seconds"]),
            "",
            shortened(inspection.parameter_table(run.state.params)),
            "",
            f"run folder {workdir}",
            f"next: python launch/evaluate.py {there}{where}",
            f"      python launch/report.py {there}{where}",
            f"      python launch/predict.py {there} IMAGE.png",
        ]
    )


def shortened(text: str) -> str:
    """``text`` without its middle, where it has over 30 lines."""
    lines = text.splitlines()
    return text if len(lines) <= 30 else "\n".join([*lines[:15], "…", *lines[-14:]])


def time_table(seconds: dict[str, float]) -> str:
    """What the ``seconds`` of a result were spent on, and their sum."""
    spent = {"save" if name == "checkpoint" else name: seconds[name] for name in SECONDS}
    spent["other"] = max(0.0, seconds["total"] - sum(spent.values()))
    spent["all"] = seconds["total"]
    rows = [(name, f"{value:,.2f}", f"{value / seconds['total']:.0%}") for name, value in spent.items()]
    return inspection.table([("time", "seconds", "share"), *rows])


def params_sha256(params: Any) -> str:
    """SHA-256 over the bytes of the parameters, leaves in the order of their paths."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def peak_memory() -> int:
    """The most bytes in use at once: on this process' first device where it counts them, else by the process."""
    counted = jax.local_devices()[0].memory_stats() or {}
    unit = 1 if sys.platform == "darwin" else 1024
    return counted.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
