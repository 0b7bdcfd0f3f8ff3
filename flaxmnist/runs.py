"""One run from config to result: the only loop, and the only place that compiles training.

The loop trains in chunks, each one call of one compiled program. A chunk ends where something else is due: a look at a
batch, an evaluation, a checkpoint, the end. While a chunk computes, the one before it is reported.
"""

import hashlib
import json
import resource
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from flaxmnist import evaluation, folders, order, parallel, steps
from flaxmnist.config import Config
from flaxmnist.data import Dataset, Split
from flaxmnist.errors import Diverged, Stopped, UserError
from flaxmnist.logs import Clock, Progress, Records, logger, write_json
from flaxmnist.state import Metrics, Totals, TrainState
from flaxmnist.trained import load_run

# Bounds of a chunk: it answers a signal within a second or so, and its metrics stay small.
CHUNK_SECONDS = 1.0
CHUNK_STEPS = 1000

# Steps of a trace, done after as many to warm up.
PROFILE_STEPS = 10


@dataclass(frozen=True)
class Run:
    """A finished run."""

    config: Config  # its length in steps
    state: TrainState
    history: list[dict[str, Any]]  # the records of metrics.jsonl
    result: dict[str, Any]  # what result.json holds

    @property
    def model(self) -> nnx.Module:
        """The trained model, with averaged weights where the config has such."""
        return self.state.model


class Program:
    """The training program of a run, compiled once: any number of steps up to ``capacity``."""

    def __init__(self, config: Config, state: TrainState, train: Split, mesh: Mesh):
        self.config, self.train = config, train
        self.capacity = min(CHUNK_STEPS, max(PROFILE_STEPS, config.train.length))
        self.whole, self.columns = parallel.whole(mesh), parallel.split_columns(mesh)
        function = jax.jit(
            partial(steps.train_steps, config),
            in_shardings=(self.whole, self.whole, self.whole, self.columns, self.whole),
            out_shardings=self.whole,
            donate_argnums=0,
        )
        self.compiled = function.lower(state, *train, *self.place(0, 0)).compile()

    def place(self, start: int, count: int) -> tuple[Array, Array]:
        """The arguments that say which ``count`` steps from ``start`` on to do."""
        indices = np.zeros((self.capacity, self.config.train.batch_size), np.int32)
        indices[:count] = order.batch_indices(self.config, len(self.train.labels), start, start + count)
        return jax.device_put(indices, self.columns), jax.device_put(np.int32(count), self.whole)

    def __call__(self, state: TrainState, start: int, count: int) -> tuple[TrainState, Metrics]:
        """``count`` steps from ``state``, which is at step ``start`` and may not be used any more."""
        return self.compiled(state, *self.train, *self.place(start, count))


def fit(
    config: Config,
    data: Dataset,
    workdir: str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    allow_config_change: bool = False,
    devices: int | None = None,
    profile: str | Path | None = None,
    stop: threading.Event | None = None,
    clock: Clock | None = None,
) -> Run:
    """Trains and evaluates; where there is a ``workdir``, everything is kept there, else nothing touches the disk.

    ``devices`` is how many to use (None: all). ``profile`` is a folder for a trace of a few steady steps. ``stop``,
    once set, ends the run after the chunk at hand, with a checkpoint. ``clock`` holds what the command spent before.

    Raises UserError for what the caller can mend, Diverged where the loss is no longer finite, and Stopped.
    """
    config = order.resolve(config, len(data.train.labels))
    mesh = parallel.make_mesh(devices)
    parallel.check_batch(config.train.batch_size, mesh)
    if config.data.order == "file" and not data.file_order:
        raise UserError(f"data.order file needs the original files, but these images are {data.source}")
    folder = None if workdir is None else Path(workdir)
    if folder is not None and folders.open_folder(folder, config, data, resume, overwrite, allow_config_change):
        logger.info("%s is finished", folder)
        return finished_run(folder)
    loop = Loop(config, data, mesh, folder, clock or Clock())
    try:
        return loop.run(profile, stop or threading.Event())
    finally:
        loop.close()


