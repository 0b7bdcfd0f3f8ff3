"""How fast an experiment trains and evaluates on this machine, and beside PyTorch.

Speeds are medians over rounds in which everything measured takes its turn, so that a machine that is slower for a
while is slower for all. The training path is the one that ``fit`` uses.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flaxmnist import evaluation, figures, folders, inspection, order, parallel, peer, program, results, steps
from flaxmnist.config import Config, load_experiment
from flaxmnist.data import Dataset, load_data
from flaxmnist.state import TrainState

# Seconds that one timed stretch takes at least, and how many there are of each.
STRETCH_SECONDS = 0.5
ROUNDS = 5

# Sides of the matrices whose product stands for what the device can do at most.
MATRIX = 2048


class Trainer:
    """The training path of ``fit``, from the first step on."""

    def __init__(self, config: Config, data: Dataset, mesh: Mesh, backend: program.Backend = "jit"):
        parallel.check_batch(config.train.batch_size, mesh)
        self.state, self.done = program.first_state(config, data, mesh), 0
        train = program.place(data.train, mesh)
        began = time.perf_counter()
        self.compiled = program.Program(config, self.state, train, mesh, backend)
        self.compile_seconds = time.perf_counter() - began

    def run(self, count: int) -> None:
        """Does ``count`` steps more."""
        self.state = jax.block_until_ready(advance(self.compiled, self.state, self.done, count))
        self.done += count


def advance(compiled: program.Program, state: TrainState, start: int, count: int) -> TrainState:
    """``state``, which is at step ``start``, after ``count`` steps."""
    for first in range(start, start + count, compiled.capacity):
        state, _ = compiled(state, first, min(compiled.capacity, start + count - first))
    return state


def whole_run(config: Config, data: Dataset) -> tuple[float, float]:
    """Seconds and test accuracy of a whole run.

    The seconds are those of all training work once everything is compiled: from arrays in the host's memory to trained
    parameters, with the data's way to the device, initial values and batch order. Not with evaluation.
    """
    mesh = parallel.make_mesh()
    state = program.first_state(config, data, mesh)
    compiled = program.Program(config, state, program.place(data.train, mesh), mesh)
    began = time.perf_counter()
    state = program.first_state(config, data, mesh)
    compiled.train = program.place(data.train, mesh)
    state = jax.block_until_ready(advance(compiled, state, 0, config.train.length))
    seconds = time.perf_counter() - began
    return seconds, evaluation.evaluate(state.model, *data.test).accuracy


def whole_runs(config: Config, data: Dataset, count: int) -> dict[str, list[float]]:
    """Seconds and test accuracies of ``count`` whole runs, with the seeds 0 to ``count`` − 1."""
    config = order.resolve(config, len(data.train.labels))
    seconds, accuracies = zip(*(whole_run(replace(config, seed=seed), data) for seed in range(count)), strict=True)
    return {"seconds": list(seconds), "test_accuracy": list(accuracies)}


def seconds_of(work: Callable[[], Any]) -> float:
    """Seconds that ``work`` takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def race(trainers: dict[str, Callable[[int], None]]) -> dict[str, list[float]]:
    """Steps a second of each trainer in each round, after a warm-up that also finds how long a stretch must be."""
    counts = {}
    for name, train in trainers.items():
        train(1)  # a first step may compile
        count, seconds = 1, seconds_of(partial(train, 1))
        while seconds < STRETCH_SECONDS / 4:
            count *= 2
            seconds = seconds_of(partial(train, count))
        counts[name] = max(1, round(count * STRETCH_SECONDS / seconds))
    speeds: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in range(ROUNDS):
        for name, train in trainers.items():
            speeds[name].append(counts[name] / seconds_of(partial(train, counts[name])))
    return speeds


def measure(config: Config, data: Dataset, peers: dict[str, Callable[[int], None]]) -> dict[str, Any]:
    """Speeds of one experiment, raced against ``peers``, and what they are of the speed of a matrix product."""
    config = order.resolve(config, len(data.train.labels))
    ours = Trainer(config, data, parallel.make_mesh())
    speeds = race({"flaxmnist": ours.run} | peers)
    rate = float(np.median(speeds["flaxmnist"]))
    operations, best = inspection.step_cost(config, data).operations, peak()
    result = {
        "name": config.name,
        "batch_size": config.train.batch_size,
        "steps": config.train.length,
        "steps_per_second": rate,
        "images_per_second": rate * config.train.batch_size,
        "compile_seconds": ours.compile_seconds,
        "gflop_per_step": operations / 1e9,
        "gflops_per_second": rate * operations / 1e9,
        "peak_gflops_per_second": best / 1e9,
        "share_of_peak": rate * operations / best,
        "evaluate_images_per_second": evaluation_speed(config, data),
        "peak_memory_bytes": results.peak_memory(),
        "device": f"{jax.device_count()} {jax.devices()[0].device_kind}",
        "versions": folders.versions(),
    }
    if peers:
        # Round by round, against the mode that is the better one over all rounds.
        better = max(peers, key=lambda name: float(np.median(speeds[name])))
        result["peer_steps_per_second"] = {name: float(np.median(speeds[name])) for name in peers}
        result["ratio_to_peer"] = float(np.median(np.divide(speeds["flaxmnist"], speeds[better])))
    return result


def run(experiment: Path, data_dir: Path | None, beside: Literal["torch"] | None, runs: int) -> dict[str, Any]:
    """Everything ``launch/benchmark.py`` says of the experiment file ``experiment``, of its peer, of ``runs`` runs."""
    config = load_experiment(experiment)
    data = load_data(config.data, data_dir)
    with peer.trainers(experiment, data_dir) if beside else nullcontext({}) as peers:
        result = measure(config, data, peers) | start_ups(experiment, data_dir)
    return result | ({"runs": whole_runs(config, data, runs)} if runs else {})


