"""Setup for all tests: eight CPU devices, no silent rank promotion, and shared fixtures and helpers."""

import contextlib
import gc
import importlib
import json
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["JAX_NUM_CPU_DEVICES"] = "8"

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxmnist.config import SGD, CNNConfig, Config, Data, MLPConfig, SoftmaxConfig, Train
from flaxmnist.console import logger
from flaxmnist.data.sets import Dataset, Split, load_data
from flaxmnist.devices import evaluation, program
from flaxmnist.devices.evaluation import Evaluation
from flaxmnist.errors import Stopped, UserError
from flaxmnist.runs import fit
from flaxmnist.store.load import Run

jax.config.update("jax_numpy_rank_promotion", "raise")

# JAX keeps many objects; with Python's defaults, collecting garbage takes a tenth of the tests' time.
gc.freeze()
gc.set_threshold(100_000, 50, 50)

ROOT = Path(__file__).parent.parent

MODELS = {
    "softmax": SoftmaxConfig(),
    "mlp": MLPConfig(hidden=(32,)),
    "cnn": CNNConfig(features=(4, 8), kernel=(3,), dense=16),
}


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """Restore the logger, which commands configure."""
    handlers, propagate, level = logger.handlers, logger.propagate, logger.level
    yield
    logger.handlers, logger.propagate = handlers, propagate
    logger.setLevel(level)


@pytest.fixture
def normal() -> Callable[..., jax.Array]:
    """A function that draws an array of a shape. NumPy draws it, because JAX compiles half a second for each shape."""
    generator = np.random.default_rng(0)
    return lambda *shape: jnp.asarray(generator.standard_normal(shape, np.float32))


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


def fit_on_one(config: Config, data: Dataset, *arguments, **options) -> Run:
    """Train on one of the eight devices of the test process."""
    return fit(config, data, *arguments, devices=1, **options)


@pytest.fixture
def fit_until(monkeypatch) -> Callable[..., None]:
    """A function that trains in chunks of one step, with a signal in an evaluation that stops the run."""

    def fit_until(stop_at: int, config: Config, data: Dataset, folder: Path, **options) -> None:
        stop = threading.Event()
        with monkeypatch.context() as patch:
            patch.setattr(program, "MAX_STEPS", 1)
            hook = {"on_evaluation": lambda done, *_: stop.set() if done == stop_at - 1 else None}
            with pytest.raises(Stopped, match=rf"step {stop_at} of \d+; --resume continues"):
                fit_on_one(config, data, folder, stop=stop, **hook, **options)

    return fit_until


def evaluated(count: int, **scores: float) -> Evaluation:
    """Return an evaluation of ``count`` empty images of class 0, all predicted as 0, with these ``scores``."""
    images, labels, logits = np.zeros((count, 28, 28, 1), np.uint8), np.zeros(count, np.int32), np.zeros((count, 10))
    return replace(evaluation.score_logits(logits, images, labels), scores=scores)


def score(logits: np.ndarray, labels: np.ndarray) -> Evaluation:
    """Return the scores of logits for images that do not matter."""
    return evaluation.score_logits(logits, np.zeros((len(labels), 8, 8, 1), np.uint8), labels.astype(np.int32))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """Return the records of the run in ``folder``."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def slow(*values):
    """Return the parameters of a slow test."""
    return pytest.param(*values, marks=pytest.mark.slow)


def main(verb: str) -> Callable[[list[str]], int]:
    """Return the main function of a command, which takes its arguments and returns the exit code."""
    return importlib.import_module(f"flaxmnist.commands.{verb}").main


def idx_bytes(values: np.ndarray) -> bytes:
    """Return ``values`` as the content of an IDX file."""
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.astype(np.uint8).tobytes()


def idx_files(train=16, test=6, size=(28, 28), classes=4) -> dict[str, bytes]:
    """Return a small data set as four IDX files: all pixels of image i are i, and its label is i mod ``classes``."""
    files = {}
    for split, count in ("train", train), ("t10k", test):
        images = np.broadcast_to(np.arange(count)[:, None, None], (count, *size))
        files[f"{split}-images-idx3-ubyte"] = idx_bytes(images)
        files[f"{split}-labels-idx1-ubyte"] = idx_bytes(np.arange(count) % classes)
    return files


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@contextlib.contextmanager
def user_error(*words: str) -> Iterator[None]:
    """Assert that the block raises UserError with a message of one line that contains all ``words``."""
    with pytest.raises(UserError) as error:
        yield
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def assert_same(one, other) -> None:
    """Assert that two pytrees are bitwise identical."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=jax.tree_util.keystr(path))
