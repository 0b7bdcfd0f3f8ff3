"""Conversion of a person's own images to MNIST form, and the errors for anything that is not an image of a digit."""

import contextlib
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont, ImageOps

from flaxmnist.data import photos
from flaxmnist.data.photos import find_images, read_digit, to_mnist_form
from flaxmnist.errors import UserError


def draw(text="3", size=(300, 260), height=180, ink=0, background=255, mode="L", centre=None):
    """Draw ``text`` in Pillow's own font, ``height`` pixels high, centred at ``centre`` (x, y)."""
    picture = Image.new(mode, size, background)
    centre = centre or (size[0] / 2, size[1] / 2)
    ImageDraw.Draw(picture).text(centre, text, fill=ink, font=ImageFont.load_default(size=height), anchor="mm")
    return picture


def photograph(picture, contrast=0.5, noise=8.0):
    """Return ``picture`` like a photograph: unevenly lit, with less contrast, and noisy."""
    grey = np.asarray(picture.convert("L"), np.float64)
    rows, columns = np.meshgrid(*(np.linspace(0, 1, side) for side in grey.shape), indexing="ij")
    light = 1 - 0.4 * columns - 0.2 * (rows - 0.5) ** 2
    lit = (100 + contrast * grey) * light + np.random.default_rng(0).normal(0, noise, grey.shape)
    return Image.fromarray(lit.clip(0, 255).astype(np.uint8))


