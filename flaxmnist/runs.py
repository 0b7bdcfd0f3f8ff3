"""One run, from config to result: ``fit`` and the training loop."""

import contextlib
import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from flaxmnist.config import Config
from flaxmnist.console import Clock, logger
from flaxmnist.core import checks, metrics, steps
from flaxmnist.core.state import Metrics, TrainState
from flaxmnist.core.steps import Step
from flaxmnist.data import order
from flaxmnist.data.sets import Dataset
from flaxmnist.devices import evaluation, parallel, program
from flaxmnist.devices.evaluation import Evaluation
from flaxmnist.devices.program import Backend, MakeArrays, Program
from flaxmnist.errors import Diverged, Stopped, UserError
from flaxmnist.loop.advance import Pace, advance
from flaxmnist.loop.conditions import is_due, next_due, stops_early
from flaxmnist.loop.log import TrainingLog
from flaxmnist.store.initial import load_initial
from flaxmnist.store.load import Run, load_run
from flaxmnist.store.provenance import RunInfo
from flaxmnist.store.result import Result
from flaxmnist.store.run_folder import NoFolder, open_folder

# Steps in a profiler trace.
PROFILE_STEPS = 10

# Called after each evaluation with the number of steps, the split ("validation" or "test") and the scores.
OnEvaluation = Callable[[int, str, Evaluation], None]

# Called at each checkpoint with the state, whose arrays are donated to the next step: copy those to keep.
OnCheckpoint = Callable[[TrainState], None]


@dataclass(frozen=True)
class Session:
    """Everything that a run in progress uses, besides its state."""

    info: RunInfo  # with the config, whose length is in steps
    data: Dataset
    step: Step
    arrays: Any  # of the step
    mesh: Mesh
    backend: Backend
    folder: NoFolder  # or a RunFolder
    log: TrainingLog
    clock: Clock
    stop: threading.Event
    on_evaluation: OnEvaluation | None
    on_checkpoint: OnCheckpoint | None


def fit(
    config: Config,
    data: Dataset,
    workdir: str | Path | None = None,
    *,
    step: Step = steps.train_step,
    arrays: MakeArrays | None = None,
    resume: bool = False,
    overwrite: bool = False,
    allow_config_change: bool = False,
    devices: int | None = None,
    backend: Backend = "jit",
    model_parallel: int = 1,
    profile: str | Path | None = None,
    profile_at: int | None = None,
    experiment: str | Path | None = None,
    initial: nnx.Module | None = None,
    stop: threading.Event | None = None,
    clock: Clock | None = None,
    on_evaluation: OnEvaluation | None = None,
    on_checkpoint: OnCheckpoint | None = None,
) -> Run:
    """Train and evaluate. Save everything in ``workdir``, or write nothing to disk if it is None.

    ``resume`` continues a run in ``workdir``, if there is one: it restores the newest intact checkpoint and the records
    up to it, or loads the run if it is finished. The config may differ only in length, intervals and reports, unless
    ``allow_config_change`` is set. ``overwrite`` deletes the run. (``store.claim`` decides; ``store.run_folder``
    restores and saves.)

    ``step(config, state, batch, arrays, *, axis_name)`` is the training step: the built-in one, or your own made of the
    functions in ``core.steps``. ``arrays(config, data)`` makes its ``arrays``, any pytree, at each start. ``initial``
    is a module whose weights training starts from (see also ``train.start_from``).

    ``devices`` is the number of devices to use (None: all), ``backend`` how training is compiled for them, and
    ``model_parallel`` the number of devices that each dense kernel is split over. ``profile`` is a folder for a trace
    of a few steps from ``profile_at`` on (None: the first step). ``experiment`` is the file that defines ``config``;
    its name goes into ``config.json``. Setting ``stop`` ends the run after the current chunk, with a checkpoint.
    ``clock`` contains the seconds that the command has spent so far. ``on_evaluation(step, split, scores)`` is called
    after each evaluation, ``on_checkpoint(state)`` at each checkpoint, also without a ``workdir``.

    Raise UserError if the caller can fix the problem, Diverged if loss, gradient or weights are no longer finite, and
    Stopped.
    """
    config = order.resolve_length(config, len(data.train.labels))
    mesh, clock, stop = parallel.make_mesh(devices, model_parallel), clock or Clock(), stop or threading.Event()
    with clock("data"):
        step_arrays = program.step_arrays(arrays, config, data)
    check(config, data, step, step_arrays, mesh, backend)
    if profile_at is not None and not 0 <= profile_at < config.train.length:
        raise UserError(f"--profile-at must be in [0, {config.train.length - 1}], but is {profile_at}")
    load = functools.cache(partial(load_initial, config, data, initial))
    if not resume:
        load()  # raises UserError before anything is written
    info = RunInfo.of(config, data, step, mesh, backend, experiment)
    with open_folder(workdir, info, clock, resume, overwrite, allow_config_change) as folder, parallel.memory_errors():
        if folder.finished:
            logger.info("%s is finished", workdir)
            return load_run(str(workdir), config=config)
        with clock("checkpoint"):
            state = folder.begin(program.state_shapes(config, data, mesh))
        if state is None:
            with clock("compile"):
                state = program.initial_state(config, data, mesh)
                state = program.with_weights(state, load()) if load() else state
        epoch_length = order.steps_per_epoch(config, len(data.train.labels))
        with contextlib.closing(TrainingLog(config, epoch_length, folder.records, int(state.step))) as log:
            session = Session(
                info=info,
                data=data,
                step=step,
                arrays=step_arrays,
                mesh=mesh,
                backend=backend,
                folder=folder,
                log=log,
                clock=clock,
                stop=stop,
                on_evaluation=on_evaluation,
                on_checkpoint=on_checkpoint,
            )
            try:
                return finish(session, train(session, state, profile, profile_at))
            except Diverged as error:
                last = folder.last_checkpoint()
                kept = "no checkpoint was saved" if last is None else f"the checkpoint at step {last} is kept"
                advice = "try a smaller --optimizer.learning-rate or an --optimizer.clip-norm"
                raise Diverged(f"{error}: training diverged, {kept}; {advice}") from None


