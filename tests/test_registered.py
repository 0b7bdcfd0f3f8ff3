"""Data sets registered in tensorflow-datasets, from their original files and from array records."""

import functools
import gzip
import hashlib
import http.server
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from conftest import idx_bytes, idx_files, user_error, write_files
from tensorflow_datasets.core.download.checksums import UrlInfo
from tensorflow_datasets.core.download.resource import get_dl_fname
from tensorflow_datasets.core.utils import Size

from flaxmnist.config import Data
from flaxmnist.data.sets import load_data

needs_mnist = pytest.mark.skipif("FLAXMNIST_DATA" not in os.environ, reason="FLAXMNIST_DATA names no folder with MNIST")


def registry(name: str) -> dict[str, UrlInfo]:
    """Return the download information that tensorflow-datasets has about each file of a data set, by URL."""
    return tfds.builder_cls(name).url_infos or {}


@pytest.fixture
def requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Serve a small MNIST on the loopback interface, and yield the growing list of the files requested from there."""
    served = tmp_path / "served"
    served.mkdir()
    write_files(served, {f"{name}.gz": gzip.compress(content) for name, content in idx_files().items()})
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
    cached(tmp_path, "train-labels").write_bytes(gzip.compress(idx_bytes(np.zeros(16))))
    assert load_data("mnist", tmp_path).classes == 4
    assert requests[4:] == ["train-labels-idx1-ubyte.gz"]


def test_error_for_a_damaged_file_that_cannot_be_downloaded_again(requests: list[str], tmp_path: Path):
    load_data("mnist", tmp_path)
    path = cached(tmp_path, "train-labels")
    path.write_bytes(b"damaged")
    (tmp_path / "served" / "train-labels-idx1-ubyte.gz").unlink()
    with user_error(f"{path} is damaged", "404", "--data.name digits"):
        load_data("mnist", tmp_path)


def test_error_for_a_missing_file_that_cannot_be_downloaded(requests: list[str], tmp_path: Path):
    (tmp_path / "served" / "t10k-images-idx3-ubyte.gz").unlink()
    with user_error("/t10k-images-idx3-ubyte.gz", str(cached(tmp_path, "t10k-images")), "404"):
        load_data("mnist", tmp_path)


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
    monkeypatch.setenv("TFDS_DATA_DIR", "gs://bucket/data")
    with user_error("gs://bucket/data is not on a file system"):
        load_data("mnist")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "named"))
    load_data("mnist")
    assert len(list((tmp_path / "named" / "downloads").iterdir())) == 4


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "kmnist"])
def test_tensorflow_datasets_lists_four_files_per_data_set(name: str):
    infos = registry(name)
    for stem in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        assert sum(url.endswith(f"/{stem}-ubyte.gz") for url in infos) == 1


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """A folder with an empty array record."""
    folder = tmp_path / "mnist" / "3.0.1"
    folder.mkdir(parents=True)
    (folder / "mnist-train.array_record-00000-of-00001").touch()
    return folder


def test_file_order_is_not_available_for_array_records(requests: list[str], records: Path, tmp_path: Path):
    with user_error("data.order", str(records), str(tmp_path / "downloads")):
        load_data(Data(order="file"), tmp_path)
    assert requests == []


def test_error_for_unreadable_array_records(requests: list[str], records: Path, tmp_path: Path):
    with user_error("cannot read", str(records), "--data.name digits"):
        load_data("mnist", tmp_path)
    assert requests == []


def test_error_for_array_records_without_their_package(
    requests: list[str], records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*arguments, **options):
        raise ModuleNotFoundError("No module named 'array_record'")

    monkeypatch.setattr(tfds, "data_source", fail)
    with user_error(str(records), "pip install array_record"):
        load_data("mnist", tmp_path)
    assert requests == []


def test_original_files_are_preferred_to_array_records(requests: list[str], records: Path, tmp_path: Path):
    load_data("mnist", tmp_path / "new")
    (tmp_path / "new" / "downloads").rename(tmp_path / "downloads")
    assert load_data(Data(order="file"), tmp_path).file_order


@pytest.mark.slow
@needs_mnist
def test_real_mnist_from_its_original_files_without_tensorflow():
    code = (
        "import sys; from flaxmnist.data.sets import load_data; data = load_data('mnist', sys.argv[1]);"
        "assert 'tensorflow' not in sys.modules;"
        "print(data.validation.labels[:5], data.train.images.shape, data.test.images.shape, data.classes)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, os.environ["FLAXMNIST_DATA"]], capture_output=True, text=True, check=False
    )
    assert result.stdout == "[5 0 4 1 9] (55000, 28, 28, 1) (10000, 28, 28, 1) 10\n", result.stderr


@pytest.mark.slow
@needs_mnist
def test_real_mnist_from_array_records(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    # If a command has run in this process, the package's messages no longer propagate.
    monkeypatch.setattr(logging.getLogger("flaxmnist"), "propagate", True)
    (tmp_path / "mnist").symlink_to(Path(os.environ["FLAXMNIST_DATA"], "mnist").resolve())
    with caplog.at_level(logging.WARNING, "flaxmnist"):
        dataset = load_data(Data(validation=0), tmp_path)
    assert "another order" in caplog.text
    assert dataset.train.labels[:5].tolist() == [4, 1, 0, 7, 8]
    assert not dataset.file_order
    assert dataset.source == "tfds array_record mnist/3.0.1"
    assert dataset.train.images.shape == (60_000, 28, 28, 1)
    original = load_data(Data(validation=0), os.environ["FLAXMNIST_DATA"])
    for actual, expected in (dataset.train, original.train), (dataset.test, original.test):
        assert actual.images.dtype == np.uint8
        assert actual.labels.dtype == np.int32
        assert contents(actual) == contents(expected)


def contents(split) -> list[bytes]:
    """Return all images with their labels, sorted, to compare splits regardless of their order."""
    return sorted(image.tobytes() + bytes([label]) for image, label in zip(split.images, split.labels, strict=True))
