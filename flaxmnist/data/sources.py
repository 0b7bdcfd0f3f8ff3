"""Where images come from: tensorflow-datasets, IDX and NumPy files, arrays in memory, scikit-learn's digits."""

import glob
import io
import itertools
import logging
import os
import string
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8

from flaxmnist.data.downloads import obtain, sha256
from flaxmnist.data.idx import ALTERNATIVE, parse, read_idx
from flaxmnist.data.photos import to_mnist_form
from flaxmnist.errors import UserError

logger = logging.getLogger("flaxmnist")

# The files of a data set: images and labels for training, then for testing.
MAX_LABEL = 65_535

STEMS = ("train-images", "train-labels", "t10k-images", "t10k-labels")


# Class names of registered data sets whose classes are more than digits.
DIGITS, LOWER, UPPER = map(tuple, (string.digits, string.ascii_lowercase, string.ascii_uppercase))
CLASS_NAMES: dict[str, tuple[str, ...]] = {
    "fashion_mnist": (
        *("T-shirt/top", "trouser", "pullover", "dress", "coat"),
        *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
    ),
    "kmnist": ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
    "emnist/letters": LOWER,
    "emnist/byclass": DIGITS + UPPER + LOWER,
    "emnist/bymerge": DIGITS + UPPER + tuple("abdefghnqrt"),  # the other lower-case letters count as upper-case
    "emnist/balanced": DIGITS + UPPER + tuple("abdefghnqrt"),
}


class Split(NamedTuple):
    """Images with values from 0 (background) to 255 (ink), and their class labels, counted from 0."""

    images: UInt8[np.ndarray, "n h w c"]
    labels: Int32[np.ndarray, " n"]


class Files(NamedTuple):
    """A data set as its files have it, before validation images are held out."""

    source: str  # a description of its origin, with hashes
    file_order: bool
    train: Split
    test: Split
    class_names: tuple[str, ...] = ()  # (): the numbers of the classes


# The arrays of a data set in memory.
ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


def load_files(name: str, folder: Path, order: str) -> Files:
    """Load the data set ``name`` as its files have it. Raise UserError as ``sets.load_data`` does."""
    match name:
        case "digits":
            return load_embedded_digits()
        case "idx":
            return read_own_files(folder)
        case "npz":
            return read_npz(folder)
        case "arrays":
            raise UserError("data.name arrays is in memory: pass a Dataset.from_arrays(…) to fit, or use another name")
        case _:
            return load_registered(name, folder, order)


def from_arrays(
    arrays: Mapping[str, np.ndarray], source: str, class_names: Sequence[str] = (), hint: str = ""
) -> Files:
    """Return arrays named train_images, train_labels, test_images and test_labels as a data set.

    Images are uint8 [n, h, w] or [n, h, w, c], labels integers [n] or [n, 1]. Raise UserError for others.
    """
    splits = []
    for split in ("train", "test"):
        images, labels = (np.asarray(arrays[f"{split}_{kind}"]) for kind in ("images", "labels"))
        name = f"{hint}{split}_images"
        if images.dtype != np.uint8 or images.ndim not in (3, 4):
            found = f"{images.dtype} {list(images.shape)}"
            raise UserError(f"{name} must be uint8 [n, h, w] or [n, h, w, c], from 0 to 255, but is {found}")
        if not np.issubdtype(labels.dtype, np.integer) or labels.size != len(labels) or labels.size != len(images):
            found = f"{labels.dtype} {list(labels.shape)} for {len(images)} images"
            raise UserError(f"{hint}{split}_labels must be integers, one for each image, but is {found}")
        if labels.size == 0 or labels.min() < 0 or labels.max() > MAX_LABEL:
            raise UserError(f"{hint}{split}_labels must be in [0, {MAX_LABEL}], and there must be at least one")
        splits.append(make_split(images, labels.reshape(-1), name))
    return Files(source, True, *splits, class_names=tuple(class_names))


# --- NumPy files ------------------------------------------------------------------------------------------------------

# The names of the four arrays in an .npz file, by convention: as in MedMNIST, or as in Keras.
NPZ_NAMES = (ARRAYS, ("x_train", "y_train", "x_test", "y_test"))


