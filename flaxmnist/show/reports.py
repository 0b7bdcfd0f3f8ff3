"""HTML reports on a run, several runs, or a sweep: which text and which ``plots`` they contain, and the page."""

import base64
import html
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from flaxmnist import fields
from flaxmnist.config import Config
from flaxmnist.core.models import CNN, Softmax
from flaxmnist.data.sets import Dataset
from flaxmnist.devices import evaluation
from flaxmnist.devices.evaluation import Evaluation
from flaxmnist.errors import UserError, check_local
from flaxmnist.show import canvas, pages, plots, text
from flaxmnist.store.files import write_file
from flaxmnist.store.load import Recorded, Run, classes_of, load_recorded, load_training_data
from flaxmnist.sweeps.folder import load_finished_trials, load_sweep
from flaxmnist.sweeps.results import Sweep

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Picture(NamedTuple):
    """A picture of a report."""

    name: str  # file name without suffix
    caption: str
    figure: "Figure"
    curves: bool = False  # it has nothing but curves, which the page shows with their values


class Section(NamedTuple):
    """A section of a report: preformatted text, a table whose first row has the titles, and pictures."""

    title: str
    text: str = ""
    table: Sequence[tuple[str, ...]] = ()
    pictures: Iterable[Picture] = ()


def write(
    workdirs: Sequence[Path],
    out: Path | None = None,
    data_dir: Path | None = None,
    config: Config | None = None,
    data: Dataset | None = None,
    reload: float | None = None,
) -> tuple[Path, list[Path]]:
    """Write ``report.html``, and each picture to ``plots/``; return their paths.

    Runs and sweeps may be unfinished. ``out`` defaults to the folder of the run or sweep, or to the common parent of
    several runs. For ``config`` see ``load_run``, for ``data`` ``evaluate_run``. With ``reload``, the page loads itself
    again every so many seconds. Raise UserError if a folder is neither run nor sweep or is damaged, if one of several
    is a sweep, if the data cannot be loaded, or if ``out`` cannot be written to.
    """
    if not workdirs:
        raise UserError("no folder: pass that of a run or sweep, such as runs/a")
    if out is not None:
        check_local(out)
    sweep_folders = [folder for folder in workdirs if os.path.exists(folder / "sweep.json")]
    if sweep_folders and len(workdirs) > 1:
        raise UserError(f"{sweep_folders[0]} is a sweep: pass only this folder, or only runs to compare")
    if sweep_folders:
        (folder,) = workdirs
        is_finished = (folder / "result.json").exists()
        sweep = load_sweep(folder) if is_finished else load_finished_trials(folder, classes_of(config))
        return write_sweep(sweep, folder, out, reload)
    if len(workdirs) == 1:
        (folder,) = workdirs
        run = load_recorded(folder, config)
        return save(run.config.name, run_summary(run), run_sections(folder, run, data_dir, data), out or folder, reload)
    parents = {folder.resolve().parent for folder in workdirs}
    if out is None and len(parents) > 1:
        raise UserError("the runs are in several folders: pass --out")
    common = Path(os.path.commonpath(parents))
    runs = {str(folder.resolve().relative_to(common)): load_recorded(folder, config) for folder in workdirs}
    if len(runs) < len(workdirs):
        raise UserError("a run is listed twice: pass each run once")
    experiments = " and ".join(dict.fromkeys(run.config.name for run in runs.values()))
    return save(f"{experiments}: {len(runs)} runs", "", comparison_sections(runs), out or common, reload)


def write_sweep(
    sweep: Sweep, folder: Path, out: Path | None = None, reload: float | None = None
) -> tuple[Path, list[Path]]:
    """Write the report of a sweep in ``folder``, as ``write`` does."""
    result = sweep.result
    counts = {"run": len(result.members), "setting": len(result.groups), "seed": len(result.seeds)}
    summary = ", ".join(f"{count} {name}{'' if count == 1 else 's'}" for name, count in counts.items()) + "."
    if not (folder / "result.json").exists():
        summary += " Not finished: --resume continues."
    content = text.sweep_report(sweep) if result.members else "no run is finished"
    section = Section("Results", content, pictures=sweep_pictures(sweep))
    return save(" and ".join(result.experiments), summary, [section], out or folder, reload)


# --- Contents -------------------------------------------------------------------------------------------------------


