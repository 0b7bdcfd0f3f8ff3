"""Reports: one page that shows a run, several runs, or a sweep, and its pictures as files."""

import base64
import html
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float

from flaxmnist import evaluation, fields, figures, folders, inspection, parts, plots, results, trained
from flaxmnist.data import Dataset, Split
from flaxmnist.errors import UserError
from flaxmnist.evaluation import Evaluation
from flaxmnist.models import CNN, Softmax
from flaxmnist.parts import Sweep
from flaxmnist.results import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Picture(NamedTuple):
    """A picture of a report."""

    name: str  # of its file
    caption: str  # what is to be seen
    drawn: "Figure"


class Section(NamedTuple):
    """A part of a report: text as it stands, and pictures."""

    title: str
    text: str
    pictures: Iterable[Picture]


def write(workdirs: Sequence[Path], out: Path | None = None, data_dir: Path | None = None) -> tuple[Path, list[Path]]:
    """Writes ``report.html``, and each picture into ``plots/``; returns their paths.

    They go to ``out``, by default the folder of the run or sweep or, of several runs, the one that all lie in. Raises
    UserError where a folder is neither or damaged, where sweeps are to be compared, and where data or ``out`` cannot be
    had.
    """
    swept = [folder for folder in workdirs if os.path.exists(folder / "sweep.json")]
    if swept and len(workdirs) > 1:
        raise UserError(f"{swept[0]} is a sweep: give it alone, or runs to compare")
    if swept:
        with folders.as_saved(swept[0]):
            return write_sweep(parts.load_sweep(swept[0]), swept[0], out)
    if len(workdirs) == 1:
        folder = workdirs[0]
        run = results.load_run(folder)
        return save(folder.resolve().name, of_run(folder, run, data_dir), out or folder)
    homes = {folder.resolve().parent for folder in workdirs}
    if out is None and len(homes) > 1:
        raise UserError("the runs lie in several folders: give --out, where to write")
    common = Path(os.path.commonpath(homes))
    runs = {str(folder.resolve().relative_to(common)): results.load_run(folder) for folder in workdirs}
    if len(runs) < len(workdirs):
        raise UserError("a run is given twice: give each once")
    return save(f"{len(runs)} runs", of_runs(runs), out or common)


def write_sweep(sweep: Sweep, folder: Path, out: Path | None = None) -> tuple[Path, list[Path]]:
    """``write`` of a sweep in ``folder``."""
    return save(folder.resolve().name, [Section("Results", parts.report(sweep), of_sweep(sweep))], out or folder)


# --- What a report holds --------------------------------------------------------------------------------------------


def of_run(folder: Path, run: Run, data_dir: Path | None) -> Iterator[Section]:
    """The sections of a run's report. Those of a run that is not finished look at validation images."""
    data = trained.data_of(folder, run.config, run.data, data_dir)
    yield Section("Result", "\n".join(f"{name:<20} {value}" for name, value in facts(run)), [])
    yield Section("Training", "", of_training(run))
    images = data.test if run.result else data.validation
    if images is not None:
        logits = evaluation.predict_logits(run.model, images.images)
        seen, probabilities = evaluation.score(logits, images.labels), np.exp(evaluation.log_softmax(logits))
        pictures = of_answers(images, probabilities, seen)
        yield Section(f"Answers on the {'test' if run.result else 'validation'} images", "", pictures)
        yield Section("Each class", inspection.class_scores(seen), [])
    yield Section("Model", inspection.parameter_table(run.state.params), of_model(run, data))
    yield Section("Data", "", of_data(data))
    yield Section("Config", "\n".join(f"{name} = {value}" for name, value in settings(run).items()), [])


def of_training(run: Run) -> Iterator[Picture]:
    yield Picture("history", "Cost and accuracy against the epoch.", plots.history(run))
    if sum(record["split"] == "train" for record in run.history) > 1:
        every = run.config.train.log_every
        which = "every batch" if every == 1 else f"one batch in {every}"
        yield Picture("batch_costs", f"Cost of {which}, before its step; a curve an epoch.", plots.batch_costs(run))


def of_answers(split: Split, probabilities: Float[np.ndarray, "n classes"], seen: Evaluation) -> Iterator[Picture]:
    yield Picture("confusion", "Images by true class and answer.", plots.confusion(seen.confusion))
    if not np.isfinite(probabilities).all():
        return  # a model that diverged is neither confident nor worst anywhere
    if seen.accuracy < 1:
        yield Picture(
            "mistakes",
            "The images answered most wrongly: the true class with the probability it was given, then the answer.",
            plots.mistakes(*split, probabilities),
        )
    yield Picture(
        "calibration",
        "How often answers are right that are given with some confidence.",
        plots.calibration(probabilities, split.labels),
    )


def of_model(run: Run, data: Dataset) -> Iterator[Picture]:
    height, width = run.data["shape"]
    try:
        drawn = plots.weights(run.model, (height, width))
    except UserError:  # a model of the reader's own
        return
    means = "blue where ink is evidence for the class, red where it is evidence against"
    means = means if isinstance(run.model, Softmax) else "blue above zero, red below"
    yield Picture("weights", f"Weights of the first layer: {means}.", drawn)
    if isinstance(run.model, CNN):
        caption = "What the convolutions make of the first training image, after pooling and ReLU."
        yield Picture("feature_maps", caption, plots.feature_maps(run.model, data.train.images[0]))


