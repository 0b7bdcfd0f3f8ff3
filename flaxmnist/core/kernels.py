"""The kernels of a module and the meaning of their axes, by the type of their layer.

Muon and model parallelism need it. Parameters of unknown layers are none of these kernels.
"""

from typing import Any, NamedTuple

import jax
from flax import nnx

from flaxmnist.core import layers
from flaxmnist.core.definition import Path


class Kernel(NamedTuple):
    """The axes of a kernel."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    dense: bool  # not a convolution


# For each parameter of a module, by the path to it: what kernel it is, None if it is not a known one.
Kernels = dict[Path, Kernel | None]


def find_kernels(module: nnx.Module) -> Kernels:
    """Return the kernels of ``module``."""
    kernels = {}
    for path, layer in nnx.iter_modules(module):
        match layer:
            case layers.Dense():
                kernel = Kernel((1,), (0,), dense=True)
            case nnx.Linear():
                kernel = Kernel((0,), (1,), dense=True)
            case nnx.LinearGeneral() if not layer.batch_axis:  # also those of nnx.MultiHeadAttention
                axes = tuple(range(len(layer.kernel.shape)))
                inputs = len(layer.in_features)
                kernel = Kernel(axes[:inputs], axes[inputs:], dense=True)
            case layers.Conv() | nnx.Conv() if len(layer.kernel.shape) == 4:
                kernel = Kernel((0, 1, 2), (3,), dense=False)
            case _:
                continue
        kernels[(*path, "kernel")] = kernel
    return {path: kernels.get(path) for path, _ in nnx.to_flat_state(nnx.state(module, nnx.Param))}


def map_kernels(function: Any, tree: Any, kernels: Kernels) -> Any:
    """Return ``function(leaf, kernel)`` of each leaf of a state; None stands for a leaf that belongs to no kernel.

    The optimizer has its own arrays for a parameter, under paths that end in that of the parameter.
    """

    def call(path: Any, leaf: Any) -> Any:
        names = tuple(getattr(key, "key", getattr(key, "idx", getattr(key, "name", None))) for key in path)
        ends = [names[start:] for start in range(len(names))]  # the longest first: "out" may be a layer of "stem" too
        return function(leaf, next((kernels[end] for end in ends if end in kernels), None))

    return jax.tree_util.tree_map_with_path(call, tree)
