"""Kernels, and the axes of inputs and outputs that follow from the type of their layer."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small
from flax import nnx

import flaxmnist as fm
from flaxmnist.config import Muon
from flaxmnist.core import layers, steps
from flaxmnist.core.kernels import Kernel, find_kernels, map_kernels
from flaxmnist.devices import parallel


class Mixed(nnx.Module):
    """Layers of all kinds; images are summed to 28 numbers."""

    def __init__(self, classes, rngs):
        self.conv = nnx.Conv(1, 2, (3, 3), rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 28, decode=False, rngs=rngs)
        self.embedding = nnx.Embed(4, 28, rngs=rngs)
        self.ours = layers.Dense(28, 12, rngs=rngs)
        self.norm = nnx.LayerNorm(12, rngs=rngs)
        self.last = nnx.Linear(12, classes, rngs=rngs)

    def __call__(self, x):
        x = self.conv(x).sum((2, 3))[:, None]
        x = self.attention(x)[:, 0] + self.embedding(jnp.zeros(len(x), jnp.int32))
        return self.last(self.norm(self.ours(x)))


@dataclass(frozen=True)
class Model:
    def make(self, shape, classes, rngs):
        return Mixed(classes, rngs)


def test_axes_of_known_layers():
    heads = {("attention", name, "kernel"): Kernel((0,), (1, 2), dense=True) for name in ("query", "key", "value")}
    kernels = find_kernels(Mixed(10, nnx.Rngs(0)))
    assert {path: kernel for path, kernel in kernels.items() if kernel} == heads | {
        ("attention", "out", "kernel"): Kernel((0, 1), (2,), dense=True),
        ("conv", "kernel"): Kernel((0, 1, 2), (3,), dense=False),
        ("ours", "kernel"): Kernel((1,), (0,), dense=True),
        ("last", "kernel"): Kernel((0,), (1,), dense=True),
    }


def test_layers_of_equal_names_keep_their_own_axes():
    """Also as arrays of an optimizer, whose paths end in those of the parameters."""
    dense, conv = Kernel((0,), (1,), dense=True), Kernel((0, 1, 2), (3,), dense=False)
    kernels = {("out", "kernel"): dense, ("stem", "out", "kernel"): conv, ("own", "out", "kernel"): None}
    params = {"out": {"kernel": 0}, "stem": {"out": {"kernel": 1}}, "own": {"out": {"kernel": 2}}}
    expected = {"out": {"kernel": dense}, "stem": {"out": {"kernel": conv}}, "own": {"out": {"kernel": None}}}
    mapped = map_kernels(lambda _, kernel: kernel, {"mu": params, "count": 0}, kernels)
    assert mapped == {"mu": expected, "count": None}


def test_muon_orthogonalises_the_kernels_and_leaves_the_rest_to_nadam():
    """An embedding is a matrix, but not a kernel."""
    config = small(Model(), optimizer=Muon(learning_rate=0.1), steps=1)
    state = steps.state_shapes(config, (28, 28, 1), 10)
    moments = dict(state.opt_state.inner_states)
    trained = {name: len(jax.tree.leaves(inner.inner_state[0].mu)) for name, inner in moments.items()}
    assert trained == {"muon": 7, "adam": len(jax.tree.leaves(state.params)) - 7}


def test_model_parallelism_splits_outputs_if_they_divide_and_else_inputs():
    mesh = parallel.make_mesh(4, 4)
    state = steps.state_shapes(small(Model(), optimizer=Muon()), (28, 28, 1), 10)
    shardings = parallel.state_shardings(state, mesh).params
    rows, replicated = parallel.sharded(mesh, "model"), parallel.sharded(mesh)
    assert shardings["ours"]["kernel"] == rows and shardings["last"]["kernel"] == rows
    assert shardings["attention"]["query"]["kernel"] == rows, "two heads of 14 numbers do not divide"
    for layer, name in (("conv", "kernel"), ("embedding", "embedding"), ("ours", "bias"), ("last", "bias")):
        assert shardings[layer][name] == replicated


@pytest.mark.slow
def test_a_model_of_flax_layers_trains_in_parallel(few):
    config = small(Model(), steps=5)
    one, four = fm.fit(config, few, devices=1), fm.fit(config, few, devices=4, model_parallel=4)
    for a, b in zip(jax.tree.leaves(one.state.params), jax.tree.leaves(four.state.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
