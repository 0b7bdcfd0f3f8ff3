"""The members of a sweep that answer together: the mean of their probabilities."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from flaxmnist import evaluation, fields, folders, inspection, statistics
from flaxmnist.config import Config
from flaxmnist.errors import UserError
from flaxmnist.parts import load_members
from flaxmnist.trained import data_of, split_of


@dataclass(frozen=True)
class Answers:
    """How right a set of answers is, and how right about that."""

    accuracy: float  # share answered rightly
    calibration_error: float  # expected calibration error


@dataclass(frozen=True)
class Ensemble:
    """Members of one setting, alone and together."""

    setting: str
    count: int  # images
    members: list[Answers]
    together: Answers


def answers(probabilities: np.ndarray, labels: np.ndarray) -> Answers:
    """What ``probabilities`` are worth against ``labels``."""
    accuracy = float((probabilities.argmax(axis=1) == labels).mean())
    return Answers(accuracy, evaluation.reliability(probabilities, labels).error())


def evaluate(workdir: Path, size: int | None, split: str = "test", data_dir: Path | None = None) -> Ensemble:
    """The first ``size`` members (None: all) of the best setting of the sweep in ``workdir``, by their seeds' order.

    Raises UserError where the sweep is not finished, chose no setting, or has fewer members.
    """
    with folders.as_saved(workdir):
        setting, config, about, chosen = best_members(workdir)
    if size is not None and not 1 <= size <= len(chosen):
        raise UserError(f"{workdir} has {len(chosen)} members of its best setting: give --ensemble a number up to that")
    images = split_of(workdir, data_of(workdir, config, about, data_dir), split)
    each = [evaluation.predict(model, images.images)[1] for model in chosen[:size]]
    together = answers(np.mean(each, axis=0), images.labels)
    return Ensemble(setting, len(images.labels), [answers(one, images.labels) for one in each], together)


def best_members(workdir: Path) -> tuple[str, Config, dict[str, Any], list[nnx.Module]]:
    """The best setting of the sweep in ``workdir`` in words, its config, what is noted of its data, and its models."""
    result, about = folders.read_json(workdir / "result.json"), folders.read_json(workdir / "sweep.json")
    best = result["best"]
    if best is None:
        raise UserError(f"{workdir} has no best setting: an ensemble needs validation images, or a single setting")
    chosen = [
        model
        for line, model in load_members(workdir)
        if (line["experiment"], line["fields"]) == (best["experiment"], best["fields"])
    ]
    number = result["experiments"].index(best["experiment"])
    config = fields.from_json(about["experiments"][number], Config)
    return statistics.title(best), config, about["data"][number], chosen


def report(ensemble: Ensemble) -> str:
    """The members and the ensemble as a table."""
    rows: list[tuple[str, ...]] = [(ensemble.setting, "accuracy", "calibration error")]
    for name in ("mean", "std", "min", "max"):
        cells = [
            statistics.summarise([getattr(one, part) for one in ensemble.members])[name]
            for part in ("accuracy", "calibration_error")
        ]
        rows.append((f"members, {name}", *("" if cell is None else f"{cell:.4f}" for cell in cells)))
    together = ensemble.together
    rows.append(
        (f"ensemble of {len(ensemble.members)}", f"{together.accuracy:.4f}", f"{together.calibration_error:.4f}")
    )
    return f"{inspection.table(rows)}\n{ensemble.count} images"
