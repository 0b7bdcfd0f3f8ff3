"""Sharpness-aware minimisation (Foret et al. 2021): the gradient at the worst weights within a small distance."""

from dataclasses import replace

import jax
import optax

import flaxmnist as fm

RADIUS = 0.05
config = replace(fm.load_experiment("quickstart"), name="sam")


def step(config, state, batch, arrays, *, axis_name=None):
    uphill = fm.gradient(config, state, state.params, batch, axis_name=axis_name).params
    scale = RADIUS / optax.tree.norm(uphill)
    worst = jax.tree.map(lambda weight, change: weight + scale * change, state.params, uphill)
    return fm.update(config, state, fm.gradient(config, state, worst, batch, axis_name=axis_name))
