"""Text output: an experiment before training, the scores of a model, and single predictions."""

import itertools
import json
import math
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, UInt8

from flaxmnist import fields, order, steps
from flaxmnist.config import Config
from flaxmnist.data import Dataset
from flaxmnist.evaluation import Evaluation


class StepCost(NamedTuple):
    """The cost of one training step."""

    operations: float  # floating-point operations
    bytes: int  # temporary memory, in addition to state and images


def step_cost(config: Config, data: Dataset) -> StepCost:
    """Return XLA's cost estimate for one step of ``config``, whose length must be in steps."""
    shape = data.train.images.shape[1:3]
    state = jax.eval_shape(partial(steps.create_state, config, shape, data.classes))
    indices = jax.ShapeDtypeStruct((config.train.batch_size,), np.int32)
    batch = jax.eval_shape(steps.take_batch, *data.train, indices)
    lowered = jax.jit(partial(steps.train_step, config), donate_argnums=0).lower(state, batch)
    memory = lowered.compile().memory_analysis()
    operations = (lowered.cost_analysis() or {}).get("flops", math.nan)
    return StepCost(operations, 0 if memory is None else memory.temp_size_in_bytes)


def describe_experiment(config: Config, data: Dataset) -> str:
    """Return the resolved config, the parameters, the operations per step, and the memory that training needs."""
    config = order.resolve_length(config, len(data.train.labels))
    state = jax.eval_shape(partial(steps.create_state, config, data.train.images.shape[1:3], data.classes))
    cost = step_cost(config, data)
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
