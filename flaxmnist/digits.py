"""A person's own image files, brought to the form MNIST's images have.

That form (LeCun, Bottou, Bengio & Haffner, "Gradient-based learning applied to document recognition", 1998): light ink
on black, grey where a stroke's edge covers part of a pixel; scaled, keeping its proportions, to fit a box of 20×20
pixels; and moved by whole pixels until its centre of mass is nearest to the centre of 28×28. In all 70,000 images that
centre is the pixel of index 14, counted from 0, and the mass lies within 0.52 of it along each axis.

One digit on a plain ground is looked for. The ground may be unevenly lit if the light changes gently, without the
edge of a shadow; lined paper is not plain, nor is paper with the table around it.
"""

import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Num, UInt8

from flaxmnist.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

SIDE = 28  # pixels, of an MNIST image
BOX = 20  # pixels, of the box its digit fits in
CENTRE = 14  # index of the row and the column where its centre of mass lies

FORMATS = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg"),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
}
LARGEST = 50_000_000  # pixels: 200 MB once decoded, and 400 MB at most on the way (transparent PNG)
WORKING_SIDE = 512  # pixels: what is larger is made smaller first, which is quick and evens out a photograph's noise
PEN = 2.0  # pixels: nine in ten of MNIST's digits are written with a wider stroke
FAINTEST = 12.0  # grey levels by which ink must differ from its ground


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """Returns the files among ``paths`` as given, and for each folder its image files, sorted by name.

    Raises UserError where a path is missing, a folder holds no image files, or there are no paths.
    """
    endings = {ending for group in FORMATS.values() for ending in group}
    found: list[Path] = []
    for path in map(Path, paths):
        if not os.path.exists(path):
            raise UserError(f"there is no file or folder {path}: give the path of an image of a digit, or of a folder")
        if not os.path.isdir(path):
            found.append(path)
            continue
        try:
            files = sorted(file for file in path.iterdir() if file.suffix.lower() in endings and file.name[0] != ".")
        except OSError as error:
            raise UserError(f"the folder {path} cannot be read ({error.strerror}): allow it, or give another") from None
        if not files:
            raise UserError(f"the folder {path} holds no images: give one with {', '.join(sorted(endings))} files")
        found += files
    if not found:
        raise UserError("no images were given: give the path of an image of a digit, or of a folder of them")
    return found


def read_digit(path: str | Path) -> UInt8[np.ndarray, "28 28 1"]:
    """Returns the digit in the image file ``path`` in MNIST form, in grey levels from 0 (ground) to 255 (ink).

    The file is a PNG or JPEG (or GIF, BMP, WebP, TIFF: the first picture) of any size: dark on light or light on dark,
    grey or colour, transparent, turned by its EXIF tag, a scan or a photograph. What is in MNIST form already, such as
    one of its images saved as PNG, comes back bit for bit.

    Raises UserError where the file cannot be read, is not such an image, has over ``LARGEST`` pixels, or is blank.
    """
    path = Path(path)
    picture = decode(path)
    if in_mnist_form(picture):
        return picture[:, :, :1].copy()
    ink = find_ink(picture)
    if ink is None:
        raise UserError(f"{path} is blank, or nearly so: give an image of one digit that stands out from its ground")
    return to_mnist_form(ink)


def to_mnist_form(ink: UInt8[np.ndarray, "h w"]) -> UInt8[np.ndarray, "28 28 1"]:
    """Returns ``ink``, from 0 (none) to 255, cut out, scaled to fit the box, and moved to the centre.

    Raises ValueError where there is no ink.
    """
    from PIL import Image

    top, bottom, left, right = bounds(ink > 0)
    cut = Image.fromarray(ink[top:bottom, left:right])
    width, height = (max(1, round(side * BOX / max(cut.size))) for side in cut.size)
    # Pillow's filters widen as they make an image smaller, which is the antialiasing.
    digit = np.asarray(cut.resize((width, height), Image.Resampling.BICUBIC))
    # However lopsided the digit is, its box stays whole.
    corner = np.round(CENTRE - centre_of_mass(digit)).clip(0, SIDE - np.array(digit.shape))
    row, column = corner.astype(int)
    image = np.zeros((SIDE, SIDE, 1), np.uint8)
    image[row : row + height, column : column + width, 0] = digit
    return image


