"""Train the trials of a sweep, with as few compiled programs as possible."""

import itertools
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from flaxmnist.config import Config
from flaxmnist.console import Progress, logger
from flaxmnist.core import checks
from flaxmnist.core.steps import Step, train_step
from flaxmnist.data.sets import Dataset
from flaxmnist.devices import parallel
from flaxmnist.devices.program import MakeArrays, TrialProgram, put_split, step_arrays
from flaxmnist.errors import UserError
from flaxmnist.store.initial import load_initial
from flaxmnist.store.provenance import DataInfo, DeviceInfo, StepInfo, versions
from flaxmnist.sweeps.folder import SweepFolder, open_sweep_folder
from flaxmnist.sweeps.plan import TRACED, Experiment, Group, group_trials, plan_trials
from flaxmnist.sweeps.results import Sweep, SweepInfo
from flaxmnist.sweeps.settings import distinct
from flaxmnist.sweeps.trials import Trials

# Fraction of a device's memory that trials may use.
MEMORY_FRACTION = 0.5


def sweep(
    config: Config,
    data: Dataset,
    *,
    seeds: int | Sequence[int] = 8,
    over: Mapping[str, Sequence[Any]] | None = None,
    share_order: bool = False,
    exact: bool = False,
    devices: int | None = None,
    step: Step = train_step,
    arrays: MakeArrays | None = None,
) -> Sweep:
    """Train ``config`` with each seed and each combination of the values in ``over``, {dotted field: values}.

    ``seeds`` is a list, or a number of seeds counted from 0. With ``share_order`` all trials use the batches of the
    first seed, which makes small models fast. With ``exact`` each trial is bitwise identical to ``fit``. For ``step``
    and ``arrays`` see ``fit``. Raise UserError.
    """
    seeds, over = range(seeds) if isinstance(seeds, int) else list(seeds), over or {}
    # A value of NumPy becomes a number of Python.
    columns = [
        [value.item() if isinstance(value, np.generic) else value for value in values] for values in over.values()
    ]
    settings = [dict(zip(over, values, strict=True)) for values in itertools.product(*columns)]
    experiment = Experiment(config, data, step, arrays)
    return run_sweep([experiment], seeds, settings, share_order=share_order, exact=exact, devices=devices)


def run_sweep(
    experiments: Sequence[Experiment],
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
    """Train every experiment with every setting and seed once; save the sweep in ``workdir`` unless it is None."""
    names = [config.name for config, *_ in experiments]
    if len(set(names)) < len(names):
        raise UserError(f"experiments of a sweep need different names, but these are {', '.join(names)}: rename one")
    mesh, trials = parallel.make_mesh(devices), plan_trials(experiments, seeds, settings, share_order)
    groups = group_trials(trials, share_order, exact)
    for trial in (group.trials[0] for group in groups):
        arrays = step_arrays(trial.arrays, trial.config, trial.data)
        checks.check(trial.config, trial.data, trial.step, arrays, num_shards=1)
        load_initial(trial.config, trial.data)
    info = SweepInfo(
        experiments=tuple(experiment.config for experiment in experiments),
        steps={config.name: info for config, _, step, _ in experiments if (info := StepInfo.of(step))} or None,
        data=tuple(DataInfo.of(experiment.data) for experiment in experiments),
        seeds=tuple(distinct(seeds)),
        settings=tuple(distinct(settings)),
        share_order=share_order,
        exact=exact,
        devices=DeviceInfo.of(mesh, "jit"),
        versions=versions(),
    )
    with open_sweep_folder(workdir, info, resume=resume, overwrite=overwrite) as folder:
        lengths = [trial.config.train.length for trial in trials]
        progress = Progress(
            sum(lengths), sum(lengths[index] for index in folder.results), trials[0].config.train.batch_size
        )
        try:
            with parallel.memory_errors():
                for group in groups:
                    train_group(group, mesh, folder, progress, stop or threading.Event())
        finally:
            progress.close()
            folder.flush()
        return folder.finish(sum(lengths))


def train_group(group: Group, mesh: Mesh, folder: SweepFolder, progress: Progress, stop: threading.Event) -> None:
    """Train the trials of ``group`` that are not finished yet."""
    if folder.has(group.trials):
        return
    try:
        program = compile_group(group, mesh)
    except Exception:
        own = [name for name in group.names if not TRACED.fullmatch(name)]
        if not own:
            raise
        logger.info("%s cannot be traced: each value gets its own program", ", ".join(own))
        for part in separate(group):
            train_group(part, mesh, folder, progress, stop)
        return
    for start in range(0, len(group.trials), program.size):
        trials = group.trials[start : start + program.size]
        if not folder.has(trials):
            training = Trials(program, trials, group.names)
            folder.restore_unfinished(training)
            training.train(progress, stop, folder.is_save_due, partial(folder.save_unfinished, training))
            folder.add(training)
    folder.save()


def separate(group: Group) -> list[Group]:
    """Return the trials of ``group`` in groups without fields whose values differ."""
    groups: dict[str, Group] = {}
    for trial in group.trials:
        values = repr([trial.fields[name] for name in group.names])
        groups.setdefault(values, replace(group, trials=[], names=())).trials.append(trial)
    return list(groups.values())


def compile_group(group: Group, mesh: Mesh) -> TrialProgram:
    """Compile the program for as many trials at once as fit into the memory of a device."""
    first = group.trials[0]
    images = put_split(first.data.train, mesh)
    per_device = 1 if group.sequential else -(-len(group.trials) // mesh.size)
    while True:
        program = TrialProgram(
            first.config,
            group.names,
            first.data,
            images,
            mesh,
            per_device,
            group.share_order,
            first.step,
            first.arrays,
        )
        if per_device == 1 or program.bytes <= MEMORY_FRACTION * parallel.device_memory(mesh):
            return program
        per_device = -(-per_device // 2)
