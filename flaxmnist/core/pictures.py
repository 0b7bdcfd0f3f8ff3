"""Arrays behind pictures, for plots and TensorBoard."""

import numpy as np
from jaxtyping import Float, Int, Num

# Images in one picture.
MAX_TILES = 64


def sheet(images: Num[np.ndarray, "n h w"], columns: int) -> Float[np.ndarray, "height width"]:
    """Return one image with ``images`` in a grid, separated by one pixel of NaN."""
    count, height, width = images.shape
    rows = -(-count // columns)
    tiles = np.full((rows * columns, height + 1, width + 1), np.nan)
    tiles[:count, :-1, :-1] = images
    tiles = tiles.reshape(rows, columns, height + 1, width + 1).swapaxes(1, 2)
    return tiles.reshape(rows * (height + 1), columns * (width + 1))[:-1, :-1]


def class_fractions(confusion: Int[np.ndarray, "classes classes"]) -> Float[np.ndarray, "classes classes"]:
    """Return each prediction's fraction of the images of a true class (row); 0 for a class without images."""
    return confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