def in_mnist_form(picture: UInt8[np.ndarray, "h w 3"]) -> bool:
    """Whether ``picture`` is grey and 28×28 with a digit that fits the box, at the centre, on pure black."""
    grey = picture[:, :, 0]
    if grey.shape != (SIDE, SIDE) or not grey.any() or not is_grey(picture):
        return False
    top, bottom, left, right = bounds(grey > 0)
    return max(bottom - top, right - left) <= BOX and bool(np.all(abs(centre_of_mass(grey) - CENTRE) < 1))


def is_grey(picture: UInt8[np.ndarray, "h w 3"]) -> bool:
    """Whether the three colours of every pixel are equal."""
    return not np.ptp(picture, axis=2).any()


def bounds(mask: Bool[np.ndarray, "h w"]) -> tuple[int, int, int, int]:
    """Returns the first and one past the last row, then column, where ``mask`` holds. Raises ValueError for none."""
    rows, columns = np.nonzero(mask)
    return int(rows.min()), int(rows.max()) + 1, int(columns.min()), int(columns.max()) + 1


def centre_of_mass(grey: Num[np.ndarray, "h w"]) -> Float[np.ndarray, "2"]:
    """Returns the mean row and column, as indices counted from 0, weighted by brightness."""
    return np.array([np.average(index, weights=grey) for index in np.indices(grey.shape)])


def decode(path: Path) -> UInt8[np.ndarray, "h w 3"]:
    """Returns the picture in the file ``path`` in colour, upright, opaque, and at most ``WORKING_SIDE`` a side.

    Raises UserError where it cannot be had.
    """
    from PIL import Image, UnidentifiedImageError

    too_large = f"{path} has over {LARGEST // 10**6} million pixels: cut out the digit, or save it smaller"
    if not os.path.isfile(path):
        raise UserError(f"there is no image file {path}: give the path of an image of one digit")
    try:
        # Warnings are about what is harmless here (odd EXIF) or what is checked below (size).
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=tuple(FORMATS)) as image:
            if image.width * image.height > LARGEST:
                raise UserError(too_large)
            return to_colour(image)
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise UserError(too_large) from None
    except UnidentifiedImageError:
        raise UserError(f"{path} is not an image that can be read: give one of {', '.join(FORMATS)}") from None
    except PermissionError as error:
        raise UserError(f"{path} cannot be opened ({error.strerror}): allow reading it") from None
    # For a damaged file the decoders raise whatever they stumble over.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} is damaged or unusual ({reason}): save it again as PNG") from error


def to_colour(image: "Image.Image") -> UInt8[np.ndarray, "h w 3"]:
    """Returns ``image`` as ``decode`` does."""
    from PIL import Image, ImageOps

    if image.has_transparency_data and image.mode != "RGBA":
        image = image.convert("RGBA")
    elif image.mode in ("1", "P"):
        # Pillow does not blend these when it makes them smaller.
        image = image.convert("RGB")
    elif image.mode[0] in "IF":
        image = image.convert("F")
    image.thumbnail((WORKING_SIDE, WORKING_SIDE))
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F":
        # Deep greys have no common white: black and white are their least and most.
        deep = np.asarray(image)
        deep = 255 * (deep - deep.min()) / max(np.ptp(deep), 1)
        image = Image.fromarray(deep.astype(np.uint8))
    if image.mode != "RGBA":
        return np.array(image.convert("RGB"))
    # Paper is white, but a digit drawn in white must be seen.
    on_white, on_black = (
        np.array(Image.alpha_composite(Image.new("RGBA", image.size, ground), image).convert("RGB"))
        for ground in ("white", "black")
    )
    return on_white if np.ptp(on_white) >= FAINTEST else on_black


def find_ink(picture: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "height width"] | None:
    """Returns the digit's ink at each pixel of ``picture``, 0 beside it and 255 on it; None where it is blank.

    The digit may be lighter or darker than its ground; the colour channel it stands out in most is used.
    """
    from scipy import ndimage

    channels = np.moveaxis(picture[:, :, : 1 if is_grey(picture) else 3].astype(np.float32), 2, 0)
    _, ink, threshold, noise = max(map(part_from_ground, channels), key=lambda parted: parted[0])
    strong = ink > threshold
    if not strong.any():
        return None
    labelled: Any = ndimage.label(strong, np.ones((3, 3)))
    pieces = labelled[0]
    amounts = np.bincount(pieces.ravel(), np.where(strong, ink, 0).ravel())
    # The sum of n pixels of noise alone deviates by √n times that of one.
    if amounts.max() < 20 * noise * np.sqrt(np.sum(pieces == amounts.argmax())):
        return None
    # Specks are left out; the grey rim of a stroke, under the threshold, belongs to it.
    strong &= (amounts >= 0.05 * amounts.max())[pieces]
    rim = ndimage.binary_dilation(strong, np.ones((3, 3)))
    ink = np.where(rim, ink / np.median(ink[strong]), 0).clip(0, 1)
    return widen(np.round(255 * ink).astype(np.uint8), strong)


