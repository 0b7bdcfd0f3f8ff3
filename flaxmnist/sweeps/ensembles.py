"""Ensembles of trials of a sweep, which predict by the mean of their probabilities."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flaxmnist.config import Config
from flaxmnist.core.metrics import log_softmax
from flaxmnist.devices import evaluation
from flaxmnist.devices.evaluation import Evaluation
from flaxmnist.errors import UserError
from flaxmnist.store.files import read_json
from flaxmnist.store.load import classes_of, get_split, load_training_data
from flaxmnist.sweeps.folder import load_trials
from flaxmnist.sweeps.results import SweepInfo, SweepResult


@dataclass(frozen=True)
class Ensemble:
    """Scores of each member, a trial of one setting, and of the ensemble."""

    setting: str
    members: list[Evaluation]
    together: Evaluation


def evaluate_ensemble(
    workdir: Path,
    size: int | None,
    split: str = "test",
    data_dir: Path | None = None,
    config: Config | None = None,
) -> Ensemble:
    """Evaluate the first ``size`` trials (None: all), by seed, of the best setting of the sweep in ``workdir``.

    For ``config`` see ``load_run``. Raise UserError if the sweep is not finished, has no best setting, or has fewer
    trials.
    """
    classes = classes_of(config)
    info = read_json(workdir / "sweep.json", SweepInfo, classes)
    result = read_json(workdir / "result.json", SweepResult)
    best = result.best
    if best is None:
        raise UserError(f"{workdir} has no best setting: an ensemble needs validation images, or a single setting")
    models = [model for trial, model in load_trials(workdir, classes) if trial.setting == best.setting]
    count = len(models) if size is None else size
    if not 1 <= count <= len(models):
        raise UserError(f"{workdir} has {len(models)} trials of its best setting: pass --ensemble a number up to that")
    trained, data = info.experiment(best.experiment)
    images, labels = get_split(workdir, load_training_data(workdir, trained.data, data, data_dir), split)
    logits = [evaluation.predict_logits(model, images) for model in models[:count]]
    with np.errstate(divide="ignore"):  # of a probability that rounds to 0
        together = np.log(np.mean([np.exp(log_softmax(each)) for each in logits], axis=0))
    members = [evaluation.score_logits(each, labels) for each in logits]
    return Ensemble(best.title, members, evaluation.score_logits(together, labels))
