"""Optax optimizers and schedules from a config.

Its numbers may be traced in a sweep; ``fields.is_zero`` compares them.
"""

from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers

from flaxmnist import config, fields

# Root mean square of a Muon update at rate 1 for any matrix shape: about that of Adam, so that the same rates suit both
# (Liu et al. 2025, "Muon is scalable for LLM training").
MUON_RMS = 0.2


def matrix_axes(params: Any) -> Any:
    """Return the input and output axes of each parameter; None for vectors, which Muon leaves to Nadam."""
    by_ndim = {2: MuonDimensionNumbers(1, 0), 4: MuonDimensionNumbers((0, 1, 2), 3)}
    return jax.tree.map(lambda leaf: by_ndim.get(leaf.ndim), params)


def schedule(optimizer: config.Optimizer, updates: int) -> optax.Schedule:
    """Return the learning rate as a function of the number of updates done, for a run of ``updates``."""
    rate = optimizer.learning_rate
    match optimizer.schedule:
        case config.Flat():
            return optax.constant_schedule(rate)
        case config.Cosine(warmup_steps=warmup, end=end):
            decay = optax.cosine_decay_schedule(rate, max(1, updates - warmup), alpha=end)
            return optax.join_schedules([optax.linear_schedule(0, rate, warmup), decay], [warmup]) if warmup else decay
        case config.OneCycle(peak=peak, start_divisor=start, end_divisor=end):
            # Optax divides the first rate, not the full rate, by its final_div_factor.
            return optax.cosine_onecycle_schedule(max(1, updates), rate, peak, start, end / start)
        case config.Exponential(decay=decay, every=every):
            return optax.exponential_decay(rate, every, decay)


def make_optimizer(optimizer: config.Optimizer, updates: int) -> optax.GradientTransformation:
    """Return the transformation that ``optimizer`` describes, for a run of ``updates`` updates.

    It averages the gradients of ``accumulate`` batches, clips by global norm, and applies the optimizer.
    """
    rate = optimizer.learning_rate if isinstance(optimizer.schedule, config.Flat) else schedule(optimizer, updates)
    match optimizer:
        case config.SGD(momentum=momentum, nesterov=nesterov):
            update = optax.sgd(rate, None if fields.is_zero(momentum) else momentum, nesterov)
        case config.Adam(b1=b1, b2=b2, eps=eps, weight_decay=decay):
            no_decay = fields.is_zero(decay)
            update = optax.adam(rate, b1, b2, eps) if no_decay else optax.adamw(rate, b1, b2, eps, weight_decay=decay)
        case config.Muon(momentum=momentum, newton_schulz_steps=iterations):
            update = optax.contrib.muon(
                rate,
                ns_steps=iterations,
                beta=momentum,
                preconditioning="aol",
                muon_weight_dimension_numbers=matrix_axes,
                consistent_rms=MUON_RMS,
            )
    if optimizer.clip_norm is not None:
        update = optax.chain(optax.clip_by_global_norm(optimizer.clip_norm), update)
    if optimizer.accumulate > 1:
        update = optax.MultiSteps(update, optimizer.accumulate).gradient_transformation()
    return update
