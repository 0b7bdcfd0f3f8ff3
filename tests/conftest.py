"""Setup for all tests: eight CPU devices, no silent rank promotion, and shared fixtures and helpers."""

import importlib.util
import itertools
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

os.environ["JAX_NUM_CPU_DEVICES"] = "8"

import jax
import numpy as np
import pytest

from flaxmnist.config import CNN, MLP, SGD, Config, Data, Softmax, Train
from flaxmnist.data.sets import Dataset, Split, load_data

jax.config.update("jax_numpy_rank_promotion", "raise")

ROOT = Path(__file__).parent.parent

MODELS = {
    "softmax": Softmax(),
    "mlp": MLP(hidden=(32,)),
    "cnn": CNN(features=(4, 8), kernel=(3,), dense=16),
}


@pytest.fixture
def getkey():
    """Return a function that returns a new key at every call, the same ones in every run of a test."""
    counter = itertools.count()
    return lambda: jax.random.key(next(counter))


@pytest.fixture(scope="session")
def digits() -> Dataset:
    return load_data("digits")


@pytest.fixture(scope="session")
def few(digits) -> Dataset:
    """The first 70 training, 30 validation and 45 test images of the digits."""
    sizes = {"train": 70, "validation": 30, "test": 45}
    splits = {name: Split(*(array[:size] for array in digits.splits()[name])) for name, size in sizes.items()}
    return replace(digits, **splits)


def small(model="softmax", *, optimizer=None, data=None, **train) -> Config:
    """Return a small experiment on the digits, by default of 20 steps with batches of 16."""
    train = {"batch_size": 16, "steps": 20, "log_every": 1} | train
    return Config(
        name="small",
        model=MODELS[model] if isinstance(model, str) else model,
        optimizer=optimizer or SGD(learning_rate=0.1),
        data=data or Data(name="digits"),
        train=Train(**train),
    )


def main(script: str) -> Callable[[list[str]], int]:
    """Return the main function of a command, which takes its arguments and returns the exit code."""
    name = f"launch_{script}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / f"launch/{script}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name].main


def assert_same(one, other) -> None:
    """Assert that two pytrees are bitwise identical."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=jax.tree_util.keystr(path))