def report(results: list[dict[str, Any]]) -> str:
    """The results as two tables: speed, and what is spent before the first step is done."""
    speeds: list[tuple[str, ...]] = [
        ("experiment", "batch", "steps/s", "images/s", "GFLOP/s", "of peak", "evaluated/s", "× peer")
    ]
    beginnings: list[tuple[str, ...]] = [
        ("seconds to the first step", "import", "data", "compile", "step", "all", "GFLOP a step", "peak memory")
    ]
    for result in results:
        ratio, parts = result.get("ratio_to_peer"), result["start_up_seconds"]
        speeds.append(
            (
                result["name"],
                str(result["batch_size"]),
                f"{result['steps_per_second']:,.1f}",
                f"{result['images_per_second']:,.0f}",
                f"{result['gflops_per_second']:,.1f}",
                f"{result['share_of_peak']:.0%}",
                f"{result['evaluate_images_per_second']:,.0f}",
                "" if ratio is None else f"{ratio:.2f}",
            )
        )
        seconds = (f"{parts[name]:.2f}" for name in ("import", "data", "compile", "train", "first_step"))
        memory = inspection.megabytes(result["peak_memory_bytes"])
        beginnings.append((result["name"], *seconds, f"{result['gflop_per_step']:.3g}", memory))
    return f"{inspection.table(speeds)}\n\n{inspection.table(beginnings)}"


def runs_report(results: list[dict[str, Any]]) -> str:
    """Whole runs as a table."""
    rows: list[tuple[str, ...]] = [
        ("experiment", "runs", "training s", "peer's s", "test accuracy", "least", "runs ≥ 99 %")
    ]
    for result in results:
        seconds, accuracies = (np.array(result["runs"][name]) for name in ("seconds", "test_accuracy"))
        peers, freedom = result.get("peer_steps_per_second"), min(1, len(seconds) - 1)
        rows.append(
            (
                result["name"],
                str(len(seconds)),
                f"{seconds.mean():.3f} ± {seconds.std(ddof=freedom):.3f}",
                f"{result['steps'] / max(peers.values()):.3f}" if peers else "",
                f"{accuracies.mean():.3%} ± {accuracies.std(ddof=freedom):.3%}",
                f"{accuracies.min():.2%}",
                f"{np.mean(accuracies >= 0.99):.0%}",
            )
        )
    return inspection.table(rows)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Draws images a second of each experiment, and of its peers, as bars into ``path``."""
    speeds = [
        {"flaxmnist": result["steps_per_second"], **result.get("peer_steps_per_second", {})} for result in results
    ]
    names = list(dict.fromkeys(name for each in speeds for name in each))
    drawn, axes = figures.plot(1.5 + 1.4 * len(results), 4)
    for number, name in enumerate(names):
        heights = [result["batch_size"] * each.get(name, np.nan) for result, each in zip(results, speeds, strict=True)]
        places = np.arange(len(results)) + (number - (len(names) - 1) / 2) * 0.8 / len(names)
        bars = axes.bar(places, heights, 0.8 / len(names), label=name, color=figures.COLOURS[number])
        axes.bar_label(bars, fmt="{:,.0f}", fontsize=7)
    axes.set_xticks(range(len(results)), [result["name"] for result in results])
    axes.set_yscale("log")
    axes.set_ylabel("training images a second")
    axes.set_title(results[0]["device"])
    axes.legend()
    figures.save(drawn, path)


def peak() -> float:
    """Operations a second of the product of two large float32 matrices on one device, the best of several."""
    matrix = jax.random.normal(jax.random.key(0), (MATRIX, MATRIX))
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(matrix, matrix))
    return (
        2 * MATRIX**3 / min(seconds_of(lambda: jax.block_until_ready(product(matrix, matrix))) for _ in range(ROUNDS))
    )


def evaluation_speed(config: Config, data: Dataset) -> float:
    """Test images a second, from arrays on the host to their logits there."""
    model = steps.create_state(config, data.train.images.shape[1:3], data.classes).model
    evaluation.predict_logits(model, data.test.images)
    seconds = [seconds_of(lambda: evaluation.predict_logits(model, data.test.images)) for _ in range(ROUNDS)]
    return len(data.test.labels) / float(np.median(seconds))


def start_ups(experiment: Path, data_dir: Path | None) -> dict[str, dict[str, float]]:
    """``start_up`` with no program kept from earlier, and again with those kept, where the device has them kept."""
    if jax.default_backend() == "cpu":
        return {"start_up_seconds": start_up(experiment, data_dir, {})}
    with tempfile.TemporaryDirectory() as kept:
        environment = {"JAX_COMPILATION_CACHE_DIR": kept}
        return {
            name: start_up(experiment, data_dir, environment) for name in ("start_up_seconds", "warm_start_up_seconds")
        }


def start_up(experiment: Path, data_dir: Path | None, environment: dict[str, str]) -> dict[str, float]:
    """Seconds from the start of ``launch/train.py`` to its first finished step, and what they went to."""
    train = Path(__file__).parent.parent / "launch/train.py"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, train, experiment, "--train.steps", "1", "--workdir", folder, "--log-level", "error"]
        command += ["--data-dir", data_dir] if data_dir else []
        began = time.perf_counter()
        subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL, env=os.environ | environment)
        whole = time.perf_counter() - began
        seconds = json.loads((Path(folder) / "result.json").read_text())["seconds"]
    parts = {name: seconds[name] for name in ("import", "data", "compile", "train")}
    # Evaluation, the checkpoint and the end of the process come after the first step.
    return parts | {"first_step": sum(parts.values()), "whole_command": whole}