def exif_of(orientation):
    """Return EXIF data with this orientation tag."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.fixture
def read(tmp_path):
    """Return a function that saves a picture in the format of ``suffix``, and reads it as a digit."""

    def save_and_read(picture, suffix="png", **options):
        picture.save(tmp_path / f"digit.{suffix}", **options)
        return read_digit(tmp_path / f"digit.{suffix}")

    return save_and_read


def assert_mnist_form(digit):
    assert digit.shape == (28, 28, 1) and digit.dtype == np.uint8
    grey = digit[:, :, 0].astype(float)
    rows, columns = np.nonzero(grey)
    assert 19 <= max(np.ptp(rows), np.ptp(columns)) + 1 <= 20
    # Shifted by whole pixels, so the error is at most half a pixel.
    assert abs(np.average(np.arange(28), weights=grey.sum(1)) - 14) <= 0.5
    assert abs(np.average(np.arange(28), weights=grey.sum(0)) - 14) <= 0.5
    assert grey.max() > 240 and grey[:4].max() == 0


def similarity(first, second):
    """Return the correlation of two digits, the best for shifts of up to a pixel, as rounding may go either way."""
    shifts = [(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1)]
    return max(np.corrcoef(np.roll(first, shift, (0, 1)).ravel(), second.ravel())[0, 1] for shift in shifts)


RED, BLUE = (200, 30, 30), (0, 0, 255)
GREY_DIGIT = np.pad(np.full((20, 8), 254, np.uint8), ((4, 4), (10, 10)))


@pytest.mark.parametrize(
    "picture",
    [
        draw(),
        draw(size=(40, 40), height=26),
        draw(size=(1500, 2000), height=1200),
        draw(size=(600, 400), height=90, centre=(60, 330)),
        draw(ink=255, background=0),
        draw(ink=110, background=140),
        draw(ink=0, background=1, mode="1"),
        draw(mode="RGB", ink=RED, background=(240, 240, 180)),
        draw(mode="RGB", ink=(255, 255, 0), background=(255, 255, 255)),
        draw(mode="RGB", ink=BLUE, background=(97, 0, 0)),
        draw(mode="RGB", ink=RED, background=(255, 255, 255)).convert("P"),
        draw(mode="RGBA", ink=(0, 0, 0, 255), background=(0, 0, 0, 0)),
        draw(mode="RGBA", ink=(255, 255, 255, 255), background=(255, 255, 255, 0)),
        draw(mode="LA", ink=(0, 255), background=(0, 0)),
        Image.fromarray(np.asarray(draw()).astype(np.uint16) * 200 + 3000),
        photograph(draw(size=(900, 700), height=300)),
        photograph(draw(size=(900, 700), height=300, ink=255, background=0)),
        photograph(draw(size=(100, 100), height=70), noise=20),
        ImageOps.invert(ImageOps.invert(draw()).crop(ImageOps.invert(draw()).getbbox())),
    ],
    ids=[
        "plain",
        "small",
        "large",
        "corner",
        "inverted",
        "faint",
        "bilevel",
        "colour",
        "yellow",
        "equally-bright",
        "palette",
        "transparent",
        "white-on-transparent",
        "grey-transparent",
        "16-bit",
        "photograph",
        "photograph-inverted",
        "noisy",
        "tight",
    ],
)
def test_converts_any_picture_to_mnist_form(read, picture):
    digit = read(picture)
    assert_mnist_form(digit)
    assert similarity(digit, read(draw())) > 0.9


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "webp", "tiff"])
def test_reads_every_format(read, suffix):
    assert similarity(read(draw(), suffix), read(draw())) > 0.99


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_applies_the_exif_orientation(read, suffix):
    sideways = draw("4").transpose(Image.Transpose.ROTATE_90)
    assert similarity(read(sideways, suffix, exif=exif_of(6)), read(draw("4"))) > 0.99
    assert similarity(read(sideways, suffix), read(draw("4"))) < 0.5


def test_dark_on_light_equals_light_on_dark(read):
    picture = photograph(draw())
    difference = read(picture).astype(int) - read(ImageOps.invert(picture))
    assert abs(difference).max() <= 2


def test_keeps_the_aspect_ratio(read):
    for text in "018":
        left, top, right, bottom = ImageOps.invert(draw(text)).getbbox()
        columns = np.nonzero(read(draw(text)).any((0, 2)))[0]
        assert np.ptp(columns) + 1 == pytest.approx(20 * (right - left) / (bottom - top), abs=1.5)


def test_keeps_grey_levels(read):
    digit = read(draw("8"))
    assert np.mean((digit > 20) & (digit < 235)) > 0.05


def test_thickens_fine_strokes(read):
    picture = Image.new("L", (800, 800), 255)
    ImageDraw.Draw(picture).line([(300, 200), (500, 200), (400, 650)], fill=0, width=3)
    digit = read(picture)
    assert_mnist_form(digit)
    # The stem is neither broken nor faint in any row.
    assert digit[8:23].max((1, 2)).min() > 200


def test_removes_specks(read):
    dusty = draw()
    for corner in (5, 60, 240):
        ImageDraw.Draw(dusty).rectangle((corner, 4, corner + 3, 7), fill=0)
    assert similarity(read(dusty), read(draw())) > 0.99


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_does_not_change_an_image_in_mnist_form(read, mode):
    digit = GREY_DIGIT.copy()
    digit[6:9, 11:13] = 7
    np.testing.assert_array_equal(read(Image.fromarray(digit).convert(mode))[:, :, 0], digit)


def test_not_every_small_image_is_in_mnist_form(read):
    expected = read(Image.fromarray(GREY_DIGIT))
    for other in (255 - GREY_DIGIT, np.roll(GREY_DIGIT, 3, axis=0)):
        np.testing.assert_allclose(read(Image.fromarray(other)).astype(int), expected, atol=1)


def test_centres_at_pixel_14_but_keeps_the_box_within_the_image():
    image = to_mnist_form(np.full((5, 5), 255, np.uint8))
    assert np.argwhere(image[:, :, 0]).min(0).tolist() == [4, 4]
    lopsided = np.zeros((100, 100), np.uint8)
    lopsided[:, :2] = lopsided[0] = 255
    assert to_mnist_form(lopsided)[:, 8:].any() and np.ptp(np.nonzero(to_mnist_form(lopsided))[1]) == 19


NOISE = Image.fromarray(np.random.default_rng(0).normal(128, 10, (300, 300)).astype(np.uint8))
SLOPE = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (200, 1)))


@pytest.mark.parametrize(
    "picture",
    [
        Image.new("L", (1, 1)),
        Image.new("L", (28, 28)),
        Image.new("RGB", (300, 200), "white"),
        NOISE,
        SLOPE,
        Image.new("RGBA", (50, 50), (0, 0, 0, 0)),
        Image.new("I;16", (50, 50), 700),
    ],
    ids=["pixel", "black", "white", "noise", "slope", "clear", "16-bit"],
)
def test_blank_image_is_an_error(read, picture):
    with pytest.raises(UserError, match=r"digit\.png is blank"):
        read(picture)


def test_error_for_files_that_are_not_images(tmp_path, monkeypatch):
    draw().save(tmp_path / "intact.png")
    intact = (tmp_path / "intact.png").read_bytes()
    (tmp_path / "truncated.png").write_bytes(intact[: len(intact) // 2])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").touch()
    for name, message in {
        "truncated.png": "is damaged",
        "text.png": "is not an image",
        "empty.png": "is not an image",
        "absent.png": "there is no image file",
        ".": "there is no image file",
    }.items():
        with pytest.raises(UserError, match=message) as error:
            read_digit(tmp_path / name)
        assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)
    monkeypatch.setattr(photos, "MAX_PIXELS", 70_000)
    with pytest.raises(UserError, match=r"intact\.png has over"):
        read_digit(tmp_path / "intact.png")


def test_decompression_bomb_is_an_error(tmp_path):
    bomb = bytearray(1000)
    header = b"BM" + bytes(8) + b"\x36\0\0\0" + b"\x28\0\0\0"
    for side in (8_000, 12_000, 50_000):
        sides = side.to_bytes(4, "little") * 2
        bomb[: len(header) + 12] = header + sides + b"\x01\0\x18\0"
        (tmp_path / "bomb.bmp").write_bytes(bomb)
        with pytest.raises(UserError, match="has over 50 million pixels"):
            read_digit(tmp_path / "bomb.bmp")


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Return the bytes of one picture in each format."""
    folder = tmp_path_factory.mktemp("originals")
    for suffix in ("png", "jpg", "gif", "bmp", "webp", "tiff"):
        draw(size=(40, 40), height=26).save(folder / f"digit.{suffix}")
    return [file.read_bytes() for file in sorted(folder.iterdir())]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_file_is_read_or_raises_a_user_error(tmp_path, originals, data):
    damaged = bytearray(data.draw(st.sampled_from(originals)))
    for index, value in data.draw(st.lists(st.tuples(st.integers(0, len(damaged) - 1), st.integers(0, 255)))):
        damaged[index] = value
    (tmp_path / "file").write_bytes(damaged[: data.draw(st.integers(0, len(damaged)))] or data.draw(st.binary()))
    with warnings.catch_warnings(action="error"), contextlib.suppress(UserError):
        assert read_digit(tmp_path / "file").shape == (28, 28, 1)


def test_finds_files_as_passed_and_the_images_of_a_folder_by_name(tmp_path):
    for name in ("b.png", "a.JPG", "c.tiff", "notes.txt", ".hidden.png"):
        (tmp_path / name).touch()
    names = [path.name for path in find_images([str(tmp_path / "notes.txt"), tmp_path])]
    assert names == ["notes.txt", "a.JPG", "b.png", "c.tiff"]
    (tmp_path / "empty").mkdir()
    for paths, message in {
        (tmp_path / "empty",): "contains no images",
        (tmp_path / "no",): "no file or folder",
        (): "no images were passed",
    }.items():
        with pytest.raises(UserError, match=message):
            find_images(paths)
