"""A Flax module as its static structure and its arrays, which a training step takes apart and puts together.

The arrays are parameters, buffers (all other state, such as batch statistics) and random keys. Keys are not kept: each
step makes new ones, so that nothing random has to be carried or saved.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import unflatten_dict
from jax.core import Tracer
from jaxtyping import Array, Int, PRNGKeyArray

Path = tuple[Any, ...]  # names and indices from the module to an array


def no_key() -> PRNGKeyArray:
    """Return a key for a model in evaluation mode, which does not use it, without compiling a program."""
    return jax.random.wrap_key_data(jnp.asarray(np.zeros(2, np.uint32)))


class BatchKey(nnx.RngKey):
    """A key whose random numbers cover the full batch; a device with a shard of it uses its slice of them."""


@jax.tree_util.register_static
@dataclass(frozen=True)
class Definition:
    """The static structure of a module."""

    graphdef: nnx.GraphDef
    keys: tuple[Path, ...]  # of all random keys
    batch_keys: frozenset[Path]  # those that are a BatchKey
    counts: tuple[Path, ...]  # of the counters of random streams

    def merge(
        self, params: Any, buffers: Any, key: PRNGKeyArray | None = None, shard: int | Int[Array, ""] = 0
    ) -> nnx.Module:
        """Return the module with these arrays, given as nested dicts, and random keys derived from ``key``, if any.

        The keys of different layers differ, and those of different shards unless they are a BatchKey.
        """
        random = {path: jnp.uint32(0) for path in self.counts}
        for index, path in enumerate(self.keys):
            if key is None:
                random[path] = no_key()
            elif path in self.batch_keys:
                random[path] = jax.random.fold_in(key, index)
            else:
                random[path] = jax.random.fold_in(jax.random.fold_in(key, index), shard)
        return nnx.merge(self.graphdef, params, buffers, unflatten_dict(random))


def split(module: nnx.Module) -> tuple[Definition, Any, Any]:
    """Return the definition of ``module``, and its parameters and buffers as nested dicts."""
    for _, child in nnx.iter_modules(module):
        for name, value in vars(child).items():
            # Flax takes an array that a traced function makes for a static attribute.
            if isinstance(value, Tracer):
                setattr(child, name, nnx.data(value))
    graphdef, params, random, buffers = nnx.split(module, nnx.Param, nnx.RngState, ...)
    variables = nnx.to_flat_state(random)
    definition = Definition(
        graphdef=graphdef,
        keys=tuple(path for path, variable in variables if isinstance(variable, nnx.RngKey)),
        batch_keys=frozenset(path for path, variable in variables if isinstance(variable, BatchKey)),
        counts=tuple(path for path, variable in variables if isinstance(variable, nnx.RngCount)),
    )
    return definition, nnx.to_pure_dict(params), nnx.to_pure_dict(buffers)