def train(
    session: Session, state: TrainState, profile: str | Path | None = None, profile_at: int | None = None
) -> TrainState:
    """Train from ``state``, which is donated, to the end of the run, or until it stops early. Raise Stopped."""
    config, folder, log, clock = session.info.config.train, session.folder, session.log, session.clock
    step, length, pace = int(state.step), config.length, Pace()
    report_every = config.log_every if config.report in ("batch_accuracy", "probabilities") else None
    if step == length:
        return state
    trace_at = step if profile_at is None else profile_at
    if profile is not None:
        make_trace_folder(Path(profile))
        if trace_at < step:
            logger.info("no trace: the run resumes at step %d, after --profile-at", step)
    compiled = compile_training(session, state)
    log.progress.begin()

    def report(start: int, count: int, of_steps: Metrics) -> None:
        log.chunk(start, count, of_steps)
        folder.update()

    while step < length and not stops_early(config, folder.records.validations):
        if report_every and step % report_every == 0:
            report_batch(session, state)
        if profile is not None and step == trace_at:
            write_trace(compiled, state, Path(profile))
        until = next_due(step, length, config.evaluate_every, config.checkpoint_every, report_every, at=trace_at)
        with clock("train"):
            state, step, stopping, pausing = advance(
                compiled, state, step, until, pace=pace, report=report, stop=session.stop, pause=folder.is_save_due
            )
        evaluates = is_due(step, length, config.evaluate_every)
        saves = stopping or pausing or is_due(step, length, config.checkpoint_every)
        if evaluates or saves:
            with clock("evaluate"):
                state = program.with_batch_statistics(session.info.config, state, session.data.train)
        if evaluates:
            evaluate(session, state, "validation")
        if saves or stops_early(config, folder.records.validations):
            with clock("checkpoint"):
                folder.save(state)
            if session.on_checkpoint is not None:
                session.on_checkpoint(state)
        if stopping and step < length:
            with clock("checkpoint"):
                folder.flush(state)
            raise Stopped(f"stopped at step {step} of {length}; {folder.advice}")
    with clock("checkpoint"):
        folder.flush(state)
    return state


