"""Convolutions: XLA's with other gradients, Winograd's, and which of them is used."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import fit_on_one, slow, small
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from flaxmnist.config import CNNConfig
from flaxmnist.core import models, winograd
from flaxmnist.core.convolution import LAYOUT, Convolution, convolve
from flaxmnist.devices import program
from flaxmnist.store import exports
from flaxmnist.store.load import evaluate_run


def assert_gradients_match_lax(x, kernel, padding, stride, normal):
    """Compare a direct convolution with jax's own bitwise, and its gradients with jax's up to rounding."""
    layout = ("NHWC", "HWIO", "NHWC")

    def reference(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=layout)

    expected, expected_vjp = jax.vjp(reference, x, kernel)
    actual, actual_vjp = jax.vjp(lambda x, kernel: convolve(x, kernel, padding, stride, "direct"), x, kernel)
    np.testing.assert_array_equal(actual, expected)
    dy = normal(*actual.shape)
    for gradient, expected_gradient in zip(actual_vjp(dy), expected_vjp(dy), strict=True):
        np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("window", [slow(1), 2, slow(3), 5])
@pytest.mark.parametrize("size", [7, 8])
def test_direct_convolution_and_its_gradients_match_lax(size, window, padding, stride, normal):
    x, kernel = normal(3, size, size, 2), normal(window, window, 2, 4)
    assert_gradients_match_lax(x, kernel, padding, stride, normal)


@pytest.mark.parametrize(("count", "padding", "stride"), [(10, "SAME", 1), (25, "SAME", 1), (111, "VALID", 2)])
def test_gradients_of_large_batches_match_lax(count, padding, stride, normal):
    """On CPU the kernel gradient is summed in groups of images, on accelerators at once, as for 10 images here."""
    x, kernel = normal(count, 8, 8, 2), normal(3, 3, 2, 4)
    assert_gradients_match_lax(x, kernel, padding, stride, normal)


def test_kernel_gradient_counts_every_image_once():
    """The kernel gradient is summed in groups, which need not divide the batch."""
    kernel = jnp.zeros((3, 3, 1, 1))
    for count in (1, 9, 10, 11, 23):
        images = jnp.ones((count, 3, 3, 1))
        gradient = jax.grad(lambda k, x=images: convolve(x, k, "VALID", form="direct").sum())(kernel)
        np.testing.assert_array_equal(gradient, jnp.full((3, 3, 1, 1), count))


@pytest.mark.parametrize(("strides", "padding"), [slow(1, "SAME"), slow(2, "VALID"), (1, ((2, 1), (0, 3)))])
@pytest.mark.parametrize("form", ["direct", "winograd"])
def test_convolutions_of_flax_have_the_same_gradient(strides, padding, form, normal):
    def gradients(function):
        conv = nnx.Conv(2, 3, (3, 3), strides=strides, padding=padding, conv_general_dilated=function, rngs=nnx.Rngs(0))
        graphdef, params = nnx.split(conv)
        return jax.grad(lambda params, x: (nnx.merge(graphdef, params)(x) ** 2).sum(), (0, 1))(params, x)

    x = normal(4, 9, 9, 2)
    ours, theirs = gradients(Convolution(form)), gradients(jax.lax.conv_general_dilated)
    for mine, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(mine, expected, rtol=1e-4, atol=1e-4)


# --- Winograd's form ------------------------------------------------------------------------------------------------


def outputs_and_gradients(form, x, kernel, padding, dy):
    """Return the convolution of ``x``, and the gradients for an output gradient ``dy``."""
    y, vjp = jax.vjp(partial(convolve, padding=padding, form=form), x, kernel)
    return y, *vjp(dy)


def assert_forms_agree(shape, kernel_shape, padding, dtype, tolerance):
    """Compare Winograd's form with the direct one; errors are relative to the largest value of each array."""
    generator = np.random.default_rng(0)
    x, kernel = (jnp.asarray(generator.standard_normal(shape), dtype) for shape in (shape, kernel_shape))
    y = jax.eval_shape(partial(convolve, padding=padding, form="direct"), x, kernel)
    dy = jnp.asarray(generator.standard_normal(y.shape), dtype)
    direct, others = (
        jax.jit(partial(outputs_and_gradients, form, padding=padding))(x, kernel, dy=dy)
        for form in ("direct", "winograd")
    )
    for expected, actual in zip(direct, others, strict=True):
        assert (actual.shape, actual.dtype) == (expected.shape, dtype)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(actual / scale, expected / scale, rtol=0, atol=tolerance)


