"""Predictions and scores: every image is counted once, for any number of images and devices."""

import jax
import numpy as np
import pytest
from conftest import score, small
from flax import nnx

import flaxmnist as fm
from flaxmnist.core import steps
from flaxmnist.devices import evaluation, parallel
from flaxmnist.errors import UserError


@pytest.mark.parametrize("size", [1, 2, 249, 250, 251, 360])
def test_exactly_n_of_n_images_are_counted(size, digits):
    model = fm.Softmax(kernel_init=nnx.initializers.normal(), rngs=nnx.Rngs(0))
    images, labels = digits.test.images[:size], digits.test.labels[:size]
    scores = fm.evaluate(model, images, labels)
    logits = np.asarray(model(images))
    assert scores.count == scores.confusion.sum() == size
    assert scores.accuracy == (logits.argmax(1) == labels).mean()
    losses = -np.log(np.asarray(jax.nn.softmax(logits)))[np.arange(size), labels]
    np.testing.assert_allclose(scores.loss, losses.mean(), rtol=1e-4)


def test_confusion_matrix_has_true_classes_in_rows_and_predictions_in_columns():
    logits = np.array([[9, 0, 0], [9, 0, 0], [0, 0, 9]], np.float32)
    scores = score(logits, np.array([0, 1, 2]))
    assert scores.confusion.tolist() == [[1, 0, 0], [1, 0, 0], [0, 0, 1]]
    assert scores.accuracy == pytest.approx(2 / 3)


def test_loss_of_an_extreme_wrong_prediction_is_finite():
    scores = score(np.array([[1e4, 0]], np.float32), np.array([1]))
    assert scores.loss == 1e4


def test_loss_of_infinite_logits_is_nan():
    scores = score(np.array([[np.inf, 0]], np.float32), np.array([0]))
    assert np.isnan(scores.loss)


@pytest.mark.parametrize(("devices", "model_parallel"), [(1, 1), (8, 1), (8, 2)])
@pytest.mark.parametrize("size", [1, 17, 360])
def test_logits_do_not_depend_on_devices(devices, model_parallel, size, digits):
    state = steps.create_state(small("mlp"), (28, 28, 1), 10)
    model = state.model
    mesh = parallel.make_mesh(devices, model_parallel)
    sharded = jax.device_put(state, parallel.state_shardings(state, mesh)).model
    logits = evaluation.predict_logits(sharded, digits.test.images[:size])
    assert logits.shape == (size, 10)
    np.testing.assert_allclose(logits, evaluation.predict_logits(model, digits.test.images[:size]), rtol=0, atol=1e-5)


def test_no_images_are_an_error(digits):
    model = fm.Softmax(rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="there are no images to predict: pass at least one"):
        fm.predict(model, digits.test.images[:0])


@pytest.mark.parametrize(("model", "noun"), [(fm.CNN, "3 channels, but the weights need 1"), (fm.MLP, "2352 values")])
def test_images_of_another_shape_are_an_error(model, noun, digits):
    with pytest.raises(UserError, match=f"the images have {noun}"):
        fm.predict(model(rngs=nnx.Rngs(0)), digits.test.images[:2].repeat(3, axis=3))


def test_predict_returns_classes_and_probabilities(digits):
    model = fm.CNN(features=(2,), kernel=(3,), dense=8, rngs=nnx.Rngs(0))
    classes, probabilities = fm.predict(model, digits.test.images[:7])
    assert classes.shape == (7,)
    assert probabilities.shape == (7, 10)
    np.testing.assert_array_equal(classes, probabilities.argmax(1))
    np.testing.assert_allclose(probabilities.sum(1), 1)


# --- Averages over shifts -------------------------------------------------------------------------------------------


def test_a_prediction_over_shifts_is_the_mean_of_the_shifted_images(digits):
    model, images = fm.MLP(rngs=nnx.Rngs(0)), digits.test.images[:20]
    assert not images[:, [0, -1]].any() and not images[:, :, [0, -1]].any()  # so that rolling loses nothing
    moves = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    mean = np.mean([fm.predict(model, np.roll(images, move, (1, 2)))[1] for move in moves], axis=0)
    classes, probabilities = fm.predict(model, images, shifts=1)
    np.testing.assert_allclose(probabilities, mean, atol=1e-6)
    assert (classes == mean.argmax(1)).all()
    scores = fm.evaluate(model, images, digits.test.labels[:20], shifts=1)
    assert scores.accuracy == (classes == digits.test.labels[:20]).mean()


def test_shifts_lose_what_leaves_the_image(digits):
    image = np.full((1, 28, 28, 1), 255, np.uint8)
    copies = list(evaluation.shifted(image, 2))
    assert len(copies) == 25 and copies[0].sum() == 255 * 26 * 26 and (copies[12] == image).all()


@pytest.mark.parametrize("shifts", [-1, 5])
def test_shifts_have_bounds(shifts, digits):
    with pytest.raises(UserError, match=rf"shifts must be in \[0, 4\] pixels, but is {shifts}"):
        fm.predict(fm.Softmax(rngs=nnx.Rngs(0)), digits.test.images[:1], shifts=shifts)
