"""Sweeps: trials over seeds × settings, trained with as few compiled programs as possible.

A setting is one combination of values of the swept fields; a trial is the run of one experiment with one setting and
seed. If trials are vectorised, those that differ only in seed and in fields that change no shape share a program. If
they run sequentially, each setting has its own program, and each trial is bitwise identical to a single run.
"""

import itertools
import json
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from flaxmnist import fields
from flaxmnist.config import CNN, Config
from flaxmnist.console import Progress
from flaxmnist.core.state import Metrics, TrainState, consecutive_before
from flaxmnist.data import order
from flaxmnist.data.sets import Dataset, Split
from flaxmnist.devices import evaluation, parallel, program
from flaxmnist.errors import Stopped, UserError
from flaxmnist.store import folders, results
from flaxmnist.store.records import to_json_value
from flaxmnist.sweeps.parts import Kept, Sweep

# Fields whose values may differ between the trials of one program.
TRACED = re.compile(
    r"optimizer\.(learning_rate|momentum|b1|b2|weight_decay)|model\.dropout|objective\.label_smoothing"
    r"|model\.(kernel|bias)_init\.\w+"
)

# Fields that cannot be swept: the experiment, its images and the seeds define them.
FIXED = {"name", "seed", "data.name", "data.validation", "data.order_seed"}

# Approximate upper bound on the seconds per chunk.
CHUNK_SECONDS = 1.0

# Trials in one sweep.
MAX_TRIALS = 100_000

# Fraction of a device's memory that trials may use.
MEMORY_FRACTION = 0.5


@dataclass(frozen=True)
class Trial:
    """One run of a sweep."""

    config: Config  # with its length in steps
    data: Dataset
    fields: dict[str, Any]  # values of the swept fields, by dotted name


def sweep(
    config: Config,
    data: Dataset,
    *,
    seeds: int | Sequence[int] = 8,
    over: Mapping[str, Sequence[Any]] | None = None,
    share_order: bool = False,
    exact: bool = False,
    devices: int | None = None,
) -> Sweep:
    """Train ``config`` with each seed and each combination of the values in ``over``, {dotted field: values}.

    ``seeds`` is a list, or a number of seeds counted from 0. With ``share_order`` all trials use the batches of the
    first seed, which makes small models fast. With ``exact`` each trial is bitwise identical to ``fit``. Raise
    UserError.
    """
    seeds = range(seeds) if isinstance(seeds, int) else list(seeds)
    settings = [dict(zip(over or {}, values, strict=True)) for values in itertools.product(*(over or {}).values())]
    return run([(config, data)], seeds, settings, share_order=share_order, exact=exact, devices=devices)


def run(
    experiments: Sequence[tuple[Config, Dataset]],
    seeds: Sequence[int],
    settings: Sequence[dict[str, Any]],
    *,
    share_order: bool = False,
    exact: bool = False,
    devices: int | None = None,
    workdir: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    stop: threading.Event | None = None,
) -> Sweep:
    """Train every experiment with every setting and seed; save the sweep in ``workdir`` unless it is None."""
    names = [config.name for config, _ in experiments]
    if len(set(names)) < len(names):
        raise UserError(f"experiments of a sweep need different names, but these are {', '.join(names)}: rename one")
    mesh = parallel.make_mesh(devices)
    trials = plan_trials(experiments, seeds, settings, share_order)
    kept = Kept(workdir, describe_sweep(experiments, seeds, settings, share_order, exact, mesh), resume, overwrite)
    total = sum(trial.config.train.length for trial in trials)
    done = sum(trials[index].config.train.length for index in kept.results)
    progress = Progress(total, done, trials[0].config.train.batch_size)
    try:
        try:
            with parallel.memory_errors():
                for group in group_trials(trials, share_order, exact):
                    group.train(trials, mesh, kept, progress, stop or threading.Event())
        finally:
            kept.flush()
        return kept.finish(total)
    finally:
        progress.close()
        kept.lock.release()


# --- Planning -------------------------------------------------------------------------------------------------------


def plan_trials(
    experiments: Sequence[tuple[Config, Dataset]],
    seeds: Sequence[int],
    settings: Sequence[dict[str, Any]],
    share_order: bool,
) -> list[Trial]:
    """Return the trials ordered by experiment, setting and seed. Raise UserError if a config is invalid."""
    if len(experiments) * len(settings) * len(seeds) > MAX_TRIALS:
        raise UserError(f"a sweep has at most {MAX_TRIALS:,} trials: pass fewer seeds, values or experiments")
    trials = []
    for (config, data), setting, seed in itertools.product(experiments, settings, seeds):
        if config.train.patience is not None or config.train.stop_accuracy is not None:
            raise UserError("trials of a sweep cannot stop early: set train.patience and train.stop_accuracy to None")
        for name, value in setting.items():
            if name in FIXED:
                raise UserError(f"{name} cannot be swept: it is set by the experiment and --seeds")
            fields.get(config, name)  # raises UserError if there is no such field
            config = fields.replace(config, name, value, check=False)
        if share_order:
            config = fields.replace(config, "data.order_seed", seeds[0], check=False)
        # Checked only when all values are set, because some are only valid together.
        config = order.resolve_length(replace(config, seed=seed), len(data.train.labels))
        trials.append(Trial(config, data, dict(setting)))
    if not trials:
        raise UserError("there is nothing to train: pass at least one seed and one value of each field")
    return trials


