"""Predictions for drawn and printed digits, and how they are shown."""

import io
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from conftest import fit_on_one, main, small
from PIL import Image, ImageDraw, ImageFont
from scipy.interpolate import make_interp_spline

import flaxmnist as fm
from flaxmnist.data.photos import read_digit
from flaxmnist.errors import exit_code

# Pen strokes of each digit: points (x, y) in percent of the width and height, from the top left.
STROKES = [
    "50,0 20,15 10,55 30,95 60,95 85,60 80,20 50,0",
    "35,20 55,0 | 55,0 50,50 47,100",
    "15,25 30,3 65,3 75,30 50,65 12,97 | 12,97 50,95 90,97",
    "20,10 50,0 78,18 65,40 42,47 | 42,47 75,55 85,78 60,98 15,90",
    "35,0 20,35 12,60 | 12,60 50,58 88,57 | 68,25 66,60 62,100",
    "80,2 30,4 | 30,4 22,42 | 22,42 55,38 82,60 70,92 40,100 12,90",
    "70,0 35,30 15,70 35,98 70,92 78,68 50,55 20,70",
    "12,8 50,6 85,5 | 85,5 60,45 42,100",
    "75,15 45,0 22,18 45,42 78,70 60,97 30,95 18,72 45,45 75,20",
    "75,25 50,3 22,20 28,45 55,48 75,25 | 75,25 72,60 60,100",
]

FONTS = (
    "DejaVuSans",
    "DejaVuSerif",
    "DejaVuSansMono",
    "STIXGeneral",
    "STIXGeneralItalic",
    "cmss10",
    "cmtt10",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSerif-Italic",
)

COLOURS = (("black", "white"), ("#223399", "#f5efdc"), ("white", "black"), ("#b03020", "white"), ("#444444", "#cccccc"))


def draw_digit(digit: int, width: int, slant: float) -> Image.Image:
    """Draw ``digit`` as if by hand, with a round pen ``width`` pixels wide."""
    ink, background = COLOURS[digit % 5]
    picture = Image.new("RGB", (360, 480), background)
    for stroke in STROKES[digit].split("|"):
        points = np.array([point.split(",") for point in stroke.split()], float) / 100
        curve = make_interp_spline(np.linspace(0, 1, len(points)), points, k=min(3, len(points) - 1))
        for x, y in curve(np.linspace(0, 1, 200)):
            centre = 360 * (0.2 + 0.6 * x + slant * (0.5 - y)), 480 * (0.15 + 0.7 * y)
            ImageDraw.Draw(picture).circle(centre, width / 2, fill=ink)
    return picture


def print_digit(digit: int, font: str) -> Image.Image:
    ink, background = COLOURS[(digit + 2) % 5]
    picture = Image.new("RGB", (200, 240), background)
    path = Path(matplotlib.get_data_path()) / f"fonts/ttf/{font}.ttf"
    ImageDraw.Draw(picture).text((100, 120), str(digit), ink, ImageFont.truetype(str(path), 170), anchor="mm")
    return picture


@pytest.mark.slow
@pytest.mark.skipif("FLAXMNIST_DATA" not in os.environ, reason="FLAXMNIST_DATA names no folder with MNIST")
@pytest.mark.parametrize(("name", "steps", "least"), [("speedrun", 1000, 18), ("flagship", 500, 19)])
def test_good_models_read_drawn_and_printed_digits(name, steps, least, tmp_path):
    experiment = fm.load_experiment(name)
    config = replace(experiment, train=replace(experiment.train, steps=steps, epochs=None))
    run = fm.fit(config, fm.load_data(config.data, os.environ["FLAXMNIST_DATA"]), devices=1)
    assert run.result.test_accuracy >= 0.99
    drawn = [draw_digit(digit, width=6 + 4 * digit, slant=0.02 * (digit - 4)) for digit in range(10)]
    for index, picture in enumerate([*drawn, *map(print_digit, range(10), FONTS)]):
        picture.save(tmp_path / f"{index:02d}.png")
    images = np.stack([read_digit(path) for path in sorted(tmp_path.iterdir())])
    predictions, _ = fm.predict(run.model, images)
    assert (predictions == np.arange(20) % 10).sum() >= least, predictions


def test_predict_shows_the_images(digits, few, tmp_path, capsys):
    fit_on_one(small(), few, tmp_path / "run")
    (tmp_path / "own").mkdir()
    for name in ("b", "a"):
        draw_digit(7, 20, 0.0).save(tmp_path / f"own/{name}.png")
    command = [str(tmp_path / "run"), str(tmp_path / "own")]
    assert main("predict")([*command, "--plot", str(tmp_path / "seen.png")]) == 0
    shown = capsys.readouterr().out
    assert shown.index("own/a.png: ") < shown.index("own/b.png: ") and shown.count("│") == 4 * 14
    with Image.open(tmp_path / "seen.png") as picture:
        assert picture.width > 300
    assert main("predict")([*command, "--json"]) == 0
    predictions = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert f"own/a.png: {predictions[0]['class']}\n" in shown
    for path, message in {"nowhere/seen.png": "use a file in a folder", "seen.jpg": "pictures are PNG files"}.items():
        assert main("predict")([*command, "--plot", str(tmp_path / path)]) == 2
        assert message in capsys.readouterr().err


def test_output_to_an_ascii_terminal(monkeypatch):
    file = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(file, encoding="ascii"))
    assert exit_code(lambda: print("│░▪ 7")) == 0
    assert file.getvalue() == b"??? 7\n"
