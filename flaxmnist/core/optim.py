"""Optax optimizers and schedules from a config.

Its numbers may be traced in a sweep; ``fields.is_zero`` compares them.
"""

from typing import Any

import jax
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Int
from optax.contrib import MuonDimensionNumbers

from flaxmnist import config, fields
from flaxmnist.core.kernels import Kernels, map_kernels
from flaxmnist.errors import UserError

# Root mean square of a Muon update at rate 1 for any matrix shape: about that of Adam, so that the same rates suit both
# (Liu et al. 2025, "Muon is scalable for LLM training").
MUON_RMS = 0.2


def make_schedule(schedule: config.BuiltInSchedule, rate: ArrayLike, updates: int) -> optax.Schedule:
    """Return the learning rate as a function of the number of updates done, for a run of ``updates``."""
    match schedule:
        case config.Flat():
            return optax.constant_schedule(rate)
        case config.Cosine(warmup_steps=warmup, end=end):
            if warmup > updates:
                limit = f"is {warmup}, but the run has only {updates} updates"
                raise UserError(f"optimizer.schedule.warmup_steps {limit}: use a shorter warm-up or a longer run")
            decay = optax.cosine_decay_schedule(rate, max(1, updates - warmup), alpha=end)
            return optax.join_schedules([optax.linear_schedule(0, rate, warmup), decay], [warmup]) if warmup else decay
        case config.OneCycle(peak=peak, start_divisor=start, end_divisor=end):
            # Optax divides the first rate, not the full rate, by its final_div_factor.
            return optax.cosine_onecycle_schedule(max(1, updates), rate, peak, start, end / start)
        case config.Exponential(decay=decay, every=every):
            return optax.exponential_decay(rate, every, decay)
        case config.WarmupStableDecay(warmup=warmup, decay=decay, end=end):
            if warmup + decay > 1:
                raise UserError(
                    f"optimizer.schedule: warmup {warmup} and decay {decay} are more than the run: make them shorter"
                )
            rise, fall = round(warmup * updates), updates - round(decay * updates)
            up, down = optax.linear_schedule(0, rate, rise), optax.linear_schedule(rate, end * rate, updates - fall)
            return optax.join_schedules([up, optax.constant_schedule(rate), down], [rise, max(rise, fall)])
    raise TypeError(f"{schedule} has no schedule")


def schedule_counts(opt_state: optax.OptState) -> list[Int[Array, ""]]:
    """Return the number of updates done, as each schedule in the state of an optimizer counts them."""
    counts = optax.tree.get_all_with_path(opt_state, "count")
    return [count for path, count in counts if getattr(path[-1], "tuple_name", None) == "ScaleByScheduleState"]


def is_matrix(params: Any) -> Any:
    """Return True for each parameter that is no bias and no scale. The biases of attention have two axes."""

    def decays(path: Any, leaf: Any) -> bool:
        return leaf.ndim > 1 and getattr(path[-1], "key", None) != "bias"

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(optimizer: config.BaseOptimizer, updates: int, kernels: Kernels) -> optax.GradientTransformation:
    """Return the transformation that ``optimizer`` describes, for ``updates`` of a model with ``kernels``.

    It averages the gradients of ``accumulate`` batches, clips by global norm, and applies the optimizer.
    """
    rate = optimizer.learning_rate
    rate = rate if isinstance(optimizer.schedule, config.Flat) else optimizer.schedule.make(rate, updates)
    match optimizer:
        case config.SGD(momentum=momentum, nesterov=nesterov):
            update = optax.sgd(rate, None if fields.is_zero(momentum) else momentum, nesterov)
        case config.Adam(b1=b1, b2=b2, eps=eps, weight_decay=decay, decay_vectors=all_decay):
            mask = None if all_decay else is_matrix
            adamw = optax.adamw(rate, b1, b2, eps, weight_decay=decay, mask=mask)
            update = optax.adam(rate, b1, b2, eps) if fields.is_zero(decay) else adamw
        case config.Lion(b1=b1, b2=b2, weight_decay=decay, decay_vectors=all_decay):
            update = optax.lion(rate, b1, b2, weight_decay=decay, mask=None if all_decay else is_matrix)
        case config.Muon(momentum=momentum, newton_schulz_steps=iterations):

            def matrix_axes(params: Any) -> Any:
                return map_kernels(lambda _, kernel: kernel and MuonDimensionNumbers(*kernel[:2]), params, kernels)

            update = optax.contrib.muon(
                rate,
                ns_steps=iterations,
                beta=momentum,
                preconditioning="aol",
                muon_weight_dimension_numbers=matrix_axes,
                consistent_rms=MUON_RMS,
            )
        case _:
            raise TypeError(f"{optimizer} has no optimizer")
    if optimizer.clip_norm is not None:
        update = optax.chain(optax.clip_by_global_norm(optimizer.clip_norm), update)
    if optimizer.accumulate > 1:
        update = optax.MultiSteps(update, optimizer.accumulate).gradient_transformation()
    return update
