"""Conversion of a person's own image files to the form of MNIST's images.

That form (LeCun, Bottou, Bengio & Haffner, "Gradient-based learning applied to document recognition", 1998): light ink
on black, grey where the edge of a stroke covers part of a pixel; scaled to fit a box of 20×20 pixels, keeping the
aspect ratio; and shifted by whole pixels so that the centre of mass is as close as possible to the centre of 28×28. In
all 70,000 images that centre is the pixel of index 14, counted from 0, and the mass is within 0.52 of it on each axis.

An image must show one digit on a plain background. Uneven lighting is fine if it changes gradually, without the edge
of a shadow. Lined paper is not plain, nor is paper with the table around it.
"""

import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Num, Shaped, UInt8

from flaxmnist.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

SIDE = 28  # pixels per side of an MNIST image
BOX_SIDE = 20  # pixels per side of the box that its digit fits in
CENTRE = 14  # row and column index of its centre of mass

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF")
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
MAX_PIXELS = 50_000_000  # 200 MB once decoded, and at most 400 MB while decoding (transparent PNG)
WORKING_SIDE = 512  # pixels per side; larger images are first scaled down, which is fast and averages out camera noise
MIN_PEN_WIDTH = 2.0  # pixels in the box; nine in ten of MNIST's digits are written with a wider stroke
MIN_CONTRAST = 12.0  # grey levels by which ink must differ from its background


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """Return ``paths`` with each folder replaced by its image files, sorted by name.

    Raise UserError if a path does not exist, a folder contains no image files, or there are no paths.
    """
    images: list[Path] = []
    for path in map(Path, paths):
        if not os.path.exists(path):
            raise UserError(f"there is no file or folder {path}: pass an image of a digit, or a folder of images")
        if not os.path.isdir(path):
            images.append(path)
            continue
        try:
            files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.name[0] != ".")
        except OSError as error:
            remedy = "check the permissions, or pass another folder"
            raise UserError(f"cannot read the folder {path} ({error.strerror}): {remedy}") from None
        if not files:
            raise UserError(f"the folder {path} contains no images: pass one with {', '.join(SUFFIXES)} files")
        images += files
    if not images:
        raise UserError("no images were passed: pass an image of a digit, or a folder of images")
    return images


def read_image(path: str | Path, shape: Sequence[int]) -> UInt8[np.ndarray, "h w c"]:
    """Return an image file as an image of ``shape`` (height, width, channels).

    With one channel it is a digit in MNIST form, resized if it is not 28×28; with three, the whole picture in colour.
    Raise UserError as ``read_digit`` does, or for another number of channels.
    """
    from PIL import Image

    height, width, channels = shape
    if channels not in (1, 3):
        raise UserError(f"image files have 1 or 3 channels, but the model needs {channels}: pass arrays to its model")
    image = read_digit(path)[:, :, 0] if channels == 1 else decode(Path(path))
    if channels == 3 and image.shape[2] == 1:
        image = image.repeat(3, axis=2)
    if image.shape[:2] != (height, width):
        image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    return image.reshape(height, width, channels)


def read_digit(path: str | Path) -> UInt8[np.ndarray, "28 28 1"]:
    """Return the digit in an image file in MNIST form, with grey levels from 0 (background) to 255 (ink).

    The file is a PNG or JPEG (or GIF, BMP, WebP, TIFF: the first picture) of any size: dark on light or light on dark,
    grey or colour, transparent, rotated by its EXIF tag, a scan or a photograph. An image in MNIST form, such as one
    of MNIST's own saved as PNG, is returned bitwise identical.

    Raise UserError if the file cannot be read, is no such image, has over ``MAX_PIXELS`` pixels, or is blank.
    """
    path = Path(path)
    picture = decode(path)
    if in_mnist_form(picture):
        return picture
    ink = extract_ink(picture)
    if ink is None:
        raise UserError(f"{path} is blank, or nearly so: pass an image of one digit that contrasts with its background")
    return to_mnist_form(ink)


def to_mnist_form(ink: UInt8[np.ndarray, "h w"]) -> UInt8[np.ndarray, "28 28 1"]:
    """Crop ``ink``, from 0 (none) to 255, scale it to fit the box, and centre it. Raise ValueError if there is none."""
    from PIL import Image

    cropped = Image.fromarray(crop(ink))
    width, height = (max(1, round(side * BOX_SIDE / max(cropped.size))) for side in cropped.size)
    # Pillow widens its filters when it scales down, which prevents aliasing.
    digit = np.asarray(cropped.resize((width, height), Image.Resampling.BICUBIC))
    # Clip so that even a lopsided digit stays within the image.
    row, column = np.round(CENTRE - centre_of_mass(digit)).clip(0, SIDE - np.array(digit.shape)).astype(int)
    image = np.zeros((SIDE, SIDE, 1), np.uint8)
    image[row : row + height, column : column + width, 0] = digit
    return image