class Loop:
    """What a run needs while it goes: the program, the data on the devices, and where it tells and keeps things."""

    def __init__(self, config: Config, data: Dataset, mesh: Mesh, folder: Path | None, clock: Clock):
        self.config, self.data, self.mesh, self.folder, self.clock = config, data, mesh, folder, clock
        self.epoch_length = order.steps_per_epoch(config, len(data.train.labels))
        self.whole = parallel.whole(mesh)
        with clock("compile"):
            create = partial(steps.create_state, config, data.train.images.shape[1:3], data.classes)
            self.state = jax.jit(create, out_shardings=self.whole)()
        self.checkpoints, self.saved = None, None
        about: dict[str, Any] = {"records": 0}
        if folder is not None:
            # Orbax takes a third of a second to import, which a run without a folder need not spend.
            from flaxmnist.checkpoints import Checkpoints

            with clock("checkpoint"):
                self.checkpoints = Checkpoints(folder / "checkpoints", config.train.keep)
                self.saved = self.checkpoints.find("latest")
                if self.saved is not None:
                    self.state, about = self.checkpoints.restore(self.saved, self.state)
                    clock.resume(about["seconds"])
                    logger.info("going on from the checkpoint at step %d", self.saved)
                    folders.check_longer(folder, self.saved, config)
        self.step = int(self.state.step)
        self.rate = 10.0  # steps a second, as far as is known
        self.records = Records(folder and folder / "metrics.jsonl", about["records"])
        self.progress = Progress(config.train.length, self.step, config.train.batch_size)

    def close(self) -> None:
        self.progress.close()
        self.records.close()
        if self.checkpoints is not None:
            self.checkpoints.close()

    # --- The loop ---------------------------------------------------------------------------------------------------

    def run(self, profile: str | Path | None, stop: threading.Event) -> Run:
        """Trains to the end, or until ``stop``; then evaluates on the test images, once."""
        if self.step < self.config.train.length:
            with self.clock("data"):
                self.train = Split(*jax.device_put(tuple(self.data.train), self.whole))
            with self.clock("compile"):
                self.program = Program(self.config, self.state, self.train, self.mesh)
            if profile is not None:
                self.trace(profile)
        self.progress.begin()
        while self.step < self.config.train.length and not stops_early(self.config, self.records.history):
            if self.config.train.report in ("batch_accuracy", "probabilities") and self.is_logged(self.step):
                self.look_at_batch()
            self.advance(self.next_due(), stop)
            if self.is_due(self.config.train.evaluate_every):
                self.evaluate("validation", self.data.validation)
            ends = stop.is_set() or stops_early(self.config, self.records.history)
            if self.checkpoints is not None and (ends or self.is_due(self.config.train.checkpoint_every)):
                self.save()
            if stop.is_set() and self.step < self.config.train.length:
                self.wait()
                raise Stopped(f"stopped at step {self.step} of {self.config.train.length}; --resume goes on")
        self.wait()
        return self.finish()

    def is_logged(self, step: int) -> bool:
        """Whether the batch of ``step`` is recorded; batches reported by epoch are counted from its beginning."""
        counted = step % self.epoch_length if self.config.train.report == "batch_loss" else step
        return counted % self.config.train.log_every == 0

    def is_due(self, every: int | None) -> bool:
        """Whether something done ``every`` so many steps, and at the end, is due now."""
        return self.step == self.config.train.length or (every is not None and self.step % every == 0)

    def next_due(self) -> int:
        """The next step at which something other than training is to be done."""
        train = self.config.train
        look = train.log_every if train.report in ("batch_accuracy", "probabilities") else None
        intervals = [every for every in (train.evaluate_every, train.checkpoint_every, look) if every is not None]
        return min([train.length, *(self.step - self.step % every + every for every in intervals)])

    def trace(self, folder: str | Path) -> None:
        """Writes a trace of a few steady steps, done on a copy of the state, to ``folder``."""
        state = jax.tree.map(jnp.copy, self.state)
        state, _ = jax.block_until_ready(self.program(state, self.step, PROFILE_STEPS))
        with jax.profiler.trace(str(folder)):
            jax.block_until_ready(self.program(state, self.step, PROFILE_STEPS))

    def advance(self, until: int, stop: threading.Event) -> None:
        """Trains up to step ``until``, or to the end of a chunk after ``stop``."""
        with self.clock("train"):
            unreported = None
            while self.step < until and not stop.is_set():
                count = min(until - self.step, self.program.capacity, max(1, int(self.rate * CHUNK_SECONDS)))
                start, began = self.step, time.perf_counter()
                self.state, metrics = self.program(self.state, start, count)
                self.step += count
                if unreported is not None:
                    self.report(*unreported)
                    self.rate = unreported[1] / (time.perf_counter() - began)
                unreported = (start, count, metrics)
            if unreported is not None:
                self.report(*unreported)

    # --- What happens on the way ------------------------------------------------------------------------------------

    def report(self, start: int, count: int, metrics: Metrics) -> None:
        """Waits for a chunk of ``count`` steps from ``start`` on; records and prints what is to be told of them."""
        batch, epoch = jax.device_get(metrics)
        losses, accuracies = means(batch)
        costs, shares = means(epoch)
        for i in np.flatnonzero(~np.isfinite(losses[:count]))[:1]:
            raise Diverged(f"the loss at step {start + i} is {losses[i]}: {self.advice()}")
        style = self.config.train.report
        for i, step in enumerate(range(start, start + count)):
            number, position = divmod(step, self.epoch_length)
            if self.is_logged(step):
                self.records.add(step, number, "train", loss=losses[i], accuracy=accuracies[i])
                if style == "loss":
                    logger.info("step %d, loss %.4f, accuracy %.4f", step, losses[i], accuracies[i])
                elif style == "batch_loss":
                    logger.info("epoch %d, batch %d, loss %.6f", number, position, losses[i])
            if position == self.epoch_length - 1:
                self.records.add(step + 1, number + 1, "epoch", loss=costs[i], accuracy=shares[i])
                if style == "epoch_cost":
                    logger.info("Epoch: %04d, Cost: %.9f", number + 1, costs[i])
        self.progress.show(start + count, losses[count - 1], accuracies[count - 1])

    def advice(self) -> str:
        """What is left of a run that diverged, and what to do."""
        kept = "no checkpoint was saved" if self.saved is None else f"the checkpoint at step {self.saved} is kept"
        return f"training diverged, {kept}; try a smaller --optimizer.learning-rate or an --optimizer.clip-norm"

    def look_at_batch(self) -> None:
        """Records and prints what the model says of the batch it is about to learn from."""
        with self.clock("evaluate"):
            indices = order.batch_indices(self.config, len(self.data.train.labels), self.step, self.step + 1)[0]
            images, labels = (part[indices[indices >= 0]] for part in self.data.train)
            epoch = self.step // self.epoch_length
            if self.config.train.report == "batch_accuracy":
                seen = evaluation.evaluate(self.state.model, images, labels)
                self.records.add(self.step, epoch, "batch", loss=seen.loss, accuracy=seen.accuracy)
                logger.info("step %d, training accuracy %g", self.step, seen.accuracy)
            else:
                logits = train_logits(self.config, self.state, images)
                probabilities = np.exp(evaluation.log_softmax(np.asarray(logits))).round(6)
                self.records.add(self.step, epoch, "batch", probabilities=probabilities)
                shown = np.array2string(
                    probabilities, precision=4, suppress_small=True, threshold=60, max_line_width=120
                )
                logger.info("step %d, probabilities\n%s", self.step, shown)

    def evaluate(self, split: str, images: Split | None) -> evaluation.Evaluation | None:
        """Evaluates on ``images``, where there are such, and records it."""
        if images is None:
            return None
        with self.clock("evaluate"):
            seen = evaluation.evaluate(self.state.model, *images)
        epoch = self.step // self.epoch_length
        self.records.add(self.step, epoch, split, loss=seen.loss, accuracy=seen.accuracy)
        logger.info("step %d, %s loss %.4f, accuracy %.4f", self.step, split, seen.loss, seen.accuracy)
        return seen

    def save(self) -> None:
        """Saves a checkpoint in the background, with how much of the records belongs to it."""
        assert self.checkpoints is not None
        with self.clock("checkpoint"):
            last = self.latest("validation")
            accuracy = last["accuracy"] if last and last["step"] == self.step else None
            about = {"records": self.records.sync(), "seconds": self.clock.seconds, "accuracy": accuracy}
            self.checkpoints.save(self.state, about, accuracy)
            self.saved = self.step

    def wait(self) -> None:
        """Returns when all that was saved is on the disk."""
        if self.checkpoints is not None:
            with self.clock("checkpoint"):
                self.checkpoints.wait()

    def latest(self, split: str) -> dict[str, Any] | None:
        """The last record of ``split``."""
        return next((record for record in reversed(self.records.history) if record["split"] == split), None)

    def finish(self) -> Run:
        """Scores the test images, and writes the result."""
        test = self.evaluate("test", self.data.test)
        assert test is not None  # every data set has test images
        validation = self.latest("validation")
        self.records.sync()
        seconds = {name: self.clock.seconds.get(name, 0.0) for name in SECONDS} | {"total": self.clock.total()}
        result = {
            "experiment": self.config.name,
            "seed": self.config.seed,
            "backend": "jit",
            "devices": self.mesh.size,
            "device_kind": self.mesh.devices.flat[0].device_kind,
            "steps": self.step,
            "epochs": self.step / self.epoch_length,
            "test_accuracy": test.accuracy,
            "test_loss": test.loss,
            "test_count": test.count,
            "validation_accuracy": validation and validation["accuracy"],
            "params": sum(leaf.size for leaf in jax.tree.leaves(self.state.params)),
            "params_sha256": params_sha256(self.state.params),
            "steps_per_second": self.step / seconds["train"] if seconds["train"] else None,
            "seconds": seconds,
            "peak_memory_bytes": peak_memory(self.mesh),
            "versions": folders.versions(),
        }
        if self.folder is not None:
            write_json(self.folder / "result.json", result)
        return Run(self.config, self.state, self.records.history, result)


