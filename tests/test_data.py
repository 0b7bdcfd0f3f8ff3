"""Data sets from each of their sources, and what is said where one is not to be had."""

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
from flaxmnist.data import load_data
from flaxmnist.errors import UserError

GENUINE = Path(os.environ.get("FLAXMNIST_DATA") or Path(__file__).parents[2] / "shared" / "tensorflow_datasets")


def idx(values: np.ndarray) -> bytes:
    """``values`` as the bytes of an IDX file."""
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.astype(np.uint8).tobytes()


def four_files(train=16, test=6, size=(28, 28), classes=4) -> dict[str, bytes]:
    """A small data set as four IDX files: image i is filled with the value i and has the label i mod ``classes``."""
    files = {}
    for part, count in ("train", train), ("t10k", test):
        images = np.broadcast_to(np.arange(count)[:, None, None], (count, *size))
        files[f"{part}-images-idx3-ubyte"] = idx(images)
        files[f"{part}-labels-idx1-ubyte"] = idx(np.arange(count) % classes)
    return files


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def assert_refused(data: Data | str, folder: Path, *words: str):
    """Loading gives one line with all ``words``, in any order."""
    with pytest.raises(UserError) as refusal:
        load_data(data, folder)
    for word in words:
        assert word in str(refusal.value)
    assert "\n" not in str(refusal.value)


# --- The person's own IDX files ---------------------------------------------------------------------------------------


def test_idx_images_labels_and_the_validation_images_at_the_beginning(tmp_path: Path):
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


@pytest.mark.parametrize(("test", "dot", "end"), [("t10k", ".", ""), ("test", "-", ".gz"), ("test", ".", ".gz")])
def test_idx_files_under_the_other_names_in_use(tmp_path: Path, test: str, dot: str, end: str):
    for name, content in four_files().items():
        part, kind, rest = name.replace("t10k", test).split("-", 2)
        (tmp_path / f"{part}-{kind}{dot}{rest}{end}").write_bytes(gzip.compress(content) if end else content)
    assert len(load_data("idx", tmp_path).test.labels) == 6


@pytest.mark.parametrize(("count", "held"), [(16, 2), (17, 3), (41_000, 5000)])
def test_validation_is_an_eighth_of_the_training_file_and_at_most_5000(tmp_path: Path, count: int, held: int):
    dataset = load_data("idx", write(tmp_path, four_files(train=count, size=(8, 9))))
    assert dataset.validation is not None
    assert len(dataset.validation.labels) == len(dataset.validation.images) == held
    assert len(dataset.train.labels) == count - held
    assert dataset.train.images.shape[1:] == (8, 9, 1)


def test_no_validation(tmp_path: Path):
    dataset = load_data(Data(name="idx", validation=0), write(tmp_path, four_files()))
    assert dataset.validation is None
    assert len(dataset.train.labels) == 16


@pytest.mark.parametrize("validation", [16, 17, -1])
def test_validation_must_leave_a_training_image(tmp_path: Path, validation: int):
    assert_refused(Data(name="idx", validation=validation), write(tmp_path, four_files()), "data.validation", "[0, 15]")


def test_missing_file_is_named_with_its_other_names(tmp_path: Path):
    files = four_files()
    del files["t10k-labels-idx1-ubyte"]
    words = [str(tmp_path), "t10k-labels-idx1-ubyte", "test-labels.idx1-ubyte.gz", "--data.name digits"]
    assert_refused("idx", write(tmp_path, files), *words)
    assert_refused("idx", tmp_path / "none", str(tmp_path / "none"), "train-images-idx3-ubyte")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"train-images-idx3-ubyte": b"\0\0\x08"}, ["train-images-idx3-ubyte is no readable IDX file"]),
        ({"train-images-idx3-ubyte": idx(np.zeros(16))}, ["train-images-idx3-ubyte holds no images"]),
        ({"t10k-labels-idx1-ubyte": idx(np.zeros((6, 28, 28)))}, ["t10k-labels-idx1-ubyte holds no labels"]),
        ({"train-labels-idx1-ubyte": idx(np.zeros(15))}, ["train-labels-idx1-ubyte", "16 images", "15 labels"]),
        (four_files(test=0), ["0 images"]),
        (four_files(size=(28, 7)), ["train-images-idx3-ubyte", "28×7"]),
        (four_files(size=(257, 28)), ["train-images-idx3-ubyte", "257×28"]),
        ({"t10k-images-idx3-ubyte": idx(np.zeros((6, 28, 27)))}, ["28×28", "28×27"]),
        ({"t10k-labels-idx1-ubyte": idx(np.arange(6))}, ["test labels go to 5", "only to 3"]),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, wrong: dict[str, bytes], words: list[str]):
    assert_refused("idx", write(tmp_path, four_files() | wrong), *words)


