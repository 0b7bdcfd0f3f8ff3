"""Optax from config."""

from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers

from flaxmnist import config, fields

# Root mean square of an update by Muon at rate 1, whatever the matrix: about that of Adam, so that one rate serves both
# (Liu et al. 2025, "Muon is scalable for LLM training").
MUON_RMS = 0.2


def sides(params: Any) -> Any:
    """Which axes of each parameter are a matrix's inputs and outputs; None for a vector, which Muon leaves to Nadam."""
    kinds = {2: MuonDimensionNumbers(1, 0), 4: MuonDimensionNumbers((0, 1, 2), 3)}
    return jax.tree.map(lambda leaf: kinds.get(leaf.ndim), params)


def schedule(optimizer: config.Optimizer, updates: int) -> optax.Schedule:
    """The learning rate as a function of the number of updates done, over a run of ``updates``."""
    rate = optimizer.learning_rate
    match optimizer.schedule:
        case config.Flat():
            return optax.constant_schedule(rate)
        case config.Cosine(warmup_steps=warmup, end=end):
            decay = optax.cosine_decay_schedule(rate, max(1, updates - warmup), alpha=end)
            return optax.join_schedules([optax.linear_schedule(0, rate, warmup), decay], [warmup]) if warmup else decay
        case config.OneCycle(peak=peak, start_divisor=start, end_divisor=end):
            # Optax divides the first rate, not the peak, by its final_div_factor.
            return optax.cosine_onecycle_schedule(max(1, updates), rate, peak, start, end / start)
        case config.Exponential(decay=decay, every=every):
            return optax.exponential_decay(rate, every, decay)


def make_optimizer(optimizer: config.Optimizer, updates: int) -> optax.GradientTransformation:
    """The transformation that ``optimizer`` describes, for a run of ``updates`` updates.

    In order: clipping by global norm, SGD or Adam with its schedule; the whole on the mean of the gradients of
    ``accumulate`` batches, where that is more than one.
    """
    rate = optimizer.learning_rate if isinstance(optimizer.schedule, config.Flat) else schedule(optimizer, updates)
    match optimizer:
        case config.SGD(momentum=momentum, nesterov=nesterov):
            update = optax.sgd(rate, None if fields.is_off(momentum) else momentum, nesterov)
        case config.Adam(b1=b1, b2=b2, eps=eps, weight_decay=decay):
            plain = fields.is_off(decay)
            update = optax.adam(rate, b1, b2, eps) if plain else optax.adamw(rate, b1, b2, eps, weight_decay=decay)
        case config.Muon(momentum=momentum, newton_schulz_steps=count):
            update = optax.contrib.muon(
                rate,
                ns_steps=count,
                beta=momentum,
                preconditioning="aol",
                muon_weight_dimension_numbers=sides,
                consistent_rms=MUON_RMS,
            )
    if optimizer.clip_norm is not None:
        update = optax.chain(optax.clip_by_global_norm(optimizer.clip_norm), update)
    if optimizer.accumulate > 1:
        update = optax.MultiSteps(update, optimizer.accumulate).gradient_transformation()
    return update
