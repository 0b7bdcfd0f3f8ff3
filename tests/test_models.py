"""The models as functions, and golden initial values."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MODELS
from flax import nnx

import flaxmnist as fm
from flaxmnist import config, models
from flaxmnist.errors import UserError
from flaxmnist.steps import stream_key


@pytest.mark.parametrize("model", [fm.Softmax, fm.MLP, fm.CNN])
def test_modules_work_as_they_are(model, getkey):
    """As in a notebook: made with a seed, called on images, whole numbers or floats."""
    images = jax.random.randint(getkey(), (3, 28, 28, 1), 0, 256).astype(jnp.uint8)
    logits = model(rngs=nnx.Rngs(0))(images)
    assert logits.shape == (3, 10)
    np.testing.assert_allclose(model(rngs=nnx.Rngs(0))(images / 255), logits, rtol=1e-5, atol=1e-5)


OTHER_CNNS = [
    config.CNN(features=(3, 3), padding="VALID", dense=5),
    config.CNN(features=(3, 3), kernel=(5, 3), dense=5, space_to_depth=3),
]


@pytest.mark.parametrize(("shape", "classes"), [((28, 28), 10), ((20, 31), 47)])
@pytest.mark.parametrize("model", [*MODELS.values(), *OTHER_CNNS])
def test_any_shape_and_number_of_classes(model, shape, classes):
    network = models.make_model(model, shape, classes, nnx.Rngs(0))
    assert network(jnp.zeros((2, *shape, 1))).shape == (2, classes)


def test_a_model_that_leaves_no_pixel_is_refused():
    with pytest.raises(
        UserError, match=r"no pixel left of 28×28 after 3 convolutions VALID of kernels \(5, 5, 5\) and pools"
    ):
        models.make_model(config.CNN(features=(2, 2, 2), padding="VALID"), (28, 28), 10, nnx.Rngs(0))


def test_the_mlp_is_a_sequence_of_layers_one_can_see_through(getkey):
    network = fm.MLP(hidden=(20, 30), rngs=nnx.Rngs(0))
    images = jax.random.uniform(getkey(), (4, 28, 28, 1))
    x = images.reshape(4, 784)
    for layer in network.layers[:-1]:
        x = jnp.maximum(x @ layer.kernel[...].T + layer.bias[None, :], 0)
    x = x @ network.layers[-1].kernel[...].T + network.layers[-1].bias[None, :]
    np.testing.assert_allclose(network(images), x, rtol=1e-5)


def test_dropout_reaches_the_hidden_units_only():
    """With everything left out, what remains is the last layer's bias."""
    for model in (fm.MLP(rngs=nnx.Rngs(0)), fm.CNN(rngs=nnx.Rngs(0)), fm.Softmax(rngs=nnx.Rngs(0))):
        logits = model(jnp.ones((2, 28, 28, 1)), dropout=jnp.zeros_like)
        np.testing.assert_array_equal(logits, jnp.zeros((2, 10)))


GOLDEN = {
    "softmax_epochs": "317a1e8a27fab5b0",
    "mlp_scratch": "fce291a995ddf5e2",
    "cnn_experts": "0a2b47fa0b0dee7c",
    "cnn_layers": "795bf05884583b36",
}


@pytest.mark.parametrize("name", ["softmax_epochs", "mlp_scratch", "cnn_experts", "cnn_layers"])
def test_golden_initial_values(name):
    """The same on every version and machine. A change means that no run before it can be repeated: say so, and why."""
    experiment = fm.load_experiment(f"experiments/{name}.py")
    rngs = nnx.Rngs(params=stream_key(0, "init"))
    params = nnx.to_pure_dict(nnx.state(models.make_model(experiment.model, (28, 28), 10, rngs)))
    digest = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)))
    assert digest.hexdigest()[:16] == GOLDEN[name]