def test_unknown_name(tmp_path: Path):
    assert_refused("mnits", tmp_path, "data.name", "'mnits'", "'mnist'")


# --- The registry's data sets -----------------------------------------------------------------------------------------


def registry(name: str) -> dict[str, UrlInfo]:
    """What tensorflow-datasets knows of each file of the data set, by address."""
    return tfds.builder_cls(name).url_infos or {}


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """tensorflow-datasets' registry has a small MNIST on the loopback interface; what was asked for is listed here."""
    served = tmp_path / "served"
    served.mkdir()
    write(served, {f"{name}.gz": gzip.compress(content) for name, content in four_files().items()})
    paths: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_request(self, code="-", size="-"):
            paths.append(self.path.removeprefix("/"))

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
        yield paths
        server.shutdown()
        thread.join()


def cached(folder: Path, part: str) -> Path:
    """Where the file ``part`` of the small MNIST lies once it is downloaded."""
    url, info = next((url, info) for url, info in registry("mnist").items() if part in url)
    return folder / "downloads" / get_dl_fname(url, info.checksum)


def test_files_are_fetched_once(asked: list[str], tmp_path: Path):
    folder = tmp_path / "new" / "data"
    dataset = load_data("mnist", folder)
    assert sorted(asked) == [
        f"{part}-{kind}-ubyte.gz" for part in ("t10k", "train") for kind in ("images-idx3", "labels-idx1")
    ]
    assert dataset.file_order
    assert dataset.train.labels[:4].tolist() == [2, 3, 0, 1]
    assert hashlib.sha256(cached(folder, "t10k-labels").read_bytes()).hexdigest() in dataset.source
    load_data("mnist", folder)
    assert len(asked) == 4
    assert len(list((folder / "downloads").iterdir())) == 4


def test_damaged_file_is_fetched_anew(asked: list[str], tmp_path: Path):
    load_data("mnist", tmp_path)
    cached(tmp_path, "train-labels").write_bytes(gzip.compress(idx(np.zeros(16))))
    assert load_data("mnist", tmp_path).classes == 4
    assert asked[4:] == ["train-labels-idx1-ubyte.gz"]


def test_damaged_file_is_named_where_it_cannot_be_fetched(asked: list[str], tmp_path: Path):
    load_data("mnist", tmp_path)
    path = cached(tmp_path, "train-labels")
    path.write_bytes(b"damaged")
    (tmp_path / "served" / "train-labels-idx1-ubyte.gz").unlink()
    assert_refused("mnist", tmp_path, f"{path} is damaged", "404", "--data.name digits")


def test_missing_file_and_no_network(asked: list[str], tmp_path: Path):
    (tmp_path / "served" / "t10k-images-idx3-ubyte.gz").unlink()
    assert_refused("mnist", tmp_path, "/t10k-images-idx3-ubyte.gz", str(cached(tmp_path, "t10k-images")), "404")


def test_folder_is_read_only_where_the_files_are_there(asked: list[str], tmp_path: Path):
    load_data("mnist", tmp_path)
    downloads = tmp_path / "downloads"
    for path in (*downloads.iterdir(), downloads):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = downloads.stat()
    load_data("mnist", tmp_path)
    after = downloads.stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)
    downloads.chmod(0o755)


def test_default_folder_is_that_of_tensorflow_datasets(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    load_data("mnist")
    assert len(list((tmp_path / "home" / "tensorflow_datasets" / "downloads").iterdir())) == 4
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "named"))
    load_data("mnist")
    assert len(list((tmp_path / "named" / "downloads").iterdir())) == 4


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "kmnist"])
def test_registry_names_four_files_for_each_set(name: str):
    infos = registry(name)
    for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        assert sum(url.endswith(f"/{part}-ubyte.gz") for url in infos) == 1


