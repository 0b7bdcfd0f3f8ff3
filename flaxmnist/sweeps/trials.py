"""Trials that are trained simultaneously by one compiled program, which ``devices.program.TrialProgram`` vmaps."""

import json
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax import Array

from flaxmnist import fields
from flaxmnist.console import Progress, logger
from flaxmnist.core import steps
from flaxmnist.core.state import Metrics, TrainState
from flaxmnist.devices import evaluation
from flaxmnist.devices.program import TrialProgram, with_batch_statistics, with_weights
from flaxmnist.errors import Stopped
from flaxmnist.loop.advance import Pace, advance
from flaxmnist.loop.conditions import is_due, may_skip, next_due
from flaxmnist.loop.log import means
from flaxmnist.store.initial import load_initial
from flaxmnist.store.provenance import git_commit
from flaxmnist.store.records import to_json_value
from flaxmnist.store.result import params_sha256
from flaxmnist.sweeps.plan import Trial
from flaxmnist.sweeps.results import TrialResult


class Point(NamedTuple):
    """A point of the curves of a trial."""

    step: int
    validation: bool  # all validation images, after the step; otherwise its batch
    loss: float
    accuracy: float


class Trials:
    """Trials in training; the trial in row i is row i of each array of ``state``."""

    def __init__(self, program: TrialProgram, trials: list[Trial], names: tuple[str, ...]):
        self.program, self.trials, self.train_config = program, trials, trials[0].config.train
        # Pad to the program's size with copies of the last trial.
        padded = [trials[min(row, len(trials) - 1)] for row in range(program.size)]
        self.configs = [trial.config for trial in padded]
        self.seeds = np.array([config.seed for config in self.configs], np.int32)
        values = [[trial.fields[name] for name in names] for trial in padded]
        self.values = np.array(values, np.float32).reshape(program.size, len(names))
        self.state = program.create(self.seeds, self.values)
        if weights := load_initial(trials[0].config, trials[0].data):
            stacked = {name: np.stack([array] * program.size) for name, array in weights.items()}
            self.state = with_weights(self.state, stacked)
        self.arrays = program.arrays(self.configs, trials[0].data)
        self.curves: list[list[Point]] = [[] for _ in trials]
        self.validation: list[dict[str, float] | None] = [None for _ in trials]  # scores of the last evaluation
        self.failed: list[str | None] = [None] * len(trials)  # the reason, if a trial diverged
        self.skipped: list[list[int]] = [[] for _ in trials]  # steps whose loss or gradient was not finite
        self.step, self.seconds = 0, 0.0  # of training

    @property
    def capacity(self) -> int:
        return self.program.capacity

    def __call__(self, state: TrainState, start: int, count: int) -> tuple[TrainState, Metrics]:
        """Do ``count`` steps of every trial from ``state``, which is at step ``start`` and is donated."""
        return self.program(self.seeds, self.values, state, self.arrays, self.configs, start, count)

    def train(
        self, progress: Progress, stop: threading.Event, save_due: Callable[[], bool], save: Callable[[], None]
    ) -> None:
        """Train to the end; call ``save`` when ``save_due()`` and when ``stop`` is set, which then raises Stopped."""
        pace, done = Pace(10.0), progress.step
        progress.start += self.step * len(self.trials)  # restored, not trained now
        progress.show(done + self.step * len(self.trials))

        def report(start: int, count: int, metrics: Metrics) -> None:
            self.record(start, count, jax.device_get(metrics))
            progress.show(done + (start + count) * len(self.trials))

        length, evaluate_every = self.train_config.length, self.train_config.evaluate_every
        while self.step < length:
            until, start_time = next_due(self.step, length, evaluate_every), time.perf_counter()
            options = {"pace": pace, "report": report, "stop": stop, "pause": save_due}
            self.state, self.step, stopping, pausing = advance(self, self.state, self.step, until, **options)
            self.seconds += time.perf_counter() - start_time
            if is_due(self.step, length, evaluate_every):
                self.validate()
            if stopping or pausing:
                save()
            if stopping:
                raise Stopped("stopped; --resume continues")

    def record(self, start: int, count: int, metrics: Metrics) -> None:
        """Record the metrics of ``count`` steps from ``start`` on, and mark the trials that diverged."""
        log_every = self.train_config.log_every
        for row, skipped in enumerate(self.skipped):
            of_trial: Metrics = jax.tree.map(lambda values, row=row: np.asarray(values)[row], metrics)
            for step, reason in of_trial.nonfinite(start, count).items():
                if self.failed[row] is None and not may_skip(self.train_config, step, skipped):
                    self.failed[row] = reason
                elif self.failed[row] is None:
                    skipped.append(step)
            losses, accuracies = means(of_trial.batch)
            for i in range(-start % log_every, count, log_every):
                self.curves[row].append(Point(start + i, False, losses[i], accuracies[i]))

    def validate(self) -> None:
        """Evaluate every trial on the validation images, if there are any."""
        images = self.trials[0].data.validation
        if images is not None:
            for row, points in enumerate(self.curves):
                scores = evaluation.evaluate(self.trial_state(row).model, *images)
                if not np.isfinite(scores.loss):
                    message = f"the validation loss after step {self.step} is {scores.loss}"
                    self.failed[row] = self.failed[row] or message
                points.append(Point(self.step, True, scores.loss, scores.accuracy))
                self.validation[row] = scores.scores

    def trial_state(self, row: int) -> TrainState:
        """Return the state of a trial, ready for evaluation."""
        trial, state = self.trials[row], jax.tree.map(lambda x: x[row], self.state)
        return with_batch_statistics(trial.config, state, trial.data.train)

    def weights(self, row: int) -> dict[str, Array]:
        """Return the weights and buffers of a trial by dotted name, without the values of swept fields."""
        trial, state = self.trials[row], self.trial_state(row)
        shape, classes = trial.data.train.images.shape[1:], trial.data.classes
        alone = steps.state_shapes(trial.config, shape, classes)
        buffers = fields.flatten(state.evaluation_buffers)
        return fields.flatten(state.weights) | {name: buffers[name] for name in fields.flatten(alone.buffers)}

    def result(self, row: int) -> TrialResult:
        """Evaluate a trained trial on the test images."""
        trial, state, failed = self.trials[row], self.trial_state(row), self.failed[row]
        test = evaluation.evaluate(state.model, *trial.data.test)
        if not np.isfinite(test.loss):
            failed = failed or f"the test loss is {test.loss}"
        validation = None if failed else self.validation[row]
        return TrialResult(
            experiment=trial.config.name,
            seed=trial.config.seed,
            fields=trial.fields,
            test_accuracy=None if failed else test.accuracy,
            validation_accuracy=None if validation is None else validation["accuracy"],
            test_loss=None if failed else test.loss,
            params_sha256=params_sha256(state.params),
            failed=failed,
            test=None if failed else test.scores,
            validation=validation,
            train_seconds=self.seconds / len(self.trials),
            git_commit=git_commit(),
        )

    # --- Saving unfinished trials -----------------------------------------------------------------------------------

    @property
    def indices(self) -> list[int]:
        return [trial.index for trial in self.trials]

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return everything that is needed to resume from the current step."""
        curves = [
            {name: [to_json_value(getattr(point, name)) for point in points] for name in Point._fields}
            for points in self.curves
        ]
        progress = {"step": self.step, "seconds": self.seconds, "failed": self.failed, "skipped": self.skipped}
        progress |= {"validation": self.validation}
        told = np.array(json.dumps(progress | {"curves": curves}))
        leaves = {f"leaf.{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(self.state))}
        return {"numbers": np.array(self.indices), "told": told, **leaves}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Resume from ``arrays`` if they are those of the same trials; otherwise change nothing."""
        if arrays["numbers"].tolist() != self.indices:
            return
        leaves, tree = jax.tree.flatten(self.state)
        saved = [arrays[f"leaf.{i}"] for i in range(len(leaves))]
        # On other devices, the size of the program may differ.
        if [array.shape for array in saved] == [leaf.shape for leaf in leaves]:
            progress = json.loads(str(arrays["told"]))
            self.curves = [list(map(Point, *(c[name] for name in Point._fields))) for c in progress["curves"]]
            self.step, self.seconds = progress["step"], progress["seconds"]
            self.failed, self.skipped = progress["failed"], progress["skipped"]
            self.validation = progress.get("validation", self.validation)  # not in old files
            restored = [jax.device_put(array, leaf.sharding) for array, leaf in zip(saved, leaves, strict=True)]
            self.state = jax.tree.unflatten(tree, restored)
            logger.info("resuming: unfinished trials: %d, at step %d", len(self.trials), self.step)
