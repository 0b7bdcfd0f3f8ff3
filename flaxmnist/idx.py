"""The IDX format, in which MNIST and its relatives are given out (https://yann.lecun.com/exdb/mnist/, at the end).

Two zero bytes, a byte for the type (8: unsigned bytes), a byte for the number of dimensions, each dimension's size as
four bytes with the most significant first, and then the values, the last dimension running fastest.
"""

import gzip
import math
import os
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from flaxmnist.errors import UserError

LIMIT = 1 << 32  # most bytes of values that are read, so that a wrong header cannot ask for all memory
DEFLATE_RATIO = 1032  # most bytes that a byte of a gzip file can hold (zlib's documentation)


def read_idx(path: Path | str) -> UInt8[np.ndarray, " n"] | UInt8[np.ndarray, "n h w"]:
    """The values of the IDX file ``path``: labels [n] or images [n, h, w], as uint8. They cannot be written to.

    The file may be gzipped, whatever its name. Raises UserError, naming the file, where it is missing, no such file,
    truncated, altered, or longer than its header says. Memory stays within a few times what the header promises.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise UserError(f"no file {path}: put it there, or use --data.name digits, which needs no files")
    try:
        return parse(path)
    except (ValueError, EOFError, zlib.error, OSError) as error:
        what = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
        remedy = "replace it by a whole copy, or use --data.name digits, which needs no files"
        raise UserError(f"{path} is no readable IDX file: {what}; {remedy}") from error


def parse(path: Path) -> np.ndarray:
    """``read_idx`` with the errors as they arise."""
    with open(path, "rb") as file:
        gzipped = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        length = os.fstat(file.fileno()).st_size
        with gzip.open(file) if gzipped else file as stream:
            magic = stream.read(4)
            if magic[:3] != b"\0\0\x08" or magic[3:] not in (b"\1", b"\3"):
                expected = "00000801 (labels) or 00000803 (images)"
                raise ValueError(f"it begins with {magic.hex() or 'nothing'}, not with {expected}")
            sizes = stream.read(4 * magic[3])
            shape = tuple(int.from_bytes(sizes[i : i + 4]) for i in range(0, len(sizes), 4))
            if len(sizes) < 4 * magic[3]:
                raise ValueError("it ends within its header")
            promised = math.prod(shape)
            if promised > LIMIT:
                raise ValueError(f"its header promises {promised:,} bytes, and more than {LIMIT:,} are not read")
            # Asking for that much would take the memory before the first byte is read.
            if promised > length * DEFLATE_RATIO:
                raise ValueError(f"its header promises {promised:,} bytes, which a file of {length:,} cannot hold")
            # One byte more than promised tells a file that is too long, and lets gzip reach and check its own sum.
            values = stream.read(promised + 1)
    if len(values) != promised:
        found = "more follow" if len(values) > promised else f"{len(values):,} are there"
        raise ValueError(f"its header promises {promised:,} bytes, but {found}")
    return np.frombuffer(values, np.uint8).reshape(shape)
