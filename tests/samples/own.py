"""The experiment of the run in samples/own: a model with batch statistics, and a step with arrays."""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx

import flaxmnist as fm
from flaxmnist.config import Adam, Config, Cosine, Data, Train


class Module(nnx.Module):
    """Two dense layers with batch normalisation and dropout."""

    def __init__(self, inputs: int, classes: int, rngs: nnx.Rngs):
        self.first, self.last = nnx.Linear(inputs, 4, rngs=rngs), nnx.Linear(4, classes, rngs=rngs)
        self.norm, self.dropout = fm.BatchNorm(4, rngs=rngs), nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(nnx.relu(self.norm(self.first(x.reshape(x.shape[0], -1)[:, ::8])))))


@dataclass(frozen=True)
class Model:
    """A small model of the user's."""

    def make(self, shape, classes, rngs):
        return Module(shape[0] * shape[1] * shape[2] // 8, classes, rngs)


def arrays(config, data):
    """Return a weight of each image."""
    return jnp.linspace(0.5, 1.5, len(data.train.labels))


def step(config, state, batch, arrays, *, axis_name=None):
    """Record the sum of the weights of the batch."""
    state, metrics = fm.train_step(config, state, batch, axis_name=axis_name)
    total = fm.sum_over_devices(jnp.sum(arrays[batch.indices] * batch.weights), axis_name)
    return state, metrics._replace(extra=metrics.extra | {"weight": total})


config = Config(
    name="own",
    model=Model(),
    optimizer=Adam(learning_rate=3e-3, schedule=Cosine(warmup_steps=5)),
    data=Data(name="digits"),
    train=Train(batch_size=32, steps=60, log_every=5, evaluate_every=20, checkpoint_every=20, keep=1, ema_decay=0.9),
)
