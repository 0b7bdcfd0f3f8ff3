"""Ensembles of trials of a sweep, which predict by the mean of their probabilities."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from flaxmnist import fields
from flaxmnist.config import Config
from flaxmnist.devices import evaluation
from flaxmnist.errors import UserError
from flaxmnist.store import folders
from flaxmnist.store.trained import get_split, load_training_data
from flaxmnist.sweeps import statistics
from flaxmnist.sweeps.parts import load_trials


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


def evaluate(workdir: Path, size: int | None, split: str = "test", data_dir: Path | None = None) -> Ensemble:
    """Evaluate the first ``size`` trials (None: all), by seed, of the best setting of the sweep in ``workdir``.

    Raise UserError if the sweep is not finished, has no best setting, or has fewer trials.
    """
    with folders.damage_as_user_error(workdir):
        setting, config, data, trials = load_best_trials(workdir)
    if size is not None and not 1 <= size <= len(trials):
        raise UserError(f"{workdir} has {len(trials)} trials of its best setting: pass --ensemble a number up to that")
    images = get_split(workdir, load_training_data(workdir, config, data, data_dir), split)
    probabilities = [evaluation.predict(model, images.images)[1] for model in trials[:size]]
    together = score(np.mean(probabilities, axis=0), images.labels)
    return Ensemble(setting, len(images.labels), [score(p, images.labels) for p in probabilities], together)


def load_best_trials(workdir: Path) -> tuple[str, Config, dict[str, Any], list[nnx.Module]]:
    """Load the best setting of the sweep in ``workdir``: its title, config, description of the data, and models."""
    result, described = folders.read_json(workdir / "result.json"), folders.read_json(workdir / "sweep.json")
    best = result["best"]
    if best is None:
        raise UserError(f"{workdir} has no best setting: an ensemble needs validation images, or a single setting")
    models = [
        model
        for line, model in load_trials(workdir)
        if (line["experiment"], line["fields"]) == (best["experiment"], best["fields"])
    ]
    index = result["experiments"].index(best["experiment"])
    config = fields.from_json(described["experiments"][index], Config)
    return statistics.title(best), config, described["data"][index], models