def test_file_order_is_refused_for_array_records(asked: list[str], tmp_path: Path):
    records = tmp_path / "mnist" / "3.0.1"
    records.mkdir(parents=True)
    (records / "mnist-train.array_record-00000-of-00001").touch()
    assert_refused(Data(order="file"), tmp_path, "data.order", str(records), str(tmp_path / "downloads"))
    assert asked == []


def test_unreadable_array_records_are_named(asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    records = tmp_path / "mnist" / "3.0.1"
    records.mkdir(parents=True)
    (records / "mnist-train.array_record-00000-of-00001").touch()
    assert_refused("mnist", tmp_path, "cannot read", str(records), "--data.name digits")

    def fail(*arguments, **options):
        raise ModuleNotFoundError("No module named 'array_record'")

    monkeypatch.setattr(tfds, "data_source", fail)
    assert_refused("mnist", tmp_path, str(records), "pip install array_record")
    assert asked == []


def test_original_files_come_before_array_records(asked: list[str], tmp_path: Path):
    load_data("mnist", tmp_path)
    records = tmp_path / "mnist" / "3.0.1"
    records.mkdir(parents=True)
    (records / "mnist-train.array_record-00000-of-00001").touch()
    assert load_data(Data(order="file"), tmp_path).file_order


@pytest.mark.slow
def test_genuine_mnist_from_its_original_files_without_tensorflow():
    code = (
        "import sys; from flaxmnist.data import load_data; data = load_data('mnist', sys.argv[1]);"
        "assert 'tensorflow' not in sys.modules;"
        "print(data.validation.labels[:5], data.train.images.shape, data.test.images.shape, data.classes)"
    )
    result = subprocess.run([sys.executable, "-c", code, GENUINE], capture_output=True, text=True, check=False)
    assert result.stdout == "[5 0 4 1 9] (55000, 28, 28, 1) (10000, 28, 28, 1) 10\n", result.stderr


@pytest.mark.slow
def test_genuine_mnist_from_array_records(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    # The commands show the package's messages themselves, and may have run in this process.
    monkeypatch.setattr(logging.getLogger("flaxmnist"), "propagate", True)
    (tmp_path / "mnist").symlink_to(GENUINE / "mnist")
    with caplog.at_level(logging.WARNING, "flaxmnist"):
        dataset = load_data(Data(validation=0), tmp_path)
    assert "another order" in caplog.text
    assert dataset.train.labels[:5].tolist() == [4, 1, 0, 7, 8]
    assert not dataset.file_order
    assert dataset.source == "tfds array_record mnist/3.0.1"
    assert dataset.train.images.shape == (60_000, 28, 28, 1)
    original = load_data(Data(validation=0), GENUINE)
    for found, expected in (dataset.train, original.train), (dataset.test, original.test):
        assert found.images.dtype == np.uint8
        assert found.labels.dtype == np.int32
        assert contents(found) == contents(expected)


def contents(split) -> list[bytes]:
    """Every image with its label, in an order that depends on nothing else."""
    return sorted(image.tobytes() + bytes([label]) for image, label in zip(split.images, split.labels, strict=True))


# --- The embedded digits ----------------------------------------------------------------------------------------------


def test_digits_are_1257_180_360_of_mnists_form_and_need_no_folder(tmp_path: Path):
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
    """Row and column, in pixels, of each image's centre of mass."""
    mass = images.sum(axis=(1, 2), dtype=float)
    return images.sum(axis=2) @ np.arange(28) / mass, images.sum(axis=1) @ np.arange(28) / mass


def test_digits_have_each_class_in_proportion_in_every_part():
    digits = load_data("digits")
    parts = [split.labels for split in (digits.train, digits.validation, digits.test) if split]
    shares = np.bincount(np.concatenate(parts)) / 1797
    for labels in parts:
        assert np.abs(np.bincount(labels) - shares * len(labels)).max() < 2


def test_digits_are_pinned():
    digits = load_data("digits")
    parts = [array.tobytes() for split in (digits.train, digits.validation, digits.test) for array in split or ()]
    # A change of this sum is a change of the data set: of every number measured on it.
    found = hashlib.sha256(b"".join(parts)).hexdigest()
    assert found == "048ed7706bee2968b44b3c0b0eb39262e53a0bbd854a1267d2e6940d0d26c096"


def test_digits_differ_between_the_parts():
    digits = load_data(Data(name="digits", validation=0))
    train = {image.tobytes() for image in digits.train.images}
    assert sum(image.tobytes() in train for image in digits.test.images) == 0