def summary(run: Run, workdir: Path) -> str:
    """How the run ended, where it lies, and what to try next."""
    result, seconds = run.result, run.result["seconds"]
    spent = ", ".join(f"{name} {seconds[name]:.1f}" for name in SECONDS)
    return "\n".join(
        [
            f"test accuracy {result['test_accuracy']:.4f} of {result['test_count']} images, "
            f"loss {result['test_loss']:.4f}",
            f"{result['steps']} steps, {seconds['total']:.1f} s ({spent})",
            f"run folder {workdir}",
            f"next: python launch/evaluate.py {workdir}",
            f"      python launch/predict.py {workdir} IMAGE.png",
        ]
    )


def finished_run(workdir: str | Path) -> Run:
    """The run that was finished in ``workdir``."""
    folder = Path(workdir)
    config, state = load_run(folder)
    history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return Run(config, state, history, folders.read_json(folder / "result.json"))


SECONDS = ("import", "data", "compile", "train", "evaluate", "checkpoint")


def means(totals: Totals) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Mean loss and accuracy of each step; NaN where a step did not happen."""
    with np.errstate(invalid="ignore"):
        images = np.asarray(totals.images)
        return np.asarray(totals.loss) / images, np.asarray(totals.correct) / images


def stops_early(config: Config, history: list[dict[str, Any]]) -> bool:
    """Whether the validation records so far meet ``train.stop_accuracy``, or have not risen for ``train.patience``."""
    target, patience = config.train.stop_accuracy, config.train.patience
    if target is None and patience is None:
        return False
    accuracies = [record["accuracy"] for record in history if record["split"] == "validation"]
    if not accuracies:
        return False
    reached = target is not None and max(accuracies) >= target
    return reached or (patience is not None and len(accuracies) - 1 - int(np.argmax(accuracies)) >= patience)


@partial(jax.jit, static_argnums=0)
def train_logits(config: Config, state: TrainState, images: Array) -> Float[Array, "b classes"]:
    """The logits that the next step would see for ``images``, with its dropout and augmentation."""
    return steps.train_logits(config, nnx.merge(state.graphdef, state.params), images, state.step)


def params_sha256(params: Any) -> str:
    """SHA-256 over the bytes of the parameters, leaves in the order of their paths."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def peak_memory(mesh: Mesh) -> int:
    """The most bytes in use at once: on the first device where it counts them, else by this process."""
    counted = mesh.devices.flat[0].memory_stats() or {}
    return counted.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
