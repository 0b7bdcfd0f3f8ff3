"""What a run folder knows, without the experiment file: its model, how well it does, what it reads."""

import contextlib
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import jax
import numpy as np

from flaxmnist import digits, evaluation, fields, folders, steps
from flaxmnist.config import Config
from flaxmnist.data import load_data
from flaxmnist.errors import UserError
from flaxmnist.state import TrainState


def load_run(workdir: str | Path, which: str = "latest") -> tuple[Config, TrainState]:
    """The config and the state of the checkpoint called ``which``: "latest", "best" or a step.

    Needs the run folder alone. Raises UserError where it holds no such checkpoint.
    """
    from flaxmnist.checkpoints import Checkpoints

    folder = Path(workdir)
    described = folders.read_json(folder / "config.json")
    config = fields.from_json(described.get("config"), Config)
    try:
        height, width = described["data"]["shape"]
        create = partial(steps.create_state, config, (height, width), described["data"]["classes"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{folder / 'config.json'} does not say what the data are") from None
    with contextlib.closing(Checkpoints(folder / "checkpoints", read_only=True)) as checkpoints:
        step = checkpoints.find(which)
        if step is None:
            raise UserError(f"{folder} has no checkpoint yet: train on with --resume")
        state, _ = checkpoints.restore(step, jax.eval_shape(create))
    return config, state


def evaluate_run(
    workdir: str | Path, which: str = "latest", split: str = "test", data_dir: str | Path | None = None
) -> evaluation.Evaluation:
    """How the checkpoint called ``which`` does on a split of its own data set."""
    config, state = load_run(workdir, which)
    images = load_data(config.data, data_dir).splits()[split]
    if images is None:
        raise UserError(f"{workdir} has no {split} images: its data.validation is 0")
    return evaluation.evaluate(state.model, *images)


def predict_files(
    workdir: str | Path, paths: Iterable[str | Path], which: str = "latest"
) -> Iterator[tuple[Path, int, list[float]]]:
    """Each image file, its class, and the probabilities of all classes; raises UserError for no digit."""
    files = digits.find_images(paths)
    images = np.stack([digits.read_digit(file) for file in files])
    classes, probabilities = evaluation.predict(load_run(workdir, which)[1].model, images)
    for file, answer, row in zip(files, classes, probabilities, strict=True):
        yield file, int(answer), row.tolist()
