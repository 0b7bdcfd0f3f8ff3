"""Empty figures, what lies in them side by side, and their way into a file.

Colours are told apart by the colour-blind and in grey: those of Okabe & Ito (2008), one scale that darkens evenly, and
one from red over white to blue.
"""

import functools
import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Num

from flaxmnist.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":", "-.")
MARKERS = "osv^D"
INK = "Greys"  # digits: dark on paper
AMOUNT = "viridis_r"  # the more, the darker
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
    from cycler import cycler

    drawn = figure(width, height)
    axes = drawn.add_subplot()
    axes.set_prop_cycle(cycler(linestyle=STYLES) * cycler(color=COLOURS))
    return drawn, axes


def png(drawn: "Figure") -> bytes:
    """The picture as a PNG file."""
    file = io.BytesIO()
    # What a name is made of may not be in the font.
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        drawn.savefig(file, format="png", dpi=DPI)
    return file.getvalue()


def short(name: str, most: int = 40) -> str:
    """A name as it may stand in a picture: not too long, no mathematics, not hidden from legends."""
    text = name if len(name) <= most else f"{name[: most // 2]}…{name[-(most // 2) :]}"
    return f"{' ' if text.startswith('_') else ''}{text}".replace("$", r"\$")


def save(drawn: "Figure", path: Path) -> None:
    """Writes the picture to ``path``, a PNG file. Raises UserError where that cannot be."""
    if path.suffix.lower() != ".png":
        raise UserError(f"pictures are PNG files: give {path.with_suffix('.png')} for {path}")
    try:
        path.write_bytes(png(drawn))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; give another file") from None


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


def explain(drawn: "Figure", axes: "Axes") -> None:
    """A legend: within the axes where it is short, else under them, in its own height."""
    handles, names = axes.get_legend_handles_labels()
    if len(names) <= 6:
        axes.legend(fontsize=8)
    else:
        drawn.set_figheight(drawn.get_figheight() + 0.17 * -(-len(names) // 2))
        drawn.legend(handles, names, loc="outside lower center", ncols=2, fontsize=7)
