"""One run from config to result, with the only training loop.

The loop trains in chunks of steps; a chunk is one call of the compiled program. A chunk ends at the latest when a batch
report, an evaluation, a checkpoint or the end of the run is due. While a chunk computes, the previous one is reported.
"""

import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float

from flaxmnist.config import Config
from flaxmnist.console import Clock, Progress, logger
from flaxmnist.core import models
from flaxmnist.core.state import Metrics, Totals, consecutive_before
from flaxmnist.data import order
from flaxmnist.data.sets import Dataset, Split
from flaxmnist.devices import evaluation, parallel, processes
from flaxmnist.devices.program import Backend, Program, initial_state, put_split, state_shapes, train_logits
from flaxmnist.errors import Diverged, Stopped, UserError
from flaxmnist.store import folders
from flaxmnist.store.files import write_json
from flaxmnist.store.lock import Lock
from flaxmnist.store.records import Records
from flaxmnist.store.results import Run, load_run, make_result

# Approximate upper bound on the seconds per chunk, and so on the delay before a signal takes effect.
CHUNK_SECONDS = 1.0

# Steps in a profiler trace, and warm-up steps before it.
PROFILE_STEPS = 10


def fit(
    config: Config,
    data: Dataset,
    workdir: str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    allow_config_change: bool = False,
    devices: int | None = None,
    backend: Backend = "jit",
    model_parallel: int = 1,
    profile: str | Path | None = None,
    experiment: str | Path | None = None,
    stop: threading.Event | None = None,
    clock: Clock | None = None,
) -> Run:
    """Train and evaluate. Save everything in ``workdir``, or write nothing to disk if it is None.

    ``devices`` is the number of devices to use (None: all), ``backend`` how training is compiled for them, and
    ``model_parallel`` the number of devices that each dense kernel is split over. ``profile`` is a folder for a trace
    of a few steps after warm-up. ``experiment`` is the file that defines ``config``; its name goes into
    ``config.json``. Setting ``stop`` ends the run after the current chunk, with a checkpoint. ``clock`` contains the
    seconds that the command has spent so far.

    Raise UserError if the caller can fix the problem, Diverged if loss, gradient or weights are no longer finite, and
    Stopped.
    """
    config = order.resolve_length(config, len(data.train.labels))
    mesh = parallel.make_mesh(devices, model_parallel)
    check(config, data, mesh, backend)
    folder = None if workdir is None else Path(workdir)
    described = folders.describe_run(config, data, mesh, backend, experiment)
    lock = Lock()
    try:
        if folder is not None:
            prepare = partial(folders.is_finished, folder, lock, described, resume, overwrite, allow_config_change)
            if processes.on_first_process(prepare):
                logger.info("%s is finished", folder)
                return load_run(folder)
        with parallel.memory_errors():
            loop = Loop(config, data, mesh, backend, folder, lock, described, clock or Clock())
            try:
                return loop.run(profile, stop or threading.Event())
            finally:
                loop.close()
    finally:
        lock.release()


def check(config: Config, data: Dataset, mesh: Mesh, backend: Backend) -> None:
    """Raise UserError if ``config`` cannot be trained on ``data``, before anything is written."""
    if backend == "pmap" and (jax.process_count() > 1 or mesh.shape[parallel.MODEL] > 1):
        raise UserError("--backend pmap supports neither several processes nor --model-parallel: use --backend jit")
    parallel.check_batch(config.train.batch_size, mesh)
    order.steps_per_epoch(config, len(data.train.labels))
    if config.data.order == "file" and not data.file_order:
        raise UserError(f"data.order file needs the original files, not {data.source}: use --data.order shuffled")
    shapes = state_shapes(config, data)
    parallel.check_model(shapes.params, mesh)
    parallel.check_memory(
        "the state of this model", sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes)), mesh
    )


