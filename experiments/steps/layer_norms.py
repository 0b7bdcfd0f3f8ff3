"""Record the norm of the gradient of each layer, in metrics.jsonl, TensorBoard and the report."""

from dataclasses import replace

import optax
from jax.tree_util import keystr, tree_leaves_with_path

import flaxmnist as fm

config = replace(fm.load_experiment("quickstart"), name="layer_norms")


def step(config, state, batch, arrays, *, axis_name=None):
    gradient = fm.gradient(config, state, state.params, batch, axis_name=axis_name)
    layers = {}
    for path, leaf in tree_leaves_with_path(gradient.params):
        layers.setdefault(keystr(path[:-1], simple=True, separator="."), []).append(leaf)
    norms = {f"gradient_norm/{layer}": optax.tree.norm(leaves) for layer, leaves in layers.items()}
    return fm.update(config, state, gradient._replace(extra=gradient.extra | norms))
