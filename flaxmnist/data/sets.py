"""Data sets as arrays: registered in tensorflow-datasets, a person's own IDX files, or scikit-learn's digits."""

import glob
import logging
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8

from flaxmnist.config import Data
from flaxmnist.data.downloads import obtain, sha256
from flaxmnist.data.idx import ALTERNATIVE, read_idx
from flaxmnist.data.photos import to_mnist_form
from flaxmnist.errors import UserError, check_local
from flaxmnist.fields import FieldType

logger = logging.getLogger("flaxmnist")

# The files of a data set: images and labels for training, then for testing.
STEMS = ("train-images", "train-labels", "t10k-images", "t10k-labels")


class Split(NamedTuple):
    """Images with values from 0 (background) to 255 (ink), and their class labels, counted from 0."""

    images: UInt8[np.ndarray, "n h w 1"]
    labels: Int32[np.ndarray, " n"]


class Files(NamedTuple):
    """A data set as its files have it, before validation images are held out."""

    source: str
    file_order: bool
    train: Split
    test: Split


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set, ready for training."""

    name: str  # its name in the config
    source: str  # a description of its origin, with the hash of every file
    file_order: bool  # True if the images are in the order of the original files
    classes: int  # the largest training label + 1
    train: Split
    validation: Split | None  # the first images of the training file; None if none are held out
    test: Split

    def splits(self) -> dict[str, Split | None]:
        """Return the three splits by name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}


def load_data(data: Data | str, data_dir: str | Path | None = None) -> Dataset:
    """Load the data set that ``data`` describes; a bare name stands for ``Data`` with this name.

    Images are uint8 [n, h, w, 1], labels int32 [n]. ``data_dir`` defaults to ``$TFDS_DATA_DIR``, then
    ``~/tensorflow_datasets``, as in tensorflow-datasets. Missing or damaged files are downloaded to
    ``data_dir``/downloads; nothing else is written. Raise UserError if files cannot be obtained, do not belong
    together, or are not in the requested order.

    Sources: MNIST (LeCun et al. 1998), Fashion-MNIST (Xiao et al. 2017), KMNIST (Clanuwat et al. 2018), the digits of
    scikit-learn (Alpaydin & Kaynak 1998).
    """
    if isinstance(data, str):
        data = Data(name=data)  # pyright: ignore[reportArgumentType]
    FieldType(Data).check(data, "data")
    if data_dir is not None:
        check_local(data_dir)
    folder = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    match data.name:
        case "digits":
            files = load_embedded_digits()
        case "idx":
            files = read_own_files(folder)
        case name:
            files = load_registered(name, folder, data.order)
    return split_files(files, data)


def split_files(files: Files, data: Data) -> Dataset:
    """Hold out the validation images; raise UserError if there are too few images or train and test do not match."""
    train, test = files.train, files.test
    classes = int(train.labels.max()) + 1
    if size(test.images) != size(train.images):
        sizes = f"training images are {size(train.images)}, test images {size(test.images)}"
        raise UserError(f"{data.name}: {sizes}: make them the same size")
    if test.labels.max() >= classes:
        labels = f"the largest test label is {test.labels.max()}, but the largest training label is only {classes - 1}"
        raise UserError(f"{data.name}: {labels}: add training images of every class, {ALTERNATIVE}")
    count = len(train.labels)
    held_out = min(5000, math.ceil(count / 8)) if data.validation is None else data.validation
    if held_out >= count:
        raise UserError(
            f"data.validation must lie in [0, {count - 1}], to leave one of {count} training images, but is {held_out}"
        )
    validation = Split(train.images[:held_out], train.labels[:held_out]) if held_out else None
    train = Split(train.images[held_out:], train.labels[held_out:])
    return Dataset(data.name, files.source, files.file_order, classes, train, validation, test)


# --- IDX files --------------------------------------------------------------------------------------------------------


def read_own_files(folder: Path) -> Files:
    """Read the four IDX files in ``folder``, under any of their usual names."""
    paths = [find_idx_file(folder, stem) for stem in STEMS]
    return read_files(paths, [sha256(path) for path in paths])


def find_idx_file(folder: Path, stem: str) -> Path:
    """Return the path of an IDX file; raise UserError if there is none."""
    stems = [stem, stem.replace("t10k", "test")] if "t10k" in stem else [stem]
    kind = "idx3-ubyte" if "images" in stem else "idx1-ubyte"
    names = [f"{stem}{dot}{kind}{suffix}" for stem in stems for dot in "-." for suffix in ("", ".gz")]
    for name in names:
        if os.path.isfile(folder / name):
            return folder / name
    raise UserError(f"{folder} contains no {names[0]} (nor {', '.join(names[1:])}): put it there, {ALTERNATIVE}")


def read_files(paths: Sequence[Path], checksums: Sequence[str]) -> Files:
    """Read four IDX files: the images and labels of the training set, then those of the test set."""
    contents = ("training images", "training labels", "test images", "test labels")
    hashes = ", ".join(f"{content} {checksum}" for content, checksum in zip(contents, checksums, strict=True))
    return Files(f"original files, SHA-256: {hashes}", True, read_split(*paths[:2]), read_split(*paths[2:]))


