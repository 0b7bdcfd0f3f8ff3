"""IDX files, whole and broken."""

import gzip
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from flaxmnist.errors import UserError
from flaxmnist.idx import read_idx


def idx(values: np.ndarray) -> bytes:
    """``values`` as the bytes of an IDX file."""
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.astype(np.uint8).tobytes()


LABELS = idx(np.array([5, 0, 4]))
IMAGES = idx(np.arange(2 * 3 * 4).reshape(2, 3, 4))


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("name", ["labels", "labels.gz"])
def test_values_and_shape_plain_or_gzipped_whatever_the_name(tmp_path: Path, pack, name: str):
    (tmp_path / name).write_bytes(pack(LABELS))
    (tmp_path / "images").write_bytes(pack(IMAGES))
    labels, images = read_idx(tmp_path / name), read_idx(tmp_path / "images")
    assert labels.dtype == images.dtype == np.uint8
    assert labels.tolist() == [5, 0, 4]
    assert images.shape == (2, 3, 4)
    assert images[1, 2].tolist() == [20, 21, 22, 23]


def test_no_images_are_read_as_none(tmp_path: Path):
    (tmp_path / "file").write_bytes(idx(np.zeros((0, 28, 28))))
    assert read_idx(tmp_path / "file").shape == (0, 28, 28)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "begins with nothing"),
        (b"<html>not found</html>", "begins with 3c68746d"),
        (IMAGES[:3], "begins with 000008"),
        (IMAGES[:10], "ends within its header"),
        (IMAGES[:-1], "promises 24 bytes, but 23 are there"),
        (IMAGES + b"\0", "promises 24 bytes, but more follow"),
        (b"\0\0\x0d\1" + LABELS[4:], "begins with 00000d01"),  # floats
        (b"\0\0\x08\2" + LABELS[4:], "begins with 00000802"),  # two dimensions
        (struct.pack(">HBBI", 0, 8, 1, 2**31) + b"123", "cannot hold"),
        (struct.pack(">HBB3I", 0, 8, 3, *[2**32 - 1] * 3) + b"123", "are not read"),
    ],
)
def test_broken_content(tmp_path: Path, content: bytes, words: str, pack):
    path = tmp_path / "file"
    path.write_bytes(pack(content))
    assert_refused(path, words)


def test_broken_gzip(tmp_path: Path):
    whole = gzip.compress(idx(np.random.default_rng(0).integers(0, 256, (2, 8, 8))))
    wrong_sum = whole[:-8] + bytes(8)
    wrong_block = whole[:10] + b"\xff" + whole[11:]
    path = tmp_path / "file"
    for content in (whole[:-1], whole[:-20], wrong_sum, wrong_block, whole + b"more"):
        path.write_bytes(content)
        assert_refused(path, "no readable IDX file")


def test_gzip_bomb_is_not_unpacked(tmp_path: Path):
    header = struct.pack(">HBB3I", 0, 8, 3, 1000, 28, 28)
    with gzip.open(tmp_path / "file", "wb") as file:
        file.write(header)
        for _ in range(256):
            file.write(bytes(1 << 20))
    tracemalloc.start()
    assert_refused(tmp_path / "file", "more follow")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20


def test_missing_file_and_folder(tmp_path: Path):
    assert_refused(tmp_path / "none", "no file")
    assert_refused(tmp_path, "no file")


def assert_refused(path: Path, words: str):
    """Reading ``path`` gives one line that names it, says ``words`` and what to do."""
    with pytest.raises(UserError) as refusal:
        read_idx(path)
    assert str(path) in str(refusal.value)
    assert words in str(refusal.value)
    assert "--data.name digits" in str(refusal.value)
    assert "\n" not in str(refusal.value)
