"""Data sets, ready for training: from their files (``data.sources``) or from arrays in memory."""

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flaxmnist.config import Data
from flaxmnist.data import sources
from flaxmnist.data.idx import ALTERNATIVE
from flaxmnist.data.sources import Files, Split, size
from flaxmnist.errors import UserError, check_local
from flaxmnist.fields import FieldType


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set, ready for training."""

    name: str  # its name in the config
    source: str  # a description of its origin, with the hash of every file
    file_order: bool  # True if the images are in the order of the original files
    class_names: tuple[str, ...]  # in the order of the labels; the numbers if they have no names
    train: Split
    validation: Split | None  # the first images of the training file; None if none are held out
    test: Split

    @property
    def classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    @classmethod
    def from_arrays(
        cls,
        train_images: np.ndarray,
        train_labels: np.ndarray,
        test_images: np.ndarray,
        test_labels: np.ndarray,
        *,
        validation: int | None = None,
        class_names: Sequence[str] = (),
    ) -> "Dataset":
        """Return a data set of arrays in memory: images uint8 [n, h, w] or [n, h, w, c], labels integers [n] from 0.

        ``validation`` is the number of training images to hold out, the first ones (None: 5,000, or an eighth if less).
        """
        values = map(np.asarray, (train_images, train_labels, test_images, test_labels))
        arrays: dict[str, np.ndarray] = dict(zip(sources.ARRAYS, values, strict=True))
        digests = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in arrays.items()}
        hashes = ", ".join(f"{name} {digest}" for name, digest in digests.items())
        files = sources.from_arrays(arrays, f"arrays in memory, SHA-256: {hashes}", class_names)
        return split_files(files, Data(name="arrays", validation=validation))

    def splits(self) -> dict[str, Split | None]:
        """Return the three splits by name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}


def load_data(data: Data | str, data_dir: str | Path | None = None) -> Dataset:
    """Load the data set that ``data`` describes; a bare name stands for ``Data`` with this name.

    Images are uint8 [n, h, w, c], labels int32 [n]. ``data_dir`` defaults to ``$TFDS_DATA_DIR``, then
    ``~/tensorflow_datasets``, as in tensorflow-datasets. Missing or damaged files are downloaded to
    ``data_dir``/downloads; nothing else is written. Raise UserError if files cannot be obtained, do not belong
    together, or are not in the requested order.

    Sources: MNIST (LeCun et al. 1998), Fashion-MNIST (Xiao et al. 2017), KMNIST (Clanuwat et al. 2018), the digits of
    scikit-learn (Alpaydin & Kaynak 1998), EMNIST (Cohen et al. 2017).
    """
    if isinstance(data, str):
        data = Data(name=data)  # pyright: ignore[reportArgumentType]
    FieldType(Data).check(data, "data")
    folder = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    check_local(folder)
    return split_files(sources.load_files(data.name, Path(folder).expanduser(), data.order), data)


def split_files(files: Files, data: Data) -> Dataset:
    """Hold out the validation images; raise UserError if there are too few images or train and test do not match."""
    train, test = files.train, files.test
    largest = int(train.labels.max())
    class_names = files.class_names or tuple(map(str, range(largest + 1)))
    if len(class_names) <= largest:
        labels = f"labels up to {largest}, but {len(class_names)} class names"
        raise UserError(f"{data.name} has {labels}: name them all, and count labels from 0")
    if test.images.shape[1:] != train.images.shape[1:]:
        sizes = f"training images are {size(train.images)}, test images {size(test.images)}"
        raise UserError(f"{data.name}: {sizes}: make them the same size")
    if test.labels.max() >= len(class_names):
        labels = f"the largest test label is {test.labels.max()}, but the largest training label is only {largest}"
        raise UserError(f"{data.name}: {labels}: add training images of every class, {ALTERNATIVE}")
    count = len(train.labels)
    held_out = min(5000, math.ceil(count / 8)) if data.validation is None else data.validation
    if held_out >= count:
        raise UserError(
            f"data.validation must lie in [0, {count - 1}], to leave one of {count} training images, but is {held_out}"
        )
    validation = Split(train.images[:held_out], train.labels[:held_out]) if held_out else None
    train = Split(train.images[held_out:], train.labels[held_out:])
    return Dataset(data.name, files.source, files.file_order, class_names, train, validation, test)
