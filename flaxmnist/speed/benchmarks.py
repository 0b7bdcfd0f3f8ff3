"""Training and evaluation speed of an experiment on this machine, optionally compared with PyTorch.

Speeds are medians over rounds. Each round times every trainer once, so that a machine that slows down for a while
slows down all of them. Training uses the same compiled program as ``fit``.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import threading
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

from flaxmnist.config import Config
from flaxmnist.core import steps
from flaxmnist.data import order
from flaxmnist.data.sets import Dataset, load_data
from flaxmnist.devices import evaluation, parallel, program
from flaxmnist.errors import UserError
from flaxmnist.experiment import read_experiment
from flaxmnist.loop.advance import Pace, advance
from flaxmnist.show import canvas, text
from flaxmnist.speed import torch_peer
from flaxmnist.store.provenance import versions
from flaxmnist.store.result import peak_memory
from flaxmnist.sweeps.plan import Experiment

# Target duration of one timing in seconds, and the number of timings.
STRETCH_SECONDS = 1.0
ROUNDS = 5

# Side of the square matrices whose product measures the peak rate of the device.
MATRIX = 2048

# Experiments whose mean test accuracy is to reach a target in the least training time, or with the fewest parameters.
TRACKS = {"speedrun": 0.99, "speedrun_994": 0.994, "speedrun_995": 0.995, "tiny": 0.99}

# The results of an experiment, as ``--json`` writes them.
Row = dict[str, Any]


class Trainer:
    """The training path of ``fit``, starting at step 0."""

    def __init__(self, experiment: Experiment, mesh: Mesh, backend: program.Backend = "jit"):
        config, data, step, arrays = experiment
        self.state, self.step = program.initial_state(config, data, mesh), 0
        images, arrays = program.put_split(data.train, mesh), program.step_arrays(arrays, config, data)
        arrays = parallel.put(arrays, parallel.replicated(mesh))
        start = time.perf_counter()
        self.compiled = program.Program(config, self.state, images, mesh, backend, step, arrays)
        self.compile_seconds = time.perf_counter() - start

    def run(self, count: int) -> None:
        """Train for ``count`` more steps, and wait for them."""
        options = {"pace": Pace(math.inf), "report": lambda *_: None, "stop": threading.Event()}
        self.state, self.step, *_ = advance(self.compiled, self.state, self.step, self.step + count, **options)
        jax.block_until_ready(self.state)


def full_run(experiment: Experiment, mesh: Mesh) -> tuple[float, float]:
    """Return the training time in seconds and the test accuracy of a full run.

    The time covers all training work after compilation, from arrays in host memory to trained parameters: transfer of
    the data to the device, initial values, batch order and steps. It does not include evaluation.
    """
    config, data, *_ = experiment
    trainer = Trainer(experiment, mesh)
    start = time.perf_counter()
    trainer.state = program.initial_state(config, data, mesh)
    trainer.compiled.train = program.put_split(data.train, mesh)
    trainer.run(config.train.length)
    seconds = time.perf_counter() - start
    state = program.with_batch_statistics(config, trainer.state, data.train)
    return seconds, evaluation.evaluate(state.model, *data.test).accuracy


def full_runs(experiment: Experiment, mesh: Mesh, count: int) -> Row:
    """Return the training times in seconds and the test accuracies of full runs with the seeds 0 to ``count`` − 1."""
    config, data, *_ = experiment
    runs = (experiment._replace(config=replace(config, seed=seed)) for seed in range(count))
    seconds, accuracies = zip(*(full_run(run, mesh) for run in runs), strict=True)
    params = steps.state_shapes(config, data.train.images.shape[1:], data.classes).params
    return {
        "seconds": list(seconds),
        "test_accuracy": list(accuracies),
        "target": TRACKS.get(config.name, 0.99),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
    }


def time_of(function: Callable[[], Any]) -> float:
    """Return the seconds that one call of ``function`` takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare_speeds(trainers: dict[Any, Callable[[int], None]]) -> dict[Any, np.ndarray]:
    """Return the steps per second of each trainer in each round.

    A warm-up compiles, and finds the number of steps that take about STRETCH_SECONDS.
    """
    counts = {}
    for name, train in trainers.items():
        train(1)  # the first step may compile
        count, seconds = 1, time_of(partial(train, 1))
        while seconds < STRETCH_SECONDS / 4:
            count *= 2
            seconds = time_of(partial(train, count))
        counts[name] = max(1, round(count * STRETCH_SECONDS / seconds))
    speeds = {name: np.zeros(ROUNDS) for name in trainers}
    for i in range(ROUNDS):
        for name, train in trainers.items():
            speeds[name][i] = counts[name] / time_of(partial(train, counts[name]))
    return speeds