def run_sections(folder: Path, run: Recorded, data_dir: Path | None, data: Dataset | None = None) -> Iterator[Section]:
    """Yield the sections for one run, evaluated on the test images if it is finished, else on the validation images."""
    data = load_training_data(folder, run.config.data, run.data, data_dir, data)
    yield Section("Result", "\n".join(f"{name:<24} {value}" for name, value in facts(run).items()))
    yield Section("Training", pictures=training_pictures(run))
    split_name, split = ("test", data.test) if run.result else ("validation", data.validation)
    if isinstance(run, Run) and split is not None:
        scores = evaluation.evaluate(run.model, *split, data.class_names)
        title, pictures = f"Predictions on the {split_name} images", prediction_pictures(scores)
        yield Section(title, text.mistakes(scores), pictures=pictures)
        yield Section("Scores of each class", text.class_scores(scores))
    if isinstance(run, Run):
        yield Section("Model", text.parameter_table(run.state.params), pictures=model_pictures(run, data))
    yield Section("Data", pictures=data_pictures(data))
    yield Section("Config", "\n".join(f"{name} = {value}" for name, value in flat_config(run).items()))


def training_pictures(run: Recorded) -> Iterator[Picture]:
    if not run.history:
        return
    yield Picture("history", "Cost and accuracy against the epoch.", plots.history(run), curves=True)
    interval = run.config.train.log_every
    # With fewer than two batches per epoch there are no curves.
    if sum(record["split"] == "train" for record in run.history) > 1 and 2 * interval <= run.epoch_length:
        batches = "every batch" if interval == 1 else f"one batch in {interval}"
        caption = f"Cost of {batches}, before its update; one curve per epoch."
        yield Picture("batch_costs", caption, plots.batch_costs(run), curves=True)
    if any(record["split"] == "train" for record in run.history):
        yield Picture("step_metrics", "Other metrics of the recorded steps.", plots.step_metrics(run), curves=True)


def prediction_pictures(scores: Evaluation) -> Iterator[Picture]:
    labels, probabilities, names = scores.labels, scores.probabilities, scores.class_names
    figure = plots.confusion(scores.confusion, names)
    yield Picture("confusion", "Number of images by true class and prediction.", figure)
    if not np.isfinite(probabilities).all():
        return  # the model diverged: it has no confidence, and no worst mistakes
    if scores.accuracy < 1:
        caption = "The worst mistakes: the true and the predicted class, each with its probability."
        yield Picture("mistakes", caption, plots.mistakes(scores.images, labels, probabilities, names=names))
    caption = "Fraction of correct predictions against their confidence."
    yield Picture("calibration", caption, plots.calibration(probabilities, labels))


def model_pictures(run: Run, data: Dataset) -> Iterator[Picture]:
    try:
        figure = plots.weights(run.model, run.data.shape, data.class_names)
    except UserError:  # a custom model
        return
    is_softmax = isinstance(run.model, Softmax)
    meaning = "blue is evidence for the class, red is evidence against it" if is_softmax else "blue above 0, red below"
    yield Picture("weights", f"Weights of the first layer: {meaning}.", figure)
    if isinstance(run.model, CNN):
        caption = "Feature maps of the convolutions for the first training image, after pooling and ReLU."
        yield Picture("feature_maps", caption, plots.feature_maps(run.model, data.train.images[0]))


def data_pictures(data: Dataset) -> Iterator[Picture]:
    images, labels = data.train
    yield Picture(
        "examples", "The first training images of each class.", plots.examples(*data.train, names=data.class_names)
    )
    yield Picture("digit", "The first training image.", plots.digit(images[0], data.class_names[labels[0]]))
    yield Picture("values", "Distribution of pixel values in the training images.", plots.values(images))


def comparison_sections(runs: Mapping[str, Recorded]) -> Iterator[Section]:
    """Yield the sections for several runs."""
    rows: list[tuple[str, ...]] = [("run", "test accuracy", "loss", "validation", "steps", "parameters", "training s")]
    for name, run in runs.items():
        result, steps = run.result, f"{run.step:,}"
        if result is None:
            rows.append((name, "", "", "", steps, "", ""))
        else:
            scores = (result.test_accuracy, result.test_loss, result.validation_accuracy)
            train_seconds = format_number(result.seconds["train"])
            rows.append((name, *map(format_number, scores), steps, f"{result.params:,}", train_seconds))
    yield Section("Results", table=rows, pictures=comparison_pictures(runs))
    configs = {name: flat_config(run) for name, run in runs.items()}
    table: list[tuple[str, ...]] = [("field", *configs)]
    for field in dict.fromkeys(field for config in configs.values() for field in config):
        if len({str(config.get(field)) for config in configs.values()}) > 1:
            table.append((field, *(str(config.get(field, "")) for config in configs.values())))
    yield Section("Fields that differ", table=table)


def comparison_pictures(runs: Mapping[str, Recorded]) -> Iterator[Picture]:
    # More runs have equal colours, and differ in the markers of the picture.
    curves = len(runs) <= len(canvas.COLOURS)
    yield Picture("history", "Cost and accuracy against the epoch.", plots.history(runs), curves)
    if any(run.result for run in runs.values()):
        yield Picture("accuracies", "Test accuracy of each run.", plots.accuracies(runs))


