"""Data sets from each source, and the errors if one cannot be loaded."""

import functools
import gzip
import hashlib
import http.server
import logging
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download.checksums import UrlInfo
from tensorflow_datasets.core.download.resource import get_dl_fname
from tensorflow_datasets.core.utils import Size

from flaxmnist.config import Data
from flaxmnist.data.sets import load_data
from flaxmnist.errors import UserError

DATA_DIR = Path(os.environ.get("FLAXMNIST_DATA") or Path(__file__).parents[2] / "shared" / "tensorflow_datasets")


def idx(values: np.ndarray) -> bytes:
    """Return ``values`` as the bytes of an IDX file."""
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.astype(np.uint8).tobytes()


def four_files(train=16, test=6, size=(28, 28), classes=4) -> dict[str, bytes]:
    """Return a small data set as four IDX files: all pixels of image i are i, and its label is i mod ``classes``."""
    files = {}
    for split, count in ("train", train), ("t10k", test):
        images = np.broadcast_to(np.arange(count)[:, None, None], (count, *size))
        files[f"{split}-images-idx3-ubyte"] = idx(images)
        files[f"{split}-labels-idx1-ubyte"] = idx(np.arange(count) % classes)
    return files


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def assert_error(data: Data | str, folder: Path, *words: str):
    """Check that loading raises a one-line error that contains all ``words``, in any order."""
    with pytest.raises(UserError) as error:
        load_data(data, folder)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


# --- A person's own IDX files -----------------------------------------------------------------------------------------


def test_idx_validation_images_are_the_first_training_images(tmp_path: Path):
    dataset = load_data(Data(name="idx", validation=5), write(tmp_path, four_files()))
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
    assert hashlib.sha256(four_files()["train-images-idx3-ubyte"]).hexdigest() in dataset.source


@pytest.mark.parametrize(("test", "dot", "suffix"), [("t10k", ".", ""), ("test", "-", ".gz"), ("test", ".", ".gz")])
def test_idx_files_under_their_other_names(tmp_path: Path, test: str, dot: str, suffix: str):
    for name, content in four_files().items():
        split, kind, rest = name.replace("t10k", test).split("-", 2)
        (tmp_path / f"{split}-{kind}{dot}{rest}{suffix}").write_bytes(gzip.compress(content) if suffix else content)
    assert len(load_data("idx", tmp_path).test.labels) == 6


@pytest.mark.parametrize(("count", "held_out"), [(16, 2), (17, 3), (41_000, 5000)])
def test_validation_is_an_eighth_of_the_training_file_and_at_most_5000(tmp_path: Path, count: int, held_out: int):
    dataset = load_data("idx", write(tmp_path, four_files(train=count, size=(8, 9))))
    assert dataset.validation is not None
    assert len(dataset.validation.labels) == len(dataset.validation.images) == held_out
    assert len(dataset.train.labels) == count - held_out
    assert dataset.train.images.shape[1:] == (8, 9, 1)


def test_no_validation(tmp_path: Path):
    dataset = load_data(Data(name="idx", validation=0), write(tmp_path, four_files()))
    assert dataset.validation is None
    assert len(dataset.train.labels) == 16


@pytest.mark.parametrize("validation", [16, 17, -1])
def test_validation_must_leave_at_least_one_training_image(tmp_path: Path, validation: int):
    assert_error(Data(name="idx", validation=validation), write(tmp_path, four_files()), "data.validation", "[0, 15]")


def test_error_for_a_missing_file_lists_all_its_names(tmp_path: Path):
    files = four_files()
    del files["t10k-labels-idx1-ubyte"]
    words = [str(tmp_path), "t10k-labels-idx1-ubyte", "test-labels.idx1-ubyte.gz", "--data.name digits"]
    assert_error("idx", write(tmp_path, files), *words)
    assert_error("idx", tmp_path / "none", str(tmp_path / "none"), "train-images-idx3-ubyte")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"train-images-idx3-ubyte": b"\0\0\x08"}, ["train-images-idx3-ubyte is not a readable IDX file"]),
        ({"train-images-idx3-ubyte": idx(np.zeros(16))}, ["train-images-idx3-ubyte contains no images"]),
        ({"t10k-labels-idx1-ubyte": idx(np.zeros((6, 28, 28)))}, ["t10k-labels-idx1-ubyte contains no labels"]),
        ({"train-labels-idx1-ubyte": idx(np.zeros(15))}, ["train-labels-idx1-ubyte", "16 images", "15 labels"]),
        (four_files(test=0), ["0 images"]),
        (four_files(size=(28, 7)), ["train-images-idx3-ubyte", "28×7"]),
        (four_files(size=(257, 28)), ["train-images-idx3-ubyte", "257×28"]),
        ({"t10k-images-idx3-ubyte": idx(np.zeros((6, 28, 27)))}, ["28×28", "28×27"]),
        ({"t10k-labels-idx1-ubyte": idx(np.arange(6))}, ["largest test label is 5", "training label is only 3"]),
    ],
)
def test_invalid_files(tmp_path: Path, wrong: dict[str, bytes], words: list[str]):
    assert_error("idx", write(tmp_path, four_files() | wrong), *words)