def median(values: np.ndarray | list[float]) -> float:
    return float(np.median(values))


def measure(experiment: Experiment, mesh: Mesh, peers: dict[str, Callable[[int], None]]) -> Row:
    """Return the speeds of an experiment, compared with ``peers`` and with the peak rate of the device."""
    config, data, *_ = experiment
    trainer = Trainer(experiment, mesh)
    speeds = compare_speeds({"flaxmnist": trainer.run} | peers)
    medians = {name: median(speed) for name, speed in speeds.items()}
    rate = medians.pop("flaxmnist")
    operations, peak = program.step_cost(*experiment).operations, mesh.size * matrix_rate()
    result = {
        "name": config.name,
        "batch_size": config.train.batch_size,
        "steps": config.train.length,
        "steps_per_second": rate,
        "images_per_second": rate * config.train.batch_size,
        "compile_seconds": trainer.compile_seconds,
        "gflop_per_step": operations / 1e9,
        "gflops_per_second": rate * operations / 1e9,
        "peak_gflops_per_second": peak / 1e9,
        "share_of_peak": rate * operations / peak,
        "evaluate_images_per_second": evaluation_speed(config, data),
        "peak_memory_bytes": peak_memory(),
        "device": device(),
        "versions": versions(),
    }
    if peers:
        result["peer_steps_per_second"] = medians
        # The median ratio over rounds, to the peer with the best median.
        result["ratio_to_peer"] = median(speeds["flaxmnist"] / speeds[max(peers, key=medians.__getitem__)])
    return result


def load(file: Path, data_dir: Path | None) -> Experiment:
    """Return the experiment of a file, with its length in steps, and its data."""
    config, functions = read_experiment(file)
    data = load_data(config.data, data_dir)
    return Experiment(order.resolve_length(config, len(data.train.labels)), data, **functions)


def run(file: Path, data_dir: Path | None, framework: Literal["torch"] | None, runs: int) -> Row:
    """Return all results for an experiment file: speeds, startup times and, if ``runs`` is not 0, full runs."""
    experiment, mesh = load(file, data_dir), parallel.make_mesh()
    start_up = start_up_times(partial(start_up_time, file, data_dir), jax.default_backend() != "cpu")
    with torch_peer.trainers(file, data_dir) if framework else nullcontext({}) as peers:
        result = measure(experiment, mesh, peers)
    return result | start_up | ({"runs": full_runs(experiment, mesh, runs)} if runs else {})


def run_track(file: Path, data_dir: Path | None, runs: int) -> Row:
    """Return the results of full runs alone."""
    experiment = load(file, data_dir)
    return {
        "name": experiment.config.name,
        "steps": experiment.config.train.length,
        "device": device(),
        "versions": versions(),
        "runs": full_runs(experiment, parallel.make_mesh(), runs),
    }


def device() -> str:
    return f"{jax.device_count()} {jax.devices()[0].device_kind}"


def format_results(header: str, cells: str, results: list[Row]) -> str:
    """Return a table with a row per result. ``header`` is split at commas, the format strings ``cells`` at spaces."""
    rows = [tuple(cell.format(**result) for cell in cells.split()) for result in results]
    return text.format_table([tuple(header.split(", ")), *rows])


def report(results: list[Row]) -> str:
    """Return the results as two tables: speeds, and the time until the first step is done."""
    rows = []
    for result in results:
        ratio = f"{result['ratio_to_peer']:.2f}" if "ratio_to_peer" in result else ""
        rows.append(result | {"ratio": ratio, "memory": text.megabytes(result["peak_memory_bytes"])})
    header = "experiment, batch, steps/s, images/s, GFLOP/s, of peak, evaluated/s, × peer"
    cells = "{name} {batch_size} {steps_per_second:,.1f} {images_per_second:,.0f} {gflops_per_second:,.1f} "
    cells += "{share_of_peak:.0%} {evaluate_images_per_second:,.0f} {ratio}"
    speeds = format_results(header, cells, rows)
    header = "seconds to the first step, import, data, compile, step, total, GFLOP/step, peak memory"
    seconds = (f"{{start_up_seconds[{name}]:.2f}}" for name in ("import", "data", "compile", "train", "first_step"))
    cells = " ".join(("{name}", *seconds, "{gflop_per_step:.3g} {memory}"))
    return f"{speeds}\n\n{format_results(header, cells, rows)}"


