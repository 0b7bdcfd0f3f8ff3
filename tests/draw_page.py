"""Draw 20 digits on the page of a run in Chromium, and drop 20 photographs of digits on it: what does predict.py read?

Also measure how soon a point of a stroke is answered.

    python tests/draw_page.py runs/speedrun [--pictures FOLDER]

``--pictures`` writes screenshots of the page in use: draw.png, draw_dark.png and draw_phone.png.
"""

import argparse
import base64
import io
import json
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from browser import browse, evaluate, evaluate_in_real_time, with_script
from flax import nnx
from PIL import Image, ImageFilter
from scipy.interpolate import make_interp_spline
from test_reading import FONTS, STROKES, draw_digit, print_digit

import flaxmnist as fm
from flaxmnist.data.photos import read_digit

TIMES = np.linspace(0, 1, 40)


def curves(digit: int, size: float, slant: float, left: float, top: float) -> list[list[list[float]]]:
    """Return the strokes of a digit as points in fractions of the pad."""
    strokes = []
    for stroke in STROKES[digit].split("|"):
        points = np.array([point.split(",") for point in stroke.split()], float) / 100
        x, y = make_interp_spline(np.linspace(0, 1, len(points)), points, k=min(3, len(points) - 1))(TIMES).T
        strokes.append(np.stack([left + size * 0.75 * (x + slant * (0.5 - y)), top + size * y], axis=1).tolist())
    return strokes


DRAWINGS = [{"pen": 36, "strokes": curves(digit, 0.7, 0.0, 0.2, 0.15)} for digit in range(10)]
DRAWINGS += [{"pen": 14, "strokes": curves(digit, 0.45, 0.1, 0.3, 0.3)} for digit in range(10)]  # thickened

# Both wait until the page shows a prediction, or none.
SHOWN = """
const prediction = document.getElementById("prediction"), isBlank = () => prediction.textContent === "Draw something";
const until = async (condition) => { while (!condition()) await new Promise((resolve) => setTimeout(resolve, 20)); };
"""

POINTER = """
const pad = document.getElementById("pad");
const fire = (type, [x, y]) => {
  const box = pad.getBoundingClientRect();
  const at = { clientX: box.left + x * box.width, clientY: box.top + y * box.height };
  pad.dispatchEvent(new PointerEvent(type, { pointerId: 1, bubbles: true, ...at }));
};
const draw = async ({ pen, strokes }, afterPoint) => {
  document.getElementById("pen").value = pen;
  for (const points of strokes) {
    fire("pointerdown", points[0]);
    for (const point of points) { fire("pointermove", point); if (afterPoint) await afterPoint(); }
    fire("pointerup", points[points.length - 1]);
  }
};
"""

# Draw everything, and return what the page shows, and the pad as PNG.
ALL = (
    f"{SHOWN} {POINTER} const drawings = {json.dumps(DRAWINGS)}, drawn = [];"
    + """
for (const drawing of drawings) {
  flaxmnist.clear();
  await until(isBlank);
  await draw(drawing);
  await until(() => !isBlank());
  const [image, probabilities] = [flaxmnist.image(), flaxmnist.probabilities()];
  drawn.push({ shown: prediction.textContent, image, probabilities, png: pad.toDataURL() });
}
return drawn;
"""
)

# Return the milliseconds from each point to the end of the frame that shows its answer.
LATENCIES = (
    f"{POINTER} const drawings = {json.dumps(DRAWINGS)}, latencies = [];"
    + """
for (const drawing of drawings) {
  flaxmnist.clear();
  let start = performance.now();
  await draw(drawing, async () => {
    await new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve)));
    latencies.push(performance.now() - start);
    start = performance.now();
  });
}
return latencies;
"""
)


# Drop each of the ``files``, and return what the model sees.
DROP = """
const seen = [];
for (const file of files) {
  flaxmnist.clear();
  await until(isBlank);
  const dataTransfer = new DataTransfer(), bytes = Uint8Array.from(atob(file), (letter) => letter.charCodeAt(0));
  dataTransfer.items.add(new File([bytes], "digit.png", { type: "image/png" }));
  dispatchEvent(new DragEvent("drop", { dataTransfer }));
  await until(() => !isBlank());
  seen.push({ shown: prediction.textContent, image: flaxmnist.image(), probabilities: flaxmnist.probabilities() });
}
return seen;
"""


