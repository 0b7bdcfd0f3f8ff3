"""Traced models, and the ONNX files that are written from them, which ONNX Runtime runs."""

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest
from conftest import ROOT, fit_on_one, slow, small
from flax import nnx
from test_experiments import LARGE, NAMES
from test_user_classes import ViT

import flaxmnist as fm
from flaxmnist.core.trace import Operation, trace
from flaxmnist.data import order
from flaxmnist.errors import UserError
from flaxmnist.store import exports
from flaxmnist.store.load import Trained, load_checkpoint
from flaxmnist.store.onnx_model import onnx_model

IMAGES = np.random.default_rng(0).integers(0, 256, (257, 28, 28, 1), np.uint8)


def assert_onnx_agrees(model: nnx.Module) -> None:
    """Logits of any number of images agree to 1e-5 of the largest."""
    expected = fm.predict_logits(model, IMAGES)
    session = onnxruntime.InferenceSession(onnx_model(model, (28, 28, 1), expected.shape[1]))
    for count in (1, 7, 257):
        (logits,) = session.run(None, {"images": IMAGES[:count]})
        np.testing.assert_allclose(logits, expected[:count], rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", [slow(name) if name in {*LARGE, "quickstart"} else name for name in NAMES])
def test_every_experiment_is_written_as_onnx(name):
    config = order.resolve_length(fm.load_experiment(ROOT / f"experiments/{name}.py"), 1000)
    model = fm.create_state(config, (28, 28, 1), 10).model
    # Random weights: some experiments begin with zeros.
    normal = np.random.default_rng(0).standard_normal
    nnx.update(model, jax.tree.map(lambda x: x + 0.1 * normal(x.shape, np.float32), nnx.state(model, nnx.Param)))
    assert_onnx_agrees(model)


class Calls(nnx.Module):
    """The mean over pixels of functions of the image, as logits."""

    def __init__(self, *functions):
        self.functions, self.scale = functions, nnx.Param(jnp.ones(()))

    def __call__(self, x):
        return self.scale[...] * jnp.stack([function(x).mean((1, 2, 3)) for function in self.functions], axis=1)


def weight(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))


FUNCTIONS = {
    **{name: getattr(nnx, name) for name in ("gelu", "leaky_relu", "elu", "softplus", "silu", "hard_swish", "sigmoid")},
    "exact gelu": lambda x: nnx.gelu(x, approximate=False),
    "square root": lambda x: jnp.sqrt(x) - jnp.abs(x - 0.5) + jnp.sign(x - 0.5) + x**0.3 + x**2 + x**3,
    "minimum": lambda x: jnp.minimum(x, 0.5) - x.min((1, 2), keepdims=True) + jnp.log(x + 1) + jnp.log1p(x),
    "comparisons": lambda x: jnp.where((x > 0.201) == (x < 0.7), x, -x) + (x >= 0.1) - (x <= 0.3) + (x != 0.5),
    "truth values": lambda x: x.astype(bool).astype(x.dtype) + (x > 0.5).astype(jnp.int32),
    "slice": lambda x: x[:, 3:-2, 5:] + x[:, 4:5, :1] + x[:, 1::9, ::2][:, :1, :1],
    "concatenation": lambda x: jnp.concatenate([x, 2 * x[:, :4]], axis=1),
    "roll": lambda x: jnp.roll(x, 3, axis=2),
    "pad": lambda x: jnp.pad(x, ((0, 0), (2, 1), (0, 3), (0, 0)), constant_values=0.5)[:, :, 1:],
    "average pooling": lambda x: nnx.avg_pool(x, (3, 3), strides=(2, 2), padding="SAME"),
    "max pooling": lambda x: nnx.max_pool(x, (3, 2), strides=(2, 1), padding="SAME"),
    "strides": lambda x: jax.lax.conv_general_dilated(
        x, weight(3, 3, 1, 1), (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    ),
    "groups": lambda x: jax.lax.conv_general_dilated(
        x.repeat(4, 3), weight(2, 2, 2, 4), (1, 1), "VALID", None, None, ("NHWC", "HWIO", "NHWC"), 2
    ).sum(3, keepdims=True),
    "products": lambda x: jnp.einsum("nhwc,nvwc->nhvc", x, x) / 28 + jnp.einsum("nhwc,hk->nkwc", x, weight(28, 28)),
    "broadcasting": lambda x: jnp.broadcast_to(x.mean((1, 2, 3))[:, None, None, None], x.shape) + jnp.ones(x.shape),
}


def test_operations_of_models_of_your_own():
    assert_onnx_agrees(Calls(*FUNCTIONS.values()))


@pytest.mark.slow
def test_a_transformer():
    model = ViT().make((28, 28, 1), 10, nnx.Rngs(0))
    model.eval()
    assert_onnx_agrees(model)


def test_normalisation_becomes_a_factor_and_an_offset_for_each_channel():
    model = fm.BatchNorm(1, rngs=nnx.Rngs(0))
    model.eval()
    names = [node.name for node in trace(model, (28, 28, 1)) if isinstance(node, Operation)]
    assert names == ["images", "convert_element_type", "div", "mul", "add"]  # division: from 0 to 255 to 0 to 1


UNSUPPORTED = {
    lambda x: jnp.sort(x, axis=1): "an operation that only JAX can compute: sort",
    lambda x: x.astype(jnp.bfloat16): "a type that is not supported in ONNX: bfloat16",
    lambda x: (x > 0.5).max(1, keepdims=True) + x: "the model cannot be written as ONNX .InferenceError",
    lambda x: jnp.broadcast_to(jnp.ones(1), (4 * len(x), 1, 1)).sum() + x: "a shape that is not supported in ONNX",
}


def test_a_model_that_onnx_lacks_is_exported_in_the_other_formats(few, tmp_path, caplog, monkeypatch):
    for function, message in UNSUPPORTED.items():
        with pytest.raises(UserError, match=message):
            onnx_model(Calls(function), (28, 28, 1), 10)
    fit_on_one(small(steps=1), few, tmp_path)
    (tmp_path / "export").mkdir()
    (tmp_path / "export/model.onnx").touch()
    monkeypatch.setattr(Trained, "model", Calls(lambda x: jnp.sort(x, axis=1)))
    names = [path.name for path in exports.write(load_checkpoint(tmp_path), tmp_path / "export")]
    assert "model.onnx" not in names and "model.stablehlo" in names
    assert not (tmp_path / "export/model.onnx").exists()
    assert "no model.onnx: the model has an operation that only JAX can compute: sort" in caplog.text
