"""One network of the flagship's size, distilled from a committee: trained on its probabilities for distorted images.

python launch/sweep.py experiments/flagship.py --seeds 5 --workdir runs/committee
python launch/train.py experiments/distilled.py
"""

from dataclasses import replace

import jax
import jax.numpy as jnp

import flaxmnist as fm

COMMITTEE = "runs/committee"  # folder of the sweep
config = replace(fm.load_experiment("flagship"), name="distilled")


def arrays(config, data):
    """Return the models of the committee, with a first axis for the members."""
    return jax.tree.map(lambda *weights: jnp.stack(weights), *fm.load_members(COMMITTEE, config=config))


def step(config, state, batch, committee, *, axis_name=None):
    """Train on the mean probabilities of the committee for the images that the network sees."""
    images = fm.augmented_images(config, batch.images, state.step, axis_name=axis_name)
    targets = jax.lax.map(lambda member: jax.nn.softmax(member(images)), committee).mean(0)

    def losses(logits, batch):
        return -(targets * jax.nn.log_softmax(logits)).sum(1)

    options = {"images": images, "losses": losses, "axis_name": axis_name}
    return fm.update(config, state, fm.gradient(config, state, state.params, batch, **options))
