"""Distillation of a committee, the sweep in runs/committee: its mean probabilities are the targets of one network."""

from dataclasses import replace

import jax
import jax.numpy as jnp

import flaxmnist as fm

COMMITTEE = "runs/committee"
config = replace(fm.load_experiment("flagship"), name="committee")


def arrays(config, data):
    return jax.tree.map(lambda *weights: jnp.stack(weights), *fm.load_members(COMMITTEE, config=config))


def step(config, state, batch, committee, *, axis_name=None):
    images = fm.augmented_images(config, batch.images, state.step, axis_name=axis_name)
    targets = jax.lax.map(lambda member: jax.nn.softmax(member(images)), committee).mean(0)
    options = {"losses": lambda logits, batch: -(targets * jax.nn.log_softmax(logits)).sum(1), "images": images}
    return fm.update(config, state, fm.gradient(config, state, state.params, batch, axis_name=axis_name, **options))
