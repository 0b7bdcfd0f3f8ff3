"""Pictures, each a function that returns a matplotlib figure: of data, runs, models, answers and sweeps."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from flax import nnx
from jaxtyping import Float, Int, Num

from flaxmnist import evaluation, models
from flaxmnist.errors import UserError
from flaxmnist.figures import (
    AMOUNT,
    COLOURS,
    INK,
    MARKERS,
    MOST_TILES,
    SIGN,
    explain,
    figure,
    plot,
    sheet,
    short,
    shown_of,
    tiled,
)
from flaxmnist.layers import Images
from flaxmnist.parts import Sweep
from flaxmnist.results import Run
from flaxmnist.statistics import summarise, wilson
from flaxmnist.trained import Reading

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Classes of a confusion matrix whose counts can be read.
MOST_NUMBERED = 30

# --- Data -----------------------------------------------------------------------------------------------------------


def examples(images: Images, labels: Int[np.ndarray, " n"], each: int = 12) -> "Figure":
    """The first ``each`` images of each class, a row a class."""
    classes, (height, width) = int(labels.max()) + 1, images.shape[1:3]
    rows = np.zeros((classes, each, height, width))
    for number, row in enumerate(rows):
        mine = np.asarray(images[labels == number][:each, :, :, 0])
        row[: len(mine)] = mine
    drawn, axes = plot(0.55 * each + 0.6, 0.55 * classes + 0.4)
    axes.imshow(sheet(rows.reshape(-1, height, width), each), cmap=INK)
    axes.set_yticks((height + 1) * (np.arange(classes) + 0.5) - 1, [str(number) for number in range(classes)])
    axes.set_xticks([])
    axes.set_ylabel("class")
    return drawn


def digit(image: Num[np.ndarray, "h w 1"], label: int | None = None) -> "Figure":
    """One image, with the values of its pixels as a colour bar."""
    drawn, axes = plot(5, 4.2)
    shown = axes.imshow(image[:, :, 0], cmap=INK)
    drawn.colorbar(shown, label="value of a pixel")
    axes.set_xlabel("column (pixels)")
    axes.set_ylabel("row (pixels)")
    if label is not None:
        axes.set_title(f"label {label}")
    return drawn


def values(images: Images) -> "Figure":
    """How often pixels have which value, and the range that they lie in."""
    drawn, axes = plot(7, 3.5)
    pixels = np.asarray(images).ravel()
    if pixels.dtype == np.uint8:
        counts, edges = np.bincount(pixels, minlength=256), np.arange(257)
    else:
        counts, edges = np.histogram(pixels, 256)
    axes.stairs(counts / len(pixels), edges, fill=True, color=COLOURS[0])
    axes.set_yscale("log")
    axes.set_xlabel("value of a pixel")
    axes.set_ylabel("share of all pixels")
    count, height, width = images.shape[:3]
    least, most, mean = pixels.min(), pixels.max(), pixels.mean()
    sizes = f"{count:,} images of {height}×{width} pixels, {images.dtype}"
    axes.set_title(f"{sizes}: {least:.3g} to {most:.3g}, mean {mean:.3g}", fontsize=10)
    return drawn


# --- Runs -----------------------------------------------------------------------------------------------------------


def columns(run: Run, split: str, *names: str) -> list[np.ndarray]:
    """Values of the run's records of ``split``, each name a column."""
    mine = [record for record in run.history if record["split"] == split]
    return [np.array([record[name] for record in mine], float) for name in names]


