"""Convolutions in the fastest form: XLA's own, with gradients that are fast on CPU, or Winograd's."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from flaxmnist.core import winograd
from flaxmnist.core.winograd import Pads

Form = Literal["auto", "direct", "winograd"]
LAYOUT = "NHWC", "HWIO", "NHWC"


@dataclass(frozen=True)
class Convolution:
    """``jax.lax.conv_general_dilated``, computed by ``convolve`` if that can: for ``Conv`` and ``nnx.Conv``."""

    form: Form = "auto"

    def __call__(self, x: Array, kernel: Array, strides: Sequence[int], padding: Any, **options: Any) -> Array:
        layout = jax.lax.conv_dimension_numbers(x.shape, kernel.shape, options.get("dimension_numbers"))
        defaults = {"lhs_dilation": (1, 1), "rhs_dilation": (1, 1), "feature_group_count": 1, "batch_group_count": 1}
        others = {name: value for name, value in options.items() if name != "dimension_numbers" and value is not None}
        plain = x.ndim == 4 and layout == jax.lax.conv_dimension_numbers(x.shape, kernel.shape, LAYOUT)
        plain &= all(name in defaults and defaults[name] == value for name, value in others.items())
        if plain and len(set(strides)) == 1:
            return convolve(x, kernel, padding, strides[0], self.form)
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)


def set_form(module: nnx.Module, form: Form) -> None:
    """Let the convolutions in ``module`` have this form, unless they have a function of their own."""

    def is_ours(_: Any, layer: Any) -> bool:
        function = getattr(layer, "conv_general_dilated", None)
        return isinstance(function, Convolution) or function is jax.lax.conv_general_dilated

    module.set_attributes(is_ours, conv_general_dilated=Convolution(form), raise_if_not_found=False)


def convolve(
    x: Float[Array, "b h w i"],
    kernel: Float[Array, "kh kw i o"],
    padding: str | Sequence[tuple[int, int]],
    stride: int = 1,
    form: Form = "auto",
) -> Float[Array, "b h2 w2 o"]:
    """Cross-correlate images with a kernel (the convolution of neural networks).

    ``padding`` is SAME, VALID, or the pixels before and after the rows and the columns. ``form`` "auto" is the fastest,
    "winograd" is used where it is defined. Forward-mode derivatives are not supported.
    """
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], (stride, stride), padding)
    (top, bottom), (left, right) = padding
    pads = (top, bottom), (left, right)
    if is_winograd(form, x, kernel, pads, stride):
        return winograd.convolve(x, kernel, pads)
    return direct(x, kernel, pads, stride)


def is_winograd(form: Form, x: Array, kernel: Array, pads: Pads, stride: int) -> bool:
    """Return True if a convolution of stride ``stride`` is to have Winograd's form."""
    side, width, inputs, outputs = kernel.shape
    sizes = [low + size + high - side + 1 for size, (low, high) in zip(x.shape[1:3], pads, strict=True)]
    defined = side == width and side in (3, 5) and stride == 1 and x.shape[3] == inputs
    defined &= min(sizes) > 0 and 0 not in (*x.shape, outputs)
    defined &= x.dtype == kernel.dtype and x.dtype in (jnp.float32, jnp.float64)
    if form != "auto" or not defined:
        return form == "winograd" and defined
    # XLA's time divided by Winograd's, forward and backward and in brackets forward only, for 100 images of 14×14, on
    # two cores of an AMD EPYC with AVX-512:
    #            jax 0.10.2, 3×3   5×5         jax 0.12.0.1, 3×3   5×5
    #     4→32   2.2 (1.1)         1.6 (0.6)   0.9 (1.5)           1.2 (1.1)
    #    16→16   1.1 (0.9)         1.0 (1.1)   1.4 (0.8)           1.5 (1.3)
    #    16→32   2.3 (1.6)         0.8 (0.9)   1.4 (1.3)           1.2 (1.5)
    #    32→64   1.7 (2.2)         2.5 (3.2)   1.6 (1.7)           1.6 (1.9)
    #   64→128   1.9 (3.3)         1.8 (1.6)   1.7 (1.9)           1.9 (1.8)
    # The ratios for 7×7 images are alike. For 28×28 they are 0.8 to 1.3 for 16→32, and 1.0 to 2.7 for 32→64. GPU and
    # TPU have kernels of their own, which XLA chooses.
    return jax.default_backend() == "cpu" and inputs * outputs >= 512


# --- XLA's convolution ----------------------------------------------------------------------------------------------


def correlate(x, kernel, pads, stride=1, x_dilation=1, kernel_dilation=1):
    strides, x_dilations, kernel_dilations = 2 * (stride,), 2 * (x_dilation,), 2 * (kernel_dilation,)
    return jax.lax.conv_general_dilated(x, kernel, strides, pads, x_dilations, kernel_dilations, LAYOUT)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def direct(
    x: Float[Array, "b h w i"], kernel: Float[Array, "kh kw i o"], pads: Pads, stride: int
) -> Float[Array, "b h2 w2 o"]:
    """Cross-correlate images with a kernel by XLA.

    The gradients are written as convolutions in the layout of XLA's fast CPU kernels (NHWC, HWIO). XLA converts them
    to this layout itself, but on CPU only outside of loops: inside ``scan`` and ``fori_loop`` a 5×5×32→64 convolution
    of 50 images and its gradient took 920 ms as naive loops, and take 13 ms in this form (two cores of a Xeon with
    AVX-512).
    """
    return correlate(x, kernel, pads, stride)


def direct_backward(pads, stride, residuals, dy):
    x, kernel = residuals
    if 0 in dy.shape:
        return jnp.zeros_like(x), jnp.zeros_like(kernel)
    kernel_pads, x_pads = [], []
    for size, (low, high), window, out in zip(x.shape[1:3], pads, kernel.shape[:2], dy.shape[1:3], strict=True):
        # Pixels at the end that no window covers, because the stride does not divide the size.
        rest = low + size + high - window - (out - 1) * stride
        kernel_pads.append((low, high - rest))
        x_pads.append((window - 1 - low, window - 1 - high + rest))

    def kernel_gradient(x, dy):
        # dW[u, v, i, o] sums x[b, h+u, w+v, i] · dy[b, h, w, o]: a convolution with batch and channels swapped.
        gradient = correlate(x.transpose(3, 1, 2, 0), dy.transpose(1, 2, 0, 3), kernel_pads, kernel_dilation=stride)
        return gradient.transpose(1, 2, 0, 3)

    def in_groups(x, dy):
        # XLA's CPU kernel is slow for sums this long: 5×5×32→64 took 14 ms in one sum and 6.7 ms in groups of 10 images
        # at batch 50, 34 and 14 ms at batch 100 (two cores of a Xeon with AVX-512). Smaller groups gained nothing.
        size = max(10, -(-x.shape[0] // 10))
        starts = range(0, x.shape[0], size)
        return sum(kernel_gradient(x[start : start + size], dy[start : start + size]) for start in starts)

    d_kernel = jax.lax.platform_dependent(x, dy, cpu=in_groups, default=kernel_gradient)
    # dx distributes dy over the windows: the kernel rotated by 180 degrees, inputs and outputs swapped.
    d_x = correlate(dy, kernel[::-1, ::-1].swapaxes(2, 3), x_pads, x_dilation=stride)
    return d_x, d_kernel


direct.defvjp(lambda x, kernel, pads, stride: (correlate(x, kernel, pads, stride), (x, kernel)), direct_backward)
