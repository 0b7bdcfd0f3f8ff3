"""Pictures, each a function that returns a matplotlib figure: of data, runs, models, answers and sweeps.

Colours are told apart by the colour-blind and in grey: those of Okabe & Ito (2008), one scale that darkens evenly, and
one from red over white to blue.
"""

import functools
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from flax import nnx
from jaxtyping import Float, Int, Num

from flaxmnist import evaluation, models
from flaxmnist.errors import UserError
from flaxmnist.layers import Images
from flaxmnist.parts import Sweep
from flaxmnist.results import Run
from flaxmnist.statistics import summarise
from flaxmnist.trained import Reading

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
INK = "Greys"  # digits: dark on paper
AMOUNT = "viridis_r"  # amounts: the more, the darker
SIGN = "RdBu"  # red below zero, blue above

DPI = 150  # pixels an inch
MOST_TILES = 64  # pictures in one


@functools.cache
def picture_class() -> type["Figure"]:
    """A figure that notebooks show as it is. Not by pyplot, so that nothing is shown or left behind elsewhere."""
    from matplotlib.figure import Figure

    class Picture(Figure):
        def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
            # In its own size of 96 pixels an inch, sharp where a screen has more.
            width, height = (round(96 * inches) for inches in self.get_size_inches())
            return png(self), {"width": width, "height": height}

    return Picture


def figure(width: float = 7, height: float = 4.5) -> "Figure":
    """An empty figure, its sides in inches."""
    return picture_class()(figsize=(width, height), layout="constrained")


def plot(width: float = 7, height: float = 4.5) -> tuple["Figure", "Axes"]:
    """An empty figure and its axes."""
    drawn = figure(width, height)
    axes = drawn.add_subplot()
    axes.set_prop_cycle(color=COLOURS)
    return drawn, axes


def png(drawn: "Figure") -> bytes:
    """The picture as a PNG file."""
    file = io.BytesIO()
    drawn.savefig(file, format="png", dpi=DPI)
    return file.getvalue()


