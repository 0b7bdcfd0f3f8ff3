"""The IDX format, in which MNIST and its relatives are distributed (https://yann.lecun.com/exdb/mnist/, at the end).

Two zero bytes, one byte for the type (8: unsigned bytes), one byte for the number of dimensions, the size of each
dimension in four big-endian bytes, and then the values in row-major order.
"""

import contextlib
import gzip
import io
import math
import os
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from flaxmnist.errors import UserError

ALTERNATIVE = "or train on the data set digits, which needs no files: --data.name digits, or the experiment quickstart"
MAX_BYTES = 1 << 32  # largest number of values to read, so that a wrong header cannot exhaust the memory
MAX_DEFLATE_RATIO = 1032  # largest possible ratio of uncompressed to gzipped size (zlib's documentation)


def read_idx(path: Path | str) -> UInt8[np.ndarray, " n"] | UInt8[np.ndarray, "n h w"]:
    """Return the values of an IDX file, labels [n] or images [n, h, w], as a read-only uint8 array.

    The file may be gzipped, whatever its name. Raise UserError, naming the file, if it is missing, not an IDX file,
    truncated, corrupted, or longer than its header says. Memory is limited to a few times the size in the header.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise UserError(f"there is no file {path}: put it there, {ALTERNATIVE}")
    try:
        with open(path, "rb") as file:
            return parse(file, os.fstat(file.fileno()).st_size)
    except (ValueError, EOFError, zlib.error, OSError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
        problem = f"{path} is not a readable IDX file: {reason}"
        raise UserError(f"{problem}; replace it with an intact copy, {ALTERNATIVE}") from error


def parse(file: io.BufferedIOBase, file_size: int) -> np.ndarray:
    """Return the values of an open IDX file, as ``read_idx`` does, but let all exceptions propagate."""
    gzipped = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    with gzip.open(file) if gzipped else contextlib.nullcontext(file) as stream:
        magic = stream.read(4)
        if magic[:3] != b"\0\0\x08" or magic[3:] not in (b"\1", b"\3"):
            expected = "00000801 (labels) or 00000803 (images)"
            raise ValueError(f"it begins with {magic.hex() or 'nothing'}, not with {expected}")
        sizes = stream.read(4 * magic[3])
        shape = tuple(int.from_bytes(sizes[i : i + 4]) for i in range(0, len(sizes), 4))
        if len(sizes) < 4 * magic[3]:
            raise ValueError("it ends within its header")
        count = math.prod(shape)
        if count > MAX_BYTES:
            raise ValueError(f"its header declares {count:,} bytes, but at most {MAX_BYTES:,} are read")
        # Check first, because a read allocates all the memory before the first byte arrives.
        if count > file_size * MAX_DEFLATE_RATIO:
            raise ValueError(f"its header declares {count:,} bytes, which a file of {file_size:,} cannot hold")
        # The extra byte detects a file that is too long, and makes gzip reach the end and verify its checksum.
        values = stream.read(count + 1)
    if len(values) != count:
        found = "more follow" if len(values) > count else f"only {len(values):,} follow"
        raise ValueError(f"its header declares {count:,} bytes, but {found}")
    return np.frombuffer(values, np.uint8).reshape(shape)
