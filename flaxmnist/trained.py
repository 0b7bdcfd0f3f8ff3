"""What a run folder knows, without the experiment file: its model, how well it does, what it reads."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, UInt8

from flaxmnist import digits, evaluation, fields, folders, manifest, order, steps
from flaxmnist.config import Config
from flaxmnist.data import Dataset, Split, load_data
from flaxmnist.errors import UserError
from flaxmnist.state import TrainState


@dataclass(frozen=True)
class Trained:
    """A checkpoint of a run, and what it was trained on."""

    config: Config
    state: TrainState = field(repr=False)
    data: dict[str, Any] = field(repr=False)  # name, source, shape, classes, sizes

    @property
    def model(self) -> nnx.Module:
        """The model to evaluate and predict with."""
        return self.state.model

    @property
    def epoch_length(self) -> int:
        """Steps of a pass over the training images."""
        return order.steps_per_epoch(self.config, self.data["train"])


def load(workdir: str | Path, which: str = "latest") -> Trained:
    """The checkpoint called ``which``, "latest", "best" or a step, of the run in ``workdir``.

    Needs the run folder alone. Raises UserError where it holds no such checkpoint.
    """
    from flaxmnist.checkpoints import restore

    folder = Path(workdir)
    described = folders.read_described(folder)
    config = fields.from_json(described.get("config"), Config)
    with folders.as_saved(folder):
        data = described["data"]
        height, width = data["shape"]
        create = partial(steps.create_state, config, (height, width), data["classes"])
    saved = manifest.find(folder / "checkpoints", which)
    if saved is None:
        raise UserError(f"{folder} has no checkpoint yet: train on with --resume")
    # On one device, wherever it was saved.
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = jax.eval_shape(create)
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), shapes)
    return Trained(config, restore(folder / "checkpoints", saved.step, like), data)


def evaluate_run(
    workdir: str | Path, which: str = "latest", split: str = "test", data_dir: str | Path | None = None
) -> evaluation.Evaluation:
    """How the checkpoint called ``which`` does on a split of the data it was trained on.

    Raises UserError where ``data_dir`` holds other data.
    """
    trained = load(workdir, which)
    data = data_of(workdir, trained.config, trained.data, data_dir)
    return evaluation.evaluate(trained.model, *split_of(workdir, data, split))


def data_of(trained: str | Path, config: Config, about: dict[str, Any], data_dir: str | Path | None) -> Dataset:
    """What ``trained``, a folder or a file, learned from, which its ``config`` and what it has noted ``about`` it say.

    Raises UserError where ``data_dir`` holds other data.
    """
    data = load_data(replace(config.data, name=about["name"]), data_dir)
    if (data.source, data.classes) != (about["source"], about["classes"]):
        raise UserError(
            f"{trained} was trained on {about['source']} with {about['classes']} classes, but here are {data.source} "
            f"with {data.classes}: give its --data-dir"
        )
    return data


def split_of(trained: str | Path, data: Dataset, split: str) -> Split:
    """The images called ``split``. Raises UserError where there are none."""
    images = data.splits()[split]
    if images is None:
        raise UserError(f"{trained} has no {split} images: its data.validation is 0")
    return images


class Reading(NamedTuple):
    """What a model read in an image file."""

    file: Path
    image: UInt8[np.ndarray, "28 28 1"]  # as the model saw it
    answer: int  # the most probable class
    probabilities: Float[np.ndarray, " classes"]


def read_files(workdir: str | Path, paths: Iterable[str | Path], which: str = "latest") -> list[Reading]:
    """What the checkpoint called ``which`` reads in image files and folders of them; raises UserError for no digit."""
    trained = load(workdir, which)
    if trained.data["shape"] != [28, 28]:
        raise UserError(f"{workdir} was trained on images of {trained.data['shape']} pixels: only 28×28 are read here")
    files = digits.find_images(paths)
    images = np.stack([digits.read_digit(file) for file in files])
    classes, probabilities = evaluation.predict(trained.model, images)
    return [Reading(*each) for each in zip(files, images, classes.tolist(), probabilities, strict=True)]
