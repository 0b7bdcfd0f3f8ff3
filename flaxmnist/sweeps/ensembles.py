"""Ensembles: trials of a sweep that predict by the mean of their probabilities."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from flax import nnx

from flaxmnist.config import Config
from flaxmnist.devices import evaluation
from flaxmnist.devices.evaluation import Evaluation
from flaxmnist.errors import UserError
from flaxmnist.store.files import read_json
from flaxmnist.store.load import classes_of, get_split, load_training_data
from flaxmnist.store.provenance import DataInfo
from flaxmnist.sweeps.folder import load_sweep, load_trials
from flaxmnist.sweeps.results import BestSetting, SweepInfo


@dataclass(frozen=True)
class Ensemble:
    """Scores of each member, a trial of one setting, and of the ensemble."""

    setting: str
    members: list[Evaluation]
    together: Evaluation


class Committee(NamedTuple):
    """The models of the trials of a sweep's best setting, with the config and the data of their experiment."""

    setting: BestSetting
    config: Config
    data: DataInfo
    models: list[nnx.Module]


def load_committee(folder: Path, size: int | None = None, config: Config | None = None) -> Committee:
    """Load the models of the first ``size`` trials (None: all), by seed, of the best setting of a sweep.

    For ``config`` see ``load_run``. Raise UserError if the sweep in ``folder`` is unfinished, has no best setting, or
    has fewer trials.
    """
    best, classes = load_sweep(folder).result.best, classes_of(config)
    if best is None:
        needed = "validation images or a single setting, and no diverged trials in it"
        raise UserError(f"{folder} has no best setting: an ensemble needs {needed}")
    models = [model for trial, model in load_trials(folder, classes) if trial.setting == best.setting]
    count = len(models) if size is None else size
    if not 1 <= count <= len(models):
        raise UserError(f"{folder} has {len(models)} trials of its best setting: use 1 to {len(models)} of them")
    trained = read_json(folder / "sweep.json", SweepInfo, classes).experiment(best.experiment)
    return Committee(best, *trained, models[:count])


def load_members(workdir: str | Path, size: int | None = None, *, config: Config | None = None) -> list[nnx.Module]:
    """Load the models of a sweep, as ``load_committee`` does."""
    return load_committee(Path(workdir), size, config).models


def evaluate_ensemble(
    workdir: Path,
    size: int | None,
    split: str = "test",
    data_dir: Path | None = None,
    config: Config | None = None,
    shifts: int = 0,
) -> Ensemble:
    """Evaluate the models of ``load_committee``, and their mean prediction. For ``shifts`` see ``evaluate_run``."""
    best, trained, saved, models = load_committee(workdir, size, config)
    data = load_training_data(workdir, trained.data, saved, data_dir)
    images = get_split(workdir, data, split)
    members = [evaluation.evaluate(model, *images, data.class_names, shifts) for model in models]
    together = evaluation.mean_prediction(member.logits for member in members)
    return Ensemble(best.title, members, evaluation.score_logits(together, *images, data.class_names))