class Loop:
    """The state of a run in progress: the program, the data on the devices, the records and the archive."""

    def __init__(
        self,
        config: Config,
        data: Dataset,
        mesh: Mesh,
        backend: Backend,
        folder: Path | None,
        lock: Lock,
        described: dict[str, Any],
        clock: Clock,
    ):
        self.config, self.data, self.mesh, self.clock = config, data, mesh, clock
        self.folder = folder
        self.backend: Backend = backend
        self.epoch_length = order.steps_per_epoch(config, len(data.train.labels))
        with clock("compile"):
            self.state = initial_state(config, data, mesh)
        self.archive, self.records = None, Records(None)
        if folder is not None:
            # Importing orbax takes a third of a second, which a run without a folder can save.
            from flaxmnist.store.archive import Archive

            with clock("checkpoint"):
                self.archive = Archive(folder, lock, described, config, self.state, clock)
            self.state, self.records = self.archive.state, self.archive.records
        self.step = int(self.state.step)
        self.rate = 1.0  # estimated steps per second
        self.stopping = False  # True once any process has received a signal to stop
        self.progress = Progress(config.train.length, self.step, config.train.batch_size)

    def close(self) -> None:
        self.progress.close()
        if self.archive is not None:
            self.archive.close()

    # --- The loop ---------------------------------------------------------------------------------------------------

    def run(self, profile: str | Path | None, stop: threading.Event) -> Run:
        """Train to the end, or until ``stop`` is set; after the end, evaluate once on the test images."""
        config = self.config
        if self.step < config.train.length:
            with self.clock("data"):
                train = put_split(self.data.train, self.mesh)
            with self.clock("compile"):
                self.program = Program(config, self.state, train, self.mesh, self.backend)
            parallel.check_memory("training", self.program.bytes, self.mesh)
            if profile is not None:
                self.write_trace(Path(profile))
        self.progress.begin()
        while self.step < config.train.length and not stops_early(config, self.records.few):
            if config.train.report in ("batch_accuracy", "probabilities") and self.is_logged(self.step):
                self.report_batch()
            self.train_until(self.next_event(), stop)
            if self.is_due(config.train.evaluate_every):
                self.evaluate("validation", self.data.validation)
            ends = self.stopping or stops_early(config, self.records.few)
            if ends or self.is_due(config.train.checkpoint_every) or self.is_retry_due():
                self.save()
            if self.stopping and self.step < config.train.length:
                self.flush()
                remedy = "nothing was saved without a workdir" if self.folder is None else "--resume continues"
                raise Stopped(f"stopped at step {self.step} of {config.train.length}; {remedy}")
        self.flush()
        return self.finish()

    def is_logged(self, step: int) -> bool:
        """Return True if the batch of ``step`` is recorded. With ``batch_loss``, batches are counted per epoch."""
        number = step % self.epoch_length if self.config.train.report == "batch_loss" else step
        return number % self.config.train.log_every == 0

    def is_due(self, every: int | None) -> bool:
        """Return True at multiples of ``every`` steps and at the end of the run."""
        return self.step == self.config.train.length or (every is not None and self.step % every == 0)

    def next_event(self) -> int:
        """Return the next step at which a batch report, an evaluation, a checkpoint or the end is due."""
        train = self.config.train
        report_every = train.log_every if train.report in ("batch_accuracy", "probabilities") else None
        intervals = [every for every in (train.evaluate_every, train.checkpoint_every, report_every) if every]
        return min([train.length, *(self.step - self.step % every + every for every in intervals)])

    def is_retry_due(self) -> bool:
        """Return True if saving has failed and should be tried again now."""
        return self.archive is not None and self.archive.is_retry_due()

    def write_trace(self, folder: Path) -> None:
        """Write a profiler trace of a few steps after warm-up, on a copy of the state, to ``folder``."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write a trace to {folder}: {error.strerror}; use another --profile") from None
        count = min(PROFILE_STEPS, self.program.capacity)
        state = jax.tree.map(jnp.copy, self.state)
        state, _ = jax.block_until_ready(self.program(state, self.step, count))
        with jax.profiler.trace(str(folder)):
            jax.block_until_ready(self.program(state, self.step, count))

    def train_until(self, until: int, stop: threading.Event) -> None:
        """Train up to step ``until``, or to the end of the current chunk if ``stop`` is set."""
        with self.clock("train"):
            unreported = None
            while self.step < until:
                count = min(until - self.step, self.program.capacity, max(1, int(self.rate * CHUNK_SECONDS)))
                start, began = self.step, time.perf_counter()
                self.state, metrics = self.program(self.state, start, count)
                self.step += count
                if unreported is not None:
                    self.report(*unreported)
                    self.rate = unreported[1] / (time.perf_counter() - began)
                unreported = (start, count, metrics)
                # Agree after each chunk, so that all processes stop at the same step.
                self.stopping, self.rate = processes.agree(stop.is_set(), self.rate)
                if self.stopping or self.is_retry_due():
                    break
            if unreported is not None:
                self.report(*unreported)

    # --- Reports, evaluations and checkpoints -----------------------------------------------------------------------

    def report(self, start: int, count: int, metrics: Metrics) -> None:
        """Wait for a chunk of ``count`` steps from ``start`` on; record and log its metrics."""
        metrics = jax.device_get(metrics)
        losses, accuracies = means(metrics.batch)
        epoch_losses, epoch_accuracies = means(metrics.epoch)
        nonfinite = metrics.nonfinite(start, count)
        report = self.config.train.report
        for i, step in enumerate(range(start, start + count)):
            epoch, batch = divmod(step, self.epoch_length)
            if step in nonfinite:
                self.skip(step, epoch, nonfinite[step])
            elif self.is_logged(step):
                norm = metrics.gradient_norm[i]
                self.records.add(step, epoch, "train", loss=losses[i], accuracy=accuracies[i], gradient_norm=norm)
                if report == "loss":
                    logger.info("step %d, loss %.4f, accuracy %.4f", step, losses[i], accuracies[i])
                elif report == "batch_loss":
                    logger.info("epoch %d, batch %d, loss %.6f", epoch, batch, losses[i])
            if batch == self.epoch_length - 1 and np.isfinite(epoch_losses[i]):
                self.records.add(step + 1, epoch + 1, "epoch", loss=epoch_losses[i], accuracy=epoch_accuracies[i])
                if report == "epoch_cost":
                    logger.info("Epoch: %04d, Cost: %.9f", epoch + 1, epoch_losses[i])
        self.progress.show(start + count, losses[count - 1], accuracies[count - 1])
        if self.archive is not None:
            self.archive.watch()

    def skip(self, step: int, epoch: int, reason: str) -> None:
        """Record that ``step`` made no update, because of ``reason``. Raise Diverged if too many in a row did not."""
        skipped = [record["step"] for record in self.records.few if record["split"] == "skipped"]
        allowed = self.config.train.skip_nonfinite
        if consecutive_before(step, skipped) >= allowed:
            after = f", after {allowed} steps in a row were skipped" if allowed else ""
            raise Diverged(f"{reason}{after}: {self.divergence_advice()}")
        self.records.add(step, epoch, "skipped", count=len(skipped) + 1)
        logger.warning("%s: this step is skipped", reason)

    def divergence_advice(self) -> str:
        last = None if self.archive is None else self.archive.last()
        saved = "no checkpoint was saved" if last is None else f"the checkpoint at step {last} is kept"
        return f"training diverged, {saved}; try a smaller --optimizer.learning-rate or an --optimizer.clip-norm"

    def report_batch(self) -> None:
        """Record and log the model's accuracy or probabilities on the next batch, before training on it."""
        with self.clock("evaluate"):
            indices = order.batch_indices(self.config, len(self.data.train.labels), self.step, self.step + 1)[0]
            images, labels = (array[indices[indices >= 0]] for array in self.data.train)
            epoch = self.step // self.epoch_length
            if self.config.train.report == "batch_accuracy":
                scores = evaluation.evaluate(self.state.model, images, labels)
                self.records.add(self.step, epoch, "batch", loss=scores.loss, accuracy=scores.accuracy)
                logger.info("step %d, training accuracy %g", self.step, scores.accuracy)
            else:
                logits = parallel.gather(train_logits(self.config, self.state, images), self.mesh)
                probabilities = np.exp(evaluation.log_softmax(np.asarray(logits))).round(6)
                self.records.add(self.step, epoch, "batch", probabilities=probabilities)
                text = np.array2string(
                    probabilities, precision=4, suppress_small=True, threshold=60, max_line_width=120
                )
                logger.info("step %d, probabilities\n%s", self.step, text)

    def evaluate(self, split: str, images: Split | None) -> evaluation.Evaluation | None:
        """Evaluate on ``images``, if there are any; record and log the scores."""
        if images is None:
            return None
        with self.clock("evaluate"):
            scores = evaluation.evaluate(self.state.model, *images)
        if not np.isfinite(scores.loss):
            raise Diverged(f"the {split} loss after step {self.step} is {scores.loss}: {self.divergence_advice()}")
        epoch = self.step // self.epoch_length
        self.records.add(self.step, epoch, split, loss=scores.loss, accuracy=scores.accuracy)
        logger.info("step %d, %s loss %.4f, accuracy %.4f", self.step, split, scores.loss, scores.accuracy)
        self.save_pictures(split, scores)
        return scores

    def save_pictures(self, split: str, scores: evaluation.Evaluation) -> None:
        """Save the confusion matrix and the first layer's weights, if the run has a folder."""
        if self.archive is not None:
            with self.clock("checkpoint"):
                weights = self.state.weights
                if jax.process_count() > 1:
                    weights = parallel.gather(weights, self.mesh)
                model = nnx.merge(self.state.graphdef, weights)
                shape = self.data.train.images.shape[1:3]
                self.archive.draw(self.step, split, scores, models.first_weights(model, shape))

    def save(self) -> None:
        """Save a checkpoint, with the records up to it, in the background."""
        if self.archive is not None:
            if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(self.state.params)):
                raise Diverged(f"the weights after step {self.step} are not finite: {self.divergence_advice()}")
            self.archive.save(self.state, self.validation_accuracy())

    def flush(self) -> None:
        """Wait until the current state is on disk. Raise UserError if it cannot be saved."""
        if self.archive is not None:
            with self.clock("checkpoint"):
                self.archive.settle(self.state, self.validation_accuracy())

    def validation_accuracy(self) -> float | None:
        """Return the validation accuracy if the current step has been evaluated."""
        last = self.last_record("validation")
        return last["accuracy"] if last and last["step"] == self.step else None

    def last_record(self, split: str) -> dict[str, Any] | None:
        return next((record for record in reversed(self.records.few) if record["split"] == split), None)

    def finish(self) -> Run:
        """Evaluate on the test images and write the result."""
        test = self.evaluate("test", self.data.test)
        assert test is not None  # every data set has test images
        validation = self.last_record("validation")
        state = parallel.gather(self.state, self.mesh)
        result = make_result(
            self.config,
            state,
            self.mesh,
            self.backend,
            self.clock,
            epochs=self.step / self.epoch_length,
            validation_accuracy=None if validation is None else validation["accuracy"],
            test=test,
        )
        if self.archive is not None and processes.is_first_process():
            try:
                self.archive.end()
                write_json(self.archive.folder / "result.json", result)
            except OSError as error:
                raise folders.write_error(self.archive.folder, error) from None
        return Run(self.config, state, folders.describe_data(self.data), self.records.history, result)


def means(totals: Totals) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Return mean loss and accuracy of each step; NaN for steps that were not done."""
    with np.errstate(invalid="ignore"):
        images = np.asarray(totals.images)
        return np.asarray(totals.loss) / images, np.asarray(totals.correct) / images


def stops_early(config: Config, records: list[dict[str, Any]]) -> bool:
    """Return True if ``train.stop_accuracy`` is reached or the last ``train.patience`` evaluations had no new best."""
    target, patience = config.train.stop_accuracy, config.train.patience
    accuracies = [record["accuracy"] for record in records if record["split"] == "validation"]
    if not accuracies:
        return False
    reached = target is not None and max(accuracies) >= target
    return reached or (patience is not None and len(accuracies) - 1 - int(np.argmax(accuracies)) >= patience)
