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


def find_kernels(module: nnx.Module) -> dict[Path, Kernel]:
    """Return the known kernels of ``module`` by the names and indices that lead to them."""
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
    return kernels


def map_kernels(function: Any, tree: Any, kernels: dict[Path, Kernel]) -> Any:
    """Return ``function(leaf, kernel)`` of each leaf of a state; None stands for a leaf that belongs to no kernel.

    The optimizer has its own arrays for a kernel, under other names that end in those of the kernel.
    """

    def call(path: Any, leaf: Any) -> Any:
        names = tuple(getattr(key, "key", getattr(key, "idx", getattr(key, "name", None))) for key in path)
        found = (kernel for name, kernel in kernels.items() if names[-len(name) :] == name)
        return function(leaf, next(found, None))

    return jax.tree_util.tree_map_with_path(call, tree)
