"""Ensembles of trials of a sweep, which predict by the mean of their probabilities."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flaxmnist.config import Config
from flaxmnist.devices import evaluation
from flaxmnist.errors import UserError
from flaxmnist.store.files import read_json
from flaxmnist.store.load import classes_of, get_split, load_training_data
from flaxmnist.sweeps.folder import load_trials
from flaxmnist.sweeps.results import SweepInfo, SweepResult


@dataclass(frozen=True)
class Scores:
    """Accuracy and calibration of predictions."""

    accuracy: float  # fraction of correct predictions
    calibration_error: float  # expected calibration error


@dataclass(frozen=True)
class Ensemble:
    """Scores of each member, a trial of one setting, and of the ensemble."""

    setting: str
    count: int  # images
    members: list[Scores]
    together: Scores


def score(probabilities: np.ndarray, labels: np.ndarray) -> Scores:
    accuracy = float((probabilities.argmax(axis=1) == labels).mean())
    return Scores(accuracy, evaluation.reliability(probabilities, labels).error())


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
    probabilities = [evaluation.predict(model, images)[1] for model in models[:count]]
    together = score(np.mean(probabilities, axis=0), labels)
    return Ensemble(best.title, len(labels), [score(p, labels) for p in probabilities], together)