def read_npz(folder: Path) -> Files:
    """Read the only .npz file in ``folder``, or the file itself. Raise UserError if it has other contents."""
    paths = [folder] if folder.suffix == ".npz" else sorted(folder.glob("*.npz"))
    if len(paths) != 1:
        found = f"{len(paths)} .npz files" if paths else "no .npz file"
        raise UserError(f"{folder} contains {found}: pass the one to use as --data-dir, {ALTERNATIVE}")
    (path,) = paths
    checksum = sha256(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except Exception as error:  # NumPy and zipfile raise many types
        raise UserError(f"{path} is not a readable .npz file ({error}): replace it, {ALTERNATIVE}") from None
    for names in NPZ_NAMES:
        if set(names) <= arrays.keys():
            known: dict[str, Any] = dict(zip(ARRAYS, (arrays[name] for name in names), strict=True))
            class_names = [str(name) for name in arrays.get("class_names", ())]
            return from_arrays(known, f"{path.name}, SHA-256: {checksum}", class_names, f"{path}: ")
    choices = ", or ".join(", ".join(names) for names in NPZ_NAMES)
    raise UserError(f"{path} has the arrays {', '.join(arrays)}: it needs {choices}")


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
    return make_split(images, labels, str(image_file))


def make_split(images: UInt8[np.ndarray, "n h w ..."], labels: np.ndarray, name: str) -> Split:
    """Return images with a last axis for channels, and their labels. Raise UserError if their sides are unusual."""
    if not all(8 <= side <= 256 for side in images.shape[1:3]):
        raise UserError(f"{name} contains images of {size(images)} pixels: use 8 to 256 per side, {ALTERNATIVE}")
    # Not by np.newaxis: its stride of 0 makes jax 0.12 transfer 10,000 images in 15 to 50 ms instead of 0.04.
    images = np.ascontiguousarray(images).reshape(*images.shape[:3], -1)
    return Split(images, labels.astype(np.int32))


def size(images: np.ndarray) -> str:
    """Return the size of images in words: "28×28", or "32×32×3" if they have several channels."""
    return "×".join(map(str, images.shape[1:3] if images.shape[3:] in ((), (1,)) else images.shape[1:]))


# --- Data sets of tensorflow-datasets ---------------------------------------------------------------------------------


def load_registered(name: str, folder: Path, order: str) -> Files:
    """Load a data set registered in tensorflow-datasets from its original files.

    Missing files are downloaded, unless ``folder`` contains the data set prepared as array_record.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download.resource import get_dl_fname

    builder = tfds.builder_cls(name.partition("/")[0])
    infos = builder.url_infos or {}
    # Four files, or one archive for EMNIST.
    urls = list(infos) if "/" in name else [next(url for url in infos if f"/{stem}-" in url) for stem in STEMS]
    checksums = [infos[url].checksum for url in urls]
    paths = [folder / "downloads" / get_dl_fname(*pair) for pair in zip(urls, checksums, strict=True)]
    records = folder / name / str(builder.VERSION)
    if not all(map(os.path.isfile, paths)) and glob.glob("*.array_record*", root_dir=records):
        files = load_prepared(name, folder, records, order)
    else:
        for url, path, checksum in zip(urls, paths, checksums, strict=True):
            obtain(url, path, checksum, int(infos[url].size))
        files = read_files(paths, checksums) if "/" not in name else read_emnist(paths[0], name, checksums[0])
    if "/" in name:
        files = files._replace(train=as_mnist(files.train, name), test=as_mnist(files.test, name))
    return files._replace(class_names=CLASS_NAMES.get(name, ()))


def read_emnist(archive: Path, name: str, checksum: str) -> Files:
    """Read the four IDX files of ``name``, such as "emnist/letters", in the archive of EMNIST (Cohen et al. 2017)."""
    contents, kind = [], name.replace("/", "-")
    try:
        with zipfile.ZipFile(archive) as files:
            for split, content in itertools.product(("train", "test"), ("images-idx3", "labels-idx1")):
                member = f"gzip/{kind}-{split}-{content}-ubyte.gz"
                values = files.read(member)
                contents.append(parse(io.BytesIO(values), len(values)))
    except (ValueError, EOFError, KeyError, zlib.error, zipfile.BadZipFile, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{archive} is not the archive of EMNIST: {reason}; remove it, {ALTERNATIVE}") from error
    images, labels, test_images, test_labels = contents
    train = make_split(images, labels, str(archive))
    return Files(f"{name}, SHA-256: {checksum}", True, train, make_split(test_images, test_labels, str(archive)))


def as_mnist(split: Split, name: str) -> Split:
    """Return images of EMNIST upright, because its files have them transposed, with labels from 0."""
    first = 1 if name == "emnist/letters" else 0
    return Split(np.ascontiguousarray(split.images.swapaxes(1, 2)), split.labels - first)


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
