"""Models as functions, and golden initial values."""

import hashlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MODELS, slow
from flax import nnx

import flaxmnist as fm
from flaxmnist import config
from flaxmnist.core import layers, models
from flaxmnist.core.convolution import convolve
from flaxmnist.core.steps import stream_key
from flaxmnist.errors import UserError


@pytest.mark.parametrize("model", [fm.Softmax, fm.MLP, fm.CNN])
def test_modules_work_without_a_config(model, few):
    """As in a notebook: created with a seed, called on uint8 or float images."""
    images = jnp.asarray(few.test.images[:3])
    logits = model(rngs=nnx.Rngs(0))(images)
    assert logits.shape == (3, 10)
    np.testing.assert_allclose(model(rngs=nnx.Rngs(0))(images / 255), logits, rtol=1e-5, atol=1e-5)


OTHER_CNNS = [
    config.CNNConfig(features=(3, 3), padding="VALID", dense=5),
    config.CNNConfig(features=(3, 3), kernel=(5, 3), dense=5, space_to_depth=3),
]


@pytest.mark.parametrize(("shape", "classes"), [slow((28, 28), 10), ((20, 31), 47)])
@pytest.mark.parametrize("model", [*MODELS.values(), OTHER_CNNS[0], *map(slow, OTHER_CNNS[1:])])
def test_models_accept_any_shape_and_number_of_classes(model, shape, classes):
    network = models.make_model(model, shape, classes, nnx.Rngs(0))
    assert network(jnp.zeros((2, *shape, 1))).shape == (2, classes)


def test_cnn_without_pixels_left_is_rejected():
    message = r"no pixel left of 28×28 after 3 VALID convolutions with kernels \(5, 5, 5\) and pooling: use a smaller"
    with pytest.raises(UserError, match=message):
        models.make_model(config.CNNConfig(features=(2, 2, 2), padding="VALID"), (28, 28), 10, nnx.Rngs(0))


def test_mlp_matches_its_formula(few):
    network = fm.MLP(hidden=(20, 30), rngs=nnx.Rngs(0))
    images = jnp.asarray(few.test.images[:4]) / 255
    x = images.reshape(4, 784)
    for layer in network.layers[:-1]:
        x = jnp.maximum(x @ layer.kernel[...].T + layer.bias[None, :], 0)
    x = x @ network.layers[-1].kernel[...].T + network.layers[-1].bias[None, :]
    np.testing.assert_allclose(network(images), x, rtol=1e-5)


@pytest.mark.parametrize(
    "network", [fm.Softmax, fm.MLP, partial(fm.CNN, space_to_depth=2, features=(4,), kernel=(3,), padding="VALID")]
)
def test_first_weights_are_the_factors_of_the_pixels(network):
    """For an image of a single dot, each output is the weight at the position of the dot."""
    model = network(kernel_init=nnx.initializers.normal(), rngs=nnx.Rngs(0))
    weights = models.first_weights(model)
    assert weights is not None
    count, side, _ = weights.shape
    dot = jnp.zeros((1, 28, 28, 1)).at[0, 3, 4, 0].set(1.0)
    if isinstance(model, fm.CNN):
        assert (count, side) == (4, 6)
        output = convolve(layers.space_to_depth(dot, 2), model.convs[0].kernel[...], "VALID")
        np.testing.assert_allclose(output[0, 0, 1], weights[:, 3, 2], rtol=1e-6)
    else:
        layer = model.dense if isinstance(model, fm.Softmax) else model.layers[0]
        assert weights.shape[1:] == (28, 28)
        np.testing.assert_allclose(layer(layers.flatten(dot))[0], weights[:, 3, 4], rtol=1e-6)


def test_feature_maps_are_those_behind_the_logits(few):
    network = fm.CNN(features=(2, 3), kernel=(3,), dense=8, rngs=nnx.Rngs(0))
    images = jnp.asarray(few.test.images[:4]) / 255
    first, second = network.feature_maps(images)
    assert first.shape == (4, 14, 14, 2) and second.shape == (4, 7, 7, 3)
    logits = network.logits(jax.nn.relu(network.dense(layers.flatten(second))))
    np.testing.assert_array_equal(network(images), logits)


def test_dropping_everything_leaves_the_last_bias():
    for module in (fm.MLP, fm.CNN, fm.Softmax):
        model = module(dropout=1 - 1e-7, rngs=nnx.Rngs(0))
        logits = model(jnp.ones((2, 28, 28, 1)))
        np.testing.assert_array_equal(logits, jnp.zeros((2, 10)))


GOLDEN = {
    "softmax_epochs": "317a1e8a27fab5b0",
    "mlp_scratch": "fce291a995ddf5e2",
    "cnn_experts": "0a2b47fa0b0dee7c",
    "cnn_layers": "795bf05884583b36",
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_initial_values(name):
    """Identical for all versions and machines. A change makes earlier runs irreproducible: document it and why."""
    experiment = fm.load_experiment(name)
    rngs = nnx.Rngs(params=stream_key(0, "init"))
    params = nnx.to_pure_dict(nnx.state(models.make_model(experiment.model, (28, 28), 10, rngs), nnx.Param))
    digest = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)))
    assert digest.hexdigest()[:16] == GOLDEN[name]