def read_split(image_file: Path, label_file: Path) -> Split:
    """Read an IDX file of images and one of their labels; raise UserError if they are not such a pair."""
    images, labels = read_idx(image_file), read_idx(label_file)
    if images.ndim != 3 or labels.ndim != 1:
        path, kind = (image_file, "images") if images.ndim != 3 else (label_file, "labels")
        raise UserError(f"{path} contains no {kind}: put the right file there, {ALTERNATIVE}")
    if len(images) != len(labels) or len(images) == 0:
        raise UserError(
            f"{image_file} contains {len(images):,} images and {label_file} {len(labels):,} labels: put files there "
            f"that belong together, with one label per image and at least one image, {ALTERNATIVE}"
        )
    if not all(8 <= side <= 256 for side in images.shape[1:]):
        raise UserError(f"{image_file} contains images of {size(images)} pixels: use 8 to 256 per side, {ALTERNATIVE}")
    return Split(images[..., np.newaxis], labels.astype(np.int32))


def size(images: np.ndarray) -> str:
    """Return the height and width of images in words: "28×28"."""
    return f"{images.shape[1]}×{images.shape[2]}"


# --- Data sets of tensorflow-datasets ---------------------------------------------------------------------------------


def load_registered(name: str, folder: Path, order: str) -> Files:
    """Load a data set registered in tensorflow-datasets from its four original files.

    Missing files are downloaded, unless ``folder`` contains the data set prepared as array_record.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download.resource import get_dl_fname

    builder = tfds.builder_cls(name)
    infos = builder.url_infos or {}
    urls = [next(url for url in infos if f"/{stem}-" in url) for stem in STEMS]
    checksums = [infos[url].checksum for url in urls]
    paths = [folder / "downloads" / get_dl_fname(*pair) for pair in zip(urls, checksums, strict=True)]
    records = folder / name / str(builder.VERSION)
    if not all(map(os.path.isfile, paths)) and glob.glob("*.array_record*", root_dir=records):
        return load_prepared(name, folder, records, order)
    for url, path, checksum in zip(urls, paths, checksums, strict=True):
        obtain(url, path, checksum, int(infos[url].size))
    return read_files(paths, checksums)


def load_prepared(name: str, folder: Path, records: Path, order: str) -> Files:
    """Load a data set that tensorflow-datasets prepared in ``records`` as array_record, which changes the order."""
    import tensorflow_datasets as tfds

    downloads = folder / "downloads"
    if order == "file":
        raise UserError(
            f"data.order is file, but {records} has the images in another order than the original files, which are not "
            f"in {downloads}: put them there, use --data.order shuffled, {ALTERNATIVE}"
        )
    logger.warning(
        f"the original files are not in {downloads}, so reading {records}, which takes about 10 s: its images are in "
        "another order, so the validation images and the results differ"
    )
    try:
        train, test = (stack(tfds.data_source(name, split=split, data_dir=folder)) for split in ("train", "test"))
    except ImportError as error:
        remedy = f"pip install array_record, put the original files in {downloads}, {ALTERNATIVE}"
        raise UserError(f"{records} cannot be read without the package array_record: {remedy}") from error
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"cannot read the records in {records}: {reason}; prepare them again, {ALTERNATIVE}") from error
    return Files(f"tfds array_record {name}/{records.name}", False, train, test)


def stack(elements: Iterable[Any]) -> Split:
    """Stack mappings with an image and a label each into two arrays."""
    images, labels = zip(*((element["image"], element["label"]) for element in elements), strict=True)
    return Split(np.stack(images), np.array(labels, np.int32))


# --- The digits of scikit-learn ---------------------------------------------------------------------------------------


def load_embedded_digits() -> Files:
    """Load the 1,797 digits of ``sklearn.datasets.load_digits``, in MNIST form; the last 360 are the test images.

    Their order is fixed and stratified, so that training, validation and test images have the same class proportions.
    The same writers may occur in all three.
    """
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    order = stratified_order(bunch.target)
    # Each value is the number of inked pixels in a block of 4×4.
    grey = np.round(bunch.images[order] * (255 / 16)).astype(np.uint8)
    images = np.stack([to_mnist_form(ink) for ink in grey])
    labels = bunch.target[order].astype(np.int32)
    train, test = Split(images[:-360], labels[:-360]), Split(images[-360:], labels[-360:])
    return Files("scikit-learn load_digits", True, train, test)


def stratified_order(labels: np.ndarray) -> Int32[np.ndarray, " n"]:
    """Return a fixed order in which every contiguous section has about the class proportions of all ``labels``."""
    uniform = np.random.Philox(key=0).random_raw(2 * len(labels)).reshape(2, -1) / 2.0**64
    positions = np.empty(len(labels))
    for label in np.unique(labels):
        indices = np.flatnonzero(labels == label)
        # Of a class's n images, the k-th gets a random position in the k-th of n equal intervals of [0, 1).
        ranks = np.argsort(np.argsort(uniform[0, indices]))
        positions[indices] = (ranks + uniform[1, indices]) / len(indices)
    return np.argsort(positions, kind="stable").astype(np.int32)