def batch_costs(run: Run) -> "Figure":
    """The cost of every batch that was recorded, a curve an epoch over the batches of an epoch.

    Raises UserError where fewer than two were.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    drawn, axes = plot()
    step, cost = columns(run, "train", "step", "loss")
    if len(step) < 2:
        raise UserError("one batch is no curve: record more of them, with a smaller train.log_every")
    epoch, batch = np.divmod(step, run.epoch_length)
    epochs, sizes = np.unique(epoch, return_counts=True)
    count = len(epochs)
    colours = colormaps[AMOUNT](np.linspace(0.15, 1, count)) if count > 1 else [COLOURS[0]]
    marker = "." if max(sizes) < 30 else None
    for number, colour in zip(epochs, colours, strict=True):
        axes.plot(batch[epoch == number], cost[epoch == number], "-", color=colour, linewidth=0.8, marker=marker)
    if count > 1:
        bounds = BoundaryNorm([*(epochs + 0.5), epochs[-1] + 1.5], count)
        bar = drawn.colorbar(ScalarMappable(bounds, ListedColormap(colours)), ax=axes, label="epoch")
        bar.set_ticks(
            [float(epochs[place]) + 1 for place in np.unique(np.linspace(0, count - 1, min(count, 8)).astype(int))]
        )
        bar.minorticks_off()
    if cost.min() > 0 and cost.max() / cost.min() > 10:
        axes.set_yscale("log")
    axes.set_xlabel(f"batch of the epoch ({run.config.train.batch_size} images each)")
    axes.set_ylabel("cost (nats an image)")
    return drawn


def history(runs: Run | Mapping[str, Run]) -> "Figure":
    """Cost and accuracy against the epoch, training and validation; several runs by name, a colour each."""
    several = runs if isinstance(runs, Mapping) else {"": runs}
    drawn = figure(7, 6.5)
    above, below = drawn.subplots(2, sharex=True)
    for number, (name, run) in enumerate(several.items()):
        colour = COLOURS[number % len(COLOURS)]
        marker = MARKERS[number // len(COLOURS) % len(MARKERS)]
        shown = {"training": (training(run), "-", colour), "validation": (evaluations(run), "--", colour)}
        if not name:
            shown["validation"] = (evaluations(run), "--", COLOURS[1])
        for split, ((epoch, loss, accuracy), style, shade) in shown.items():
            told = f"{short(name)}, {split}" if name else split
            common = {"linestyle": style, "color": shade, "label": told, "marker": marker, "markersize": 4}
            common["markevery"] = max(1, len(epoch) // 20)
            common["markerfacecolor"] = shade if split == "training" else "white"
            if len(epoch):
                above.plot(epoch, loss, **common)
                below.plot(epoch, 100 * accuracy, **common)
    for axes, measured in ((above, "cost (nats an image)"), (below, "accuracy (%)")):
        axes.set_ylabel(measured)
        axes.grid(alpha=0.3)
    below.set_xlabel("epoch")
    drawn.legend(*above.get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=8)
    return drawn


def training(run: Run) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Epoch, cost and accuracy: means of whole epochs, or where these are few, of a fiftieth of the run's batches."""
    step, loss, accuracy = columns(run, "epoch", "step", "loss", "accuracy")
    if len(step) < 3:
        parts = (np.array_split(column, 50) for column in columns(run, "train", "step", "loss", "accuracy"))
        step, loss, accuracy = (np.array([part.mean() for part in column if len(part)]) for column in parts)
    return step / run.epoch_length, loss, accuracy