def test_unknown_name(tmp_path: Path):
    assert_error("mnits", tmp_path, "data.name", "'mnits'", "'mnist'")


# --- Data sets of tensorflow-datasets ---------------------------------------------------------------------------------


def registry(name: str) -> dict[str, UrlInfo]:
    """Return the download information that tensorflow-datasets has about each file of a data set, by URL."""
    return tfds.builder_cls(name).url_infos or {}


@pytest.fixture
def requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Serve a small MNIST on the loopback interface, and yield the growing list of the files requested from there."""
    served = tmp_path / "served"
    served.mkdir()
    write(served, {f"{name}.gz": gzip.compress(content) for name, content in four_files().items()})
    requests: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_request(self, code="-", size="-"):
            requests.append(self.path.removeprefix("/"))

        def log_message(self, format: str, *args):
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    handler = functools.partial(Handler, directory=str(served))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        infos = {
            f"http://127.0.0.1:{server.server_port}/{path.name}": UrlInfo(
                size=Size(path.stat().st_size),
                checksum=hashlib.sha256(path.read_bytes()).hexdigest(),
                filename=path.name,
            )
            for path in sorted(served.iterdir())
        }
        monkeypatch.setattr(tfds.builder_cls("mnist"), "url_infos", infos)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield requests
        server.shutdown()
        thread.join()


def cached(folder: Path, stem: str) -> Path:
    """Return the path of a downloaded file of the small MNIST."""
    url, info = next((url, info) for url, info in registry("mnist").items() if stem in url)
    return folder / "downloads" / get_dl_fname(url, info.checksum)


def test_files_are_downloaded_once(requests: list[str], tmp_path: Path):
    folder = tmp_path / "new" / "data"
    dataset = load_data("mnist", folder)
    assert sorted(requests) == [
        f"{split}-{kind}-ubyte.gz" for split in ("t10k", "train") for kind in ("images-idx3", "labels-idx1")
    ]
    assert dataset.file_order
    assert dataset.train.labels[:4].tolist() == [2, 3, 0, 1]
    assert hashlib.sha256(cached(folder, "t10k-labels").read_bytes()).hexdigest() in dataset.source
    load_data("mnist", folder)
    assert len(requests) == 4
    assert len(list((folder / "downloads").iterdir())) == 4


def test_damaged_file_is_downloaded_again(requests: list[str], tmp_path: Path):
    load_data("mnist", tmp_path)
    cached(tmp_path, "train-labels").write_bytes(gzip.compress(idx(np.zeros(16))))
    assert load_data("mnist", tmp_path).classes == 4
    assert requests[4:] == ["train-labels-idx1-ubyte.gz"]


def test_error_for_a_damaged_file_that_cannot_be_downloaded_again(requests: list[str], tmp_path: Path):
    load_data("mnist", tmp_path)
    path = cached(tmp_path, "train-labels")
    path.write_bytes(b"damaged")
    (tmp_path / "served" / "train-labels-idx1-ubyte.gz").unlink()
    assert_error("mnist", tmp_path, f"{path} is damaged", "404", "--data.name digits")


def test_error_for_a_missing_file_that_cannot_be_downloaded(requests: list[str], tmp_path: Path):
    (tmp_path / "served" / "t10k-images-idx3-ubyte.gz").unlink()
    assert_error("mnist", tmp_path, "/t10k-images-idx3-ubyte.gz", str(cached(tmp_path, "t10k-images")), "404")


def test_folder_may_be_read_only_if_the_files_are_there(requests: list[str], tmp_path: Path):
    load_data("mnist", tmp_path)
    downloads = tmp_path / "downloads"
    for path in (*downloads.iterdir(), downloads):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = downloads.stat()
    load_data("mnist", tmp_path)
    after = downloads.stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)
    downloads.chmod(0o755)


def test_default_folder_is_the_one_of_tensorflow_datasets(
    requests: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    load_data("mnist")
    assert len(list((tmp_path / "home" / "tensorflow_datasets" / "downloads").iterdir())) == 4
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "named"))
    load_data("mnist")
    assert len(list((tmp_path / "named" / "downloads").iterdir())) == 4


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "kmnist"])
def test_tensorflow_datasets_lists_four_files_per_data_set(name: str):
    infos = registry(name)
    for stem in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        assert sum(url.endswith(f"/{stem}-ubyte.gz") for url in infos) == 1


def test_file_order_is_not_available_for_array_records(requests: list[str], tmp_path: Path):
    records = tmp_path / "mnist" / "3.0.1"
    records.mkdir(parents=True)
    (records / "mnist-train.array_record-00000-of-00001").touch()
    assert_error(Data(order="file"), tmp_path, "data.order", str(records), str(tmp_path / "downloads"))
    assert requests == []


def test_error_for_unreadable_array_records(requests: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    records = tmp_path / "mnist" / "3.0.1"
    records.mkdir(parents=True)
    (records / "mnist-train.array_record-00000-of-00001").touch()
    assert_error("mnist", tmp_path, "cannot read", str(records), "--data.name digits")

    def fail(*arguments, **options):
        raise ModuleNotFoundError("No module named 'array_record'")

    monkeypatch.setattr(tfds, "data_source", fail)
    assert_error("mnist", tmp_path, str(records), "pip install array_record")
    assert requests == []


def test_original_files_are_preferred_to_array_records(requests: list[str], tmp_path: Path):
    load_data("mnist", tmp_path)
    records = tmp_path / "mnist" / "3.0.1"
    records.mkdir(parents=True)
    (records / "mnist-train.array_record-00000-of-00001").touch()
    assert load_data(Data(order="file"), tmp_path).file_order


@pytest.mark.slow
def test_real_mnist_from_its_original_files_without_tensorflow():
    code = (
        "import sys; from flaxmnist.data.sets import load_data; data = load_data('mnist', sys.argv[1]);"
        "assert 'tensorflow' not in sys.modules;"
        "print(data.validation.labels[:5], data.train.images.shape, data.test.images.shape, data.classes)"
    )
    result = subprocess.run([sys.executable, "-c", code, DATA_DIR], capture_output=True, text=True, check=False)
    assert result.stdout == "[5 0 4 1 9] (55000, 28, 28, 1) (10000, 28, 28, 1) 10\n", result.stderr


@pytest.mark.slow
def test_real_mnist_from_array_records(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    # If a command has run in this process, the package's messages no longer propagate.
    monkeypatch.setattr(logging.getLogger("flaxmnist"), "propagate", True)
    (tmp_path / "mnist").symlink_to(DATA_DIR / "mnist")
    with caplog.at_level(logging.WARNING, "flaxmnist"):
        dataset = load_data(Data(validation=0), tmp_path)
    assert "another order" in caplog.text
    assert dataset.train.labels[:5].tolist() == [4, 1, 0, 7, 8]
    assert not dataset.file_order
    assert dataset.source == "tfds array_record mnist/3.0.1"
    assert dataset.train.images.shape == (60_000, 28, 28, 1)
    original = load_data(Data(validation=0), DATA_DIR)
    for actual, expected in (dataset.train, original.train), (dataset.test, original.test):
        assert actual.images.dtype == np.uint8
        assert actual.labels.dtype == np.int32
        assert contents(actual) == contents(expected)


def contents(split) -> list[bytes]:
    """Return all images with their labels, sorted, to compare splits regardless of their order."""
    return sorted(image.tobytes() + bytes([label]) for image, label in zip(split.images, split.labels, strict=True))


# --- The digits of scikit-learn ---------------------------------------------------------------------------------------


def test_digits_are_1257_180_360_in_mnist_form_and_need_no_folder(tmp_path: Path):
    digits = load_data("digits", tmp_path / "none")
    assert digits.validation is not None
    assert [len(split.labels) for split in (digits.train, digits.validation, digits.test)] == [1257, 180, 360]
    assert digits.classes == 10
    for split in (digits.train, digits.validation, digits.test):
        assert split.images.shape == (len(split.labels), 28, 28, 1)
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
