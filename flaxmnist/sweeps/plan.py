"""The trials of a sweep, and which of them share a compiled program.

If trials are vectorised, those that differ only in seed and in fields that change no shape share a program. If they run
sequentially, each setting has its own program, and each trial is bitwise identical to a single run.
"""

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax

from flaxmnist import fields
from flaxmnist.config import Config, MLPConfig, SoftmaxConfig
from flaxmnist.core.steps import Step, train_step
from flaxmnist.data import order
from flaxmnist.data.sets import Dataset
from flaxmnist.devices.program import MakeArrays
from flaxmnist.errors import UserError
from flaxmnist.sweeps.settings import distinct

# Fields whose values may differ between the trials of one program.
TRACED = re.compile(
    r"optimizer\.(learning_rate|momentum|b1|b2|weight_decay)|model\.dropout|objective\.(label_smoothing|gamma)"
    r"|model\.(kernel|bias)_init\.\w+"
)

# Fields that cannot be swept: the experiment, its images and the seeds define them.
FIXED = {"name", "seed", "data.name", "data.validation", "data.order_seed"}

MAX_TRIALS = 100_000


class Experiment(NamedTuple):
    """A config to sweep, with its data and its step."""

    config: Config
    data: Dataset
    step: Step = train_step
    arrays: MakeArrays | None = None


@dataclass(frozen=True)
class Trial:
    """One run of a sweep."""

    index: int  # in the sweep
    config: Config  # with its length in steps
    data: Dataset
    fields: dict[str, Any]  # values of the swept fields, by dotted name
    step: Step
    arrays: MakeArrays | None


@dataclass(frozen=True)
class Group:
    """Trials that share one compiled program."""

    trials: list[Trial]
    names: tuple[str, ...]  # fields whose values differ between them
    sequential: bool  # one trial at a time per device, not vectorised
    share_order: bool


def plan_trials(
    experiments: Sequence[Experiment],
    seeds: Sequence[int],
    settings: Sequence[dict[str, Any]],
    share_order: bool,
) -> list[Trial]:
    """Return the trials ordered by experiment, setting and seed. Raise UserError if a config is invalid."""
    if len(experiments) * len(settings) * len(seeds) > MAX_TRIALS:
        raise UserError(f"a sweep has at most {MAX_TRIALS:,} trials: pass fewer seeds, values or experiments")
    trials = []
    for experiment, setting, seed in itertools.product(experiments, distinct(settings), distinct(seeds)):
        config, data, step, arrays = experiment
        if config.train.patience is not None or config.train.stop_accuracy is not None:
            raise UserError("trials of a sweep cannot stop early: set train.patience and train.stop_accuracy to None")
        for name, value in setting.items():
            if name in FIXED:
                raise UserError(f"{name} cannot be swept: it is set by the experiment and --seeds")
            fields.get(config, name)  # raises UserError if there is no such field
            items = value if isinstance(value, tuple | list) else [value]
            if not all(isinstance(item, bool | int | float | str | None) for item in items):
                raise UserError(f"the values of {name} must be numbers, words, None or tuples of them, not {value!r}")
            config = fields.replace(config, name, value, check=False)
        for given, other in (("train.steps", "train.epochs"), ("train.epochs", "train.steps")):
            if given in setting and other not in setting:
                config = fields.replace(config, other, None, check=False)
        if share_order and config.data.order_seed is None:
            config = fields.replace(config, "data.order_seed", seeds[0], check=False)
        # Checked only when all values are set, because some are only valid together.
        config = order.resolve_length(replace(config, seed=seed), len(data.train.labels))
        trials.append(Trial(len(trials), config, data, dict(setting), step, arrays))
    if not trials:
        raise UserError("there is nothing to train: pass at least one seed and one value of each field")
    return trials


def group_trials(trials: list[Trial], share_order: bool, exact: bool) -> list[Group]:
    """Group the trials by the program that trains them. With ``exact`` all run sequentially."""
    groups: dict[str, Group] = {}
    for trial in trials:
        sequential = exact or runs_sequentially(trial.config, share_order)
        names = () if sequential else tuple(name for name in trial.fields if may_be_traced(trial, name))
        static = fields.flatten(fields.to_json(trial.config))
        for name in ("seed", "data.order_seed", *names):
            del static[name]
        groups.setdefault(json.dumps(static), Group([], names, sequential, share_order)).trials.append(trial)
    return list(groups.values())


def may_be_traced(trial: Trial, name: str) -> bool:
    """Return True for a field that changes no shape, and for a float of a user's dataclass, which may change none."""
    own = type(fields.get(trial.config, name.partition(".")[0])) in fields.user_classes(trial.config)
    return bool(TRACED.fullmatch(name)) or (own and isinstance(trial.fields[name], float))


def runs_sequentially(config: Config, share_order: bool) -> bool:
    """Return True if trials train faster sequentially than vectorised.

    On CPU this holds for CNNs, and for all models if each trial has its own batches; it is assumed for models of the
    user's. Steps/s of 8 and 16 vectorised trials relative to a single run: `quickstart` 0.85 and 0.82, `speedrun` 0.86
    and 0.74, `cnn_experts` 0.71 and 0.46 (two cores of an AMD EPYC with AVX-512, JAX 0.10.2; 0.67 and 0.52 with JAX
    0.12.0.1). `softmax_beginners` × 128 with shared batches 4.2; × 32 with own batches 1.2, but not bitwise identical
    (two cores of a Xeon with AVX-512). GPUs and TPUs have not been measured; trials are always vectorised there.
    """
    dense = isinstance(config.model, SoftmaxConfig | MLPConfig)
    return jax.default_backend() == "cpu" and not (dense and share_order)
