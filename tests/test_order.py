"""Which images a step sees."""

import dataclasses

import numpy as np
import pytest

from flaxmnist import config, order
from flaxmnist.errors import UserError
from flaxmnist.order import batch_indices, permutation, resolve, steps_per_epoch


def experiment(batch_size=4, steps: int | None = 100, epochs: int | None = None, seed=0, **data) -> config.Config:
    return config.Config(
        name="order",
        seed=seed,
        model=config.Softmax(),
        optimizer=config.SGD(learning_rate=0.1),
        data=config.Data(**data),
        train=config.Train(batch_size=batch_size, steps=steps, epochs=epochs),
    )


def test_permutation_is_pinned():
    # These numbers are what every published result was trained with: a change of them is a change of every result.
    assert permutation(0, 0, 10).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert permutation(7, 3, 10).tolist() == [2, 5, 9, 7, 3, 0, 6, 8, 4, 1]


def test_permutation_holds_every_image_once():
    order = permutation(1, 2, 60_000)
    assert order.dtype == np.int32
    assert np.array_equal(np.sort(order), np.arange(60_000))


def test_permutation_differs_by_seed_and_by_epoch():
    orders = {tuple(permutation(seed, epoch, 100)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_permutation_cannot_be_changed_for_the_next_caller():
    with pytest.raises(ValueError, match="read-only"):
        permutation(0, 0, 10)[0] = 1


@pytest.mark.parametrize(
    ("last_batch", "count", "expected"),
    [("keep", 8, 2), ("keep", 9, 3), ("keep", 3, 1), ("drop", 8, 2), ("drop", 11, 2), ("drop", 4, 1)],
)
def test_steps_per_epoch(last_batch: str, count: int, expected: int):
    assert steps_per_epoch(experiment(batch_size=4, last_batch=last_batch), count) == expected


def test_dropping_the_only_batch_is_refused():
    with pytest.raises(UserError, match=r"train\.batch_size 4 .* 3 training images.*last-batch keep"):
        steps_per_epoch(experiment(batch_size=4, last_batch="drop"), 3)


def test_resolve_gives_the_length_in_steps():
    assert resolve(experiment(steps=17), 9) == experiment(steps=17)
    assert resolve(experiment(steps=None, epochs=5), 9) == experiment(steps=15)
    dropping = experiment(steps=None, epochs=5, last_batch="drop")
    assert resolve(dropping, 9) == experiment(steps=10, last_batch="drop")


def test_an_epoch_is_its_permutation_with_the_short_last_batch_filled_up():
    indices = batch_indices(experiment(batch_size=4, seed=3), 10, 3, 6)
    assert indices.dtype == np.int32
    assert indices.shape == (3, 4)
    assert indices.ravel().tolist() == [*permutation(3, 1, 10), -1, -1]


def test_a_dropped_last_batch_leaves_no_gap():
    indices = batch_indices(experiment(batch_size=4, last_batch="drop"), 10, 0, 4)
    assert indices.ravel().tolist() == [*permutation(0, 0, 10)[:8], *permutation(0, 1, 10)[:8]]


def test_file_order_is_the_same_in_every_epoch():
    indices = batch_indices(experiment(batch_size=4, order="file"), 6, 0, 4)
    assert indices.tolist() == [[0, 1, 2, 3], [4, 5, -1, -1]] * 2


def test_a_batch_larger_than_the_data():
    indices = batch_indices(experiment(batch_size=8), 3, 0, 2)
    assert [sorted(row) for row in indices.tolist()] == [[-1] * 5 + [0, 1, 2]] * 2


@pytest.mark.parametrize("last_batch", ["keep", "drop"])
@pytest.mark.parametrize("order", ["shuffled", "file"])
def test_a_run_cut_anywhere_sees_the_same_images(last_batch: str, order: str):
    arguments = experiment(batch_size=4, last_batch=last_batch, order=order), 11
    whole = batch_indices(*arguments, 0, 12)
    for cut in range(13):
        parts = [batch_indices(*arguments, 0, cut), batch_indices(*arguments, cut, 12)]
        assert np.array_equal(np.concatenate(parts), whole)


def test_order_seed_stands_in_for_the_seed():
    by_seed = batch_indices(experiment(seed=5), 20, 0, 5)
    by_order_seed = batch_indices(experiment(seed=1, order_seed=5), 20, 0, 5)
    zero = experiment(seed=5, order_seed=0)
    assert np.array_equal(by_seed, by_order_seed)
    assert np.array_equal(batch_indices(zero, 20, 0, 5), batch_indices(dataclasses.replace(zero, seed=9), 20, 0, 5))
    assert not np.array_equal(by_seed, batch_indices(zero, 20, 0, 5))


def test_equal_keys_keep_their_order():
    """However the machine sorts: two of 60,000 random keys are equal once in ten thousand million epochs."""
    keys = np.random.Philox(key=1).random_raw(5000) % 7
    assert order.sort(keys).tolist() == sorted(range(5000), key=lambda place: keys[place])
    distinct = np.random.Philox(key=2).random_raw(5000)
    np.testing.assert_array_equal(order.sort(distinct), np.argsort(distinct, kind="stable"))
