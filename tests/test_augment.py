"""Augmentation: the transformations, their randomness, and that those turned off do nothing."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from flaxmnist import fields
from flaxmnist.config import Augment
from flaxmnist.core.augment import affine, elastic, resample
from flaxmnist.core.augment import augment as eager_augment

ALL = Augment(shift=2.0, rotate=15.0, scale=0.1, elastic=1.0)
KINDS = [Augment(shift=2.0), Augment(rotate=15.0), Augment(scale=0.1), Augment(elastic=1.0), ALL]
KEY = jax.random.key(0)
augment = jax.jit(eager_augment, static_argnums=0)


@pytest.fixture(autouse=True)
def rank_promotion_raises():
    with jax.numpy_rank_promotion("raise"):
        yield


def blobs(count=8, row=14.0, column=14.0):
    """Return identical images of a round blob centred at (row, column)."""
    rows, columns = np.indices((28, 28))
    blob = np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / 8)
    return jnp.asarray(np.tile(blob[None, :, :, None], (count, 1, 1, 1)), jnp.float32)


def centre(image):
    return [jnp.sum(index * image[:, :, 0]) / jnp.sum(image) for index in jnp.indices((28, 28))]


def move(image, shift=(0.0, 0.0), rotate=0.0, scale=0.0):
    return resample(image, affine((28, 28), jnp.array(shift), rotate, scale))


def test_transformations_turned_off_are_not_computed():
    images = blobs()
    assert eager_augment(Augment(), KEY, images) is images
    elastic_only, all_kinds = (
        jax.make_jaxpr(lambda key, images, config=config: eager_augment(config, key, images))(KEY, images)
        for config in (Augment(elastic=1.0), ALL)
    )
    assert str(elastic_only).count("random_bits") < str(all_kinds).count("random_bits")


@pytest.mark.parametrize("config", KINDS, ids=str)
def test_each_kind_changes_each_image_differently(config):
    images = blobs(row=10, column=17)
    changed = augment(config, KEY, images)
    assert changed.shape == images.shape and changed.dtype == images.dtype
    for index in range(len(images)):
        assert not np.allclose(changed[index], images[index], atol=1e-3)
        assert not np.allclose(changed[index], changed[index - 1], atol=1e-3)
    np.testing.assert_allclose(changed.sum((1, 2, 3)), images.sum((1, 2, 3)), rtol=0.5)
    assert float(changed.sum()) == pytest.approx(float(images.sum()), rel=0.2)


def test_shards_are_changed_like_the_batch():
    images = jnp.asarray(np.random.default_rng(0).random((8, 28, 28, 1), np.float32))
    batch = augment(ALL, KEY, images)
    for offset in (0, 4):
        shard = augment(ALL, KEY, images[offset : offset + 4], offset=offset)
        np.testing.assert_allclose(shard, batch[offset : offset + 4], atol=1e-6)
    assert not np.allclose(augment(ALL, jax.random.key(2), images), batch, atol=0.1)


def test_a_batch_is_shifted_as_a_whole_by_whole_pixels():
    images = jnp.asarray(np.random.default_rng(0).random((4, 28, 28, 1), np.float32))
    shifts = set()
    for seed in range(30):
        shifted = np.asarray(augment(Augment(batch_shift=1), jax.random.key(seed), images))
        padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
        candidates = {(i, j): padded[:, i : i + 28, j : j + 28] for i in range(3) for j in range(3)}
        (shift,) = [shift for shift, candidate in candidates.items() if np.array_equal(shifted, candidate)]
        shifts.add(shift)
        shard = augment(Augment(batch_shift=1), jax.random.key(seed), images[2:], offset=2)
        np.testing.assert_array_equal(shard, shifted[2:])
    assert len(shifts) == 9


def test_random_numbers_of_one_kind_do_not_depend_on_the_others():
    images = blobs()
    shifted = augment(Augment(shift=3.0), KEY, images)
    both = augment(Augment(shift=3.0, elastic=1e-6), KEY, images)
    np.testing.assert_allclose(both, shifted, atol=1e-5)


def test_integer_shift_moves_pixels_and_inserts_zeros():
    image = jnp.asarray(np.random.default_rng(0).random((28, 28, 1), np.float32))
    expected = np.zeros((28, 28, 1), np.float32)
    expected[3:, :-2] = image[:-3, 2:]
    np.testing.assert_allclose(move(image, shift=(3.0, -2.0)), expected, atol=1e-5)


def test_shift_is_uniform_along_each_axis():
    images = augment(Augment(shift=2.0), KEY, blobs(500))
    shifts = np.array(jax.jit(jax.vmap(centre))(images)).T - 14
    assert abs(shifts).max() < 2.01 and abs(shifts.mean(0)).max() < 0.15
    np.testing.assert_allclose(shifts.std(0), 2 / np.sqrt(3), rtol=0.1)


def test_rotation_is_anticlockwise_about_the_centre():
    # The centre of 28 pixels is at 13.5. The blob moves from 6 pixels to its right to 6 pixels above it.
    assert centre(move(blobs(1, 13.5, 19.5)[0], rotate=90.0)) == pytest.approx([7.5, 13.5], abs=1e-3)
    rotated = centre(move(blobs(1, 13.5, 19.5)[0], rotate=30.0))
    assert rotated == pytest.approx([13.5 - 6 * 0.5, 13.5 + 6 * 3**0.5 / 2], abs=0.05)


def test_scale_is_growth_about_the_centre():
    image = blobs(1, 13.5, 18.5)[0]
    grown = move(image, scale=0.2)
    assert centre(grown) == pytest.approx([13.5, 13.5 + 5 * 1.2], abs=0.05)
    assert float(grown.sum() / image.sum()) == pytest.approx(1.2**2, rel=0.02)


def test_elastic_displacement_is_smooth_with_unit_length_everywhere():
    displacements = jax.jit(jax.vmap(lambda key: elastic(key, (28, 28))))(jax.random.split(KEY, 2000))
    length = jnp.sqrt(jnp.mean(jnp.sum(displacements**2, axis=1), axis=0))
    np.testing.assert_allclose(length, np.ones((28, 28)), atol=0.06)
    # Noise smoothed by a Gaussian of 4 pixels has the correlation exp(−d² / (4·4²)) at a distance of d pixels.
    for distance in (1, 4, 8, 16):
        correlation = 2 * jnp.mean(displacements[:, :, distance:] * displacements[:, :, :-distance])
        assert float(correlation) == pytest.approx(np.exp(-(distance**2) / 64), abs=0.03)


def test_fields_may_be_traced():
    images = blobs()

    def augment_with(shift):
        config = fields.replace(Augment(rotate=10.0), "shift", shift, check=False)
        return eager_augment(config, KEY, images)

    changed = jax.jit(jax.vmap(augment_with))(jnp.array([0.0, 2.0]))
    np.testing.assert_allclose(changed[0], augment(Augment(rotate=10.0), KEY, images), atol=1e-5)
    np.testing.assert_allclose(changed[1], augment(Augment(rotate=10.0, shift=2.0), KEY, images), atol=1e-5)


def test_augment_runs_in_a_loop():
    images, keys = blobs(), jax.random.split(KEY, 3)
    looped = jax.lax.fori_loop(0, 3, lambda i, total: total + eager_augment(ALL, keys[i], images), 0 * images)
    np.testing.assert_allclose(looped, sum(augment(ALL, key, images) for key in keys), atol=1e-4)


def test_augment_lowers_for_every_platform():
    program = jax.jit(lambda key, images: augment(ALL, jax.random.wrap_key_data(key), images))
    arguments = jax.random.key_data(KEY), blobs()
    assert jax.export.export(program, platforms=("cpu", "cuda", "tpu"))(*arguments).platforms == ("cpu", "cuda", "tpu")
