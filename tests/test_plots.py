"""Plots show their data with labelled axes, and nothing is cut off."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from conftest import fit_on_one, small
from flax import nnx

import flaxmnist as fm
from flaxmnist.config import Adam
from flaxmnist.core import models
from flaxmnist.errors import UserError
from flaxmnist.show import canvas, charts, plots


@pytest.fixture(scope="module")
def run(few):
    """Three epochs of softmax regression with five batches each, evaluated every three steps."""
    return fit_on_one(small(steps=15, evaluate_every=3), few)


@pytest.fixture(scope="module")
def sweep(few):
    """Two settings with two seeds each."""
    over = {"train.steps": [5], "optimizer.b1": [0.8, 0.9]}
    return fm.sweep(small(optimizer=Adam()), few, seeds=2, over=over, devices=1)


@pytest.fixture(scope="module")
def network():
    return fm.CNN(features=(4, 20), kernel=(3,), space_to_depth=2, dense=16, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def probabilities(few):
    """Probabilities by which every third image is predicted as the next class."""
    labels = few.test.labels
    logits = np.random.default_rng(0).normal(0, 1, (len(labels), 10))
    logits[np.arange(len(labels)), labels] += 6
    logits[::3] = np.roll(logits[::3], 1, axis=1)
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


@pytest.fixture(scope="module")
def figures_by_name(few, run, network, probabilities):
    """Every figure except those of sweeps."""
    images, labels = few.test
    runs = {f"a run with a long name {number}": run for number in range(9)}
    return {
        "examples": plots.examples(images, labels),
        "digit": plots.digit(images[0], 7),
        "values": plots.values(images),
        "batch_costs": plots.batch_costs(run),
        "step_metrics": plots.step_metrics(run),
        "history": plots.history(run),
        "histories": plots.history(runs),
        "accuracies": plots.accuracies(runs),
        "weights": plots.weights(run.model),
        "filters": plots.weights(network),
        "units": plots.weights(fm.MLP(rngs=nnx.Rngs(0))),
        "feature_maps": plots.feature_maps(network, images[0]),
        "confusion": plots.confusion(np.arange(100).reshape(10, 10)),
        "mistakes": plots.mistakes(images, labels, probabilities),
        "calibration": plots.calibration(probabilities, labels),
    }


def test_nothing_is_cut_off_and_axes_are_labelled(figures_by_name):
    for name, figure in figures_by_name.items():
        figure.draw_without_rendering()
        box = figure.get_tightbbox()
        width, height = figure.get_size_inches()
        assert box.x0 >= -0.01 and box.y0 >= -0.01, name
        assert box.x1 <= width + 0.01 and box.y1 <= height + 0.01, name
        for axes in figure.axes:
            if axes.axison and len(axes.get_xticks()) and len(axes.get_yticks()):
                assert axes.get_ylabel(), name
                assert axes.get_xlabel() or len(figure.axes) > 1, name


def test_notebooks_display_figures_without_pyplot(few, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # to import it raises ImportError
    content, size = plots.digit(few.test.images[0], 7)._repr_png_()
    assert content.startswith(b"\x89PNG") and size == {"width": 480, "height": 403}


def test_batch_costs_has_one_curve_per_epoch(run, figures_by_name):
    curves = figures_by_name["batch_costs"].axes[0].get_lines()
    assert [list(curve.get_xdata()) for curve in curves] == [[0, 1, 2, 3, 4]] * 3
    costs = [record["loss"] for record in run.history if record["split"] == "train"]
    np.testing.assert_array_equal(np.concatenate([curve.get_ydata() for curve in curves]), costs)
    with pytest.raises(UserError, match="fewer than two batches were recorded"):
        plots.batch_costs(replace(run, history=run.history[:1]))


def test_history_shows_training_and_validation_cost_and_accuracy(run, figures_by_name):
    top, bottom = figures_by_name["history"].axes
    means = [record["loss"] for record in run.history if record["split"] == "epoch"]
    validation = [record["accuracy"] for record in run.history if record["split"] == "validation"]
    training, evaluated = top.get_lines()[0], bottom.get_lines()[1]
    assert (list(training.get_xdata()), list(training.get_ydata())) == ([1, 2, 3], means)
    np.testing.assert_allclose(evaluated.get_xdata(), np.arange(3, 16, 3) / 5)
    np.testing.assert_allclose(evaluated.get_ydata(), 100 * np.array(validation))


def test_history_of_less_than_one_epoch_shows_batches(run):
    early = replace(run, history=[record for record in run.history if record["step"] < 5])
    curve = plots.history(early).axes[0].get_lines()[0]
    np.testing.assert_allclose(curve.get_xdata(), np.arange(5) / 5)


def test_positive_weights_are_blue_and_negative_ones_red(run, figures_by_name):
    tiles = [axes for axes in figures_by_name["weights"].axes if axes.get_title()]
    assert [axes.get_title() for axes in tiles] == list("0123456789")
    shown = tiles[3].images[0]
    np.testing.assert_array_equal(shown.get_array(), np.asarray(run.model.dense.kernel[...])[3].reshape(28, 28))
    for value, channel in ((0.9, 2), (-0.9, 0)):
        colour = shown.cmap(shown.norm(value * shown.norm.vmax))
        assert colour[channel] > 2 * colour[2 - channel]


def test_weights_of_other_models_are_not_drawn():
    with pytest.raises(UserError, match="the first layer of Linear cannot be drawn: use a Softmax, MLP or CNN"):
        plots.weights(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))


def test_confusion_has_true_classes_in_rows(figures_by_name):
    axes = figures_by_name["confusion"].axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("prediction", "true class")
    assert {(text.get_position(), text.get_text()) for text in axes.texts} >= {((3, 2), "23"), ((9, 0), "9")}


def test_mistakes_are_sorted_worst_first(few, probabilities, figures_by_name):
    wrong = np.flatnonzero(probabilities.argmax(1) != few.test.labels)
    worst = min(wrong, key=lambda index: probabilities[index, few.test.labels[index]])
    tiles = figures_by_name["mistakes"].axes
    assert len(tiles) == len(wrong)
    np.testing.assert_array_equal(tiles[0].images[0].get_array(), few.test.images[worst, :, :, 0])
    assert tiles[0].get_title().startswith(f"true {few.test.labels[worst]} (")
    assert f"predicted {probabilities[worst].argmax()} ({probabilities[worst].max():.3f})" in tiles[0].get_title()
    with pytest.raises(UserError, match="all predictions are correct"):
        plots.mistakes(*few.test, np.eye(10)[few.test.labels])


def test_calibration_shows_accuracy_against_confidence():
    probabilities = np.array([[0.7, 0.3]] * 10 + [[0.05, 0.95]] * 4)
    labels = np.array([0] * 6 + [1] * 4 + [1] * 4, np.int32)
    top, bottom = plots.calibration(probabilities, labels, bins=10).axes
    np.testing.assert_allclose(top.get_lines()[1].get_xydata(), [[70, 60], [95, 100]])
    assert "error 8.57%" in top.get_title()
    assert bottom.patches[0].get_data().values.tolist() == [0] * 6 + [10, 0, 0, 4]


def test_any_run_name_can_be_a_label(run):
    """Not parsed as mathematics, not too long, and not hidden from the legend because of a leading "_"."""
    names = ["a$^^$", "_hidden", "x" * 300, "日本語"]
    figure = plots.history(dict.fromkeys(names, run))
    assert canvas.png(figure).startswith(b"\x89PNG")
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 2 * len(names)
    assert all(len(text.get_text()) < 60 for text in legend.get_texts())


def test_more_runs_than_colours_differ_in_markers(run):
    lines = plots.history({str(number): run for number in range(30)}).axes[0].get_lines()
    styles = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}
    assert len(styles) == len(lines) == 60


def test_unsuitable_models_and_fields_are_rejected(few, run, sweep):
    with pytest.raises(UserError, match="Softmax has no feature maps: use a CNN"):
        plots.feature_maps(run.model, few.test.images[0])
    with pytest.raises(UserError, match=r"typo was not swept: use one of train\.steps, optimizer\.b1"):
        plots.against(sweep, "typo")


def test_large_confusion_matrices_have_no_numbers():
    axes = plots.confusion(np.ones((100, 100), int)).axes[0]
    assert not axes.texts and len(axes.get_xticks()) == 25


def test_examples_has_one_row_per_class(few):
    grid = plots.examples(*few.train, per_class=2).axes[0].images[0].get_array()
    assert grid.shape == (10 * 29 - 1, 2 * 29 - 1)
    fives = few.train.images[few.train.labels == 5][:, :, :, 0]
    np.testing.assert_array_equal(grid[5 * 29 : 5 * 29 + 28, 29:], fives[1])


def test_filters_and_feature_maps_are_tiled(network, few, figures_by_name):
    """Feature 17 of 20 starts the second row."""
    filters = figures_by_name["filters"].axes[0].images[0].get_array()
    np.testing.assert_array_equal(filters[:6, 7:13], models.first_weights(network)[1])
    _, second = network.feature_maps(few.test.images[:1])
    axes = figures_by_name["feature_maps"].axes[2]
    assert axes.get_title() == "convolution 2: 20 features of 4×4"
    np.testing.assert_array_equal(axes.images[0].get_array()[5:9, :4], second[0, :, :, 16])


def test_weights_of_a_softmax_for_colours_are_named_by_class_and_channel():
    model = models.Softmax(shape=(12, 20, 2), classes=3, rngs=nnx.Rngs(0))
    figure = plots.weights(model, (12, 20, 2), names=("a", "b", "c"))
    titles = [axes.get_title() for axes in figure.axes[:6]]
    assert titles == [f"{name}, channel {channel}" for name in "abc" for channel in (0, 1)]


def test_values_has_the_range_in_its_title(few):
    pixels = few.train.images
    assert f"70 images of 28×28 pixels, uint8: 0 to {pixels.max()}" in plots.values(pixels).axes[0].get_title()


def test_settings_with_long_names_are_not_mixed(sweep):
    names = [f"optimizer.{'long' * 9}_{field}" for field in "abc"]
    values = [(1, 1, 1), (1, 2, 1)]
    members = [replace(sweep.members[0], fields=dict(zip(names, value, strict=True))) for value in values]
    over = {name: [1, 2] for name in names}
    mixed = replace(sweep, result=replace(sweep.result, members=tuple(members), over=over))
    assert list(charts.trials_by_setting(mixed).values()) == [[0], [1]]


def test_settings_are_named_by_the_fields_that_vary(sweep):
    assert charts.trials_by_setting(sweep) == {"b1 0.8": [0, 1], "b1 0.9": [2, 3]}
    failed = [replace(trial, failed="diverged") for trial in sweep.members[2:]]
    failed = replace(sweep, result=replace(sweep.result, members=(*sweep.members[:2], *failed)))
    assert charts.trials_by_setting(failed) == {"b1 0.8": [0, 1]}
