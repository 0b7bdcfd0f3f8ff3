"""A page to draw digits on, which a model in it reads: one HTML file that needs no network."""

import base64
import html
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flaxmnist.config import Config
from flaxmnist.core.trace import Node, Operation, trace
from flaxmnist.errors import UserError, check_local
from flaxmnist.show import pages
from flaxmnist.store.files import write_file
from flaxmnist.store.load import load_run
from flaxmnist.store.provenance import DataInfo
from flaxmnist.sweeps.ensembles import load_committee

MAX_BYTES = 8_000_000  # of a page, unless a larger one is asked for

ERASED = "Small blocks of the drawing are erased, one at a time: how much do the log-odds of the class fall?"
WEIGHTS = "These are the weights of the class, stronger where a pixel has a larger value."


def write(
    workdir: Path, folder: Path, step: str = "latest", config: Config | None = None, *, large: bool = False
) -> Path:
    """Write ``draw.html`` to ``folder`` for a checkpoint of a run, or for all trials of a sweep's best setting.

    Return its path. For ``step`` and ``config`` see ``load_run``. Raise UserError as ``draw_page`` does, or if
    ``workdir`` is damaged or ``folder`` cannot be written to.
    """
    check_local(folder)
    if os.path.exists(workdir / "sweep.json"):
        setting, _, data, models = load_committee(workdir, config=config)
        title, facts = setting.title, f"The mean of {len(models)} networks."
    else:
        run = load_run(workdir, step, config=config)
        title, data, models, result = run.config.name, run.data, [run.model], run.result
        facts = f"Step {int(run.state.step):,}."
        if result is not None:
            facts += f" {100 * result.test_accuracy:.2f} % of {result.test_count:,} test images are read correctly."
    page = draw_page(models, data, title, facts, large=large)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / "draw.html", page.encode())
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}; pass another --out") from None
    return folder / "draw.html"


def draw_page(models: Sequence[nnx.Module], data: DataInfo, title: str, facts: str, *, large: bool = False) -> str:
    """Return the page for a model, or for a committee of models of the same kind, which is read by all together.

    Raise UserError if the models have an operation or images that a page does not support, or if the page has over
    MAX_BYTES bytes and is not to be ``large``.
    """
    if data.shape[2] not in (1, 3):
        raise UserError(f"a drawing has 1 or 3 channels, but the model needs {data.shape[2]}")
    traces = [trace(model, data.shape) for model in models]
    model = {
        "shape": data.shape,
        "names": data.class_names,
        "nodes": [describe(node) for node in traces[0]],
        "layers": layers(traces[0]),
        "members": [encode([node for node in nodes if isinstance(node, np.ndarray)]) for nodes in traces],
        "weights": encode([weights(models[0], data)]) if is_linear(traces[0]) and len(models) == 1 else None,
    }
    page = pages.fill(
        "draw",
        f"{title}: draw a digit",
        title,
        facts=html.escape(facts),
        evidence=WEIGHTS if model["weights"] else ERASED,
        model=pages.to_script(model),
        libraries="\n".join(map(pages.read, ("interpreter.js", "digit.js", "photo.js"))),
    )
    if len(page) > MAX_BYTES and not large:
        raise UserError(f"the page would have {len(page) / 1e6:.0f} MB: pass --large to write it")
    return page


def is_linear(nodes: list[Node]) -> bool:
    """Return True if the logits are sums of the pixels with constant weights, and perhaps a constant."""
    for node in nodes:
        if isinstance(node, Operation):
            variable = [isinstance(nodes[index], Operation) for index in node.inputs]
            match node.name:
                case "mul" | "dot_general" if sum(variable) <= 1:
                    pass
                case "div" if not variable[1]:
                    pass
                case "images" | "convert_element_type" | "reshape" | "transpose" | "add" | "sub":
                    pass
                case _:
                    return False
    return True


def describe(node: Node) -> dict[str, Any]:
    """Return a node as JSON; the values of constants are stored elsewhere."""
    return node._asdict() if isinstance(node, Operation) else {"shape": node.shape}


def encode(arrays: Sequence[np.ndarray]) -> str:
    """Return the values of arrays, one after another, as float32 in base64."""
    return base64.b64encode(b"".join(np.asarray(array, "<f4").tobytes() for array in arrays)).decode()


def weights(model: nnx.Module, data: DataInfo) -> np.ndarray:
    """Return the weights of a linear model, [classes, h, w, c]."""
    jacobian = jax.jacobian(lambda image: model(image[None])[0])  # pyright: ignore[reportCallIssue]
    return np.asarray(jacobian(jnp.zeros(data.shape)))


def layers(nodes: list[Node]) -> list[int]:
    """Return the nodes that show what a model computes: whatever a layer with weights gets from those before it."""
    deep, shown = set(), []
    for index, node in enumerate(nodes):
        if isinstance(node, Operation):
            weighted = node.name in ("conv_general_dilated", "dot_general")
            if weighted and node.inputs[0] in deep:
                shown.append(unflattened(nodes, node.inputs[0]))
            if weighted or deep & set(node.inputs):
                deep.add(index)
    return list(dict.fromkeys(shown))


def unflattened(nodes: list[Node], index: int) -> int:
    """Return the node whose feature maps node ``index`` has in a row, or ``index`` if it is no such row."""
    node = nodes[index]
    while isinstance(node, Operation) and node.name == "reshape" and len(node.shape) == 2:
        index = node.inputs[0]
        node = nodes[index]
    return index