def runs_report(results: list[Row]) -> str:
    """Return the full runs as a table."""
    header = "experiment, parameters, runs, training s, peer s, test accuracy, minimum, target, reached"
    rows: list[tuple[str, ...]] = [tuple(header.split(", "))]
    for result in results:
        runs = result["runs"]
        seconds, accuracies = np.array(runs["seconds"]), np.array(runs["test_accuracy"])
        peers, ddof = result.get("peer_steps_per_second"), min(1, len(seconds) - 1)
        columns = (
            f"{seconds.mean():.3f} ± {seconds.std(ddof=ddof):.3f}",
            f"{result['steps'] / max(peers.values()):.3f}" if peers else "",
            f"{accuracies.mean():.3%} ± {accuracies.std(ddof=ddof):.3%}",
            f"{accuracies.min():.2%}",
            f"{runs['target']:.1%}",
            f"{np.mean(accuracies >= runs['target']):.0%}",
        )
        rows.append((result["name"], f"{runs['parameters']:,}", str(len(seconds)), *columns))
    return text.format_table(rows)


def draw(results: list[Row], path: Path) -> None:
    """Write a bar chart of the images per second of each experiment and its peers to ``path``."""
    speeds = [{"flaxmnist": item["steps_per_second"]} | item.get("peer_steps_per_second", {}) for item in results]
    names, title = list(dict.fromkeys(name for speed in speeds for name in speed)), results[0]["device"]
    figure, axes = canvas.plot(
        1.5 + 1.4 * len(results), 4, ylabel="training images per second", yscale="log", title=title
    )
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        heights = [item["batch_size"] * speed.get(name, np.nan) for item, speed in zip(results, speeds, strict=True)]
        positions = np.arange(len(results)) + (i - (len(names) - 1) / 2) * width
        bars = axes.bar(positions, heights, width, label=name, color=canvas.COLOURS[i])
        axes.bar_label(bars, fmt="{:,.0f}", fontsize=7)
    axes.set_xticks(range(len(results)), [result["name"] for result in results])
    figure.legend(loc="outside lower center")
    canvas.save(figure, path)


def matrix_rate() -> float:
    """Return the operations per second of the product of two large float32 matrices on one device: the best round."""
    matrix = jax.random.normal(jax.random.key(0), (MATRIX, MATRIX))
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(matrix, matrix))
    return 2 * MATRIX**3 / min(time_of(lambda: jax.block_until_ready(product(matrix, matrix))) for _ in range(ROUNDS))


def evaluation_speed(config: Config, data: Dataset) -> float:
    """Return the test images per second, from images to logits, both in host memory."""
    model = steps.create_state(config, data.train.images.shape[1:], data.classes).model
    evaluation.predict_logits(model, data.test.images)
    seconds = [time_of(lambda: evaluation.predict_logits(model, data.test.images)) for _ in range(ROUNDS)]
    return len(data.test.labels) / median(seconds)


def start_up_times(measure: Callable[[dict[str, str]], dict[str, float]], caches: bool) -> Row:
    """Return the startup times, with an empty compilation cache and again with a warm one if the device ``caches``.

    ``measure`` returns the startup times with the given environment variables.
    """
    if not caches:
        return {"start_up_seconds": measure({})}
    with tempfile.TemporaryDirectory() as cache:
        environment = {"JAX_COMPILATION_CACHE_DIR": cache}
        return {name: measure(environment) for name in ("start_up_seconds", "warm_start_up_seconds")}


def start_up_time(experiment: Path, data_dir: Path | None, environment: dict[str, str]) -> dict[str, float]:
    """Return the seconds from the start of ``flaxmnist train`` to the end of its first step, in total and by phase.

    Raise UserError if a run of one step fails.
    """
    train = [sys.executable, "-m", "flaxmnist.commands", "train"]
    with tempfile.TemporaryDirectory() as folder:
        command = [*train, experiment, "--train.steps", "1", "--workdir", folder, "--log-level", "error"]
        command += ["--data-dir", data_dir] if data_dir else []
        start = time.perf_counter()
        completed = subprocess.run(list(map(str, command)), stdout=subprocess.DEVNULL, env=os.environ | environment)
        if completed.returncode:
            raise UserError(f"{experiment} cannot train for one step, to time its start: see the message above")
        total = time.perf_counter() - start
        seconds = json.loads((Path(folder) / "result.json").read_text())["seconds"]
    phases = {name: seconds[name] for name in ("import", "data", "compile", "train")}
    # Evaluation, the checkpoint and the shutdown of the process come after the first step.
    return phases | {"first_step": sum(phases.values()), "whole_command": total}
