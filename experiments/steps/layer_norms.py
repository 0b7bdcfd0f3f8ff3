"""Record the norm of the gradient of each layer, in metrics.jsonl, TensorBoard and the report."""

from dataclasses import replace

import optax

import flaxmnist as fm

config = replace(fm.load_experiment("quickstart"), name="layer_norms")


def step(config, state, batch, arrays, *, axis_name=None):
    gradient = fm.gradient(config, state, state.params, batch, axis_name=axis_name)
    norms = {f"gradient_norm/{layer}": optax.tree.norm(values) for layer, values in gradient.params.items()}
    return fm.update(config, state, gradient._replace(extra=gradient.extra | norms))
