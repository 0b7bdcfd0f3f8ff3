"""Distillation of a committee, the sweep in runs/committee: its members' probabilities are one network's targets."""

import jax
import jax.numpy as jnp

import flaxmnist as fm

COMMITTEE = "runs/committee"
config = fm.replace(fm.load_experiment("flagship"), "name", "committee")


def arrays(config, data):
    return jax.tree.map(lambda *weights: jnp.stack(weights), *fm.load_members(COMMITTEE, config=config))


def step(config, state, batch, committee, *, axis_name=None):
    # The gradient is linear in the targets, so a member in each step is on average their mean, at a fifth of the cost.
    member = jax.tree.map(lambda weights: weights[state.step % len(weights)], committee)
    images = fm.augmented_images(config, batch.images, state.step, axis_name=axis_name)
    targets = jax.nn.softmax(member(images))
    options = {"losses": lambda logits, batch: -(targets * jax.nn.log_softmax(logits)).sum(1), "images": images}
    return fm.update(config, state, fm.gradient(config, state, state.params, batch, axis_name=axis_name, **options))