def sweep_pictures(sweep: Sweep) -> Iterator[Picture]:
    if all(trial.failed is not None for trial in sweep.members):
        return
    yield Picture("curves", "Accuracy against the step, by setting.", plots.curves(sweep), curves=True)
    yield Picture("distribution", "Accuracy of each seed, by setting.", plots.distribution(sweep))
    for field, values in sweep.result.over.items():
        if len(values) > 1 and all(isinstance(value, int | float) for value in values):
            yield Picture(field, f"Accuracy against {field}.", plots.against(sweep, field))


def run_summary(run: Recorded) -> str:
    """Return accuracy, errors, time and seed of a run in one line."""
    result, seed = run.result, f"seed {run.config.seed}"
    if result is None:
        return f"Step {run.step:,} of {run.config.train.length:,}, {seed}. Not finished: --resume continues."
    errors = round((1 - result.test_accuracy) * result.test_count)
    accuracy = f"{100 * result.test_accuracy:.2f} % of {result.test_count:,} test images, {errors:,} errors"
    return f"{accuracy}; {result.steps:,} steps, {result.seconds['train']:.1f} s of training, {seed}."


def facts(run: Recorded) -> dict[str, str]:
    """Return the main facts about a run, by name."""
    result, steps = run.result, run.step
    table = {"experiment": run.config.name, "seed": str(run.config.seed)}
    if result is None:
        table["steps"] = f"{steps:,} of {run.config.train.length:,}: not finished"
    else:
        packages = ("python", "jax", "flax", "optax")
        rate = format_number(result.steps_per_second)
        table |= {
            "test accuracy": f"{result.test_accuracy:.4f} of {result.test_count:,} images",
            "test loss": f"{result.test_loss:.4f} nats per image",
            **{
                f"test {text.metric_title(name)}": f"{score:.4f}"
                for name, score in (result.test or {}).items()
                if name not in ("accuracy", "loss")
            },
            "validation accuracy": format_number(result.validation_accuracy) or "no validation images",
            "steps": f"{steps:,}, {result.epochs:.3g} epochs, {rate} per second",
            "parameters": f"{result.params:,}",
            "seconds": ", ".join(f"{name} {seconds:.1f}" for name, seconds in result.seconds.items()),
            "devices": f"{result.devices} {result.device_kind}, backend {result.backend}",
            "versions": ", ".join(f"{name} {result.versions[name]}" for name in packages if name in result.versions),
        }
    return table | {"data": run.data.name}


def flat_config(run: Recorded) -> dict[str, object]:
    """Return the fields of a run's config by dotted name."""
    return fields.flatten(fields.to_json(run.config))


def format_number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


# --- HTML -----------------------------------------------------------------------------------------------------------


def save(
    title: str, summary: str, sections: Iterable[Section], out: Path, reload: float | None = None
) -> tuple[Path, list[Path]]:
    """Write the page and its pictures to ``out``; return their paths. For ``reload`` see ``write``. Raise UserError."""
    page, body, contents, files = out / "report.html", [], [], []
    if (out / "export/draw.html").exists():
        contents.append('<a href="export/draw.html">Draw a digit</a>')
    for number, section in enumerate(sections):
        contents.append(f'<a href="#{number}">{html.escape(section.title)}</a>')
        body.append(f'<section id="{number}"><h2>{html.escape(section.title)}</h2>')
        if section.text:
            body.append(f"<pre>{html.escape(section.text)}</pre>")
        if section.table:
            body.append(html_table(section.table))
        body.append('<div class="figures">')
        for name, caption, figure, curves in section.pictures:
            content, caption = canvas.png(figure), html.escape(caption)
            files.append(out / "plots" / f"{name}.png")
            write_bytes(files[-1], content)
            source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
            width = round(canvas.DISPLAY_DPI * figure.get_figwidth())
            image = f'<img alt="{caption}" width="{width}" src="{source}">'
            if curves:
                caption += " Drag to zoom, double-click to see everything."
                image += f'<script type="application/json">{pages.to_script(canvas.curves(figure))}</script>'
            body.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
        body.append("</div></section>")
    parts = {"summary": html.escape(summary), "contents": "\n".join(contents), "body": "\n".join(body)}
    parts["reload"] = "" if reload is None else f"setTimeout(() => location.reload(), {1000 * reload});"
    content = pages.fill("report", title, title, **parts)
    write_bytes(page, content.encode(errors="replace"))
    return page, files


def html_table(rows: Sequence[tuple[str, ...]]) -> str:
    """Return a table that can be sorted by its columns. The first row has their titles."""
    head, *others = ([html.escape(cell) for cell in row] for row in rows)
    titles = "".join(f'<th scope="col"><button type="button">{title}</button></th>' for title in head)
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in others)
    return f'<div class="table"><table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>'


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically, and create its folder if needed. Raise UserError if that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, content)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; pass another --out") from None