def evaluations(run: Run) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Epoch, cost and accuracy on the validation images."""
    step, loss, accuracy = columns(run, "validation", "step", "loss", "accuracy")
    return step / run.epoch_length, loss, accuracy


def accuracies(runs: Mapping[str, Run]) -> "Figure":
    """Test accuracy of each finished run, with the 95 % interval that its number of images allows (Wilson 1927)."""
    finished = {name: run.result for name, run in runs.items() if run.result}
    drawn, axes = plot(7, 1.2 + 0.35 * len(finished))
    for place, result in enumerate(finished.values()):
        low, high = wilson(result["test_accuracy"], result["test_count"])
        axes.hlines(place, 100 * low, 100 * high, color=COLOURS[0])
        axes.plot(100 * result["test_accuracy"], place, "o", color=COLOURS[0])
    axes.set_yticks(range(len(finished)), list(map(short, finished)))
    axes.set_ylim(len(finished) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("test accuracy (%), 95 % interval")
    axes.set_ylabel("run")
    return drawn


# --- Models ---------------------------------------------------------------------------------------------------------


def weights(model: nnx.Module, shape: tuple[int, int] = (28, 28)) -> "Figure":
    """The first layer's weights as pictures: of a CNN its filters, of an MLP its first units.

    Of softmax regression one a class, blue where ink is evidence for it and red where it is evidence against. Raises
    UserError for models other than these.
    """
    pictures = models.first_weights(model, shape)
    if pictures is None:
        raise UserError(f"{type(model).__name__} has no first layer that can be drawn: give a Softmax, MLP or CNN")
    limit = float(abs(pictures).max()) or 1.0
    style = {"cmap": SIGN, "vmin": -limit, "vmax": limit}
    if isinstance(model, models.Softmax):
        drawn, tiles = tiled(len(pictures), min(len(pictures), 5), 1.3)
        drawn.suptitle("evidence for (blue) and against (red) each class", fontsize=10)
        for number, axes in enumerate(tiles):
            axes.imshow(pictures[number], **style)
            axes.set_title(str(number))
    else:
        drawn, axes = plot(7, 3.5)
        count = len(pictures[:MOST_TILES])
        axes.imshow(sheet(pictures[:MOST_TILES], 8 if count <= 32 else 16), **style)
        axes.set_axis_off()
        told = shown_of(count, len(pictures), "filters" if isinstance(model, models.CNN) else "units")
        axes.set_title(f"{told} of {pictures.shape[1]}×{pictures.shape[2]}", fontsize=10)
        tiles = [axes]
    drawn.colorbar(tiles[0].images[0], ax=tiles, label="weight", shrink=0.8)
    return drawn


def feature_maps(model: nnx.Module, image: Num[np.ndarray, "h w 1"]) -> "Figure":
    """What each convolution of a CNN makes of ``image``, after pooling and ReLU, a picture a feature.

    Raises UserError for another model.
    """
    if not isinstance(model, models.CNN):
        raise UserError(f"{type(model).__name__} has no feature maps: give a CNN")
    layers = [np.asarray(maps[0]).transpose(2, 0, 1) for maps in model.feature_maps(image[None])]
    heights = [1.2, *(0.5 * -(-len(maps[:MOST_TILES]) // 16) + 0.3 for maps in layers)]
    drawn = figure(8, sum(heights))
    first, *others = drawn.subplots(1 + len(layers), height_ratios=heights)
    first.imshow(image[:, :, 0], cmap=INK)
    first.set_axis_off()
    for number, (axes, maps) in enumerate(zip(others, layers, strict=True), start=1):
        count, height, width = maps.shape
        shown = axes.imshow(sheet(maps[:MOST_TILES], 16), cmap="Blues", vmin=0)
        drawn.colorbar(shown, ax=axes, label="activation")
        axes.set_axis_off()
        told = shown_of(len(maps[:MOST_TILES]), count, "features")
        axes.set_title(f"convolution {number}: {told} of {height}×{width}", fontsize=10)
    return drawn


# --- Answers --------------------------------------------------------------------------------------------------------


def confusion(counts: Int[np.ndarray, "classes classes"]) -> "Figure":
    """Images by true class (row) and answer (column)."""
    from matplotlib.colors import PowerNorm

    classes = len(counts)
    drawn, axes = plot(6.5, 5.5)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    # A hundredth must differ from nothing.
    shown = axes.imshow(100 * shares, cmap="Blues", norm=PowerNorm(0.4, 0, 100))
    size = min(9.0, 90 / classes)
    # Smaller ones could not be read.
    for row, column in np.ndindex(*counts.shape) if classes <= MOST_NUMBERED else ():
        colour = "white" if shares[row, column] > 0.3 else "black" if counts[row, column] else "darkgrey"
        axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", color=colour, fontsize=size)
    places = range(0, classes, -(-classes // MOST_NUMBERED))
    axes.set_xticks(places)
    axes.set_yticks(places)
    axes.set_xlabel("answer")
    axes.set_ylabel("true class")
    drawn.colorbar(shown, label="share of the class (%)", ticks=[0, 0.1, 1, 5, 20, 50, 100], format="%g")
    return drawn


def mistakes(
    images: Images, labels: Int[np.ndarray, " n"], probabilities: Float[np.ndarray, "n classes"], most: int = 24
) -> "Figure":
    """The images that were answered most wrongly: true class, answer, and the probabilities given to them.

    Raises UserError where all answers are right.
    """
    answers, given = probabilities.argmax(axis=1), probabilities[np.arange(len(labels)), labels]
    wrong = np.flatnonzero(answers != labels)
    if len(wrong) == 0:
        raise UserError("no image was answered wrongly: there is nothing to draw")
    worst = wrong[np.argsort(given[wrong], kind="stable")][:most]
    drawn, tiles = tiled(len(worst), min(len(worst), 6), 1.35, 1.75)
    for number, axes in zip(worst, tiles, strict=True):
        axes.imshow(images[number, :, :, 0], cmap=INK)
        truth = f"true {labels[number]}, p = {given[number]:.2g}"
        axes.set_title(f"{truth}\nread {answers[number]}, p = {probabilities[number].max():.3f}", fontsize=8)
    return drawn


def calibration(
    probabilities: Float[np.ndarray, "n classes"], labels: Int[np.ndarray, " n"], bins: int = 15
) -> "Figure":
    """Accuracy against confidence, and how many answers were given with it (Guo et al. 2017)."""
    drawn = figure(5.5, 5.5)
    above, below = drawn.subplots(2, sharex=True, height_ratios=[3, 1])
    seen = evaluation.reliability(probabilities, labels, bins)
    counts, confidence, right = (sums[seen.answers > 0] for sums in seen)
    mean, share = confidence / counts, right / counts
    low, high = np.array([wilson(*case) for case in zip(share, counts, strict=True)]).T
    above.plot([0, 100], [0, 100], "--", color="grey", label="as right as confident")
    above.vlines(100 * mean, 100 * low, 100 * high, color=COLOURS[0])
    above.plot(100 * mean, 100 * share, "o-", color=COLOURS[0], label="answers, with 95 % intervals")
    above.set_ylabel("accuracy (%)")
    above.set_title(f"expected calibration error {seen.error():.2%}")
    above.legend(fontsize=8)
    below.stairs(seen.answers, np.linspace(0, 100, bins + 1), fill=True, color=COLOURS[0])
    below.set_yscale("log")
    below.set_ylabel("answers")
    below.set_xlabel("confidence: the probability given to the answer (%)")
    return drawn


def readings(read: Sequence[Reading]) -> "Figure":
    """Image files as a model saw them, the first 64, and the two likeliest classes of each."""
    shown = read[:MOST_TILES]
    drawn, tiles = tiled(len(shown), min(len(shown), 6), 1.6, 2.0)
    for each, axes in zip(shown, tiles, strict=True):
        axes.imshow(each.image[:, :, 0], cmap=INK)
        likely = np.argsort(-each.probabilities, kind="stable")[:2]
        told = ", ".join(f"{number}: {each.probabilities[number]:.3f}" for number in likely)
        axes.set_title(f"{short(each.file.name, 20)}\n{told}", fontsize=8)
    if len(shown) < len(read):
        drawn.suptitle(shown_of(len(shown), len(read), "images"), fontsize=10)
    return drawn


# --- Sweeps ---------------------------------------------------------------------------------------------------------


def by_setting(sweep: Sweep) -> dict[str, list[int]]:
    """The members of each setting that did not fail, by the setting's name."""
    several = len(sweep.result["experiments"]) > 1
    varied = [field for field, values in sweep.result["over"].items() if len(values) > 1]
    settings: dict[str, list[int]] = {}
    for number, line in enumerate(sweep.members):
        words = ", ".join(f"{field.rpartition('.')[2]} {line['fields'][field]}" for field in varied)
        name = short(f"{line['experiment']}: {words}" if several and words else words or line["experiment"], 60)
        settings.setdefault(name, [])
        if line["failed"] is None:
            settings[name].append(number)
    return settings