def save(drawn: "Figure", path: Path) -> None:
    """Writes the picture to ``path`` as PNG. Raises UserError where that cannot be."""
    try:
        path.write_bytes(png(drawn))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; give another file") from None


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
    drawn, axes = plot()
    step, cost = columns(run, "train", "step", "loss")
    if len(step) < 2:
        raise UserError("one batch is no curve: record more of them, with a smaller train.log_every")
    epoch, batch = np.divmod(step, run.epoch_length)
    count = int(epoch.max()) + 1
    colours = colour_map(AMOUNT)(np.linspace(0.15, 1, count)) if count > 1 else [COLOURS[0]]
    few = max(np.bincount(epoch.astype(int))) < 30
    for number in range(count):
        mine = epoch == number
        axes.plot(batch[mine], cost[mine], color=colours[number], linewidth=0.8, marker="." if few else None)
    if count > 1:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import BoundaryNorm, ListedColormap

        bounds = BoundaryNorm(np.arange(count + 1) + 0.5, count)
        bar = drawn.colorbar(ScalarMappable(bounds, ListedColormap(colours)), ax=axes, label="epoch")
        bar.set_ticks(np.unique(np.linspace(1, count, min(count, 8)).astype(int)).tolist())
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
        colours = (colour, colour) if name else COLOURS[:2]
        for split, style, marker, shade in (("training", "-", ".", colours[0]), ("validation", "--", "s", colours[1])):
            epoch, loss, accuracy = training(run) if split == "training" else evaluations(run)
            label = f"{name}, {split}".removeprefix(", ")
            style = {"linestyle": style, "color": shade, "label": label, "markersize": 5}
            style["marker"] = marker if len(epoch) < 40 else None
            if len(epoch):
                above.plot(epoch, loss, **style)
                below.plot(epoch, 100 * accuracy, **style)
    for axes, label in ((above, "cost (nats an image)"), (below, "accuracy (%)")):
        axes.set_ylabel(label)
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
        axes.plot([100 * low, 100 * high], [place, place], color=COLOURS[0])
        axes.plot(100 * result["test_accuracy"], place, "o", color=COLOURS[0])
    axes.set_yticks(range(len(finished)), list(finished))
    axes.set_ylim(len(finished) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("test accuracy (%), 95 % interval")
    axes.set_ylabel("run")
    return drawn


def wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a ``share`` seen in ``count`` independent cases (Wilson 1927)."""
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return middle - half, middle + half


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
        drawn, tiles = tiled(len(pictures), 5, 1.3)
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
    label = "weight (+ for, − against)" if isinstance(model, models.Softmax) else "weight"
    drawn.colorbar(tiles[0].images[0], ax=tiles, label=label, shrink=0.8)
    return drawn


def feature_maps(model: models.CNN, image: Num[np.ndarray, "h w 1"]) -> "Figure":
    """What each convolution of a CNN makes of ``image``, after pooling and ReLU, a picture a feature."""
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


def shown_of(count: int, total: int, what: str) -> str:
    """How many are shown of how many there are."""
    return f"{total} {what}" if count == total else f"the first {count} of {total} {what}"


def sheet(pictures: Num[np.ndarray, "n h w"], across: int) -> Float[np.ndarray, "rows columns"]:
    """Pictures in rows of so many ``across``, with a pixel of nothing between them."""
    count, height, width = pictures.shape
    down = -(-count // across)
    tiles = np.full((down * across, height + 1, width + 1), np.nan)
    tiles[:count, :-1, :-1] = pictures
    tiles = tiles.reshape(down, across, height + 1, width + 1).swapaxes(1, 2)
    return tiles.reshape(down * (height + 1), across * (width + 1))[:-1, :-1]


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
    for row, column in np.ndindex(*counts.shape):
        colour = "white" if shares[row, column] > 0.3 else "black" if counts[row, column] else "darkgrey"
        axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", color=colour, fontsize=size)
    axes.set_xticks(range(classes))
    axes.set_yticks(range(classes))
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
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    places = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    counts = np.bincount(places, minlength=bins)
    filled = np.flatnonzero(counts)
    share = np.bincount(places, right, bins)[filled] / counts[filled]
    low, high = np.array([wilson(*case) for case in zip(share, counts[filled], strict=True)]).T
    mean = np.bincount(places, confidence, bins)[filled] / counts[filled]
    above.plot([0, 100], [0, 100], "--", color="grey", label="as right as confident")
    above.vlines(100 * mean, 100 * low, 100 * high, color=COLOURS[0])
    above.plot(100 * mean, 100 * share, "o-", color=COLOURS[0], label="answers, with 95 % intervals")
    above.set_ylabel("accuracy (%)")
    above.set_title(f"expected calibration error {evaluation.calibration_error(probabilities, labels, bins):.2%}")
    above.legend(fontsize=8)
    below.stairs(counts, np.linspace(0, 100, bins + 1), fill=True, color=COLOURS[0])
    below.set_yscale("log")
    below.set_ylabel("answers")
    below.set_xlabel("confidence: the probability given to the answer (%)")
    return drawn


def readings(read: Sequence[Reading]) -> "Figure":
    """Image files as a model saw them, and the two likeliest classes of each."""
    drawn, tiles = tiled(len(read), min(len(read), 6), 1.6, 2.0)
    for each, axes in zip(read, tiles, strict=True):
        axes.imshow(each.image[:, :, 0], cmap=INK)
        first, second = np.argsort(-each.probabilities, kind="stable")[:2]
        likely = ", ".join(f"{number}: {each.probabilities[number]:.3f}" for number in (first, second))
        axes.set_title(f"{each.file.name}\n{likely}", fontsize=8)
    return drawn


def tiled(count: int, across: int, width: float, height: float | None = None) -> tuple["Figure", list["Axes"]]:
    """A figure of ``count`` pictures, so many across, each with its sides in inches, and their axes."""
    rows = -(-count // across)
    drawn = figure(across * width + 1, rows * (height or width) + 0.3)
    tiles = list(np.atleast_1d(drawn.subplots(rows, across)).flat)
    for axes in tiles[count:]:
        axes.remove()
    for axes in tiles[:count]:
        axes.set_xticks([])
        axes.set_yticks([])
    return drawn, tiles[:count]


def colour_map(name: str) -> Any:
    import matplotlib

    return matplotlib.colormaps[name]


# --- Sweeps ---------------------------------------------------------------------------------------------------------


def by_setting(sweep: Sweep) -> dict[str, list[int]]:
    """The members of each setting that did not fail, by the setting's name."""
    several = len(sweep.result["experiments"]) > 1
    varied = [field for field, values in sweep.result["over"].items() if len(values) > 1]
    settings: dict[str, list[int]] = {}
    for number, line in enumerate(sweep.members):
        words = ", ".join(f"{field.rpartition('.')[2]} {line['fields'][field]}" for field in varied)
        name = f"{line['experiment']}: {words}" if several and words else words or line["experiment"]
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
    axes.legend(fontsize=8)
    return drawn


def against(sweep: Sweep, field: str) -> "Figure":
    """Accuracy of each member, and their means, against the values of a numeric ``field``."""
    drawn, axes = plot()
    split = sweep.groups[0]["split"]
    lines = [line for line in sweep.members if line["failed"] is None]
    for experiment in sweep.result["experiments"]:
        mine = [line for line in lines if line["experiment"] == experiment]
        x = np.array([line["fields"][field] for line in mine])
        y = 100 * np.array([line[f"{split}_accuracy"] for line in mine])
        values = np.unique(x)
        (line,) = axes.plot(values, [y[x == value].mean() for value in values], label=f"{experiment}, mean of seeds")
        axes.scatter(x, y, s=12, alpha=0.4, linewidth=0, color=line.get_color())
    positive = [value for value in sweep.result["over"][field] if value > 0]
    if len(positive) == len(sweep.result["over"][field]) and max(positive) / min(positive) >= 10:
        axes.set_xscale("log")
    if len(sweep.result["over"][field]) <= 10:
        axes.set_xticks(sweep.result["over"][field], [f"{value:g}" for value in sweep.result["over"][field]])
        axes.minorticks_off()
    axes.set_xlabel(field)
    axes.set_ylabel(f"{split} accuracy (%)")
    axes.legend(fontsize=8)
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
    axes.set_xlabel(f"{split} accuracy (%)")
    return drawn
