"""Plots of data, runs, models, predictions and sweeps: each function returns a matplotlib figure."""

from collections.abc import Mapping, Sequence
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
    MARKERS,
    SEQUENTIAL_CMAP,
    add_legend,
    captioned,
    count_shown,
    figure,
    plot,
    shorten,
    tile_axes,
)
from flaxmnist.store.load import FilePrediction, Recorded
from flaxmnist.sweeps.results import Sweep
from flaxmnist.sweeps.statistics import summarise, wilson

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

# Largest number of classes for which a confusion matrix has readable counts.
MAX_NUMBERED = 30

# Values of a training record that other plots show.
NOT_EXTRA = {"step", "epoch", "split", "loss", "accuracy"}

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


# --- Runs -----------------------------------------------------------------------------------------------------------


def history_columns(run: Recorded, split: str, *names: str) -> list[np.ndarray]:
    """Return one array per name, with the values in the run's records of ``split``."""
    records = [record for record in run.history if record["split"] == split]
    return [np.array([record[name] for record in records], float) for name in names]


def batch_costs(run: Recorded) -> "Figure":
    """Draw the cost of every recorded batch against its position in the epoch, one curve per epoch.

    Raise UserError if fewer than two batches were recorded.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    step, cost = history_columns(run, "train", "step", "loss")
    if len(step) < 2:
        raise UserError("fewer than two batches were recorded: use a smaller train.log_every")
    label = f"batch within the epoch ({run.config.train.batch_size} images per batch)"
    fig, axes = plot(xlabel=label, ylabel="cost (nats per image)")
    epoch, batch = np.divmod(step, run.epoch_length)
    epochs, sizes = np.unique(epoch, return_counts=True)
    count = len(epochs)
    colours = colormaps[SEQUENTIAL_CMAP](np.linspace(0.15, 1, count)) if count > 1 else [COLOURS[0]]
    marker = "." if max(sizes) < 30 else None
    for number, colour in zip(epochs, colours, strict=True):
        axes.plot(batch[epoch == number], cost[epoch == number], "-", color=colour, linewidth=0.8, marker=marker)
    if count > 1:
        bounds = BoundaryNorm([*(epochs + 0.5), epochs[-1] + 1.5], count)
        bar = fig.colorbar(ScalarMappable(bounds, ListedColormap(colours)), ax=axes, label="epoch")
        ticks = np.unique(np.linspace(0, count - 1, min(count, 8)).astype(int))
        bar.set_ticks([float(epoch) + 1 for epoch in epochs[ticks]])
        bar.minorticks_off()
    if cost.min() > 0 and cost.max() / cost.min() > 10:
        axes.set_yscale("log")
    return fig


def history(runs: Recorded | Mapping[str, Recorded]) -> "Figure":
    """Draw training and validation cost and accuracy against the epoch, of one run or of several by name."""
    runs_by_name = runs if isinstance(runs, Mapping) else {"": runs}
    fig = figure(7, 6.5)
    top, bottom = fig.subplots(2, sharex=True)
    for number, (name, run) in enumerate(runs_by_name.items()):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number // len(COLOURS) % len(MARKERS)]
        validation = history_columns(run, "validation", "step", "loss", "accuracy")
        for split, (step, loss, accuracy), linestyle, line_colour, fill in (
            ("training", training_curve(run), "-", colour, colour),
            ("validation", validation, "--", colour if name else COLOURS[1], "white"),
        ):
            label = f"{shorten(name)}, {split}" if name else split
            style = {"label": label, "linestyle": linestyle, "color": line_colour, "marker": marker, "markersize": 4}
            style |= {"markerfacecolor": fill, "markevery": max(1, len(step) // 20)}
            if len(step):
                top.plot(step / run.epoch_length, loss, **style)
                bottom.plot(step / run.epoch_length, 100 * accuracy, **style)
    for axes, label in ((top, "cost (nats per image)"), (bottom, "accuracy (%)")):
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    bottom.set_xlabel("epoch")
    bottom.locator_params("x", integer=True, min_n_ticks=4)  # fractions only if there are few epochs
    fig.legend(*top.get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=8)
    return fig


def training_curve(run: Recorded) -> list[np.ndarray]:
    """Return step, cost and accuracy: means over epochs or, if there are fewer than three, over 1/50 of the run."""
    columns = history_columns(run, "epoch", "step", "loss", "accuracy")
    if len(columns[0]) >= 3:
        return columns
    columns = history_columns(run, "train", "step", "loss", "accuracy")
    return [np.array([chunk.mean() for chunk in np.array_split(column, 50) if len(chunk)]) for column in columns]


def step_metrics(run: Recorded) -> "Figure":
    """Draw all other metrics of the recorded steps against the step, such as gradient norm and learning rate.

    Metrics with the same prefix, as in "norm/first" and "norm/last", share axes. Raise UserError if there are none.
    """
    records = [record for record in run.history if record["split"] == "train"]
    names = dict.fromkeys(name for record in records for name in record if name not in NOT_EXTRA)
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.partition("/")[0], []).append(name)
    if not groups:
        raise UserError("no metrics of steps were recorded: use a smaller train.log_every")
    fig = figure(7, 0.6 + 1.7 * len(groups))
    rows = fig.subplots(len(groups), sharex=True, squeeze=False)[:, 0]
    for axes, (group, members) in zip(rows, groups.items(), strict=True):
        for name in members:
            points = [(record["step"], record[name]) for record in records if name in record]
            marker = "." if len(points) < 30 else None
            axes.plot(*zip(*points, strict=True), label=name.partition("/")[2] or "all", linewidth=0.8, marker=marker)
        axes.set_ylabel(group.replace("_", " "))
        axes.grid(alpha=0.3)
        if len(members) > 1:
            axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    rows[-1].set_xlabel("step")
    return fig


def accuracies(runs: Mapping[str, Recorded]) -> "Figure":
    """Draw the test accuracy of each finished run, with the 95 % interval for its number of images (Wilson 1927)."""
    finished = {name: run.result for name, run in runs.items() if run.result}
    fig, axes = plot(7, 1.2 + 0.35 * len(finished), xlabel="test accuracy (%), 95 % interval", ylabel="run")
    for y, result in enumerate(finished.values()):
        low, high = wilson(result.test_accuracy, result.test_count)
        axes.hlines(y, 100 * low, 100 * high, color=COLOURS[0])
        axes.plot(100 * result.test_accuracy, y, "o", color=COLOURS[0])
    axes.set_yticks(range(len(finished)), list(map(shorten, finished)))
    axes.set_ylim(len(finished) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
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
        labels = class_names(len(kernels), names) if len(kernels) == len(names or kernels) else [""] * len(kernels)
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
        f"true {names[labels[index]]}, p = {of_truth[index]:.2g}\n"
        f"predicted {names[predictions[index]]}, p = {probabilities[index].max():.3f}"
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


# --- Sweeps ---------------------------------------------------------------------------------------------------------


def trials_by_setting(sweep: Sweep) -> dict[str, list[int]]:
    """Return the indices of the trials that did not fail, by setting; a setting is named by the fields that vary."""
    several = len(sweep.result.experiments) > 1
    varied = [field for field, values in sweep.result.over.items() if len(values) > 1]
    settings: dict[str, list[int]] = {}
    for index, trial in enumerate(sweep.members):
        if trial.failed is None:
            words = ", ".join(f"{field.rpartition('.')[2]} {trial.fields[field]}" for field in varied)
            name = f"{trial.experiment}: {words}" if several and words else words or trial.experiment
            settings.setdefault(shorten(name, 60), []).append(index)
    return settings


def curves(sweep: Sweep) -> "Figure":
    """Draw accuracy against the step, as mean and standard deviation over seeds, one curve per setting.

    It is the validation accuracy, or the training accuracy if there was no more than one evaluation.
    """
    columns = sweep.curves
    validated = len(np.unique(columns["step"][columns["validation"]])) > 1
    split = "validation" if validated else "training"
    fig, axes = plot(xlabel="step", ylabel=f"{split} accuracy (%), mean ± std")
    for name, trials in trials_by_setting(sweep).items():
        chosen = (columns["validation"] == validated) & np.isin(columns["member"], trials)
        steps = np.unique(columns["step"][chosen])
        summaries = [summarise(columns["accuracy"][chosen & (columns["step"] == step)]) for step in steps]
        mean, std = (100 * np.array([getattr(summary, key) or 0 for summary in summaries]) for key in ("mean", "std"))
        (line,) = axes.plot(steps, mean, label=f"{name} (n = {len(trials)})", marker="." if len(steps) < 30 else None)
        axes.fill_between(steps, mean - std, mean + std, color=line.get_color(), alpha=0.2, linewidth=0)
    add_legend(fig, axes)
    return fig


def against(sweep: Sweep, field: str) -> "Figure":
    """Draw the accuracy of each trial against the value of a numeric ``field``, with means over repeated values.

    Raise UserError if ``field`` was not swept.
    """
    over, split = sweep.result.over, sweep.groups[0].split
    if field not in over:
        raise UserError(f"{field} was not swept: use one of {', '.join(over)}")
    fig, axes = plot(xlabel=field, ylabel=f"{split} accuracy (%), one point per run")
    for experiment in sweep.result.experiments:
        trials = [trial for trial in sweep.members if trial.experiment == experiment and trial.failed is None]
        x = np.array([trial.fields[field] for trial in trials])
        y = 100 * np.array([getattr(trial, f"{split}_accuracy") for trial in trials])
        values, counts = np.unique(x, return_counts=True)
        repeated = len(counts) > 0 and min(counts) > 1
        means = [y[x == value].mean() if repeated else np.nan for value in values]
        (line,) = axes.plot(values, means, label=shorten(experiment))
        axes.scatter(x, y, s=20, alpha=0.5 if repeated else 1, linewidth=0, color=line.get_color())
    magnitudes = np.unique(np.abs(over[field]))
    magnitudes = magnitudes[magnitudes > 0]
    if len(magnitudes) and magnitudes[-1] / magnitudes[0] >= 10:
        axes.set_xscale("symlog", linthresh=magnitudes[0])
    if len(over[field]) <= 10:
        axes.set_xticks(over[field], [f"{value:g}" for value in over[field]])
        axes.minorticks_off()
    add_legend(fig, axes)
    return fig


def distribution(sweep: Sweep) -> "Figure":
    """Draw the accuracy of each seed by setting: one point per run, and a box from quartile to quartile."""
    settings, split, trials = trials_by_setting(sweep), sweep.groups[0].split, sweep.members
    fig, axes = plot(height=1.5 + 0.35 * len(settings), xlabel=f"{split} accuracy (%), one point per run")
    rows = [[100 * getattr(trials[index], f"{split}_accuracy") for index in indices] for indices in settings.values()]
    axes.boxplot(rows, orientation="horizontal", showfliers=False, widths=0.6, medianprops={"color": "black"})
    jitter = np.random.default_rng(0)
    for y, row in enumerate(rows, start=1):
        axes.scatter(row, y + jitter.uniform(-0.2, 0.2, len(row)), s=20, alpha=0.7, linewidth=0)
    labels = [f"{name} (n = {len(row)})" for name, row in zip(settings, rows, strict=True)]
    axes.set_yticks(range(1, len(rows) + 1), labels)
    axes.invert_yaxis()
    return fig
