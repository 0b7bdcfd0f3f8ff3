"""Empty figures with axes, tiles, colours and legends for the plots, and saving as PNG.

All colours can be distinguished by colour-blind readers and in greyscale: the palette of Okabe & Ito (2008), a colour
map of evenly increasing darkness, and one from red through white to blue.
"""

import functools
import io
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Num

from flaxmnist.core.pictures import visible
from flaxmnist.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = {"-": "", "--": "5 3", ":": "1.5 2.5", "-.": "6 2 1.5 2"}  # with their dashes in SVG
MARKERS = "osv^D"
IMAGE_CMAP = "Greys"  # digits: dark on white
SEQUENTIAL_CMAP = "viridis_r"  # darker is larger
DIVERGING_CMAP = "RdBu"  # red below zero, blue above

DPI = 150  # pixels per inch
DISPLAY_DPI = 96  # as displayed in notebooks and reports; the other pixels are for high-resolution screens


@functools.cache
def picture_class() -> type["Figure"]:
    """Return a Figure class that notebooks display. It bypasses pyplot, which would keep every figure in memory."""
    from matplotlib.figure import Figure

    class Picture(Figure):
        def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
            width, height = (round(DISPLAY_DPI * inches) for inches in self.get_size_inches())
            return png(self), {"width": width, "height": height}

    return Picture


def figure(width: float = 7, height: float = 4.5) -> "Figure":
    """Return an empty figure of a size in inches."""
    return picture_class()(figsize=(width, height), layout="constrained")


def plot(width: float = 7, height: float = 4.5, **settings: Any) -> tuple["Figure", "Axes"]:
    """Return a figure of a size in inches, and its empty axes with ``settings`` such as ``xlabel``."""
    from cycler import cycler

    fig = figure(width, height)
    axes = fig.add_subplot(**settings)
    axes.set_prop_cycle(cycler(linestyle=list(STYLES)) * cycler(color=COLOURS))
    return fig, axes


def png(fig: "Figure") -> bytes:
    """Return the figure as the content of a PNG file."""
    file = io.BytesIO()
    # The font may lack characters of a run's name.
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        fig.savefig(file, format="png", dpi=DPI)
    return file.getvalue()


def curves(fig: "Figure") -> dict[str, Any]:
    """Return the lines, and the bands around them, as JSON: "x", the title of the axis, and "panels" from the top."""
    from matplotlib.colors import to_hex

    panels, with_lines = [], [axes for axes in fig.axes if axes.get_lines()]
    for axes in with_lines:
        lines = [
            {
                "name": "" if str(line.get_label()).startswith("_") else line.get_label(),
                "colour": to_hex(line.get_color()),
                "dashes": STYLES.get(str(line.get_linestyle()), ""),
                "x": numbers(line.get_xdata()),
                "y": numbers(line.get_ydata()),
            }
            for line in axes.get_lines()
        ]
        bands = []
        for band in axes.collections:
            colour: Any = band.get_facecolor()
            outline = np.concatenate([path.vertices for path in band.get_paths()])
            bands.append({"colour": to_hex(colour[0]), "x": numbers(outline[:, 0]), "y": numbers(outline[:, 1])})
        panels.append({"y": axes.get_ylabel(), "log": axes.get_yscale() == "log", "lines": lines, "bands": bands})
    return {"x": with_lines[-1].get_xlabel() if with_lines else "", "panels": panels}


def numbers(values: Any) -> list[float | None]:
    """Return values with six digits, as JSON has them: None if they are not finite."""
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in np.asarray(values, float).ravel()]


def shorten(name: str, max_length: int = 40) -> str:
    """Return ``name`` as a label: short, without mathematics, and visible to legends, which skip a leading "_"."""
    half = max_length // 2
    text = name if len(name) <= max_length else f"{name[:half]}…{name[-half:]}"
    return f"{' ' if text.startswith('_') else ''}{text}".replace("$", r"\$")


def check_file(path: Path | None) -> None:
    """Raise UserError if a picture cannot be written to ``path``, before the work for it begins."""
    if path is not None and path.suffix.lower() != ".png":
        raise UserError(f"pictures are PNG files: use {path.with_suffix('.png')} instead of {path}")
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise UserError(f"cannot write {path}: use a file in a folder that exists")


def save(fig: "Figure", path: Path) -> None:
    """Write the figure to the PNG file ``path``. Raise UserError if that fails."""
    check_file(path)
    try:
        path.write_bytes(png(fig))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; use another file") from None


def tile_axes(count: int, columns: int, width: float, height: float | None = None) -> tuple["Figure", list["Axes"]]:
    """Return a figure with a grid of ``count`` axes without ticks, each of a size in inches, and the axes."""
    rows = -(-count // columns)
    fig = figure(columns * width + 1, rows * (height or width) + 0.3)
    tiles = list(np.atleast_1d(fig.subplots(rows, columns)).flat)
    for axes in tiles[count:]:
        axes.remove()
    for axes in tiles[:count]:
        axes.set(xticks=[], yticks=[])
    return fig, tiles[:count]


def captioned(images: Iterable[Num[np.ndarray, "h w c"]], captions: Sequence[str]) -> "Figure":
    """Return a figure with the images in rows of six, each below its caption of two or three lines."""
    lines = 1 + max(caption.count("\n") for caption in captions)
    fig, tiles = tile_axes(len(captions), min(len(captions), 6), 1.6, 1.65 + 0.13 * lines)
    for image, caption, axes in zip(images, captions, tiles, strict=True):
        axes.imshow(visible(image), cmap=IMAGE_CMAP)
        axes.set_title(caption, fontsize=8)
    return fig


def count_shown(count: int, total: int, noun: str) -> str:
    """Return "32 filters", or "the first 64 of 100 filters" if only some are shown."""
    return f"{total} {noun}" if count == total else f"the first {count} of {total} {noun}"


def add_legend(fig: "Figure", axes: "Axes") -> None:
    """Add a legend: inside the axes if it is short, else below them, in an enlarged figure."""
    handles, names = axes.get_legend_handles_labels()
    if len(names) <= 6:
        axes.legend(fontsize=8)
    else:
        fig.set_figheight(fig.get_figheight() + 0.17 * -(-len(names) // 2))
        fig.legend(handles, names, loc="outside lower center", ncols=2, fontsize=7)