def runs_sequentially(config: Config, share_order: bool) -> bool:
    """Return True if trials train faster sequentially than vectorised.

    On CPU this holds for CNNs, and for all models if each trial has its own batches. Steps/s of all trials relative to
    a single run (two cores of a Xeon with AVX-512, JAX 0.10.2): `quickstart` × 8 sequential 1.0, vectorised 0.22,
    because XLA merges the convolutions into one slow grouped convolution, and 0.49 or 0.31 with convolutions as
    products of shifted images or of patches; `cnn_experts` × 4 1.0 and 0.25. `softmax_beginners` × 128 with shared
    batches 4.2 vectorised; × 32 with own batches 1.0 sequential, 1.2 vectorised, but not bitwise identical. GPUs and
    TPUs have not been measured; trials are always vectorised there.
    """
    return jax.default_backend() == "cpu" and (isinstance(config.model, CNN) or not share_order)


@dataclass(frozen=True)
class Group:
    """Trials that share one compiled program."""

    indices: list[int]  # of the trials
    names: tuple[str, ...]  # fields whose values differ between the trials
    sequential: bool  # one trial at a time per device, not vectorised
    share_order: bool

    def train(self, trials: list[Trial], mesh: Mesh, kept: Kept, progress: Progress, stop: threading.Event) -> None:
        """Train the trials that are not finished yet."""
        if set(self.indices) <= kept.results.keys():
            return
        first = trials[self.indices[0]]
        train = program.put_split(first.data.train, mesh)
        compiled = self.compile(first, train, mesh)
        try:
            for start in range(0, len(self.indices), compiled.size):
                indices = self.indices[start : start + compiled.size]
                if not set(indices) <= kept.results.keys():
                    block = Block(compiled, [trials[index] for index in indices], self.names)
                    block.restore(kept.load_unfinished(indices))
                    block.train(progress, stop, partial(kept.save_unfinished, indices))
                    for row, index in enumerate(indices):
                        kept.add(index, block.finish(row), block.curves[row], block.trial_state(row).weights)
                    kept.add_seconds(block.seconds)
        finally:
            kept.save()

    def compile(self, first: Trial, train: Split, mesh: Mesh) -> program.TrialProgram:
        """Compile the program for as many trials at once as fit into the memory of a device."""
        per_device = 1 if self.sequential else -(-len(self.indices) // mesh.size)
        while True:
            compiled = program.TrialProgram(
                first.config, self.names, first.data, train, mesh, per_device, self.share_order
            )
            if per_device == 1 or compiled.bytes <= MEMORY_FRACTION * parallel.device_memory(mesh):
                return compiled
            per_device = -(-per_device // 2)


def group_trials(trials: list[Trial], share_order: bool, exact: bool) -> list[Group]:
    groups: dict[str, Group] = {}
    for index, trial in enumerate(trials):
        sequential = exact or runs_sequentially(trial.config, share_order)
        names = () if sequential else tuple(name for name in trial.fields if TRACED.fullmatch(name))
        static = fields.flatten(fields.to_json(trial.config))
        for name in ("seed", "data.order_seed", *names):
            del static[name]
        groups.setdefault(json.dumps(static), Group([], names, sequential, share_order)).indices.append(index)
    return list(groups.values())


class Block:
    """Trials that are trained simultaneously; the trial in row i is row i of each array of ``state``."""

    def __init__(self, compiled: program.TrialProgram, trials: list[Trial], names: tuple[str, ...]):
        self.compiled, self.trials = compiled, trials
        # Pad to the program's size with copies of the last trial.
        padded = [trials[min(row, len(trials) - 1)] for row in range(compiled.size)]
        self.configs = [trial.config for trial in padded]
        self.seeds = np.array([config.seed for config in self.configs], np.int32)
        self.values = np.array([[trial.fields[name] for name in names] for trial in padded], np.float32)
        self.values = self.values.reshape(compiled.size, len(names))
        self.state = compiled.create(self.seeds, self.values)
        self.curves: list[dict[str, list[Any]]] = [
            {"step": [], "validation": [], "loss": [], "accuracy": []} for _ in trials
        ]
        self.failed: list[str | None] = [None] * len(trials)  # the reason, if a trial diverged
        self.skipped: list[list[int]] = [[] for _ in trials]  # steps whose loss or gradient was not finite
        self.step, self.seconds = 0, 0.0  # of training

    def train(
        self,
        progress: Progress,
        stop: threading.Event,
        save: Callable[[Callable[[], dict[str, np.ndarray]], bool], None],
    ) -> None:
        """Train to the end. Raise Stopped after the chunk in which ``stop`` is set.

        After each chunk, call ``save(self.to_arrays, now)``; ``now`` is True if training stops here.
        """
        train, rate = self.configs[0].train, 10.0
        progress.show(progress.step + self.step * len(self.trials))
        while self.step < train.length:
            every = train.evaluate_every or train.length
            due = min(train.length, self.step - self.step % every + every)
            count = min(due - self.step, self.compiled.capacity, max(1, int(rate * CHUNK_SECONDS)))
            began = time.perf_counter()
            self.state, metrics = self.compiled(self.seeds, self.values, self.state, self.configs, self.step, count)
            self.record(self.step, count, jax.device_get(metrics))
            seconds = time.perf_counter() - began
            self.seconds, self.step, rate = self.seconds + seconds, self.step + count, count / seconds
            progress.show(progress.step + count * len(self.trials))
            if self.step == due:
                self.validate(self.step)
            save(self.to_arrays, stop.is_set())
            if stop.is_set():
                raise Stopped("stopped; --resume continues")

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return everything that is needed to resume from the current step."""
        curves = [{name: [to_json_value(x) for x in column] for name, column in c.items()} for c in self.curves]
        progress = {"step": self.step, "seconds": self.seconds, "failed": self.failed, "skipped": self.skipped}
        leaves = {f"leaf.{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(self.state))}
        return {"told": np.array(json.dumps(progress | {"curves": curves})), **leaves}

    def restore(self, arrays: dict[str, np.ndarray] | None) -> None:
        """Resume from ``arrays`` if the shapes match; on other devices, the size of a block may differ."""
        leaves, tree = jax.tree.flatten(self.state)
        if arrays is None or any(
            f"leaf.{i}" not in arrays or arrays[f"leaf.{i}"].shape != leaf.shape for i, leaf in enumerate(leaves)
        ):
            return
        restored = [jax.device_put(arrays[f"leaf.{i}"], leaf.sharding) for i, leaf in enumerate(leaves)]
        self.state = jax.tree.unflatten(tree, restored)
        progress = json.loads(str(arrays["told"]))
        self.step, self.seconds, self.curves = progress["step"], progress["seconds"], progress["curves"]
        self.failed, self.skipped = progress["failed"], progress["skipped"]

    def record(self, start: int, count: int, metrics: Metrics) -> None:
        """Record the losses of ``count`` steps from ``start`` on, and mark the trials that diverged."""
        train = self.configs[0].train
        for row, skipped in enumerate(self.skipped):
            trial_metrics: Metrics = jax.tree.map(lambda values, row=row: np.asarray(values)[row], metrics)
            for step, reason in trial_metrics.nonfinite(start, count).items():
                if self.failed[row] is None and consecutive_before(step, skipped) >= train.skip_nonfinite:
                    self.failed[row] = reason
                elif self.failed[row] is None:
                    skipped.append(step)
            loss, correct, images = trial_metrics.batch
            for i in range(-start % train.log_every, count, train.log_every):
                self.add_point(row, start + i, False, loss[i] / images[i], correct[i] / images[i])

    def add_point(self, row: int, step: int, validation: bool, loss: Any, accuracy: Any) -> None:
        for name, value in (("step", step), ("validation", validation), ("loss", loss), ("accuracy", accuracy)):
            self.curves[row][name].append(value)

    def validate(self, step: int) -> None:
        """Evaluate every trial on the validation images, if there are any."""
        images = self.trials[0].data.validation
        if images is not None:
            for row in range(len(self.trials)):
                scores = evaluation.evaluate(self.trial_state(row).model, *images)
                if not np.isfinite(scores.loss):
                    self.failed[row] = self.failed[row] or f"the validation loss after step {step} is {scores.loss}"
                self.add_point(row, step, True, scores.loss, scores.accuracy)

    def trial_state(self, row: int) -> TrainState:
        return jax.tree.map(lambda x: x[row], self.state)

    def finish(self, row: int) -> dict[str, Any]:
        """Evaluate a trial on the test images and return its entry in result.json."""
        trial, state, failed = self.trials[row], self.trial_state(row), self.failed[row]
        test = evaluation.evaluate(state.model, *trial.data.test)
        if not np.isfinite(test.loss):
            failed = failed or f"the test loss is {test.loss}"
        curves = self.curves[row]
        validated = list(itertools.compress(curves["accuracy"], curves["validation"]))
        return {
            "experiment": trial.config.name,
            "seed": trial.config.seed,
            "fields": trial.fields,
            "test_accuracy": None if failed else test.accuracy,
            "validation_accuracy": validated[-1] if validated and not failed else None,
            "test_loss": None if failed else test.loss,
            "params_sha256": results.params_sha256(state.params),
            "failed": failed,
        }


def describe_sweep(
    experiments: Sequence[tuple[Config, Dataset]],
    seeds: Sequence[int],
    settings: Sequence[dict[str, Any]],
    share_order: bool,
    exact: bool,
    mesh: Mesh,
) -> dict[str, Any]:
    """Return the content of ``sweep.json``: everything that the results depend on."""
    return {
        "experiments": [fields.to_json(config) for config, _ in experiments],
        "data": [folders.describe_data(data) for _, data in experiments],
        "seeds": list(seeds),
        "settings": list(settings),
        "share_order": share_order,
        "exact": exact,
        "devices": folders.describe_devices(mesh, "jit"),
        "versions": folders.versions(),
    }
