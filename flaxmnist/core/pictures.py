"""Arrays behind pictures, for plots and TensorBoard."""

import numpy as np
from jaxtyping import Float, Int, Num

# Images in one picture.
MAX_TILES = 64


def sheet(images: Num[np.ndarray, "n h w *c"], columns: int) -> Float[np.ndarray, "height width *c"]:
    """Return one image with ``images`` in a grid, separated by one pixel of NaN."""
    count, height, width, *channels = images.shape
    rows = -(-count // columns)
    tiles = np.full((rows * columns, height + 1, width + 1, *channels), np.nan)
    tiles[:count, :-1, :-1] = images
    tiles = tiles.reshape(rows, columns, height + 1, width + 1, *channels).swapaxes(1, 2)
    return tiles.reshape(rows * (height + 1), columns * (width + 1), *channels)[:-1, :-1]


def visible(images: Num[np.ndarray, "*n h w c"]) -> Num[np.ndarray, "*n h w"] | Num[np.ndarray, "*n h w 3"]:
    """Return images as they are drawn: without the axis of a single channel, or in colour if there are three.

    Of two, four or more channels, the mean is drawn.
    """
    match images.shape[-1]:
        case 1:
            return images[..., 0]
        case 3:
            return images
        case _:
            return images.mean(axis=-1)


def class_fractions(confusion: Int[np.ndarray, "classes classes"]) -> Float[np.ndarray, "classes classes"]:
    """Return each prediction's fraction of the images of a true class (row); 0 for a class without images."""
    return confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