WINOGRAD_SHAPES = [
    ((2, 14, 14, 3), (5, 5, 3, 4), "SAME"),
    slow((3, 12, 9, 4), (3, 3, 4, 2), "VALID"),
    slow((1, 5, 5, 1), (5, 5, 1, 1), "VALID"),
    slow((2, 1, 3, 2), (3, 3, 2, 2), "SAME"),
    slow((2, 8, 9, 2), (5, 5, 2, 2), ((0, 3), (4, 1))),
    slow((2, 8, 9, 2), (3, 3, 2, 2), ((-1, 2), (5, -2))),
    slow((50, 14, 14, 32), (5, 5, 32, 64), "SAME"),
    slow((100, 28, 28, 32), (3, 3, 32, 64), "VALID"),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "kernel", "padding"), WINOGRAD_SHAPES)
def test_winograd_agrees_with_direct_convolution(shape, kernel, padding):
    assert_forms_agree(shape, kernel, padding, jnp.float32, 1e-4)
    with jax.enable_x64(True):
        assert_forms_agree(shape, kernel, padding, jnp.float64, 1e-10)


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(
    batch=st.integers(1, 4), height=st.integers(1, 20), width=st.integers(1, 20), side=st.sampled_from([3, 5]),
    channels=st.tuples(st.integers(1, 9), st.integers(1, 9)), padding=st.sampled_from(["SAME", "VALID"]),
)  # fmt: skip
def test_winograd_agrees_with_direct_convolution_for_any_shape(batch, height, width, side, channels, padding):
    if padding == "VALID":
        height, width = height + side - 1, width + side - 1
    with jax.enable_x64(True):
        arguments = (batch, height, width, channels[0]), (side, side, *channels), padding
        assert_forms_agree(*arguments, jnp.float32, 1e-4)
        assert_forms_agree(*arguments, jnp.float64, 1e-10)


@pytest.mark.parametrize("side", [3, slow(5)])
def test_gradients_of_winograd_are_finite_differences(side):
    generator, pads = np.random.default_rng(0), ((1, 2), (0, 1))
    with jax.enable_x64(True):
        arrays = generator.standard_normal((2, 6, 7, 2)), generator.standard_normal((side, side, 2, 3))
        check_grads(lambda *arrays: winograd.convolve(*map(jnp.asarray, arrays), pads), arrays, order=1, modes=["rev"])


