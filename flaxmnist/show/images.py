"""Plots of images, and of what a model makes of them: each function returns a matplotlib figure."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from flax import nnx
from jaxtyping import Float, Int, Num

from flaxmnist.core import metrics, models
from flaxmnist.core.layers import Images
from flaxmnist.core.pictures import MAX_TILES, class_fractions, sheet, visible
from flaxmnist.data import mislabelled
from flaxmnist.errors import UserError
from flaxmnist.show.canvas import (
    COLOURS,
    DIVERGING_CMAP,
    IMAGE_CMAP,
    captioned,
    count_shown,
    figure,
    plot,
    shorten,
    tile_axes,
)
from flaxmnist.store.load import FilePrediction
from flaxmnist.sweeps.statistics import wilson

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

# Largest number of classes for which a confusion matrix has readable counts.
MAX_NUMBERED = 30

# --- Data -----------------------------------------------------------------------------------------------------------


def examples(
    images: Images, labels: Int[np.ndarray, " n"], per_class: int = 12, names: Sequence[str] | None = None
) -> "Figure":
    """Draw the first ``per_class`` images of each class, one row per class."""
    names = class_names(int(labels.max()) + 1, names)
    drawn = visible(np.asarray(images))
    rows = np.zeros((len(names), per_class, *drawn.shape[1:]), drawn.dtype)
    for label, row in enumerate(rows):
        chosen = drawn[labels == label][:per_class]
        row[: len(chosen)] = chosen
    fig, axes = plot(0.55 * per_class + 0.6, 0.55 * len(names) + 0.4, ylabel="class", xticks=[])
    tiles = sheet(rows.reshape(-1, *drawn.shape[1:]), per_class)
    axes.imshow(in_colour(tiles, drawn.dtype), cmap=IMAGE_CMAP)
    axes.set_yticks((drawn.shape[1] + 1) * (np.arange(len(names)) + 0.5) - 1, names)
    return fig


def in_colour(tiles: Float[np.ndarray, "h w *c"], dtype: np.dtype) -> Float[np.ndarray, "h w *c"]:
    """Return tiles of images of ``dtype`` as matplotlib draws them: colours in [0, 1], white between them."""
    if tiles.ndim == 2:
        return tiles
    return np.nan_to_num(tiles / (255 if dtype == np.uint8 else 1), nan=1.0)


def class_names(count: int, names: Sequence[str] | None) -> list[str]:
    """Return the names of ``count`` classes as labels of a plot; their numbers if there are none."""
    return [shorten(name, 16) for name in names] if names else list(map(str, range(count)))


def digit(image: Num[np.ndarray, "h w c"], label: int | str | None = None) -> "Figure":
    """Draw one image, with a colour bar of its pixel values unless it has colours."""
    title = "" if label is None else f"label {label}"
    fig, axes = plot(5, 4.2, xlabel="column (pixels)", ylabel="row (pixels)", title=title)
    drawn = axes.imshow(visible(image), cmap=IMAGE_CMAP)
    if image.shape[2] != 3:
        fig.colorbar(drawn, label="pixel value")
    return fig


def values(images: Images) -> "Figure":
    """Draw a histogram of the pixel values, with their range in the title."""
    fig, axes = plot(7, 3.5, xlabel="pixel value", ylabel="fraction of all pixels", yscale="log")
    pixels = np.asarray(images).ravel()
    if pixels.dtype == np.uint8:
        counts, edges = np.bincount(pixels, minlength=256), np.arange(257)
    else:
        counts, edges = np.histogram(pixels, 256)
    axes.stairs(counts / len(pixels), edges, fill=True, color=COLOURS[0])
    count, *shape = images.shape
    title = f"{count:,} images of {'×'.join(map(str, shape[: 2 if shape[2] == 1 else 3]))} pixels, {images.dtype}: "
    title += f"{pixels.min():.3g} to {pixels.max():.3g}, mean {pixels.mean():.3g}"
    axes.set_title(title, fontsize=10)
    return fig


# --- Models ---------------------------------------------------------------------------------------------------------


def weights(model: nnx.Module, shape: Sequence[int] = (28, 28, 1), names: Sequence[str] | None = None) -> "Figure":
    """Draw the weights of the first layer: the filters of a CNN, or the first units of an MLP.

    Softmax regression has one image per class: blue is evidence for the class, red is evidence against it. Raise
    UserError for other models.
    """
    kernels = models.first_weights(model, shape)
    if kernels is None:
        raise UserError(f"the first layer of {type(model).__name__} cannot be drawn: use a Softmax, MLP or CNN")
    limit = float(abs(kernels).max()) or 1.0
    style = {"cmap": DIVERGING_CMAP, "vmin": -limit, "vmax": limit}
    if isinstance(model, models.Softmax):
        fig, tiles = tile_axes(len(kernels), min(len(kernels), 5), 1.3)
        fig.suptitle("evidence for (blue) and against (red) each class", fontsize=10)
        channels = (*shape, 1)[2]
        labels = class_names(len(kernels) // channels, names)
        if channels > 1:
            labels = [f"{label}, channel {channel}" for label in labels for channel in range(channels)]
        for kernel, label, axes in zip(kernels, labels, tiles, strict=True):
            axes.imshow(kernel, **style)
            axes.set_title(label)
    else:
        count = len(kernels[:MAX_TILES])
        columns = 8 if count <= 32 else 16
        fig, axes = plot(7, 1 + 5.5 / columns * -(-count // columns))
        draw_tiles(axes, kernels, columns, "filters" if isinstance(model, models.CNN) else "units", **style)
        tiles = [axes]
    fig.colorbar(tiles[0].images[0], ax=tiles, label="weight", shrink=0.8)
    return fig


def feature_maps(model: nnx.Module, image: Num[np.ndarray, "h w c"]) -> "Figure":
    """Draw the feature maps of each convolution of a CNN for ``image``, after pooling and ReLU.

    Raise UserError for other models.
    """
    if not isinstance(model, models.CNN):
        raise UserError(f"{type(model).__name__} has no feature maps: use a CNN")
    layers = [np.asarray(maps[0]).transpose(2, 0, 1) for maps in model.feature_maps(image[None])]
    heights = [1.2, *(0.5 * -(-len(maps[:MAX_TILES]) // 16) + 0.3 for maps in layers)]
    fig = figure(8, sum(heights))
    image_axes, *layer_axes = fig.subplots(1 + len(layers), height_ratios=heights)
    image_axes.imshow(visible(image), cmap=IMAGE_CMAP)
    image_axes.set_axis_off()
    for number, (axes, maps) in enumerate(zip(layer_axes, layers, strict=True), start=1):
        tiles = draw_tiles(axes, maps, 16, "features", f"convolution {number}: ", cmap="Blues", vmin=0)
        fig.colorbar(tiles, ax=axes, label="activation")
    return fig


def draw_tiles(
    axes: "Axes", images: Float[np.ndarray, "n h w"], columns: int, noun: str, prefix: str = "", **style: Any
) -> "AxesImage":
    """Draw the first 64 images as tiles, with their number and size in the title."""
    count, height, width = images.shape
    shown = count_shown(min(count, MAX_TILES), count, noun)
    axes.set_title(f"{prefix}{shown} of {height}×{width}", fontsize=10)
    axes.set_axis_off()
    return axes.imshow(sheet(images[:MAX_TILES], columns), **style)


# --- Predictions ----------------------------------------------------------------------------------------------------


def confusion(counts: Int[np.ndarray, "classes classes"], names: Sequence[str] | None = None) -> "Figure":
    """Draw a confusion matrix: the number of images by true class (row) and prediction (column)."""
    from matplotlib.colors import PowerNorm

    classes, fractions = len(counts), class_fractions(counts)
    ticks = range(0, classes, -(-classes // MAX_NUMBERED))
    fig, axes = plot(6.5, 5.5, xlabel="prediction", ylabel="true class")
    labels = [class_names(classes, names)[tick] for tick in ticks]
    axes.set_xticks(ticks, labels, rotation=90 if max(map(len, labels)) > 2 else 0)
    axes.set_yticks(ticks, labels)
    # The power makes 1 % look different from 0.
    image = axes.imshow(100 * fractions, cmap="Blues", norm=PowerNorm(0.4, 0, 100))
    fontsize = min(9.0, 90 / classes)
    # With more classes, the numbers would be too small to read.
    for row, column in np.ndindex(*counts.shape) if classes <= MAX_NUMBERED else ():
        colour = "white" if fractions[row, column] > 0.3 else "black" if counts[row, column] else "darkgrey"
        axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", color=colour, fontsize=fontsize)
    fig.colorbar(image, label="fraction of the class (%)", ticks=[0, 0.1, 1, 5, 20, 50, 100], format="%g")
    return fig


def mistakes(
    images: Images,
    labels: Int[np.ndarray, " n"],
    probabilities: Float[np.ndarray, "n classes"],
    limit: int = 24,
    names: Sequence[str] | None = None,
) -> "Figure":
    """Draw the worst mistakes, with the probabilities of the true and of the predicted class.

    Test images of MNIST whose label is known to be wrong are marked (``data.mislabelled``).
    Raise UserError if all predictions are correct.
    """
    predictions, of_truth = probabilities.argmax(axis=1), probabilities[np.arange(len(labels)), labels]
    wrong = np.flatnonzero(predictions != labels)
    if len(wrong) == 0:
        raise UserError("all predictions are correct: there are no mistakes to draw")
    worst = wrong[np.argsort(of_truth[wrong], kind="stable")][:limit]
    names = class_names(probabilities.shape[1], names)
    captions = [
        f"true {names[labels[index]]} ({of_truth[index]:.2g})\n"
        f"predicted {names[predictions[index]]} ({probabilities[index].max():.3f})"
        + ("\nlabel known to be wrong" if wrong_label else "")
        for index, wrong_label in zip(worst, mislabelled.known(np.asarray(images)[worst]), strict=True)
    ]
    return captioned(images[worst], captions)


def calibration(
    probabilities: Float[np.ndarray, "n classes"], labels: Int[np.ndarray, " n"], bins: int = 15
) -> "Figure":
    """Draw accuracy against confidence, and the number of predictions by confidence (Guo et al. 2017)."""
    fig = figure(5.5, 5.5)
    top, bottom = fig.subplots(2, sharex=True, height_ratios=[3, 1])
    reliability = metrics.reliability(probabilities, labels, bins)
    bin_counts, *_ = reliability
    counts, confidence, correct = (sums[bin_counts > 0] for sums in reliability)
    mean, accuracy = confidence / counts, correct / counts
    low, high = np.array([wilson(*case) for case in zip(accuracy, counts, strict=True)]).T
    top.plot([0, 100], [0, 100], "--", color="grey", label="perfect calibration")
    top.vlines(100 * mean, 100 * low, 100 * high, color=COLOURS[0])
    top.plot(100 * mean, 100 * accuracy, "o-", color=COLOURS[0], label="predictions, with 95 % intervals")
    top.set(ylabel="accuracy (%)", title=f"expected calibration error {reliability.error():.2%}")
    bottom.stairs(bin_counts, np.linspace(0, 100, bins + 1), fill=True, color=COLOURS[0])
    bottom.set(yscale="log", ylabel="predictions", xlabel="confidence: probability of the predicted class (%)")
    fig.legend(loc="outside upper center", ncols=2, fontsize=8)
    return fig


def predictions(files: Sequence[FilePrediction]) -> "Figure":
    """Draw the model's input for the first 64 image files, with the two most probable classes of each."""
    shown, captions = files[:MAX_TILES], []
    for file in shown:
        top_two = np.argsort(-file.probabilities, kind="stable")[:2]
        scores = ", ".join(f"{file.names[label]}: {file.probabilities[label]:.3f}" for label in top_two)
        captions.append(f"{shorten(file.file.name, 20)}\n{scores}")
    fig = captioned([file.image for file in shown], captions)
    if len(shown) < len(files):
        fig.suptitle(count_shown(len(shown), len(files), "images"), fontsize=10)
    return fig
