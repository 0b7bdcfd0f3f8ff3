"""The objective that training minimises, and which predictions are correct."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flaxmnist import config, fields


def cross_entropy(
    objective: config.Objective, logits: Float[Array, "b classes"], labels: Int[Array, " b"]
) -> Float[Array, " b"]:
    """Return the cross-entropy of each image, in nats.

    ``form="logits"`` is log Σ exp(logits) − Σ y·logits, which never overflows. ``form="probabilities"`` is
    −Σ y·log(softmax(logits)), the formula as written, for comparison: infinity or NaN if a probability rounds to 0.
    One-hot targets may be smoothed (Szegedy et al. 2016).
    """
    if objective.labels == "integer":
        label_logits = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
        return jax.nn.logsumexp(logits, axis=1) - label_logits
    targets = jax.nn.one_hot(labels, logits.shape[1])
    targets = (1 - objective.label_smoothing) * targets + objective.label_smoothing / logits.shape[1]
    if objective.form == "logits":
        return jax.nn.logsumexp(logits, axis=1) - jnp.sum(targets * logits, axis=1)
    return -jnp.sum(targets * jnp.log(jax.nn.softmax(logits)), axis=1)


def focal(
    logits: Float[Array, "b classes"], labels: Int[Array, " b"], gamma: float | Float[Array, ""]
) -> Float[Array, " b"]:
    """Return the focal loss of each image: cross-entropy · (1 − p)^gamma, with the probability p of its label."""
    losses = cross_entropy(config.Objective(), logits, labels)
    # 1 − p without cancellation; at least the smallest float, because the gradient of 0^gamma may be infinite.
    return losses * jnp.maximum(-jnp.expm1(-losses), jnp.finfo(logits.dtype).tiny) ** gamma


def is_cross_entropy(objective: config.Loss) -> bool:
    """Return True if ``objective`` is the cross-entropy that evaluations report. A traced smoothing counts as some."""
    return isinstance(objective, config.Objective) and fields.is_zero(objective.label_smoothing)


def correct(logits: Float[Array, "b classes"], labels: Int[Array, " b"]) -> Bool[Array, " b"]:
    """Return True for each image whose largest logit is that of its label."""
    return jnp.argmax(logits, axis=1) == labels