def in_mnist_form(picture: UInt8[np.ndarray, "h w c"]) -> bool:
    """Return True if ``picture`` is grey and 28×28, with a centred digit that fits the box, on pure black."""
    if picture.shape != (SIDE, SIDE, 1) or not picture.any():
        return False
    grey = picture[:, :, 0]
    return max(crop(grey).shape) <= BOX_SIDE and bool(np.all(abs(centre_of_mass(grey) - CENTRE) < 1))


def crop(image: Shaped[np.ndarray, "h w"]) -> Shaped[np.ndarray, "H W"]:
    """Return the smallest rectangle that contains all pixels but those of value 0. Raise ValueError if all are 0."""
    rows, columns = np.nonzero(image)
    return image[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def centre_of_mass(grey: Num[np.ndarray, "h w"]) -> Float[np.ndarray, "2"]:
    """Return the mean row and column index, weighted by brightness."""
    return np.array([np.average(index, weights=grey) for index in np.indices(grey.shape)])


def decode(path: Path) -> UInt8[np.ndarray, "h w c"]:
    """Return the image in a file, grey or RGB, upright, opaque, and at most ``WORKING_SIDE`` pixels per side.

    Raise UserError if the file cannot be read, is not an image, or has too many pixels.
    """
    from PIL import Image, UnidentifiedImageError

    if not os.path.isfile(path):
        raise UserError(f"there is no image file {path}: pass an image of one digit")
    try:
        # Pillow's warnings are about odd EXIF data, which is harmless here, or about the size, which is checked below.
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            rgb = to_rgb(image)
            return rgb if np.ptp(rgb, axis=2).any() else rgb[:, :, :1].copy()
    except Image.DecompressionBombError:
        size = f"{MAX_PIXELS // 10**6} million pixels"
        raise UserError(f"{path} has over {size}: crop it to the digit, or save it smaller") from None
    except UnidentifiedImageError:
        raise UserError(f"{path} is not an image in a supported format: pass one of {', '.join(FORMATS)}") from None
    except PermissionError as error:
        raise UserError(f"{path} cannot be opened ({error.strerror}): check the permissions") from None
    # Decoders raise all sorts of exceptions for a damaged file.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} is damaged or unusual ({reason}): save it again as PNG") from error


def to_rgb(image: "Image.Image") -> UInt8[np.ndarray, "h w 3"]:
    """Return an opened image as ``decode`` does, always with three channels."""
    from PIL import Image, ImageOps

    if image.has_transparency_data and image.mode != "RGBA":
        image = image.convert("RGBA")
    elif image.mode in ("1", "P"):
        # Pillow does not interpolate in these modes when it scales down.
        image = image.convert("RGB")
    elif image.mode[0] in "IF":
        image = image.convert("F")
    image.thumbnail((WORKING_SIDE, WORKING_SIDE))
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F":
        # Greys of more than 8 bits have no standard white: stretch their range from black to white.
        grey = np.asarray(image)
        image = Image.fromarray((255 * (grey - grey.min()) / max(np.ptp(grey), 1)).astype(np.uint8))
    if image.mode != "RGBA":
        return np.array(image.convert("RGB"))
    # A transparent image is put on white, like paper, unless its digit is white.
    on_white, on_black = (
        np.array(Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB"))
        for background in ("white", "black")
    )
    return on_white if np.ptp(on_white) >= MIN_CONTRAST else on_black


def extract_ink(picture: UInt8[np.ndarray, "h w c"]) -> UInt8[np.ndarray, "H W"] | None:
    """Return the ink at each pixel, from 0 (none) to 255, or None if the picture is blank.

    The digit may be lighter or darker than its background; the channel with the best separation is used.
    """
    from scipy import ndimage

    channels = np.moveaxis(picture.astype(np.float32), 2, 0)
    _, ink, threshold, noise = max(map(separate_ink, channels), key=lambda separation: separation[0])
    strokes = ink > threshold
    if not strokes.any():
        return None
    labelled: Any = ndimage.label(strokes, np.ones((3, 3)))
    components = labelled[0]
    amounts = np.bincount(components.ravel(), np.where(strokes, ink, 0).ravel())
    # The standard deviation of the sum of n pixels of noise is √n times that of one pixel.
    if amounts.max() < 20 * noise * np.sqrt(np.sum(components == amounts.argmax())):
        return None
    # Remove specks; keep the grey rim of each stroke, which is below the threshold.
    strokes &= (amounts >= 0.05 * amounts.max())[components]
    rim = ndimage.binary_dilation(strokes, np.ones((3, 3)))
    ink = np.where(rim, ink / np.median(ink[strokes]), 0).clip(0, 1)
    return thicken_strokes(np.round(255 * ink).astype(np.uint8), strokes)


def separate_ink(channel: Float[np.ndarray, "h w"]) -> tuple[float, Float[np.ndarray, "h w"], float, float]:
    """Return the separation of ink and background, the ink, its threshold, and the noise of the background.

    The separation is a variance; the others are grey levels. Ink is a pixel's difference from the background.
    """
    background, noise = fit_background(channel)
    difference = channel - background
    # Ink differs strongly, but at few pixels: in the sum of cubes its sign outweighs that of the background.
    ink = difference * np.sign(np.sum(difference**3))
    threshold, variance = otsu(ink.clip(0))
    return variance, ink, max(threshold, 3 * noise, MIN_CONTRAST), noise


def thicken_strokes(ink: UInt8[np.ndarray, "h w"], strokes: Bool[np.ndarray, "h w"]) -> UInt8[np.ndarray, "H W"]:
    """Return ``ink`` with strokes at least ``MIN_PEN_WIDTH`` wide; finer ones would be faint or broken in the box.

    ``strokes`` marks the pixels that a stroke covers by more than half. If the strokes are thickened, the picture is
    padded by the same number of pixels on every side.
    """
    from scipy import ndimage

    # Across a stroke, the mean distance to the edge is a quarter of its width.
    distances: Any = ndimage.distance_transform_edt(np.pad(strokes, 1))
    pen_width = 4 * np.mean(distances[1:-1, 1:-1][strokes] - 0.5)
    extra = round(MIN_PEN_WIDTH * max(crop(strokes).shape) / BOX_SIDE - pen_width)
    return ndimage.maximum_filter(np.pad(ink, extra), 1 + extra) if extra > 0 else ink


def fit_background(channel: Float[np.ndarray, "h w"]) -> tuple[Float[np.ndarray, "h w"], float]:
    """Return the background of ``channel`` without the digit, and the standard deviation of its noise.

    Pixels are divided into light and dark; the class with most of the border is background. A polynomial of at most
    degree 2 in row and column, which follows uneven lighting but no stroke, is fitted to that class, and then
    repeatedly to all pixels close to the fit. The fit with the smallest residuals in the class is returned.
    """
    height, width = channel.shape
    rows, columns = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    terms = np.stack([np.ones_like(rows), rows, columns, rows**2, rows * columns, columns**2], axis=2)
    # At most 64 rows and columns are enough.
    subsample = np.s_[:: -(-height // 64), :: -(-width // 64)]
    sample_terms, values = terms[subsample], channel[subsample]
    light = values > otsu(values)[0]
    border = np.concatenate([light[[0, -1]].ravel(), light[:, [0, -1]].ravel()])
    inliers = initial = light == (np.mean(border) > 0.5)
    noise, background = np.inf, terms[:, :, 0]
    # Constant, then linear, then quadratic: quadratic from the start, it would bend to the ink at the class's edge.
    for count in (1, 3, 3, *[6] * 8):
        coefficients = np.linalg.lstsq(sample_terms[inliers][:, :count], values[inliers])[0]
        residual = abs(values - sample_terms[:, :, :count] @ coefficients)
        deviation = 1.48 * float(np.median(residual[initial]))
        inliers = residual <= max(3 * deviation, 2)
        if deviation < noise:
            noise, background = deviation, terms[:, :, :count] @ coefficients
    return background.astype(np.float32), noise


def otsu(values: Float[np.ndarray, "h w"]) -> tuple[float, float]:
    """Return the threshold that best divides ``values`` into two classes, and the variance between them (Otsu 1979)."""
    counts, edges = np.histogram(values, 256)
    middles = (edges[:-1] + edges[1:]) / 2
    fraction_below = np.cumsum(counts)[:-1] / values.size
    moment_below = np.cumsum(counts * middles)[:-1] / values.size
    mean = np.sum(counts * middles) / values.size
    variances = (mean * fraction_below - moment_below) ** 2 / np.maximum(fraction_below * (1 - fraction_below), 1e-12)
    best = int(variances.argmax())
    return float(edges[best + 1]), float(variances[best])
