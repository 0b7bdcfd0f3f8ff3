"""The order of the training images, and the images of each step."""

import dataclasses

import numpy as np
import pytest

from flaxmnist import config
from flaxmnist.data import order
from flaxmnist.data.order import batch_indices, permutation, resolve_length, steps_per_epoch
from flaxmnist.errors import UserError


def experiment(batch_size=4, steps: int | None = 100, epochs: int | None = None, seed=0, **data) -> config.Config:
    return config.Config(
        name="order",
        seed=seed,
        model=config.SoftmaxConfig(),
        optimizer=config.SGD(learning_rate=0.1),
        data=config.Data(**data),
        train=config.Train(batch_size=batch_size, steps=steps, epochs=epochs),
    )


def test_permutation_is_pinned():
    # Every published result was trained with these numbers: changing them changes every result.
    assert permutation(0, 0, 10).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert permutation(7, 3, 10).tolist() == [2, 5, 9, 7, 3, 0, 6, 8, 4, 1]


def test_permutation_contains_every_image_once():
    order = permutation(1, 2, 60_000)
    assert order.dtype == np.int32
    assert np.array_equal(np.sort(order), np.arange(60_000))


def test_permutation_depends_on_seed_and_epoch():
    orders = {tuple(permutation(seed, epoch, 100)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_cached_permutation_is_read_only():
    with pytest.raises(ValueError, match="read-only"):
        permutation(0, 0, 10)[0] = 1


@pytest.mark.parametrize(
    ("last_batch", "count", "expected"),
    [("keep", 8, 2), ("keep", 9, 3), ("keep", 3, 1), ("drop", 8, 2), ("drop", 11, 2), ("drop", 4, 1)],
)
def test_steps_per_epoch(last_batch: str, count: int, expected: int):
    assert steps_per_epoch(experiment(batch_size=4, last_batch=last_batch), count) == expected


def test_dropping_the_only_batch_is_an_error():
    with pytest.raises(UserError, match=r"train\.batch_size 4 .* 3 training images.*last-batch keep"):
        steps_per_epoch(experiment(batch_size=4, last_batch="drop"), 3)


def test_resolve_length_converts_epochs_to_steps():
    assert resolve_length(experiment(steps=17), 9) == experiment(steps=17)
    assert resolve_length(experiment(steps=None, epochs=5), 9) == experiment(steps=15)
    dropping = experiment(steps=None, epochs=5, last_batch="drop")
    assert resolve_length(dropping, 9) == experiment(steps=10, last_batch="drop")


def test_an_epoch_is_its_permutation_with_a_padded_last_batch():
    indices = batch_indices(experiment(batch_size=4, seed=3), 10, 3, 6)
    assert indices.dtype == np.int32
    assert indices.shape == (3, 4)
    assert indices.ravel().tolist() == [*permutation(3, 1, 10), -1, -1]


def test_no_gap_after_a_dropped_last_batch():
    indices = batch_indices(experiment(batch_size=4, last_batch="drop"), 10, 0, 4)
    assert indices.ravel().tolist() == [*permutation(0, 0, 10)[:8], *permutation(0, 1, 10)[:8]]


def test_file_order_is_the_same_in_every_epoch():
    indices = batch_indices(experiment(batch_size=4, order="file"), 6, 0, 4)
    assert indices.tolist() == [[0, 1, 2, 3], [4, 5, -1, -1]] * 2


def test_a_batch_larger_than_the_training_set_is_padded():
    indices = batch_indices(experiment(batch_size=8), 3, 0, 2)
    assert [sorted(row) for row in indices.tolist()] == [[-1] * 5 + [0, 1, 2]] * 2


@pytest.mark.parametrize("last_batch", ["keep", "drop"])
@pytest.mark.parametrize("order", ["shuffled", "file"])
def test_a_run_split_at_any_step_gets_the_same_images(last_batch: str, order: str):
    arguments = experiment(batch_size=4, last_batch=last_batch, order=order), 11
    expected = batch_indices(*arguments, 0, 12)
    for stop in range(13):
        halves = [batch_indices(*arguments, 0, stop), batch_indices(*arguments, stop, 12)]
        assert np.array_equal(np.concatenate(halves), expected)


def test_order_seed_replaces_the_seed():
    by_seed = batch_indices(experiment(seed=5), 20, 0, 5)
    by_order_seed = batch_indices(experiment(seed=1, order_seed=5), 20, 0, 5)
    zero = experiment(seed=5, order_seed=0)
    assert np.array_equal(by_seed, by_order_seed)
    assert np.array_equal(batch_indices(zero, 20, 0, 5), batch_indices(dataclasses.replace(zero, seed=9), 20, 0, 5))
    assert not np.array_equal(by_seed, batch_indices(zero, 20, 0, 5))


def test_equal_keys_keep_their_order():
    """On any machine. Two of 60,000 random keys are equal once in ten billion epochs, so this needs its own test."""
    keys = np.random.Philox(key=1).random_raw(5000) % 7
    assert order.argsort(keys).tolist() == sorted(range(5000), key=lambda index: keys[index])
    distinct = np.random.Philox(key=2).random_raw(5000)
    np.testing.assert_array_equal(order.argsort(distinct), np.argsort(distinct, kind="stable"))
