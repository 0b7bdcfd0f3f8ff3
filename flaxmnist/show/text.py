"""Text output: an experiment before training, the scores of a model, and single predictions."""

import itertools
import json
import math
import shlex
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float, UInt8

from flaxmnist import fields
from flaxmnist.config import Config
from flaxmnist.console import ACTIVITIES
from flaxmnist.core import steps
from flaxmnist.data import order
from flaxmnist.data.sets import Dataset
from flaxmnist.devices import program
from flaxmnist.devices.evaluation import Evaluation
from flaxmnist.store.results import Run
from flaxmnist.sweeps import statistics
from flaxmnist.sweeps.ensembles import Ensemble
from flaxmnist.sweeps.parts import Sweep
from flaxmnist.sweeps.statistics import title


def describe_experiment(config: Config, data: Dataset) -> str:
    """Return the resolved config, the parameters, the operations per step, and the memory that training needs."""
    config = order.resolve_length(config, len(data.train.labels))
    state = jax.eval_shape(partial(steps.create_state, config, data.train.images.shape[1:3], data.classes))
    cost = program.step_cost(config, data)
    state_size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    data_size = data.train.images.nbytes + data.train.labels.nbytes
    return "\n".join(
        [
            json.dumps(fields.to_json(config), indent=2),
            "",
            parameter_table(state.params),
            "",
            f"steps                {config.train.steps:,} of {config.train.batch_size} images",
            f"operations per step  {cost.operations / 1e9:.4g} GFLOP",
            f"memory               {megabytes(state_size + data_size + cost.bytes)}: state {megabytes(state_size)}, "
            f"training images {megabytes(data_size)}, temporary {megabytes(cost.bytes)}",
        ]
    )


def parameter_table(params) -> str:
    """Return a table with the path, shape, size and bytes of each parameter, and the totals."""
    rows = [("parameter", "shape", "count", "bytes")]
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        count = math.prod(leaf.shape)
        total += count
        name, shape = jax.tree_util.keystr(path, simple=True, separator="."), "×".join(map(str, leaf.shape))
        rows.append((name, shape, f"{count:,}", f"{4 * count:,}"))
    rows.append(("all", "", f"{total:,}", f"{4 * total:,}"))
    return format_table(rows)


def class_report(evaluation: Evaluation) -> str:
    """Return loss, accuracy, the scores of each class, and the confusion matrix."""
    matrix = [("true \\ predicted", *map(str, range(len(evaluation.confusion))))]
    matrix += [(str(label), *map(str, row)) for label, row in enumerate(evaluation.confusion)]
    summary = f"accuracy {evaluation.accuracy:.4f}, loss {evaluation.loss:.4f}, {evaluation.count} images"
    return "\n".join([summary, "", class_scores(evaluation), "", format_table(matrix)])


def class_scores(evaluation: Evaluation) -> str:
    """Return a table with the precision, recall and F1 score of each class."""
    from sklearn.metrics import precision_recall_fscore_support

    classes = len(evaluation.confusion)
    labels, predictions = np.divmod(np.arange(classes**2), classes)
    counts = evaluation.confusion.reshape(-1)
    # A class without images or without predictions scores 0.
    scores = np.array(precision_recall_fscore_support(labels, predictions, sample_weight=counts, zero_division=0.0))  # pyright: ignore[reportArgumentType]
    rows = [("class", "precision", "recall", "F1", "images")]
    for label, (precision, recall, f1, count) in enumerate(scores.T):
        rows.append((str(label), f"{precision:.4f}", f"{recall:.4f}", f"{f1:.4f}", f"{count:.0f}"))
    return format_table(rows)