def part_from_ground(channel: Float[np.ndarray, "h w"]) -> tuple[float, Float[np.ndarray, "h w"], float, float]:
    """Returns how well ink and ground part in ``channel``; its ink; the least that is ink; and the ground's noise.

    All but the first, a variance, are grey levels. The ink is how far each pixel differs from the ground.
    """
    ground, noise = fit_ground(channel)
    difference = channel - ground
    # Ink differs strongly in few places: cubed, its sign outweighs whatever the ground does.
    ink = difference * np.sign(np.sum(difference**3))
    threshold, variance = otsu(ink.clip(0))
    return variance, ink, max(threshold, 3 * noise, FAINTEST), noise


def widen(ink: UInt8[np.ndarray, "h w"], strong: Bool[np.ndarray, "h w"]) -> UInt8[np.ndarray, "height width"]:
    """Returns ``ink`` with the strokes of a pen too fine for MNIST's box, where they would be faint or broken, wider.

    ``strong`` is where a stroke covers more than half a pixel. The pen comes to ``PEN``, measured in the box; where it
    is widened, the picture grows by as much on every side.
    """
    from scipy import ndimage

    top, bottom, left, right = bounds(strong)
    # Across a stroke the distance to its edge has a quarter of the stroke's width as its mean.
    distances: Any = ndimage.distance_transform_edt(np.pad(strong, 1))
    pen = 4 * np.mean(distances[1:-1, 1:-1][strong] - 0.5)
    lacking = round(PEN * max(bottom - top, right - left) / BOX - pen)
    return ndimage.maximum_filter(np.pad(ink, lacking), 1 + lacking) if lacking > 0 else ink


def fit_ground(channel: Float[np.ndarray, "h w"]) -> tuple[Float[np.ndarray, "h w"], float]:
    """Returns the ground of ``channel`` without the digit on it, and the standard deviation of its noise.

    The picture is parted in light and dark, and the part with most of the border is ground. A surface of at most the
    second degree in row and column, which follows the light on paper but no stroke, is fitted to that part, and then
    again and again to whatever lies close to it. The surface is taken that lay closest to the part.
    """
    height, width = channel.shape
    rows, columns = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    terms = np.stack([np.ones_like(rows), rows, columns, rows**2, rows * columns, columns**2], axis=2)
    # Every so many pixels say enough.
    step = np.s_[:: -(-height // 64), :: -(-width // 64)]
    few, values = terms[step], channel[step]
    light = values > otsu(values)[0]
    border = np.concatenate([light[[0, -1]].ravel(), light[:, [0, -1]].ravel()])
    kept = part = light == (np.mean(border) > 0.5)
    noise, ground = np.inf, terms[:, :, 0]
    # Level, then tilted, then curved: begun with all its freedom it would bend to the ink at the edge of the part.
    for count in (1, 3, 3, *[6] * 8):
        weights = np.linalg.lstsq(few[kept][:, :count], values[kept])[0]
        residual = abs(values - few[:, :, :count] @ weights)
        deviation = 1.48 * float(np.median(residual[part]))
        kept = residual <= max(3 * deviation, 2)
        if deviation < noise:
            noise, ground = deviation, terms[:, :, :count] @ weights
    return ground.astype(np.float32), noise


def otsu(values: Float[np.ndarray, "h w"]) -> tuple[float, float]:
    """Returns the threshold that parts ``values`` best in two, and the variance between the parts (Otsu 1979)."""
    counts, edges = np.histogram(values, 256)
    middles = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)[:-1] / values.size
    mass_below = np.cumsum(counts * middles)[:-1] / values.size
    mean = np.sum(counts * middles) / values.size
    between = (mean * below - mass_below) ** 2 / np.maximum(below * (1 - below), 1e-12)
    best = int(between.argmax())
    return float(edges[best + 1]), float(between[best])