def photographs() -> list[Image.Image]:
    """Return the digits of test_reading.py, drawn and printed, blurred, with noise and uneven light."""
    drawn = [draw_digit(digit, width=6 + 4 * digit, slant=0.02 * (digit - 4)) for digit in range(10)]
    row, column = np.mgrid[0:1:640j, 0:1:480j]
    light, noise = 0.65 + 0.2 * row + 0.2 * column, np.random.default_rng(0).normal(0, 6, (20, 640, 480, 3))
    pictures = []
    for picture, grain in zip([*drawn, *map(print_digit, range(10), FONTS)], noise, strict=True):
        values = np.asarray(picture.resize((480, 640)), float) * light[..., None] + grain
        pictures.append(Image.fromarray(values.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(1.2)))
    return pictures


class Read(NamedTuple):
    """A drawing or a photograph, as the page and as predict.py read it."""

    digit: int
    prediction: int
    prediction_of_png: int
    shown: str  # the page's text
    difference: float  # grey levels, the mean over pixels


def read_drawings(model: nnx.Module, page: Path) -> list[Read]:
    """Draw on the ``page`` of a model; read its pads, as PNG files beside it, with the model."""
    drawn = evaluate(page, ALL)
    return compare(model, page.parent, drawn, [base64.b64decode(one["png"].partition(",")[2]) for one in drawn])


def read_photographs(model: nnx.Module, page: Path) -> list[Read]:
    """Drop photographs on the ``page`` of a model; read them, as PNG files beside it, with the model."""
    files = []
    for picture in photographs():
        picture.save(file := io.BytesIO(), "png")
        files.append(file.getvalue())
    encoded = json.dumps([base64.b64encode(file).decode() for file in files])
    # In real time: images are decoded in it, while timers that run at once would have gone by.
    seen = evaluate_in_real_time(page, f"{SHOWN} const files = {encoded}; {DROP}")
    return compare(model, page.parent, seen, files)


def compare(model: nnx.Module, folder: Path, answers: list[dict], files: list[bytes]) -> list[Read]:
    """Compare the answers of a page with how the model reads PNG ``files``, which are written to ``folder``."""
    results = []
    for index, (answer, content) in enumerate(zip(answers, files, strict=True)):
        (folder / f"{index}.png").write_bytes(content)
        image = read_digit(folder / f"{index}.png")
        difference = float(np.abs(image.ravel() - np.array(answer["image"])).mean())
        prediction = int(np.argmax(answer["probabilities"]))
        of_png = int(fm.predict(model, image[None])[0][0])
        results.append(Read(index % 10, prediction, of_png, answer["shown"], difference))
    return results


def take_pictures(page: Path, folder: Path) -> None:
    """Write screenshots of the page with a digit."""
    folder.mkdir(parents=True, exist_ok=True)
    used = with_script(page, f"{POINTER} await draw({json.dumps(DRAWINGS[2])});")
    for name, size, scheme in (("draw", "1200,950", 1), ("draw_dark", "1200,950", 0), ("draw_phone", "500,1500", 1)):
        file, look = folder / f"{name}.png", f"--blink-settings=preferredColorScheme={scheme}"
        options = "--virtual-time-budget=5000", "--hide-scrollbars", f"--window-size={size}", look
        browse(used, *options, f"--screenshot={file}")
        print(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder that launch/export.py has exported")
    parser.add_argument("--pictures", type=Path, help="folder for screenshots")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        page, model = Path(shutil.copy(arguments.run / "export/draw.html", scratch)), fm.load_run(arguments.run).model
        for name, read in {"drawings": read_drawings, "photographs": read_photographs}.items():
            results = read(model, page)
            right = sum(result.prediction == result.digit for result in results)
            same = sum(result.prediction == result.prediction_of_png for result in results)
            differences = [result.difference for result in results]
            print(f"{len(results)} {name}: {right} right, {same} read as by predict.py; their inputs differ by")
            print(f"    {np.mean(differences):.2f} grey levels on average, {max(differences):.2f} at most")
        latencies = evaluate_in_real_time(page, LATENCIES)
        mean, most = np.mean(latencies), np.percentile(latencies, 99)
        print(f"{len(latencies)} points: answered after {mean:.0f} ms on average, 99 % of them within {most:.0f} ms")
        if arguments.pictures is not None:
            take_pictures(page, arguments.pictures)


if __name__ == "__main__":
    main()