def show_prediction(name: str, image: UInt8[np.ndarray, "h w 1"], probabilities: Float[np.ndarray, " classes"]) -> str:
    """Return the model's input image as block characters, next to ``name`` and the ten most probable classes."""
    height, width, _ = image.shape
    # Two rows of pixels per line: a character is about twice as high as wide.
    rows = np.pad(image[:, :, 0], ((0, height % 2), (0, 0))).reshape(-1, 2, width).mean(axis=1)
    picture = ["│" + "".join(" ░▒▓█"[int(value * 5) // 256] for value in row) + "│" for row in rows]
    text = [f"{name}: {probabilities.argmax()}", ""]
    for label in sorted(np.argsort(-probabilities, kind="stable")[:10]):
        text.append(f"{label}  {probabilities[label]:.4f}  {'▪' * round(20 * float(probabilities[label]))}")
    lines = itertools.zip_longest(picture, text, fillvalue="")
    return "\n".join(f"{left:<{width + 2}}  {right}".rstrip() for left, right in lines)


def format_table(rows: list[tuple[str, ...]]) -> str:
    """Return ``rows`` as aligned text: the first column left-aligned, the others right-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"


# --- Runs and sweeps ----------------------------------------------------------------------------------------------


def run_summary(run: Run, workdir: Path, data_dir: Path | None) -> str:
    """Return the text printed at the end: accuracy, times, parameters, folder, and commands to try next."""
    result = run.result
    accuracy = f"{result['test_accuracy']:.4f} of {result['test_count']} images"
    quoted = shlex.quote(str(workdir))
    data_option = "" if data_dir is None else f" --data-dir {shlex.quote(str(data_dir))}"
    return "\n".join(
        [
            f"test accuracy {accuracy}, loss {result['test_loss']:.4f}, after {result['steps']} steps",
            "",
            time_table(result["seconds"]),
            "",
            shorten(parameter_table(run.state.params)),
            "",
            f"run folder {workdir}",
            f"next: python launch/evaluate.py {quoted}{data_option}",
            f"      python launch/report.py {quoted}{data_option}",
            f"      python launch/predict.py {quoted} IMAGE.png",
        ]
    )


def shorten(text: str) -> str:
    """Replace the middle of ``text`` by "…" if it has more than 30 lines."""
    lines = text.splitlines()
    return text if len(lines) <= 30 else "\n".join([*lines[:15], "…", *lines[-14:]])


def time_table(seconds: dict[str, float]) -> str:
    """Format the ``seconds`` of a result as a table."""
    spent = {"save" if name == "checkpoint" else name: seconds[name] for name in ACTIVITIES}
    spent["other"] = max(0.0, seconds["total"] - sum(spent.values()))
    spent["all"] = seconds["total"]
    rows = [(name, f"{value:,.2f}", f"{value / seconds['total']:.0%}") for name, value in spent.items()]
    return format_table([("time", "seconds", "share"), *rows])


def sweep_report(swept: Sweep) -> str:
    """Return a table of the settings, the failed trials, the best setting and the comparisons with it, as"""
    rows: list[tuple[str, ...]] = [("setting", "n", "mean", "std", "95 % interval", "min", "max", "failed")]
    for group in swept.groups:
        numbers = [group["mean"], group["std"], *(group["ci95"] or (None, None)), group["min"], group["max"]]
        mean, std, low, high, least, most = ("" if x is None else f"{x:.4f}" for x in numbers)
        interval = f"{low} – {high}" if low else ""
        rows.append((title(group), str(group["n"]), mean, std, interval, least, most, str(group["failed"] or "")))
    lines = [f"{swept.groups[0]['split']} accuracy by setting", "", format_table(rows), ""]
    for trial in swept.members:
        if trial["failed"] is not None:
            lines.append(f"failed: {title(trial)}, seed {trial['seed']}: {trial['failed']}")
    best = swept.result["best"]
    if best is not None:
        test = best["test"]
        spread = "" if test["std"] is None else f" ± {test['std']:.4f} (std)"
        lines.append(f"best: {title(best)}: test accuracy {test['mean']:.4f}{spread}, n = {test['n']}")
    for comparison in swept.result["comparisons"]:
        if comparison["ci95"] is not None:
            low, high = comparison["ci95"]
            p_value = "" if comparison["p_value"] is None else f", p = {comparison['p_value']:.2g}"
            lines.append(
                f"{title(comparison)}: {comparison['mean']:+.4f} [{low:+.4f}, {high:+.4f}] compared with "
                f"{comparison['reference']}, same seeds{p_value}"
            )
    lines.append(f"{swept.result['replica_steps_per_second']:,.0f} steps/s, all trials together")
    return "\n".join(lines)


def ensemble_report(ensemble: Ensemble) -> str:
    """Return a table of the scores of the members and of the ensemble."""
    rows: list[tuple[str, ...]] = [(ensemble.setting, "accuracy", "calibration error")]
    for statistic in ("mean", "std", "min", "max"):
        values = [
            statistics.summarise([getattr(member, name) for member in ensemble.members])[statistic]
            for name in ("accuracy", "calibration_error")
        ]
        rows.append((f"members, {statistic}", *("" if value is None else f"{value:.4f}" for value in values)))
    together = ensemble.together
    rows.append(
        (f"ensemble of {len(ensemble.members)}", f"{together.accuracy:.4f}", f"{together.calibration_error:.4f}")
    )
    return f"{format_table(rows)}\n{ensemble.count} images"
