"""Ensembles of trials of a sweep, which predict by the mean of their probabilities."""

from dataclasses import dataclass
from pathlib import Path

from flaxmnist.config import Config
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
    shifts: int = 0,
) -> Ensemble:
    """Evaluate the first ``size`` trials (None: all), by seed, of the best setting of the sweep in ``workdir``.

    For ``config`` see ``load_run``, for ``shifts`` ``evaluation.predict``. Raise UserError if the sweep is unfinished,
    has no best setting, or has fewer trials.
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
    data = load_training_data(workdir, trained.data, data, data_dir)
    split_images = get_split(workdir, data, split)
    members = [evaluation.evaluate(model, *split_images, data.class_names, shifts) for model in models[:count]]
    together = evaluation.mean_prediction(member.logits for member in members)
    return Ensemble(best.title, members, evaluation.score_logits(together, *split_images, data.class_names))
