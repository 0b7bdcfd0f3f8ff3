"""Valid and invalid IDX files."""

import gzip
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from conftest import idx_bytes, user_error

from flaxmnist.data.idx import read_idx

LABELS = idx_bytes(np.array([5, 0, 4]))
IMAGES = idx_bytes(np.arange(2 * 3 * 4).reshape(2, 3, 4))


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("name", ["labels", "labels.gz"])
def test_values_and_shape_of_plain_and_gzipped_files_under_any_name(tmp_path: Path, pack, name: str):
    (tmp_path / name).write_bytes(pack(LABELS))
    (tmp_path / "images").write_bytes(pack(IMAGES))
    labels, images = read_idx(tmp_path / name), read_idx(tmp_path / "images")
    assert labels.dtype == images.dtype == np.uint8
    assert labels.tolist() == [5, 0, 4]
    assert images.shape == (2, 3, 4)
    assert images[1, 2].tolist() == [20, 21, 22, 23]


def test_a_file_of_zero_images_is_read(tmp_path: Path):
    (tmp_path / "file").write_bytes(idx_bytes(np.zeros((0, 28, 28))))
    assert read_idx(tmp_path / "file").shape == (0, 28, 28)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "begins with nothing"),
        (b"<html>not found</html>", "begins with 3c68746d"),
        (IMAGES[:3], "begins with 000008"),
        (IMAGES[:10], "ends within its header"),
        (IMAGES[:-1], "declares 24 bytes, but only 23 follow"),
        (IMAGES + b"\0", "declares 24 bytes, but more follow"),
        (b"\0\0\x0d\1" + LABELS[4:], "begins with 00000d01"),  # floats
        (b"\0\0\x08\2" + LABELS[4:], "begins with 00000802"),  # two dimensions
        (struct.pack(">HBBI", 0, 8, 1, 2**31) + b"123", "cannot hold"),
        (struct.pack(">HBB3I", 0, 8, 3, *[2**32 - 1] * 3) + b"123", "but at most 4,294,967,296 are read"),
    ],
)
def test_invalid_content(tmp_path: Path, content: bytes, words: str, pack):
    path = tmp_path / "file"
    path.write_bytes(pack(content))
    assert_error(path, words)


def test_invalid_gzip(tmp_path: Path):
    intact = gzip.compress(idx_bytes(np.random.default_rng(0).integers(0, 256, (2, 8, 8))))
    wrong_checksum = intact[:-8] + bytes(8)
    wrong_block = intact[:10] + b"\xff" + intact[11:]
    path = tmp_path / "file"
    for content in (intact[:-1], intact[:-20], wrong_checksum, wrong_block, intact + b"more"):
        path.write_bytes(content)
        assert_error(path, "not a readable IDX file")


def test_gzip_bomb_is_not_decompressed(tmp_path: Path):
    header = struct.pack(">HBB3I", 0, 8, 3, 1000, 28, 28)
    with gzip.open(tmp_path / "file", "wb") as file:
        file.write(header)
        for _ in range(256):
            file.write(bytes(1 << 20))
    tracemalloc.start()
    assert_error(tmp_path / "file", "more follow")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20


def test_missing_file_and_folder(tmp_path: Path):
    assert_error(tmp_path / "none", "no file")
    assert_error(tmp_path, "no file")


def assert_error(path: Path, words: str):
    """Assert that reading ``path`` raises a one-line error that contains the path, ``words`` and a remedy."""
    with user_error(str(path), words, "--data.name digits"):
        read_idx(path)
