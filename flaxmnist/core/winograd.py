"""Convolution by Winograd's method, which replaces most multiplications by additions.

Source and notation: Lavin & Gray 2016, "Fast algorithms for convolutional neural networks". F(m×m, r×r) computes the
convolution with an r×r kernel g in tiles of m×m outputs. A tile Y depends on a tile d of n×n inputs, n = m + r − 1:

    Y = Aᵀ M A,   M = U ⊙ V, summed over input channels,   U = G g Gᵀ,   V = Bᵀ d B

For all tiles together, M is n² matrix products, [tiles, inputs] × [inputs, outputs]. These are n²/m² multiplications
per output and pair of channels instead of r²: 4 instead of 25 for F(4×4, 5×5). The time goes into reading and writing
memory for the sums, so they are sums of whole shifted images: first over the rows of all tiles, then over the columns.
"""

import functools
import math
import operator
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64

# Pixels before and after the rows of an image, and before and after its columns.
Pads = tuple[tuple[int, int], tuple[int, int]]

# The n×n values of all tiles of U, V or M: an array for each GROUP of rows and each column in it.
Tiles = list[Float[Array, "_ tiles c"]]

# Where polynomials are evaluated, besides at infinity: n − 1 of these points. A larger n costs accuracy: the relative
# error in float32 is 7e-6 for F(4×4, 5×5), with n = 8, and 1e-4 for F(5×5, 5×5).
POINTS = (0, 1, -1, 2, -2, 0.5, -0.5)

# Rows of a tile in one array. With 8, 4, 2 and 1, a 5×5 convolution 32→64 of 50 images of 14×14, forward and backward,
# takes 9, 9, 12 and 13 ms (jax 0.10.2, two cores of an AMD EPYC with AVX-512), of 100 images 27, 22, 22 and 29. With
# jax 0.12.0.1 it takes 11, 8, 9 and 9, and 23, 19, 19 and 20.
GROUP = 4


@functools.cache
def matrices(
    m: int, r: int
) -> tuple[Float64[np.ndarray, "{m} {m}+{r}-1"], Float64[np.ndarray, "{m}+{r}-1 {r}"], Float64[np.ndarray, "n n"]]:
    """Return Aᵀ, G and Bᵀ of F(m, r).

    The product of polynomials with m and r coefficients has n coefficients. To compute it, evaluate both at n points,
    multiply the values, and interpolate. The transpose of this algorithm is a convolution: A and G evaluate, and B
    interpolates.
    """
    points = POINTS[: m + r - 2]
    at, g, bt = [], [], []
    for point in points:
        others = [other for other in points if other != point]
        at.append([point**power for power in range(m)])
        g.append([point**power / math.prod(point - other for other in others) for power in range(r)])
        bt.append([*np.poly(others)[::-1], 0])
    at.append([0] * (m - 1) + [1])
    g.append([0] * (r - 1) + [1])
    bt.append(np.poly(points)[::-1])
    # Rows of Bᵀ are scaled to a largest entry of 1, and those of G by the inverse, so that rounding errors are similar.
    scale = np.abs(bt).max(axis=1, keepdims=True)
    return np.array(at, float).T, g * scale, bt / scale