def of_data(data: Dataset) -> Iterator[Picture]:
    images, labels = data.train
    yield Picture("examples", "The first training images of each class.", plots.examples(images, labels))
    yield Picture("digit", "The first training image.", plots.digit(images[0], int(labels[0])))
    yield Picture("values", "Values of the training images' pixels.", plots.values(images))


def of_runs(runs: Mapping[str, Run]) -> Iterator[Section]:
    """The sections of a comparison."""
    rows: list[tuple[str, ...]] = [("run", "test accuracy", "loss", "validation", "steps", "parameters", "training s")]
    for name, run in runs.items():
        told = [run.result.get(key) for key in ("test_accuracy", "test_loss", "validation_accuracy")]
        told += [int(run.state.step), run.result.get("params"), run.result.get("seconds", {}).get("train")]
        rows.append((name, *map(cell, told)))
    yield Section("Results", inspection.table(rows), of_comparison(runs))
    flat = {name: settings(run) for name, run in runs.items()}
    all_fields = dict.fromkeys(field for each in flat.values() for field in each)
    differing = [field for field in all_fields if len({str(each.get(field)) for each in flat.values()}) > 1]
    table: list[tuple[str, ...]] = [("field", *flat)]
    table += [(field, *(str(each.get(field, "")) for each in flat.values())) for field in differing]
    yield Section("Fields that differ", inspection.table(table), [])


def of_comparison(runs: Mapping[str, Run]) -> Iterator[Picture]:
    yield Picture("history", "Cost and accuracy against the epoch.", plots.history(runs))
    if any(run.result for run in runs.values()):
        yield Picture("accuracies", "Test accuracy of each run.", plots.accuracies(runs))


def of_sweep(sweep: Sweep) -> Iterator[Picture]:
    if all(line["failed"] is not None for line in sweep.members):
        return
    yield Picture("curves", "Accuracy against the step, by setting.", plots.curves(sweep))
    yield Picture("distribution", "Accuracy of each seed, by setting.", plots.distribution(sweep))
    for field, values in sweep.result["over"].items():
        if len(values) > 1 and all(isinstance(value, int | float) for value in values):
            yield Picture(field, f"Accuracy against {field}.", plots.against(sweep, field))


def facts(run: Run) -> list[tuple[str, str]]:
    """What there is to know of a run, a line each."""
    result, steps = run.result, int(run.state.step)
    shown = ("python", "jax", "flax", "optax")
    versions = [(name, version) for name, version in result.get("versions", {}).items() if name in shown]
    rows = [("experiment", run.config.name), ("seed", str(run.config.seed))]
    if result:
        rows += [
            ("test accuracy", f"{result['test_accuracy']:.4f} of {result['test_count']:,} images"),
            ("test loss", f"{result['test_loss']:.4f} nats an image"),
            ("validation accuracy", cell(result["validation_accuracy"]) or "no validation images"),
            ("steps", f"{steps:,}, {result['epochs']:.3g} epochs, {cell(result['steps_per_second'])} a second"),
            ("parameters", f"{result['params']:,}"),
            ("seconds", ", ".join(f"{name} {spent:.1f}" for name, spent in result["seconds"].items())),
            ("devices", f"{result['devices']} {result['device_kind']}, by {result['backend']}"),
            ("versions", ", ".join(f"{name} {version}" for name, version in versions)),
        ]
    else:
        rows += [("steps", f"{steps:,} of {run.config.train.length:,}: not finished")]
    return [*rows, ("data", run.data["name"])]


def settings(run: Run) -> dict[str, object]:
    """The fields of a run's config by their dotted names."""
    return fields.flatten(fields.to_json(run.config))


def cell(value: object) -> str:
    """A value in a table; nothing where there is none."""
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# --- The page -------------------------------------------------------------------------------------------------------

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
body {{ max-width: 72rem; margin: 2rem auto; padding: 0 1rem; font: 1rem/1.5 system-ui, sans-serif; }}
pre {{ overflow-x: auto; font-size: 0.8rem; line-height: 1.35; }}
figure {{ margin: 1.5rem 0; break-inside: avoid; }}
img {{ max-width: min(100%, 56rem); background: white; }}
figcaption {{ color: #555; }}
h2 {{ margin-top: 3rem; border-bottom: 1px solid #ccc; break-after: avoid; }}
@media print {{ pre {{ white-space: pre-wrap; font-size: 7pt; }} }}
</style>
<h1>{title}</h1>
{body}
</html>
"""


def save(title: str, sections: Iterable[Section], out: Path) -> tuple[Path, list[Path]]:
    """Writes the page and its pictures to ``out``. Raises UserError where that cannot be."""
    page, body, files = out / "report.html", [], []
    for section in sections:
        body.append(f"<h2>{html.escape(section.title)}</h2>")
        if section.text:
            body.append(f"<pre>{html.escape(section.text)}</pre>")
        for name, caption, drawn in section.pictures:
            content, told = figures.png(drawn), html.escape(caption)
            files.append(out / "plots" / f"{name}.png")
            write_bytes(files[-1], content)
            source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
            body.append(f'<figure><img alt="{told}" src="{source}"><figcaption>{told}</figcaption></figure>')
    text = PAGE.format(title=html.escape(title), body="\n".join(body))
    write_bytes(page, text.encode(errors="replace"))
    return page, files


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file, and the folder it lies in. Raises UserError where that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; give another --out") from None
