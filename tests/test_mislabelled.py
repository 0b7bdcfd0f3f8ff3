"""MNIST's test images with labels that are known to be wrong."""

import os

import numpy as np
import pytest

from flaxmnist.data import mislabelled
from flaxmnist.data.sets import load_data
from flaxmnist.devices import evaluation
from flaxmnist.show import plots, text


@pytest.mark.skipif("FLAXMNIST_DATA" not in os.environ, reason="FLAXMNIST_DATA names no folder with MNIST")
def test_the_images_are_those_of_the_study():
    """The labels of the 15 images, as listed by the study."""
    mnist = load_data("mnist", os.environ["FLAXMNIST_DATA"])
    images, labels = mnist.test
    assert np.flatnonzero(mislabelled.known(images)).tolist() == list(mislabelled.IMAGES)
    assert labels[list(mislabelled.IMAGES)].tolist() == [8, 0, 9, 4, 2, 5, 6, 6, 5, 5, 0, 1, 4, 6, 5]
    assert not mislabelled.known(mnist.train.images).any()


def test_mistakes_at_wrong_labels_are_marked(digits, monkeypatch):
    images, labels = digits.test.images[:4], digits.test.labels[:4]
    monkeypatch.setattr(mislabelled, "known", lambda images: (images == digits.test.images[1]).all((1, 2, 3)))
    predictions = [labels[0], (labels[1] + 1) % 10, (labels[2] + 1) % 10, labels[3]]
    logits = 9 * np.eye(10, dtype=np.float32)[predictions]
    scores = evaluation.score_logits(logits, images, labels)
    assert scores.mistakes.tolist() == [1, 2]
    assert text.mistakes(scores) == "2 mistakes, 1 of them at labels known to be wrong (Northcutt et al. 2021)"
    titles = [axes.get_title() for axes in plots.mistakes(images, labels, scores.probabilities).axes]
    assert [title.endswith("\nlabel known to be wrong") for title in titles] == [True, False]
