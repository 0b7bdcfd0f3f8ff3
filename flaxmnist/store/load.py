"""Load, evaluate and predict with the model of a run folder, without its experiment file."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, UInt8

from flaxmnist import fields
from flaxmnist.config import Config, Data
from flaxmnist.core import steps
from flaxmnist.core.state import TrainState
from flaxmnist.data import order, photos
from flaxmnist.data.sets import Dataset, Split, load_data
from flaxmnist.devices import evaluation
from flaxmnist.errors import UserError, check_local
from flaxmnist.store import manifest
from flaxmnist.store.claim import read_run_info
from flaxmnist.store.files import read_json
from flaxmnist.store.provenance import DataInfo
from flaxmnist.store.records import read_records
from flaxmnist.store.result import Result


@dataclass(frozen=True)
class Trained:
    """A checkpoint of a run, and a description of the data that it was trained on."""

    config: Config
    state: TrainState = field(repr=False)
    data: DataInfo = field(repr=False)

    @property
    def model(self) -> nnx.Module:
        """The model to evaluate and predict with: with averaged weights if the config asks for averaging."""
        return self.state.model


@dataclass(frozen=True)
class Recorded:
    """A run with its records, but without its state: perhaps no checkpoint is saved yet."""

    config: Config
    data: DataInfo = field(repr=False)
    history: list[dict[str, Any]] = field(repr=False)  # the records of metrics.jsonl
    result: Result | None = field(repr=False)  # the content of result.json; None unless the run ended with this state

    @property
    def epoch_length(self) -> int:
        """The number of steps in an epoch."""
        return order.steps_per_epoch(self.config, self.data.train)

    @property
    def step(self) -> int:
        """The number of steps, or the last one that was recorded."""
        return max((record["step"] for record in self.history), default=0)


@dataclass(frozen=True)
class Run(Recorded):
    """A run with its records, result and state."""

    state: TrainState = field(repr=False)

    @property
    def model(self) -> nnx.Module:
        """The model to evaluate and predict with: with averaged weights if the config asks for averaging."""
        return self.state.model

    @property
    def step(self) -> int:
        return int(self.state.step)


def classes_of(config: Config | None) -> set[type]:
    """Return the user's classes in ``config``, which are needed to read the files of a run with the same classes."""
    return set() if config is None else fields.user_classes(config)


def load_checkpoint(workdir: str | Path, which: str | int = "latest", config: Config | None = None) -> Trained:
    """Load the checkpoint ``which`` of the run in ``workdir``: "latest", "best" or a step.

    Only the run folder is needed, and for a model of your own any ``config`` with its class. Raise UserError if it has
    no such checkpoint.
    """
    from flaxmnist.store.checkpoints import restore

    check_local(workdir)
    folder = Path(workdir)
    if (folder / "sweep.json").exists():
        raise UserError(f"{folder} is the folder of a sweep: pass that of a run")
    saved = manifest.find(folder / "checkpoints", str(which))
    run = read_run_info(folder, saved, classes_of(config))
    if saved is None:
        raise UserError(f"{folder} has no intact checkpoint: continue training with --resume")
    # On one device, whatever devices it was saved from.
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = steps.state_shapes(run.config, run.data.shape, run.data.classes)
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes)
    return Trained(run.config, restore(folder / "checkpoints", saved.step, like), run.data)


def load_run(workdir: str | Path, which: str | int = "latest", *, config: Config | None = None) -> Run:
    """Load the run in ``workdir`` with the checkpoint ``which``: "latest", "best" or a step.

    Only the run folder is needed, and for a model of your own any ``config`` with its class. Raise UserError if it has
    no such checkpoint, or if its files are damaged.
    """
    folder, trained = Path(workdir), load_checkpoint(workdir, which, config)
    result = read_json(folder / "result.json", Result) if (folder / "result.json").exists() else None
    if result is not None and result.steps != trained.state.step:
        result = None
    return Run(trained.config, trained.data, read_records(folder / "metrics.jsonl"), result, trained.state)


def load_recorded(folder: Path, config: Config | None = None) -> Recorded:
    """Load the run in ``folder``, with its newest checkpoint if there is any. Raise UserError as ``load_run`` does."""
    if manifest.steps(folder / "checkpoints"):
        return load_run(folder, config=config)
    run = read_run_info(folder, None, classes_of(config))
    path = folder / "metrics.jsonl"
    return Recorded(run.config, run.data, read_records(path) if path.exists() else [], None)


def evaluate_run(
    workdir: str | Path,
    which: str | int = "latest",
    split: str = "test",
    data_dir: str | Path | None = None,
    config: Config | None = None,
    data: Dataset | None = None,
    shifts: int = 0,
) -> evaluation.Evaluation:
    """Evaluate the checkpoint ``which`` on a split of the data set that it was trained on.

    That is in ``data_dir``, or is passed again as ``data``. Raise UserError if it is another one. For ``config`` see
    ``load_run``, for ``shifts`` ``evaluation.predict``.
    """
    trained = load_checkpoint(workdir, which, config)
    data = load_training_data(workdir, trained.config.data, trained.data, data_dir, data)
    return evaluation.evaluate(trained.model, *get_split(workdir, data, split), data.class_names, shifts)


def load_training_data(
    trained: str | Path, config: Data, expected: DataInfo, data_dir: str | Path | None, data: Dataset | None = None
) -> Dataset:
    """Load the data set that ``trained``, a folder or a file, was trained on, unless it is passed as ``data``.

    Raise UserError if its source or its classes differ from ``expected``, the saved description.
    """
    if data is None and expected.name == "arrays":
        raise UserError(
            f"{trained} was trained on arrays in memory: pass them again in Python, as data= to flaxmnist.evaluate_run "
            "or flaxmnist.write_report"
        )
    # The loader names the choices if a damaged description names an unknown data set.
    name: Any = expected.name
    data = data or load_data(replace(config, name=name), data_dir)
    if (data.source, data.classes) != (expected.source, expected.classes):
        raise UserError(
            f"{trained} was trained on {expected.source} with {expected.classes} classes, but this data set is "
            f"{data.source} with {data.classes}: use the --data-dir it was trained on"
        )
    return data


def get_split(trained: str | Path, data: Dataset, split: str) -> Split:
    """Return the images of ``split``. Raise UserError if there are none."""
    images = data.splits()[split]
    if images is None:
        raise UserError(f"{trained} has no {split} images: its data.validation is 0")
    return images


class FilePrediction(NamedTuple):
    """The prediction for an image file."""

    file: Path
    image: UInt8[np.ndarray, "h w c"]  # the input of the model
    prediction: int  # the most probable class
    probabilities: Float[np.ndarray, " classes"]
    names: tuple[str, ...]  # of the classes


def predict_files(
    workdir: str | Path,
    paths: Iterable[str | Path],
    which: str = "latest",
    config: Config | None = None,
    shifts: int = 0,
) -> list[FilePrediction]:
    """Predict the digits in image files and folders of them. Raise UserError for an image without a digit.

    For ``config`` see ``load_run``, for ``shifts`` ``evaluation.predict``.
    """
    trained = load_checkpoint(workdir, which, config)
    files, names = photos.find_images(paths), trained.data.class_names
    images = np.stack([photos.read_image(file, trained.data.shape) for file in files])
    classes, probabilities = evaluation.predict(trained.model, images, shifts)
    columns = zip(files, images, classes.tolist(), probabilities, strict=True)
    return [FilePrediction(*values, names) for values in columns]