def finish(session: Session, state: TrainState) -> Run:
    """Evaluate on the test images and write the result."""
    info, folder = session.info, session.folder
    state = program.with_batch_statistics(info.config, state, session.data.train)
    test = evaluate(session, state, "test")
    assert test is not None  # every data set has test images
    state = parallel.gather(state, session.mesh)
    epochs, last = int(state.step) / session.log.epoch_length, folder.records.last("validation")
    validation = None if last is None else {name: last[name] for name in metrics.METRICS if name in last}
    result = Result.of(info, state, session.clock, epochs=epochs, validation=validation, test=test)
    folder.finish(result)
    return Run(info.config, info.data, folder.records.history, result, state)


# --- Parts of the above ---------------------------------------------------------------------------------------------


def check(config: Config, data: Dataset, step: Step, arrays: Any, mesh: Mesh, backend: Backend) -> None:
    """Raise UserError if ``config`` cannot be trained on ``data``, before anything is written."""
    if backend == "pmap" and (jax.process_count() > 1 or mesh.shape[parallel.MODEL] > 1):
        raise UserError("--backend pmap supports neither several processes nor --model-parallel: use --backend jit")
    order.steps_per_epoch(config, len(data.train.labels))
    checks.check(config, data, step, arrays, mesh.shape[parallel.BATCH])
    shapes = program.state_shapes(config, data, mesh)
    parallel.check_model(shapes, mesh)
    parallel.check_memory("the state of this model", parallel.bytes_per_device(shapes), mesh)


def compile_training(session: Session, state: TrainState) -> Program:
    """Put the training images on the devices and compile the training program."""
    with session.clock("data"):
        images = program.put_split(session.data.train, session.mesh)
        arrays = parallel.put(session.arrays, parallel.replicated(session.mesh))
    with session.clock("compile"):
        compiled = Program(session.info.config, state, images, session.mesh, session.backend, session.step, arrays)
    parallel.check_memory("training", compiled.bytes, session.mesh)
    return compiled


def make_trace_folder(folder: Path) -> None:
    """Make the ``folder`` for a trace. Raise UserError if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write a trace to {folder}: {error.strerror}; use another --profile") from None


def write_trace(compiled: Program, state: TrainState, folder: Path) -> None:
    """Write a profiler trace of a few steps to ``folder``. They are done with a copy of ``state``, after a warm-up."""
    step = int(state.step)
    steps = range(step, min(step + PROFILE_STEPS, compiled.config.train.length))
    state, _ = jax.block_until_ready(compiled(jax.tree.map(jnp.copy, state), step, 1))
    with jax.profiler.trace(str(folder)):
        for step in steps:
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, _ = jax.block_until_ready(compiled(state, step, 1))


def report_batch(session: Session, state: TrainState) -> None:
    """Record and print the model's accuracy or probabilities on the next batch, before training on it."""
    config, data, step = session.info.config, session.data, int(state.step)
    with session.clock("evaluate"):
        indices = order.batch_indices(config, len(data.train.labels), step, step + 1)[0]
        images, labels = (array[indices[indices >= 0]] for array in data.train)
        if config.train.report == "batch_accuracy":
            state = program.with_batch_statistics(config, state, data.train)
            session.log.batch_accuracy(step, evaluation.evaluate(state.model, images, labels))
        else:
            logits = parallel.gather(program.train_logits(config, state, images), session.mesh)
            session.log.batch_probabilities(step, np.exp(metrics.log_softmax(np.asarray(logits))))


def evaluate(session: Session, state: TrainState, split: str) -> Evaluation | None:
    """Evaluate on the images of ``split``, if there are any; record, print and draw the scores. Raise Diverged."""
    images, step = session.data.splits()[split], int(state.step)
    if images is None:
        return None
    with session.clock("evaluate"):
        scores = evaluation.evaluate(state.model, *images)
    session.log.evaluation(step, split, scores)
    with session.clock("checkpoint"):
        session.folder.draw(state, split, scores, session.data.train.images.shape[1:])
    if session.on_evaluation is not None:
        session.on_evaluation(step, split, scores)
    return scores