def tiling(size: tuple[int, int], r: int) -> tuple[int, tuple[int, int]]:
    """Return the m with the fewest multiplications, and the tiles along each axis, for an r×r kernel.

    ``size`` is the height and width of the outputs.
    """

    def counts(m: int) -> tuple[int, int]:
        return -(-size[0] // m), -(-size[1] // m)

    m = min(range(1, len(POINTS) + 3 - r), key=lambda m: math.prod(counts(m)) * (m + r - 1) ** 2)
    return m, counts(m)


def weighted_sums(matrix: Float64[np.ndarray, "k n"], arrays: Sequence[Float[Array, "..."]]) -> list[Array]:
    """Return the product of ``matrix`` and a vector whose n entries are ``arrays``, as k arrays."""
    terms = ([float(weight) * array for weight, array in zip(row, arrays, strict=True) if weight] for row in matrix)
    return [functools.reduce(operator.add, row) for row in terms]


def transform(x: Float[Array, "b h w c"], matrix: Float64[np.ndarray, "n k"], step: int) -> Tiles:
    """Return T·d·Tᵀ, with T = ``matrix``, of the tiles d of k×k pixels that begin at every ``step``-th pixel."""

    def pixels(x, axis):
        """Return the first, second, … k-th pixel of every tile along an axis."""
        starts = x.shape[axis] - matrix.shape[1] + 1  # pixels at which a tile may begin
        return [jax.lax.slice_in_dim(x, i, i + starts, step, axis) for i in range(matrix.shape[1])]

    rows, result = weighted_sums(matrix, pixels(x, 1)), []
    for start in range(0, len(rows), GROUP):
        # Barriers here and below keep XLA from computing the sums over rows again for every column.
        group = jax.lax.optimization_barrier(jnp.stack(rows[start : start + GROUP]))
        result += [column.reshape(len(group), -1, x.shape[3]) for column in weighted_sums(matrix, pixels(group, 3))]
    return result


def assemble(
    tiles: Tiles, matrix: Float64[np.ndarray, "k n"], step: int, shape: tuple[int, int, int]
) -> Float[Array, "b h w c"]:
    """Return images with T·M·Tᵀ, T = ``matrix``, of each tile M at every ``step``-th pixel, added where they overlap.

    This is the transpose of ``transform``. ``shape`` has the images, and the tiles along their height and width.
    """
    rows, columns = [], matrix.shape[1]
    for start in range(0, len(tiles), columns):
        group = [tile.reshape(len(tile), *shape, tile.shape[2]) for tile in tiles[start : start + columns]]
        group = overlap_add(weighted_sums(matrix, group), step, axis=3)
        rows += list(jax.lax.optimization_barrier(group))
    return overlap_add(weighted_sums(matrix, rows), step, axis=1)


def overlap_add(pixels: list[Float[Array, "..."]], step: int, axis: int) -> Float[Array, "..."]:
    """Return the tiles, each ``step`` pixels after the one before, summed where they overlap.

    ``pixels`` has the first, second, … k-th pixel along ``axis`` of every tile.
    """
    blocks = [pixels[start : start + step] for start in range(0, len(pixels), step)]
    blocks[-1] += [jnp.zeros_like(pixels[0])] * (step - len(blocks[-1]))
    if len(blocks) > 1:
        blocks = jax.lax.optimization_barrier(blocks)
    zero, moved = jnp.zeros((), pixels[0].dtype), []
    for index, block in enumerate(blocks):
        # This part of a tile lies ``index`` tiles further on.
        edges = [(0, 0, 0)] * (block[0].ndim + 1)
        edges[axis] = (index, len(blocks) - 1 - index, 0)
        moved.append(jax.lax.pad(jnp.stack(block, axis + 1), zero, edges))
    return jax.lax.collapse(functools.reduce(operator.add, moved), axis, axis + 2)


def place(x: Float[Array, "b h w c"], start: Sequence[int], size: Sequence[int]) -> Float[Array, "b h2 w2 c"]:
    """Return ``x`` with its first pixel at ``start`` in images of ``size``, cut or padded with zeros."""
    edges = [(low, full - low - side, 0) for low, full, side in zip(start, size, x.shape[1:3], strict=True)]
    return jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *edges, (0, 0, 0)])


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve(x: Float[Array, "b h w i"], kernel: Float[Array, "r r i o"], pads: Pads) -> Float[Array, "b h2 w2 o"]:
    """Cross-correlate images with a kernel of 3×3 to 8×8 pixels, with stride 1. No forward-mode derivatives."""
    return forward(x, kernel, pads)[0]


# Compiled also where the caller is not: a hundred small programs would take ten seconds.
@partial(jax.jit, static_argnums=2, inline=True)
def forward(x, kernel, pads):
    r, inputs, outputs = kernel.shape[1:]
    height, width = (low + side + high - r + 1 for side, (low, high) in zip(x.shape[1:3], pads, strict=True))
    m, counts = tiling((height, width), r)
    at, g, bt = matrices(m, r)
    padded = place(x, [low for low, _ in pads], [count * m + r - 1 for count in counts])
    v = transform(padded, bt, m)
    # The kernel is a single tile of r×r pixels with inputs·outputs channels.
    u = [part.reshape(-1, inputs, outputs) for part in transform(kernel.reshape(1, r, r, -1), g, r)]
    products = [jnp.einsum("nti,nio->nto", *pair) for pair in zip(v, u, strict=True)]
    y = assemble(products, at, m, (x.shape[0], *counts))
    return place(y, (0, 0), (height, width)), (x, kernel, v, u)


@partial(jax.jit, static_argnums=0, inline=True)
def backward(pads, residuals, dy):
    x, kernel, v, u = residuals
    r = len(kernel)
    m, counts = tiling(dy.shape[1:3], r)
    at, g, bt = matrices(m, r)
    dm = transform(place(dy, (0, 0), [count * m for count in counts]), at.T, m)
    dv = [jnp.einsum("nto,nio->nti", *pair) for pair in zip(dm, u, strict=True)]
    du = [jnp.einsum("nti,nto->nio", *pair).reshape(len(pair[0]), 1, -1) for pair in zip(v, dm, strict=True)]
    dx = assemble(dv, bt.T, m, (x.shape[0], *counts))
    dx = place(dx, [-low for low, _ in pads], x.shape[1:3])
    return dx, assemble(du, g.T, r, (1, 1, 1)).reshape(kernel.shape)


convolve.defvjp(forward, backward)
