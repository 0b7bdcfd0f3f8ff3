"""Data sets from a person's own IDX files and from scikit-learn, and the errors if one cannot be loaded."""

import gzip
import hashlib
from pathlib import Path

import numpy as np
import pytest
from conftest import idx_bytes, idx_files, user_error, write_files

from flaxmnist.config import Data
from flaxmnist.data.sets import load_data

# --- A person's own IDX files -----------------------------------------------------------------------------------------


def test_idx_validation_images_are_the_first_training_images(tmp_path: Path):
    dataset = load_data(Data(name="idx", validation=5), write_files(tmp_path, idx_files()))
    assert dataset.validation is not None
    assert dataset.name == "idx"
    assert dataset.classes == 4
    assert dataset.file_order
    assert dataset.train.images.shape == (11, 28, 28, 1)
    assert dataset.train.images.dtype == np.uint8
    assert dataset.train.labels.dtype == np.int32
    assert dataset.validation.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert dataset.train.images[:, 0, 0, 0].tolist() == list(range(5, 16))
    assert dataset.train.labels[:4].tolist() == [1, 2, 3, 0]
    assert dataset.test.labels.tolist() == [0, 1, 2, 3, 0, 1]
    assert hashlib.sha256(idx_files()["train-images-idx3-ubyte"]).hexdigest() in dataset.source


@pytest.mark.parametrize(("test", "dot", "suffix"), [("t10k", ".", ""), ("test", "-", ".gz"), ("test", ".", ".gz")])
def test_idx_files_under_their_other_names(tmp_path: Path, test: str, dot: str, suffix: str):
    for name, content in idx_files().items():
        split, kind, rest = name.replace("t10k", test).split("-", 2)
        (tmp_path / f"{split}-{kind}{dot}{rest}{suffix}").write_bytes(gzip.compress(content) if suffix else content)
    assert len(load_data("idx", tmp_path).test.labels) == 6


@pytest.mark.parametrize(("count", "held_out"), [(16, 2), (17, 3), (41_000, 5000)])
def test_validation_is_an_eighth_of_the_training_file_and_at_most_5000(tmp_path: Path, count: int, held_out: int):
    dataset = load_data("idx", write_files(tmp_path, idx_files(train=count, size=(8, 9))))
    assert dataset.validation is not None
    assert len(dataset.validation.labels) == len(dataset.validation.images) == held_out
    assert len(dataset.train.labels) == count - held_out
    assert dataset.train.images.shape[1:] == (8, 9, 1)


def test_no_validation(tmp_path: Path):
    dataset = load_data(Data(name="idx", validation=0), write_files(tmp_path, idx_files()))
    assert dataset.validation is None
    assert len(dataset.train.labels) == 16


@pytest.mark.parametrize(("validation", "interval"), [(16, "[0, 15]"), (17, "[0, 15]"), (-1, "[0, 2147483647]")])
def test_validation_must_leave_at_least_one_training_image(tmp_path: Path, validation: int, interval: str):
    with user_error("data.validation must lie in", interval):
        load_data(Data(name="idx", validation=validation), write_files(tmp_path, idx_files()))


def test_error_for_a_missing_file_lists_all_its_names(tmp_path: Path):
    files = idx_files()
    del files["t10k-labels-idx1-ubyte"]
    words = [str(tmp_path), "t10k-labels-idx1-ubyte", "test-labels.idx1-ubyte.gz", "--data.name digits"]
    with user_error(*words):
        load_data("idx", write_files(tmp_path, files))
    with user_error(str(tmp_path / "none"), "train-images-idx3-ubyte"):
        load_data("idx", tmp_path / "none")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"train-images-idx3-ubyte": b"\0\0\x08"}, ["train-images-idx3-ubyte is not a readable IDX file"]),
        ({"train-images-idx3-ubyte": idx_bytes(np.zeros(16))}, ["train-images-idx3-ubyte contains no images"]),
        ({"t10k-labels-idx1-ubyte": idx_bytes(np.zeros((6, 28, 28)))}, ["t10k-labels-idx1-ubyte contains no labels"]),
        ({"train-labels-idx1-ubyte": idx_bytes(np.zeros(15))}, ["train-labels-idx1-ubyte", "16 images", "15 labels"]),
        (idx_files(test=0), ["0 images"]),
        (idx_files(size=(28, 7)), ["train-images-idx3-ubyte", "28×7"]),
        (idx_files(size=(257, 28)), ["train-images-idx3-ubyte", "257×28"]),
        ({"t10k-images-idx3-ubyte": idx_bytes(np.zeros((6, 28, 27)))}, ["28×28", "28×27"]),
        ({"t10k-labels-idx1-ubyte": idx_bytes(np.arange(6))}, ["largest test label is 5", "training label is only 3"]),
    ],
)
def test_invalid_files(tmp_path: Path, wrong: dict[str, bytes], words: list[str]):
    with user_error(*words):
        load_data("idx", write_files(tmp_path, idx_files() | wrong))


def test_unknown_name(tmp_path: Path):
    with user_error("data.name", "'mnits'", "'mnist'"):
        load_data("mnits", tmp_path)


# --- The digits of scikit-learn ---------------------------------------------------------------------------------------


def test_digits_are_1257_180_360_in_mnist_form_and_need_no_folder(tmp_path: Path):
    digits = load_data("digits", tmp_path / "none")
    assert digits.validation is not None
    assert [len(split.labels) for split in (digits.train, digits.validation, digits.test)] == [1257, 180, 360]
    assert digits.classes == 10
    for split in (digits.train, digits.validation, digits.test):
        assert split.images.shape == (len(split.labels), 28, 28, 1)
        assert split.images.strides == (784, 28, 1, 1), "jax transfers other strides slowly"
        assert split.images.dtype == np.uint8
        assert split.labels.dtype == np.int32
        assert split.images.min() == 0
        assert np.median(split.images.max(axis=(1, 2, 3))) == 255
        rows, columns = centre_of_mass(split.images[..., 0])
        assert np.abs(rows - 14).max() <= 0.5
        assert np.abs(columns - 14).max() <= 0.5
    assert not (tmp_path / "none").exists()


def centre_of_mass(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the row and column, in pixels, of each image's centre of mass."""
    mass = images.sum(axis=(1, 2), dtype=float)
    return images.sum(axis=2) @ np.arange(28) / mass, images.sum(axis=1) @ np.arange(28) / mass


def test_digits_have_the_same_class_proportions_in_every_split():
    digits = load_data("digits")
    splits = [split.labels for split in (digits.train, digits.validation, digits.test) if split]
    fractions = np.bincount(np.concatenate(splits)) / 1797
    for labels in splits:
        assert np.abs(np.bincount(labels) - fractions * len(labels)).max() < 2


def test_digits_are_pinned():
    digits = load_data("digits")
    arrays = [array.tobytes() for split in (digits.train, digits.validation, digits.test) for array in split or ()]
    # If this hash changes, so does every number measured on the data set.
    found = hashlib.sha256(b"".join(arrays)).hexdigest()
    assert found == "048ed7706bee2968b44b3c0b0eb39262e53a0bbd854a1267d2e6940d0d26c096"


def test_no_test_image_is_a_training_image():
    digits = load_data(Data(name="digits", validation=0))
    train = {image.tobytes() for image in digits.train.images}
    assert sum(image.tobytes() in train for image in digits.test.images) == 0