def curves(sweep: Sweep) -> "Figure":
    """Accuracy against the step, mean and standard deviation over seeds: on validation images, else of training."""
    drawn, axes = plot()
    columns = sweep.curves
    # One evaluation is no curve.
    validated = len(np.unique(columns["step"][columns["validation"]])) > 1
    for name, members in by_setting(sweep).items():
        if not members:
            continue
        chosen = (columns["validation"] == validated) & np.isin(columns["member"], members)
        steps = np.unique(columns["step"][chosen])
        rows = [columns["accuracy"][chosen & (columns["step"] == step)] for step in steps]
        mean, std = (100 * np.array([summarise(row)[part] or 0 for row in rows]) for part in ("mean", "std"))
        (line,) = axes.plot(steps, mean, label=f"{name} (n = {len(members)})", marker="." if len(steps) < 30 else None)
        axes.fill_between(steps, mean - std, mean + std, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set_xlabel("step")
    axes.set_ylabel(f"{'validation' if validated else 'training'} accuracy (%), mean ± std")
    explain(drawn, axes)
    return drawn


def against(sweep: Sweep, field: str) -> "Figure":
    """Accuracy of each member against the values of a numeric ``field``, and means where several have one value.

    Raises UserError where ``field`` was not swept.
    """
    over = sweep.result["over"]
    if field not in over:
        raise UserError(f"{field} was not swept: give one of {', '.join(over)}")
    drawn, axes = plot()
    split = sweep.groups[0]["split"]
    lines = [line for line in sweep.members if line["failed"] is None]
    for experiment in sweep.result["experiments"]:
        mine = [line for line in lines if line["experiment"] == experiment]
        x = np.array([line["fields"][field] for line in mine])
        y = 100 * np.array([line[f"{split}_accuracy"] for line in mine])
        values, counts = np.unique(x, return_counts=True)
        means = [y[x == value].mean() for value in values]
        together = len(counts) > 0 and min(counts) > 1
        (line,) = axes.plot(values, means if together else np.full(len(values), np.nan), label=short(experiment))
        axes.scatter(x, y, s=12, alpha=0.4 if together else 1, linewidth=0, color=line.get_color())
    sizes = np.unique(np.abs(over[field]))
    sizes = sizes[sizes > 0]
    if len(sizes) and sizes[-1] / sizes[0] >= 10:
        axes.set_xscale("symlog", linthresh=sizes[0])
    if len(over[field]) <= 10:
        axes.set_xticks(over[field], [f"{value:g}" for value in over[field]])
        axes.minorticks_off()
    axes.set_xlabel(field)
    axes.set_ylabel(f"{split} accuracy (%), a point a run")
    explain(drawn, axes)
    return drawn


def distribution(sweep: Sweep) -> "Figure":
    """Accuracy of each seed, by setting: every run a point, a box from quartile to quartile."""
    settings = {name: members for name, members in by_setting(sweep).items() if members}
    drawn, axes = plot(height=1.5 + 0.35 * len(settings))
    split = sweep.groups[0]["split"]
    rows = [[100 * sweep.members[number][f"{split}_accuracy"] for number in members] for members in settings.values()]
    axes.boxplot(rows, orientation="horizontal", showfliers=False, widths=0.6)
    scatter = np.random.default_rng(0)
    for place, row in enumerate(rows, start=1):
        axes.scatter(row, place + scatter.uniform(-0.2, 0.2, len(row)), s=10, alpha=0.5, linewidth=0)
    axes.set_yticks(
        range(1, len(rows) + 1), [f"{name} (n = {len(row)})" for name, row in zip(settings, rows, strict=True)]
    )
    axes.invert_yaxis()
    axes.set_xlabel(f"{split} accuracy (%), a point a run")
    return drawn
