"""Images and labels as arrays, from wherever the name of a data set says they come."""

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
from flaxmnist.digits import to_mnist_form
from flaxmnist.downloads import obtain, sha256
from flaxmnist.errors import UserError
from flaxmnist.fields import check_types
from flaxmnist.idx import read_idx

logger = logging.getLogger("flaxmnist")

REMEDY = "or use --data.name digits, which needs no files"


class Split(NamedTuple):
    """Images with values 0 to 255 (ink on a background of 0) and the class of each, from 0."""

    images: UInt8[np.ndarray, "n h w 1"]
    labels: Int32[np.ndarray, " n"]


class Files(NamedTuple):
    """A data set as its source has it: the training file not yet divided."""

    source: str
    file_order: bool
    train: Split
    test: Split


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set, ready for training."""

    name: str  # its name in the config
    source: str  # where it came from, in words, with the hash of every file
    file_order: bool  # whether the images come in the order of the original files
    classes: int  # the largest training label + 1
    train: Split
    validation: Split | None  # the first images of the training file; None where none are held out
    test: Split

    def splits(self) -> dict[str, Split | None]:
        """The three parts by name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}


def load_data(data: Data | str, data_dir: str | Path | None = None) -> Dataset:
    """The data set that ``data``, or a bare name with everything else at its default, asks for.

    Images are uint8 [n, h, w, 1], labels int32 [n]. Downloads lie in ``data_dir``/downloads; ``data_dir`` defaults to
    ``$TFDS_DATA_DIR``, then ``~/tensorflow_datasets``, as in tensorflow-datasets, and is written to only where files
    are missing or damaged. Raises UserError for files that are missing, damaged or do not fit together, and where they
    cannot be had in the order asked for.

    Sources: MNIST (LeCun et al. 1998), Fashion-MNIST (Xiao et al. 2017), KMNIST (Clanuwat et al. 2018), the digits of
    scikit-learn (Alpaydin & Kaynak 1998).
    """
    if isinstance(data, str):
        check_types(Data.__annotations__["name"], data, "data.name")
        data = Data(name=data)  # pyright: ignore[reportArgumentType]
    check_types(Data, data, "data")
    folder = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    match data.name:
        case "digits":
            files = embedded_digits()
        case "idx":
            files = own_files(folder)
        case name:
            files = registered(name, folder, data.order)
    return divide(files, data)


def divide(files: Files, data: Data) -> Dataset:
    """``files`` with the validation images held out as ``data`` says; raises UserError where the parts do not fit."""
    train, test = files.train, files.test
    classes = int(train.labels.max()) + 1
    if test.images.shape[1:] != train.images.shape[1:]:
        sizes = [f"{images.shape[1]}×{images.shape[2]}" for images in (train.images, test.images)]
        raise UserError(f"{data.name}: training images are {sizes[0]} and test images {sizes[1]}: make them one size")
    if test.labels.max() >= classes:
        raise UserError(
            f"{data.name}: the test labels go to {test.labels.max()}, but the training labels only to {classes - 1}: "
            f"every class must have a training image, {REMEDY}"
        )
    count = len(train.labels)
    held = min(5000, math.ceil(count / 8)) if data.validation is None else data.validation
    if not 0 <= held < count:
        raise UserError(
            f"data.validation must lie in [0, {count - 1}], to leave a training image of {count}, but is {held}"
        )
    return Dataset(
        name=data.name,
        source=files.source,
        file_order=files.file_order,
        classes=classes,
        train=Split(train.images[held:], train.labels[held:]),
        validation=Split(train.images[:held], train.labels[:held]) if held else None,
        test=test,
    )


# --- IDX files ------------------------------------------------------------------------------------------------------


def own_files(folder: Path) -> Files:
    """The four IDX files that lie in ``folder``, under any of the names in use."""
    paths = (
        find(folder, ["train-images"], 3),
        find(folder, ["train-labels"], 1),
        find(folder, ["t10k-images", "test-images"], 3),
        find(folder, ["t10k-labels", "test-labels"], 1),
    )
    return read_files(paths, [sha256(path) for path in paths])


def find(folder: Path, stems: list[str], dimensions: int) -> Path:
    """The IDX file of one of the ``stems`` in ``folder``; raises UserError where there is none."""
    names = [f"{stem}{dot}idx{dimensions}-ubyte{end}" for stem in stems for dot in "-." for end in ("", ".gz")]
    for name in names:
        if os.path.isfile(folder / name):
            return folder / name
    raise UserError(f"{folder} holds no {names[0]} (nor {', '.join(names[1:])}): put it there, {REMEDY}")


def read_files(paths: Sequence[Path], checksums: Sequence[str]) -> Files:
    """What four IDX files hold: images and labels of the training file, then those of the test file."""
    parts = ("training images", "training labels", "test images", "test labels")
    hashes = ", ".join(f"{part} {checksum}" for part, checksum in zip(parts, checksums, strict=True))
    train_images, train_labels, test_images, test_labels = paths
    return Files(
        source=f"original files, SHA-256: {hashes}",
        file_order=True,
        train=read_split(train_images, train_labels),
        test=read_split(test_images, test_labels),
    )


