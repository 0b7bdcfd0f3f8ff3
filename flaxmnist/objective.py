"""What is minimised and what is counted."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flaxmnist import config


def cross_entropy(
    objective: config.Objective, logits: Float[Array, "b classes"], labels: Int[Array, " b"]
) -> Float[Array, " b"]:
    """The cross-entropy of each example, in nats.

    ``form="logits"`` is log Σ exp(logits) − Σ y·logits, which never overflows. ``form="probabilities"`` is
    −Σ y·log(softmax(logits)) as the formula is written: where a probability rounds to 0 it gives infinity or NaN.
    It is kept for comparison. One-hot targets may be smoothed (Szegedy et al. 2016).
    """
    if objective.labels == "integer":
        chosen = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
        return jax.nn.logsumexp(logits, axis=1) - chosen
    targets = jax.nn.one_hot(labels, logits.shape[1])
    targets = (1 - objective.label_smoothing) * targets + objective.label_smoothing / logits.shape[1]
    if objective.form == "logits":
        return jax.nn.logsumexp(logits, axis=1) - jnp.sum(targets * logits, axis=1)
    return -jnp.sum(targets * jnp.log(jax.nn.softmax(logits)), axis=1)


def correct(logits: Float[Array, "b classes"], labels: Int[Array, " b"]) -> Bool[Array, " b"]:
    """Whether the largest logit is the label's."""
    return jnp.argmax(logits, axis=1) == labels
