"""The pictures show what they are given, with named axes, and nothing of them is cut off."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from conftest import small
from flax import nnx

import flaxmnist as fm
from flaxmnist import figures, models, plots
from flaxmnist.errors import UserError
from flaxmnist.parts import Sweep


@pytest.fixture(scope="module")
def run(few):
    """Three epochs of softmax regression: five batches each, evaluated in their middle."""
    return fm.fit(small(steps=15, evaluate_every=3), few)


@pytest.fixture(scope="module")
def network():
    return fm.CNN(features=(4, 20), kernel=(3,), space_to_depth=2, dense=16, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def answers(few):
    """Probabilities by which every third image is read as the class after its own."""
    labels = few.test.labels
    logits = np.random.default_rng(0).normal(0, 1, (len(labels), 10))
    logits[np.arange(len(labels)), labels] += 6
    logits[::3] = np.roll(logits[::3], 1, axis=1)
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


@pytest.fixture(scope="module")
def pictures(few, run, network, answers):
    """Every picture that is not of a sweep, by name."""
    images, labels = few.test
    many = {f"a run with a long name {number}": run for number in range(9)}
    return {
        "examples": plots.examples(images, labels),
        "digit": plots.digit(images[0], 7),
        "values": plots.values(images),
        "batch_costs": plots.batch_costs(run),
        "history": plots.history(run),
        "histories": plots.history(many),
        "accuracies": plots.accuracies(many),
        "weights": plots.weights(run.model),
        "filters": plots.weights(network),
        "units": plots.weights(fm.MLP(rngs=nnx.Rngs(0))),
        "feature_maps": plots.feature_maps(network, images[0]),
        "confusion": plots.confusion(np.arange(100).reshape(10, 10)),
        "mistakes": plots.mistakes(images, labels, answers),
        "calibration": plots.calibration(answers, labels),
    }


def test_nothing_is_cut_off_and_axes_are_named(pictures):
    for name, picture in pictures.items():
        picture.draw_without_rendering()
        inside = picture.get_tightbbox()
        width, height = picture.get_size_inches()
        assert inside.x0 >= -0.01 and inside.y0 >= -0.01, name
        assert inside.x1 <= width + 0.01 and inside.y1 <= height + 0.01, name
        for axes in picture.axes:
            if axes.axison and len(axes.get_xticks()) and len(axes.get_yticks()):
                assert axes.get_ylabel(), name
                assert axes.get_xlabel() or len(picture.axes) > 1, name


def test_notebooks_show_them_and_pyplot_is_not_touched(pictures):
    shown, size = pictures["digit"]._repr_png_()
    assert shown.startswith(b"\x89PNG") and size == {"width": 480, "height": 403}
    assert "matplotlib.pyplot" not in sys.modules


def test_batch_costs_are_a_curve_an_epoch(run, pictures):
    curves = pictures["batch_costs"].axes[0].get_lines()
    assert [list(curve.get_xdata()) for curve in curves] == [[0, 1, 2, 3, 4]] * 3
    costs = [record["loss"] for record in run.history if record["split"] == "train"]
    np.testing.assert_array_equal(np.concatenate([curve.get_ydata() for curve in curves]), costs)
    with pytest.raises(UserError, match="one batch is no curve"):
        plots.batch_costs(replace(run, history=run.history[:1]))


def test_history_has_cost_and_accuracy_of_training_and_validation(run, pictures):
    above, below = pictures["history"].axes
    means = [record["loss"] for record in run.history if record["split"] == "epoch"]
    validation = [record["accuracy"] for record in run.history if record["split"] == "validation"]
    training, evaluated = above.get_lines()[0], below.get_lines()[1]
    assert (list(training.get_xdata()), list(training.get_ydata())) == ([1, 2, 3], means)
    np.testing.assert_allclose(evaluated.get_xdata(), np.arange(3, 16, 3) / 5)
    np.testing.assert_allclose(evaluated.get_ydata(), 100 * np.array(validation))


def test_history_of_less_than_an_epoch_shows_its_batches(run):
    early = replace(run, history=[record for record in run.history if record["step"] < 5])
    curve = plots.history(early).axes[0].get_lines()[0]
    np.testing.assert_allclose(curve.get_xdata(), np.arange(5) / 5)


def test_weights_are_blue_for_and_red_against(run, pictures):
    tiles = [axes for axes in pictures["weights"].axes if axes.get_title()]
    assert [axes.get_title() for axes in tiles] == list("0123456789")
    shown = tiles[3].images[0]
    np.testing.assert_array_equal(shown.get_array(), np.asarray(run.model.dense.kernel[...])[3].reshape(28, 28))
    for value, stronger in ((0.9, 2), (-0.9, 0)):
        colour = shown.cmap(shown.norm(value * shown.norm.vmax))
        assert colour[stronger] > 2 * colour[2 - stronger]


def test_the_weights_of_a_stranger_are_not_drawn():
    with pytest.raises(UserError, match="Linear has no first layer"):
        plots.weights(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))


def test_confusion_has_the_counts_with_truth_in_rows(pictures):
    axes = pictures["confusion"].axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("answer", "true class")
    assert {(text.get_position(), text.get_text()) for text in axes.texts} >= {((3, 2), "23"), ((9, 0), "9")}


def test_mistakes_come_worst_first(few, answers, pictures):
    given = answers[np.arange(45), few.test.labels]
    worst = min(np.flatnonzero(answers.argmax(1) != few.test.labels), key=lambda i: given[i])
    tiles = pictures["mistakes"].axes
    assert len(tiles) == (answers.argmax(1) != few.test.labels).sum()
    np.testing.assert_array_equal(tiles[0].images[0].get_array(), few.test.images[worst, :, :, 0])
    assert tiles[0].get_title().startswith(f"true {few.test.labels[worst]}, p = ")
    assert f"read {answers[worst].argmax()}, p = {answers[worst].max():.3f}" in tiles[0].get_title()
    right = np.eye(10)[few.test.labels]
    with pytest.raises(UserError, match="no image was answered wrongly"):
        plots.mistakes(*few.test, right)


def test_calibration_has_accuracy_over_confidence():
    probabilities = np.array([[0.7, 0.3]] * 10 + [[0.05, 0.95]] * 4)
    labels = np.array([0] * 6 + [1] * 4 + [1] * 4, np.int32)
    above, below = plots.calibration(probabilities, labels, bins=10).axes
    np.testing.assert_allclose(above.get_lines()[1].get_xydata(), [[70, 60], [95, 100]])
    assert "error 8.57%" in above.get_title()
    assert below.patches[0].get_data().values.tolist() == [0] * 6 + [10, 0, 0, 4]


def test_any_name_may_stand_in_a_picture(run):
    """Neither mathematics, nor too long, nor hidden from the legend as matplotlib hides what begins with _."""
    names = ["a$^^$", "_hidden", "x" * 300, "日本語"]
    picture = plots.history(dict.fromkeys(names, run))
    assert figures.png(picture).startswith(b"\x89PNG")
    (legend,) = picture.legends
    assert len(legend.get_texts()) == 2 * len(names)
    assert all(len(text.get_text()) < 60 for text in legend.get_texts())


def test_runs_beyond_the_colours_differ_in_their_marks(run):
    lines = plots.history({str(number): run for number in range(30)}).axes[0].get_lines()
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}
    assert len(looks) == len(lines) == 60


def test_what_a_picture_cannot_be_of_is_said(few, run):
    with pytest.raises(UserError, match="Softmax has no feature maps: give a CNN"):
        plots.feature_maps(run.model, few.test.images[0])
    swept = Sweep({"experiments": ["e"], "members": [], "over": {"optimizer.b1": [0.8]}, "groups": [{}]}, {})
    with pytest.raises(UserError, match=r"typo was not swept: give one of optimizer\.b1"):
        plots.against(swept, "typo")


def test_counts_too_small_to_read_are_left_out():
    axes = plots.confusion(np.ones((100, 100), int)).axes[0]
    assert not axes.texts and len(axes.get_xticks()) == 25


def test_examples_are_a_row_a_class(few):
    grid = plots.examples(*few.train, each=2).axes[0].images[0].get_array()
    assert grid.shape == (10 * 29 - 1, 2 * 29 - 1)
    fives = few.train.images[few.train.labels == 5][:, :, :, 0]
    np.testing.assert_array_equal(grid[5 * 29 : 5 * 29 + 28, 29:], fives[1])


def test_filters_and_feature_maps_lie_in_rows(network, few, pictures):
    """The seventeenth of twenty features begins the second row."""
    filters = pictures["filters"].axes[0].images[0].get_array()
    np.testing.assert_array_equal(filters[:6, 7:13], models.first_weights(network)[1])
    _, second = network.feature_maps(few.test.images[:1])
    shown = pictures["feature_maps"].axes[2]
    assert shown.get_title() == "convolution 2: 20 features of 4×4"
    np.testing.assert_array_equal(shown.images[0].get_array()[5:9, :4], second[0, :, :, 16])


def test_values_tell_the_range(few):
    pixels = few.train.images
    assert f"70 images of 28×28 pixels, uint8: 0 to {pixels.max()}" in plots.values(pixels).axes[0].get_title()


def test_only_what_varies_names_the_settings_of_a_sweep():
    lines = [
        {"experiment": "e", "fields": {"train.steps": 5, "optimizer.b1": b1}, "failed": None} for b1 in (0.8, 0.8, 0.9)
    ]
    over = {"train.steps": [5], "optimizer.b1": [0.8, 0.9]}
    sweep = Sweep({"experiments": ["e"], "members": lines, "over": over}, {})
    assert plots.by_setting(sweep) == {"b1 0.8": [0, 1], "b1 0.9": [2]}