def read_split(image_file: Path, label_file: Path) -> Split:
    """Images and labels of a pair of IDX files; raises UserError where they are no such pair."""
    images, labels = read_idx(image_file), read_idx(label_file)
    if images.ndim != 3 or labels.ndim != 1:
        path, kind = (image_file, "images") if images.ndim != 3 else (label_file, "labels")
        raise UserError(f"{path} holds no {kind}: put the right file there, {REMEDY}")
    if len(images) != len(labels) or len(images) == 0:
        raise UserError(
            f"{image_file} holds {len(images):,} images and {label_file} {len(labels):,} labels: put files there that "
            f"belong together, with one label for each image, and at least one of both, {REMEDY}"
        )
    if not all(8 <= side <= 256 for side in images.shape[1:]):
        size = f"{images.shape[1]}×{images.shape[2]}"
        raise UserError(f"{image_file} holds images of {size} pixels: make each side 8 to 256, {REMEDY}")
    return Split(images[..., np.newaxis], labels.astype(np.int32))


# --- Data sets that tensorflow-datasets knows -------------------------------------------------------------------------


def registered(name: str, folder: Path, order: str) -> Files:
    """The data set ``name`` of tensorflow-datasets' registry, from its four original files.

    They are fetched where they are missing, unless ``folder`` holds the set prepared as array_record.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download.resource import get_dl_fname

    builder = tfds.builder_cls(name)
    infos = builder.url_infos or {}
    parts = ("train-images", "train-labels", "t10k-images", "t10k-labels")
    urls = [next(url for url in infos if f"/{part}-" in url) for part in parts]
    checksums = [infos[url].checksum for url in urls]
    paths = [folder / "downloads" / get_dl_fname(*pair) for pair in zip(urls, checksums, strict=True)]
    records = folder / name / str(builder.VERSION)
    if not all(map(os.path.isfile, paths)) and glob.glob("*.array_record*", root_dir=records):
        return prepared(name, folder, records, order)
    for url, path, checksum in zip(urls, paths, checksums, strict=True):
        obtain(url, path, checksum, int(infos[url].size))
    return read_files(paths, checksums)


def prepared(name: str, folder: Path, records: Path, order: str) -> Files:
    """The data set that tensorflow-datasets prepared in ``folder``, as ``records``, in an order of its own."""
    import tensorflow_datasets as tfds

    if order == "file":
        raise UserError(
            f"data.order is file, but {records} has the images in another order than the original files, which are not "
            f"in {folder / 'downloads'}: put them there, use --data.order shuffled, {REMEDY}"
        )
    logger.warning(
        "the original files are not in %s, so %s is read, which takes about 10 s: its images come in another order, so "
        "the validation images are others too, and results differ",
        folder / "downloads",
        records,
    )
    try:
        train, test = (as_split(tfds.data_source(name, split=part, data_dir=folder)) for part in ("train", "test"))
    except ImportError as error:
        remedy = f"pip install array_record, put the original files in {folder / 'downloads'}, {REMEDY}"
        raise UserError(f"{records} cannot be read without the package array_record: {remedy}") from error
    except Exception as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"cannot read the array_record in {records}: {what}; prepare it anew, {REMEDY}") from error
    return Files(f"tfds array_record {name}/{records.name}", False, train, test)


def as_split(elements: Iterable[Any]) -> Split:
    """``elements``, each a mapping with an image and a label, as two arrays."""
    images, labels = zip(*((element["image"], element["label"]) for element in elements), strict=True)
    return Split(np.stack(images), np.array(labels, np.int32))


# --- The digits that come with scikit-learn ---------------------------------------------------------------------------


def embedded_digits() -> Files:
    """The 1,797 digits of ``sklearn.datasets.load_digits``, in MNIST's form; the last 360 are the test images.

    Their order is one fixed shuffling in which every stretch holds each class in proportion. So do the training file,
    the validation images at its beginning and the test images, but writers are not kept apart.
    """
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    order = stratified(bunch.target)
    # The values count the inked ones of 4×4 pixels.
    grey = np.round(bunch.images[order] * (255 / 16)).astype(np.uint8)
    images = np.stack([to_mnist_form(ink) for ink in grey])
    labels = bunch.target[order].astype(np.int32)
    train, test = Split(images[:-360], labels[:-360]), Split(images[-360:], labels[-360:])
    return Files("scikit-learn load_digits", True, train, test)


def stratified(labels: np.ndarray) -> Int32[np.ndarray, " n"]:
    """A fixed order of ``labels`` in which every stretch has each class about as often as the whole."""
    draws = np.random.Philox(key=0).random_raw(2 * len(labels)).reshape(2, -1) / 2.0**64
    places = np.empty(len(labels))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        # Of a class's n images, the k-th has its place in the k-th of n equal stretches of the whole.
        ranks = np.argsort(np.argsort(draws[0, members]))
        places[members] = (ranks + draws[1, members]) / len(members)
    return np.argsort(places, kind="stable").astype(np.int32)
