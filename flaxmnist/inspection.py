"""What an experiment is made of and how a model did, as text."""

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
    """What a training step takes."""

    operations: float  # floating-point operations
    bytes: int  # memory for its intermediate values, beside state and images


def step_cost(config: Config, data: Dataset) -> StepCost:
    """What XLA counts of one step of ``config``, whose length must be in steps."""
    shape = data.train.images.shape[1:3]
    state = jax.eval_shape(partial(steps.create_state, config, shape, data.classes))
    indices = jax.ShapeDtypeStruct((config.train.batch_size,), np.int32)
    batch = jax.eval_shape(steps.take_batch, *data.train, indices)
    lowered = jax.jit(partial(steps.train_step, config), donate_argnums=0).lower(state, batch)
    memory = lowered.compile().memory_analysis()
    operations = (lowered.cost_analysis() or {}).get("flops", math.nan)
    return StepCost(operations, 0 if memory is None else memory.temp_size_in_bytes)


def describe(config: Config, data: Dataset) -> str:
    """The resolved config, the parameters, the operations of a step, and the memory that training needs."""
    config = order.resolve(config, len(data.train.labels))
    state = jax.eval_shape(partial(steps.create_state, config, data.train.images.shape[1:3], data.classes))
    cost = step_cost(config, data)
    held = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    images = data.train.images.nbytes + data.train.labels.nbytes
    return "\n".join(
        [
            json.dumps(fields.to_json(config), indent=2),
            "",
            parameter_table(state.params),
            "",
            f"steps                {config.train.steps:,} of {config.train.batch_size} images",
            f"operations a step    {cost.operations / 1e9:.4g} GFLOP",
            f"memory               {megabytes(held + images + cost.bytes)}: state {megabytes(held)}, "
            f"training images {megabytes(images)}, a step's own {megabytes(cost.bytes)}",
        ]
    )


def parameter_table(params) -> str:
    """Each parameter's path, shape, count and bytes, and their sum."""
    rows = [("parameter", "shape", "count", "bytes")]
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        count = math.prod(leaf.shape)
        total += count
        name, sides = jax.tree_util.keystr(path, simple=True, separator="."), "×".join(map(str, leaf.shape))
        rows.append((name, sides, f"{count:,}", f"{4 * count:,}"))
    rows.append(("all", "", f"{total:,}", f"{4 * total:,}"))
    return table(rows)


def class_report(seen: Evaluation) -> str:
    """Loss, accuracy, the scores of each class, and the confusion matrix."""
    matrix = [("true \\ read", *map(str, range(len(seen.confusion))))]
    matrix += [(str(number), *map(str, row)) for number, row in enumerate(seen.confusion)]
    head = f"accuracy {seen.accuracy:.4f}, loss {seen.loss:.4f}, {seen.count} images"
    return "\n".join([head, "", class_scores(seen), "", table(matrix)])


def class_scores(seen: Evaluation) -> str:
    """Precision, recall and F1 of each class."""
    from sklearn.metrics import precision_recall_fscore_support

    classes = len(seen.confusion)
    truth, answers = np.divmod(np.arange(classes**2), classes)
    weights, never = seen.confusion.reshape(-1), 0.0  # the score of a class that never is, or is never answered
    scores = np.array(precision_recall_fscore_support(truth, answers, sample_weight=weights, zero_division=never))  # pyright: ignore[reportArgumentType]
    rows = [("class", "precision", "recall", "F1", "images")]
    for number, (precision, recall, f1, count) in enumerate(scores.T):
        rows.append((str(number), f"{precision:.4f}", f"{recall:.4f}", f"{f1:.4f}", f"{count:.0f}"))
    return table(rows)


def answer(name: str, image: UInt8[np.ndarray, "h w 1"], probabilities: Float[np.ndarray, " classes"]) -> str:
    """An image as a model saw it, in shades, and beside it ``name`` and the ten likeliest classes."""
    height, width, _ = image.shape
    # A character is about twice as high as wide.
    rows = np.pad(image[:, :, 0], ((0, height % 2), (0, 0))).reshape(-1, 2, width).mean(axis=1)
    seen = ["".join(" ░▒▓█"[int(value * 5) // 256] for value in row) for row in rows]
    likely = sorted(np.argsort(-probabilities, kind="stable")[:10])
    told = [f"{name}: {probabilities.argmax()}", ""]
    told += [
        f"{number}  {probabilities[number]:.4f}  {'▪' * round(20 * float(probabilities[number]))}" for number in likely
    ]
    lines = itertools.zip_longest([f"│{row}│" for row in seen], told, fillvalue="")
    return "\n".join(f"{left:<{width + 2}}  {right}".rstrip() for left, right in lines)


def table(rows: list[tuple[str, ...]]) -> str:
    """Rows as aligned text: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"