def test_winograd_in_a_loop_and_over_trials_is_the_same(normal):
    x, kernels, dy = normal(2, 6, 6, 2), normal(3, 3, 3, 2, 2), normal(2, 6, 6, 2)

    def run(kernel):
        return outputs_and_gradients("winograd", x, kernel, "SAME", dy)

    alone = [jax.jit(run)(kernel) for kernel in kernels]
    expected = jax.tree.map(lambda *arrays: jnp.stack(arrays), *alone)
    for together in (jax.jit(jax.vmap(run))(kernels), jax.lax.map(run, kernels)):
        for array, other in zip(together, expected, strict=True):
            np.testing.assert_allclose(array, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("size", "side", "m"),
    [((14, 14), 5, 4), ((4, 4), 3, 4), ((12, 12), 3, 6), ((28, 28), 3, 6), ((14, 14), 3, 5), ((1, 1), 5, 1)],
)
def test_tiles_cover_the_outputs_with_the_fewest_multiplications(size, side, m):
    chosen, counts = winograd.tiling(size, side)
    assert chosen == m
    assert counts == tuple(-(-length // m) for length in size)


# --- The choice -----------------------------------------------------------------------------------------------------


def uses_winograd(function, *arguments) -> bool:
    return "conv_general_dilated" not in str(jax.make_jaxpr(function)(*arguments))


@pytest.mark.parametrize(
    ("shape", "kernel", "stride", "auto", "winograd"),
    [
        ((50, 14, 14, 32), (5, 5, 32, 64), 1, True, True),
        ((50, 28, 28, 1), (5, 5, 1, 32), 1, False, True),
        ((50, 14, 14, 16), (3, 3, 16, 16), 1, False, True),
        ((50, 14, 14, 16), (3, 3, 16, 32), 1, True, True),
        ((50, 14, 14, 32), (5, 5, 32, 64), 2, False, False),
        ((50, 14, 14, 32), (1, 1, 32, 64), 1, False, False),
        ((50, 14, 14, 32), (3, 5, 32, 64), 1, False, False),
    ],
)
def test_form_of_a_convolution(shape, kernel, stride, auto, winograd):
    arrays = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(kernel, jnp.float32)
    for form, expected in (("auto", auto), ("winograd", winograd), ("direct", False)):
        assert uses_winograd(partial(convolve, padding="SAME", stride=stride, form=form), *arrays) == expected


def test_bfloat16_and_empty_outputs_are_direct():
    def convolution(x, kernel):
        return convolve(x, kernel, "VALID", form="winograd")

    images, kernel = jnp.zeros((2, 8, 8, 2)), jnp.zeros((5, 5, 2, 2))
    assert uses_winograd(convolution, images, kernel)
    assert not uses_winograd(convolution, images.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16))
    assert not uses_winograd(convolution, images[:, :3], kernel)
    for empty in (images[:, :3], images[:0]):
        output, vjp = jax.vjp(convolution, empty, kernel)
        assert [(gradient.shape, gradient.sum()) for gradient in vjp(output)] == [(empty.shape, 0), (kernel.shape, 0)]


OPTIONS = {
    "a batch in groups": {"batch_group_count": 2},
    "channels in groups": {"feature_group_count": 2},
    "dilation": {"rhs_dilation": (2, 2)},
    "precision": {"precision": jax.lax.Precision.HIGHEST},
    "dtype": {"preferred_element_type": jnp.dtype("float32")},
    "strides": {"window_strides": (1, 2)},
    "layout": {"dimension_numbers": ("NCHW", "HWIO", "NCHW")},
    "default layout": {"dimension_numbers": None},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_other_options_of_a_convolution_are_those_of_jax(options, normal):
    groups = options.get("feature_group_count", 1)
    options = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": LAYOUT} | options
    x, kernel = normal(4, 4, 4, 4), normal(3, 3, 4 // groups, 4)
    kernel = kernel if options["dimension_numbers"] else normal(4, 4, 3, 3)
    expected = jax.lax.conv_general_dilated(x, kernel, **options)
    actual = Convolution("winograd")(x, kernel, options.pop("window_strides"), **options)
    np.testing.assert_array_equal(actual, expected)


def test_channels_that_do_not_fit_are_refused(normal):
    for channels, inputs in ((1, 32), (32, 1)):
        with pytest.raises((TypeError, ValueError)):
            convolve(normal(2, 6, 6, channels), normal(3, 3, inputs, 64), "SAME")


def test_other_backends_keep_the_convolutions_of_xla(monkeypatch):
    arrays = jax.ShapeDtypeStruct((50, 14, 14, 32), jnp.float32), jax.ShapeDtypeStruct((5, 5, 32, 64), jnp.float32)
    assert uses_winograd(partial(convolve, padding="SAME"), *arrays)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not uses_winograd(partial(convolve, padding="VALID"), *arrays)


@dataclass(frozen=True)
class Convolutions:
    """A model with a convolution of Flax, and one that has a function of the user's."""

    def make(self, shape, classes, rngs):
        return Net(shape, classes, rngs)


def own_convolution(*arguments, **options):
    return jax.lax.conv_general_dilated(*arguments, **options)


class Net(nnx.Module):
    def __init__(self, shape, classes, rngs):
        self.first = nnx.Conv(shape[2], 4, (3, 3), rngs=rngs)
        self.second = nnx.Conv(4, classes, (3, 3), conv_general_dilated=own_convolution, rngs=rngs)

    def __call__(self, x):
        return self.second(jax.nn.relu(self.first(x))).mean(axis=(1, 2))


def test_the_form_of_a_config_is_that_of_all_its_convolutions_but_those_of_the_user():
    for form in ("auto", "direct", "winograd"):
        ours = models.make_model(CNNConfig(), (28, 28), 10, nnx.Rngs(0), form)
        assert [conv.conv_general_dilated for conv in ours.convs] == [Convolution(form)] * 2
        yours = models.make_model(Convolutions(), (28, 28), 10, nnx.Rngs(0), form)
        assert (yours.first.conv_general_dilated, yours.second.conv_general_dilated) == (
            Convolution(form),
            own_convolution,
        )


@pytest.mark.slow
def test_forms_train_alike(few, tmp_path):
    direct, winograd = (
        fit_on_one(small("cnn", convolution=form), few, tmp_path / form) for form in ("direct", "winograd")
    )
    # Not more alike: rounding decides which values are equal, so that they share the gradient of max-pooling.
    assert winograd.result.test_loss == pytest.approx(direct.result.test_loss, rel=0.01)
    assert winograd.result.params_sha256 != direct.result.params_sha256
    assert evaluate_run(tmp_path / "winograd", data=few).loss == winograd.result.test_loss


def test_exports_have_direct_convolutions():
    model = models.make_model(Convolutions(), (8, 8), 10, nnx.Rngs(0), "winograd")
    program = jax.export.deserialize(bytearray(exports.stablehlo(model, (8, 8, 1))))
    assert program.mlir_module().count("stablehlo.convolution(") == 2 * len(exports.PLATFORMS)


def test_operations_are_counted_as_those_of_direct_convolutions(few):
    direct, winograd = (program.step_cost(small("cnn", convolution=form), few) for form in ("direct", "winograd"))
    assert winograd.operations == direct.operations
