"""One run from config to result: the only loop.

It trains in chunks, each one call of the compiled program. A chunk ends where something else is due: a look at a batch,
an evaluation, a checkpoint, the end. While a chunk computes, the one before it is reported.
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

from flaxmnist import evaluation, folders, hosts, models, order, parallel
from flaxmnist.config import Config
from flaxmnist.data import Dataset, Split
from flaxmnist.errors import Diverged, Stopped, UserError
from flaxmnist.lock import Lock
from flaxmnist.logs import Clock, Progress, Records, logger, write_json
from flaxmnist.program import Backend, Program, first_state, place, state_shapes, train_logits
from flaxmnist.results import Run, load_run, result_of
from flaxmnist.state import Metrics, Totals, row_before

# Seconds that a chunk takes at most, about: how soon a signal is answered.
CHUNK_SECONDS = 1.0

# Steps of a trace, done after as many to warm up.
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
    """Trains and evaluates; where there is a ``workdir``, everything is kept there, else nothing touches the disk.

    ``devices`` is how many to use (None: all), ``backend`` how training is compiled for them, ``model_parallel`` over
    how many of them each dense kernel is split. ``profile`` is a folder for a trace of a few steady steps.
    ``experiment`` is the file that ``config`` came from, to be named in ``config.json``. ``stop``, once set, ends the
    run after the chunk at hand, with a checkpoint. ``clock`` holds what the command spent before.

    Raises UserError for what the caller can mend, Diverged where loss, gradient or weights are no longer finite, and
    Stopped.
    """
    config = order.resolve(config, len(data.train.labels))
    mesh = parallel.make_mesh(devices, model_parallel)
    check(config, data, mesh, backend)
    folder = None if workdir is None else Path(workdir)
    described = folders.describe(config, data, mesh, backend, experiment)
    lock = Lock()
    try:
        if folder is not None:
            look = partial(folders.is_finished, folder, lock, described, resume, overwrite, allow_config_change)
            if hosts.on_first(look):
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
    """Raises UserError where ``config`` cannot be trained on ``data``, before anything is touched."""
    if backend == "pmap" and (jax.process_count() > 1 or mesh.shape[parallel.MODEL] > 1):
        raise UserError("--backend pmap is for one process and whole parameters: take --backend jit")
    parallel.check_batch(config.train.batch_size, mesh)
    order.steps_per_epoch(config, len(data.train.labels))
    if config.data.order == "file" and not data.file_order:
        raise UserError(f"data.order file needs the original files, but these images are {data.source}")
    shapes = state_shapes(config, data)
    parallel.check_model(shapes.params, mesh)
    parallel.check_memory(
        "the state of this model", sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes)), mesh
    )


class Loop:
    """What a run needs while it goes: the program, the data on the devices, and where it tells and keeps things."""

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
            self.state = first_state(config, data, mesh)
        self.archive, self.records = None, Records(None)
        if folder is not None:
            # Orbax takes a third of a second to import, which a run without a folder need not spend.
            from flaxmnist.archive import Archive

            with clock("checkpoint"):
                self.archive = Archive(folder, lock, described, config, self.state, clock)
            self.state, self.records = self.archive.state, self.archive.records
        self.step = int(self.state.step)
        self.rate = 1.0  # steps a second, as far as is known
        self.stopping = False  # whether some process was told to stop
        self.progress = Progress(config.train.length, self.step, config.train.batch_size)

    def close(self) -> None:
        self.progress.close()
        if self.archive is not None:
            self.archive.close()

    # --- The loop ---------------------------------------------------------------------------------------------------

    def run(self, profile: str | Path | None, stop: threading.Event) -> Run:
        """Trains to the end, or until ``stop``; then evaluates on the test images, once."""
        config = self.config
        if self.step < config.train.length:
            with self.clock("data"):
                train = place(self.data.train, self.mesh)
            with self.clock("compile"):
                self.program = Program(config, self.state, train, self.mesh, self.backend)
            parallel.check_memory("training", self.program.bytes, self.mesh)
            if profile is not None:
                self.trace(Path(profile))
        self.progress.begin()
        while self.step < config.train.length and not stops_early(config, self.records.few):
            if config.train.report in ("batch_accuracy", "probabilities") and self.is_logged(self.step):
                self.look_at_batch()
            self.advance(self.next_due(), stop)
            if self.is_due(config.train.evaluate_every):
                self.evaluate("validation", self.data.validation)
            ends = self.stopping or stops_early(config, self.records.few)
            if ends or self.is_due(config.train.checkpoint_every) or self.is_retry_due():
                self.save()
            if self.stopping and self.step < config.train.length:
                self.settle()
                kept = "no folder kept it" if self.folder is None else "--resume goes on"
                raise Stopped(f"stopped at step {self.step} of {config.train.length}; {kept}")
        self.settle()
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

    def is_retry_due(self) -> bool:
        """Whether saving failed, and it is time to try again."""
        return self.archive is not None and self.archive.is_retry_due()

    def trace(self, folder: Path) -> None:
        """Writes a trace of a few steady steps, done on a copy of the state, to ``folder``."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write a trace to {folder}: {error.strerror}; give another --profile") from None
        count = min(PROFILE_STEPS, self.program.capacity)
        state = jax.tree.map(jnp.copy, self.state)
        state, _ = jax.block_until_ready(self.program(state, self.step, count))
        with jax.profiler.trace(str(folder)):
            jax.block_until_ready(self.program(state, self.step, count))

    def advance(self, until: int, stop: threading.Event) -> None:
        """Trains up to step ``until``, or for one chunk more after ``stop``."""
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
                # Only after a chunk: what was told before it, it belongs to. All processes do the same steps next.
                self.stopping, self.rate = hosts.agree(stop.is_set(), self.rate)
                if self.stopping or self.is_retry_due():
                    break
            if unreported is not None:
                self.report(*unreported)

    # --- What happens on the way ------------------------------------------------------------------------------------

    def report(self, start: int, count: int, metrics: Metrics) -> None:
        """Waits for a chunk of ``count`` steps from ``start`` on; records and prints what is to be told of them."""
        metrics = jax.device_get(metrics)
        losses, accuracies = means(metrics.batch)
        costs, shares = means(metrics.epoch)
        nonfinite = metrics.nonfinite(start, count)
        style = self.config.train.report
        for i, step in enumerate(range(start, start + count)):
            number, position = divmod(step, self.epoch_length)
            if step in nonfinite:
                self.leave_out(step, number, nonfinite[step])
            elif self.is_logged(step):
                norm = metrics.gradient_norm[i]
                self.records.add(step, number, "train", loss=losses[i], accuracy=accuracies[i], gradient_norm=norm)
                if style == "loss":
                    logger.info("step %d, loss %.4f, accuracy %.4f", step, losses[i], accuracies[i])
                elif style == "batch_loss":
                    logger.info("epoch %d, batch %d, loss %.6f", number, position, losses[i])
            if position == self.epoch_length - 1 and np.isfinite(costs[i]):
                self.records.add(step + 1, number + 1, "epoch", loss=costs[i], accuracy=shares[i])
                if style == "epoch_cost":
                    logger.info("Epoch: %04d, Cost: %.9f", number + 1, costs[i])
        self.progress.show(start + count, losses[count - 1], accuracies[count - 1])
        if self.archive is not None:
            self.archive.watch()

    def leave_out(self, step: int, epoch: int, reason: str) -> None:
        """Records that ``step`` changed nothing, for ``reason``. Raises Diverged where too many in a row did not."""
        left_out = [record["step"] for record in self.records.few if record["split"] == "skipped"]
        allowed = self.config.train.skip_nonfinite
        if row_before(step, left_out) >= allowed:
            after = f", after {allowed} steps in a row were left out" if allowed else ""
            raise Diverged(f"{reason}{after}: {self.advice()}")
        self.records.add(step, epoch, "skipped", count=len(left_out) + 1)
        logger.warning("%s: this step is left out", reason)

    def advice(self) -> str:
        """What is left of a run that diverged, and what to do."""
        last = None if self.archive is None else self.archive.last()
        kept = "no checkpoint was saved" if last is None else f"the checkpoint at step {last} is kept"
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
                logits = parallel.gather(train_logits(self.config, self.state, images), self.mesh)
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
        if not np.isfinite(seen.loss):
            raise Diverged(f"the {split} loss after step {self.step} is {seen.loss}: {self.advice()}")
        epoch = self.step // self.epoch_length
        self.records.add(self.step, epoch, split, loss=seen.loss, accuracy=seen.accuracy)
        logger.info("step %d, %s loss %.4f, accuracy %.4f", self.step, split, seen.loss, seen.accuracy)
        self.draw(split, seen)
        return seen

    def draw(self, split: str, seen: evaluation.Evaluation) -> None:
        """Has pictures of the model, and of what was ``seen`` on ``split``, kept where there is a folder."""
        if self.archive is not None:
            with self.clock("checkpoint"):
                weights = self.state.weights
                if jax.process_count() > 1:
                    weights = parallel.gather(weights, self.mesh)
                model = nnx.merge(self.state.graphdef, weights)
                shape = self.data.train.images.shape[1:3]
                self.archive.draw(self.step, split, seen, models.first_weights(model, shape))

    def save(self) -> None:
        """Saves a checkpoint in the background, with the records that belong to it."""
        if self.archive is not None:
            if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(self.state.params)):
                raise Diverged(f"the weights after step {self.step} are not finite: {self.advice()}")
            self.archive.save(self.state, self.accuracy())

    def settle(self) -> None:
        """Returns when the run is on the disk, as far as it is. Raises UserError where that cannot be."""
        if self.archive is not None:
            with self.clock("checkpoint"):
                self.archive.settle(self.state, self.accuracy())

    def accuracy(self) -> float | None:
        """The accuracy on the validation images, where it is known of this very step."""
        last = self.latest("validation")
        return last["accuracy"] if last and last["step"] == self.step else None

    def latest(self, split: str) -> dict[str, Any] | None:
        """The last record of ``split``."""
        return next((record for record in reversed(self.records.few) if record["split"] == split), None)

    def finish(self) -> Run:
        """Scores the test images, and writes the result."""
        test = self.evaluate("test", self.data.test)
        assert test is not None  # every data set has test images
        validation = self.latest("validation")
        accuracy = None if validation is None else validation["accuracy"]
        state = parallel.gather(self.state, self.mesh)
        result = result_of(
            self.config,
            state,
            self.mesh,
            self.backend,
            self.clock,
            epochs=self.step / self.epoch_length,
            validation_accuracy=accuracy,
            test=test,
        )
        if self.archive is not None and hosts.is_first():
            try:
                self.archive.end()
                write_json(self.archive.folder / "result.json", result)
            except OSError as error:
                raise folders.unwritable(self.archive.folder, error) from None
        return Run(self.config, state, folders.describe_data(self.data), self.records.history, result)


def means(totals: Totals) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Mean loss and accuracy of each step; NaN where a step did not happen."""
    with np.errstate(invalid="ignore"):
        images = np.asarray(totals.images)
        return np.asarray(totals.loss) / images, np.asarray(totals.correct) / images


def stops_early(config: Config, records: list[dict[str, Any]]) -> bool:
    """Whether the validation records so far meet ``train.stop_accuracy``, or have not risen for ``train.patience``."""
    target, patience = config.train.stop_accuracy, config.train.patience
    if target is None and patience is None:
        return False
    accuracies = [record["accuracy"] for record in records if record["split"] == "validation"]
    if not accuracies:
        return False
    reached = target is not None and max(accuracies) >= target
    return reached or (patience is not None and len(accuracies) - 1 - int(np.argmax(accuracies)) >= patience)
