"""The worked examples of the tutorials, and the difference between the two forms of the cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxmnist.config import FocalLoss, Objective
from flaxmnist.core.metrics import log_softmax
from flaxmnist.core.objective import correct, cross_entropy

INTEGER = Objective()
ONE_HOT = Objective(labels="one_hot")
PROBABILITIES = Objective(form="probabilities", labels="one_hot")


def test_softmax_of_the_tutorial():
    expected = [0.16838508, 0.205666, 0.25120102, 0.37474789]
    softmax = np.exp(log_softmax(np.array([[0.1, 0.3, 0.5, 0.9]])))
    np.testing.assert_allclose(softmax, [expected], rtol=1e-6)


@pytest.mark.parametrize("objective", [INTEGER, ONE_HOT, PROBABILITIES])
def test_cross_entropy_of_the_tutorial(objective):
    """The target [1, 0, 0] with probabilities [.5, .3, .2] gives −log .5."""
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.2]]))
    np.testing.assert_allclose(cross_entropy(objective, logits, jnp.array([0])), [-np.log(0.5)], rtol=1e-6)


def test_one_hot_of_three():
    """The gradient of the cost is the softmax minus [0, 0, 0, 1, 0, 0, 0, 0, 0, 0]."""
    gradient = jax.grad(lambda logits: cross_entropy(ONE_HOT, logits, jnp.array([3]))[0])(jnp.zeros((1, 10)))
    np.testing.assert_allclose(0.1 - gradient, [[0, 0, 0, 1, 0, 0, 0, 0, 0, 0]], atol=1e-6)


def test_all_forms_agree_if_nothing_overflows(normal):
    logits = 3 * normal(20, 10)
    labels = jnp.arange(20) % 10
    stable = cross_entropy(INTEGER, logits, labels)
    np.testing.assert_allclose(cross_entropy(ONE_HOT, logits, labels), stable, rtol=1e-5)
    np.testing.assert_allclose(cross_entropy(PROBABILITIES, logits, labels), stable, rtol=1e-5)


def test_only_the_stable_form_is_finite_for_large_logits():
    logits, labels = jnp.array([[200.0, 0.0]]), jnp.array([1])
    assert cross_entropy(INTEGER, logits, labels) == 200
    assert not np.isfinite(cross_entropy(PROBABILITIES, logits, labels))


def test_label_smoothing_mixes_in_the_uniform_distribution(normal):
    logits, labels = normal(5, 4), jnp.array([0, 1, 2, 3, 0])
    smooth = cross_entropy(Objective(labels="one_hot", label_smoothing=0.2), logits, labels)
    uniform = sum(cross_entropy(ONE_HOT, logits, jnp.full(5, label)) for label in range(4)) / 4
    np.testing.assert_allclose(smooth, 0.8 * cross_entropy(ONE_HOT, logits, labels) + 0.2 * uniform, rtol=1e-5)


def test_correct():
    assert correct(jnp.array([[1.0, 2.0], [3.0, 0.0]]), jnp.array([1, 1])).tolist() == [True, False]


def test_focal_loss_weights_the_cross_entropy_by_the_missing_probability():
    logits, labels = jnp.log(jnp.array([[0.5, 0.3, 0.2], [0.9, 0.05, 0.05]])), jnp.array([0, 0])
    expected = [-(0.5**2) * np.log(0.5), -(0.1**2) * np.log(0.9)]
    np.testing.assert_allclose(FocalLoss().losses(logits, labels), expected, rtol=1e-5)
    np.testing.assert_allclose(FocalLoss(gamma=0.0).losses(logits, labels), -np.log([0.5, 0.9]), rtol=1e-5)
    gradient = jax.grad(lambda logits: FocalLoss(gamma=0.5).losses(logits, labels).sum())(
        jnp.array([[100.0, 0, 0]] * 2)
    )
    assert np.isfinite(gradient).all()
