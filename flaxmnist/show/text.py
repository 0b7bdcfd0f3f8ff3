"""Text output: an experiment before training, the scores of a model, and single predictions."""

import itertools
import json
import math
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, UInt8

from flaxmnist import fields
from flaxmnist.config import Config
from flaxmnist.console import ACTIVITIES
from flaxmnist.core import steps
from flaxmnist.core.models import make_model
from flaxmnist.core.trace import Operation, count_operations, trace
from flaxmnist.data import mislabelled, order
from flaxmnist.data.sets import Dataset
from flaxmnist.devices import program
from flaxmnist.devices.evaluation import Evaluation
from flaxmnist.errors import UserError
from flaxmnist.store.load import Run
from flaxmnist.sweeps.ensembles import Ensemble
from flaxmnist.sweeps.results import Difference, Sweep
from flaxmnist.sweeps.statistics import summarise


def describe_experiment(config: Config, data: Dataset, **functions: Any) -> str:
    """Return the resolved config, the parameters and layers, the operations and the memory that training needs.

    ``functions`` are the experiment's ``step`` and ``arrays``, if it defines them.
    """
    config, shape = order.resolve_length(config, len(data.train.labels)), data.train.images.shape[1:]
    state = steps.state_shapes(config, shape, data.classes)
    cost = program.step_cost(config, data, **functions)
    state_size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    data_size = data.train.images.nbytes + data.train.labels.nbytes
    return "\n".join(
        [
            json.dumps(fields.to_json(config), indent=2),
            "",
            parameter_table(state.params),
            "",
            layer_table(make_model(config.model, shape, data.classes, nnx.Rngs(0)), shape),
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


def layer_table(model: nnx.Module, shape: Sequence[int]) -> str:
    """Return a table with the output, the operations for one image, and the bytes of each convolution and product."""
    model.eval()
    try:
        nodes = trace(model, shape)
    except UserError as error:
        return f"no table of layers: {error}"
    rows, total = [("layer", "output", "MFLOP per image", "output bytes", "weight bytes")], 0
    for node in nodes:
        if isinstance(node, Operation):
            operations = count_operations(node, nodes)
            total += operations
            if node.name in LAYERS:
                output, size = "×".join(map(str, node.shape[1:])), 4 * math.prod(node.shape)
                weights = nodes[node.inputs[1]]
                held = "" if isinstance(weights, Operation) else f"{4 * weights.size:,}"
                rows.append((LAYERS[node.name], output, f"{operations / 1e6:.3f}", f"{size:,}", held))
    return format_table([*rows, ("all operations", "", f"{total / 1e6:.3f}", "", "")])


LAYERS = {"conv_general_dilated": "convolution", "dot_general": "product"}


def class_report(evaluation: Evaluation) -> str:
    """Return the metrics, the scores of each class, and the confusion matrix."""
    names = evaluation.class_names
    matrix = [("true \\ predicted", *names)]
    matrix += [(name, *map(str, row)) for name, row in zip(names, evaluation.confusion, strict=True)]
    scores = [f"{metric_title(name)} {evaluation.scores[name]:.4f}" for name in ("accuracy", *evaluation.scores)]
    summary = ", ".join([*dict.fromkeys(scores), f"{evaluation.count} images"])
    return "\n".join([summary, mistakes(evaluation), "", class_scores(evaluation), "", format_table(matrix)])


def mistakes(evaluation: Evaluation) -> str:
    """Return the number of mistakes, and how many of them are known errors of MNIST's labels."""
    count = len(evaluation.mistakes)
    text = f"{count} mistake{'' if count == 1 else 's'}"
    known = int(mislabelled.known(np.asarray(evaluation.images)[evaluation.mistakes]).sum())
    return f"{text}, {known} of them at labels known to be wrong (Northcutt et al. 2021)" if known else text


def class_scores(evaluation: Evaluation) -> str:
    """Return a table with the precision, recall and F1 score of each class, 0 without images or predictions."""
    correct = evaluation.confusion.diagonal()
    predictions, images = evaluation.confusion.sum(axis=0), evaluation.confusion.sum(axis=1)
    # F1 is the harmonic mean of precision and recall.
    scores = (correct / np.maximum(count, 1) for count in (predictions, images, (predictions + images) / 2))
    rows = zip(evaluation.class_names, *(map(decimals, score) for score in scores), map(str, images), strict=True)
    return format_table([("class", "precision", "recall", "F1", "images"), *rows])


def show_prediction(
    name: str,
    image: UInt8[np.ndarray, "h w c"],
    probabilities: Float[np.ndarray, " classes"],
    names: Sequence[str],
) -> str:
    """Return the model's input image as block characters, next to ``name`` and the ten most probable classes."""
    height, width, _ = image.shape
    grey = image.mean(axis=2)
    # Two rows of pixels per line: a character is about twice as high as wide.
    rows = np.pad(grey, ((0, height % 2), (0, 0))).reshape(-1, 2, width).mean(axis=1)
    picture = ["│" + "".join(" ░▒▓█"[int(value * 5) // 256] for value in row) + "│" for row in rows]
    text, length = [f"{name}: {names[int(probabilities.argmax())]}", ""], max(map(len, names))
    for label in sorted(np.argsort(-probabilities, kind="stable")[:10]):
        bar = "▪" * round(20 * float(probabilities[label]))
        text.append(f"{names[label]:<{length}}  {probabilities[label]:.4f}  {bar}")
    lines = itertools.zip_longest(picture, text, fillvalue="")
    return "\n".join(f"{left:<{width + 2}}  {right}".rstrip() for left, right in lines)


def format_table(rows: list[tuple[str, ...]]) -> str:
    """Return ``rows`` as aligned text: the first column left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [(row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])) for row in rows]
    return "\n".join(map("  ".join, lines))


def decimals(value: float | None) -> str:
    """Return a score with four decimals, or "" for None."""
    return "" if value is None else f"{value:.4f}"


def metric_title(name: str) -> str:
    """Return the name of a metric in words."""
    return name.replace("_", " ").replace("top2", "top-2")


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"


# --- Runs and sweeps ----------------------------------------------------------------------------------------------


def run_summary(run: Run, workdir: Path, data_dir: Path | None, experiment: Path, command: Callable[[str], str]) -> str:
    """Return the text printed at the end: accuracy, times, parameters, folder, and commands to try next.

    ``command`` returns how the user calls a verb.
    """
    result = run.result
    assert result is not None, "the run is not finished"
    accuracy = f"{result.test_accuracy:.4f} of {result.test_count} images"
    quoted = shlex.quote(str(workdir))
    data_option = "" if data_dir is None else f" --data-dir {shlex.quote(str(data_dir))}"
    # A run folder has no code of the user's classes.
    class_option = f" --experiment {shlex.quote(str(experiment))}" if fields.user_classes(run.config) else ""
    return "\n".join(
        [
            f"test accuracy {accuracy}, loss {result.test_loss:.4f}, after {result.steps} steps",
            "",
            time_table(result.seconds),
            "",
            shorten(parameter_table(run.state.params)),
            "",
            f"run folder {workdir}",
            f"next: {command('evaluate')} {quoted}{data_option}{class_option}",
            f"      {command('report')} {quoted}{data_option}{class_option}",
            f"      {command('predict')} {quoted} IMAGE.png{class_option}",
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


def sweep_report(sweep: Sweep) -> str:
    """Return a table of the settings, the failed trials, the best setting and the comparisons with it."""
    rows: list[tuple[str, ...]] = [("setting", "n", "mean", "std", "95 % interval", "min", "max", "failed")]
    for group in sweep.groups:
        mean, std, least, most = map(decimals, (group.mean, group.std, group.min, group.max))
        interval = " – ".join(map(decimals, group.ci95 or ()))
        rows.append((group.title, str(group.n), mean, std, interval, least, most, str(group.failed or "")))
    lines = [f"{sweep.groups[0].split} accuracy by setting", "", format_table(rows), ""]
    for trial in sweep.members:
        if trial.failed is not None:
            lines.append(f"failed: {trial.title}, seed {trial.seed}: {trial.failed}")
    best = sweep.result.best
    if best is not None:
        test = best.test
        spread = "" if test.std is None else f" ± {test.std:.4f} (std)"
        lines.append(f"best: {best.title}: test accuracy {test.mean:.4f}{spread}, n = {test.n}")
    for comparison in sweep.result.comparisons:
        differences = {"accuracy": comparison, "loss": comparison.loss}
        shown = [f"{name} {difference(values)}" for name, values in differences.items() if values and values.n > 1]
        if shown:
            lines.append(f"{comparison.title} − {comparison.reference}, same seeds: {', '.join(shown)}")
    lines.append(f"{sweep.result.replica_steps_per_second:,.0f} steps/s, all trials together")
    return "\n".join(lines)


def difference(values: Difference) -> str:
    """Return "-0.0012 [-0.0020, -0.0004] (p = 0.02)"."""
    interval = "" if values.ci95 is None else " [{:+.4f}, {:+.4f}]".format(*values.ci95)
    p_value = "" if values.p_value is None else f" (p = {values.p_value:.2g})"
    return f"{values.mean:+.4f}{interval}{p_value}"


def ensemble_report(ensemble: Ensemble) -> str:
    """Return a table of the scores of the members and of the ensemble."""
    names = list(ensemble.together.scores)
    rows: list[tuple[str, ...]] = [(ensemble.setting, *map(metric_title, names))]
    summaries = [summarise([member.scores[name] for member in ensemble.members]) for name in names]
    for statistic in ("mean", "std", "min", "max"):
        rows.append((f"members, {statistic}", *(decimals(getattr(summary, statistic)) for summary in summaries)))
    rows.append((f"ensemble of {len(ensemble.members)}", *map(decimals, ensemble.together.scores.values())))
    return f"{format_table(rows)}\n{ensemble.together.count} images; the ensemble makes {mistakes(ensemble.together)}"
