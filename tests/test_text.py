"""Text tables: aligned, complete, and with the numbers of the results they show."""

import re
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import evaluated, score, small
from flax import nnx
from sklearn.metrics import precision_recall_fscore_support
from test_onnx import Calls

import flaxmnist as fm
from flaxmnist.config import Constant, MLPConfig
from flaxmnist.show import text
from flaxmnist.sweeps.ensembles import Ensemble


@pytest.fixture(scope="module")
def run(few):
    return fm.fit(small("mlp"), few, devices=1)


@pytest.fixture(scope="module")
def sweep(few):
    """Two settings with three seeds each."""
    return fm.sweep(small(steps=3), few, seeds=3, over={"optimizer.learning_rate": [0.01, 0.1]}, devices=1)


def cells(line: str) -> list[str]:
    """Return the cells of a line of a table, which are at least two spaces apart."""
    return re.split(r" {2,}", line.rstrip())


def test_columns_are_aligned():
    table = text.format_table([("name", "n"), ("a", "1,000"), ("longer", "5")])
    assert table.splitlines() == ["name        n", "a       1,000", "longer      5"]


# --- Experiments and models -----------------------------------------------------------------------------------------


def test_the_parameter_table_has_paths_shapes_and_totals(run):
    lines = [cells(line) for line in text.parameter_table(run.state.params).splitlines()]
    assert lines == [
        ["parameter", "shape", "count", "bytes"],
        ["layers.0.bias", "32", "32", "128"],
        ["layers.0.kernel", "32×784", "25,088", "100,352"],
        ["layers.1.bias", "10", "10", "40"],
        ["layers.1.kernel", "10×32", "320", "1,280"],
        ["all", "25,450", "101,800"],
    ]


def test_the_parameter_table_takes_any_module():
    table = text.parameter_table(nnx.to_pure_dict(nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))))
    assert cells(table.splitlines()[-1]) == ["all", "9", "36"]


def test_the_table_of_layers_has_outputs_operations_and_bytes():
    """The convolution has 28·28·4 outputs of 9 inputs each, the first product 16 of 14·14·4; 2 operations an input."""
    model = fm.CNN(features=(4,), kernel=(3,), dense=16, rngs=nnx.Rngs(0))
    first, second, third, total = map(cells, text.layer_table(model, (28, 28, 1)).splitlines()[1:])
    assert first == ["convolution", "28×28×4", "0.056", "12,544", "144"]
    assert second == ["product", "16", "0.025", "64", "50,176"]
    assert third == ["product", "10", "0.000", "40", "640"]
    assert float(total[1]) > 0.081
    assert "only JAX can compute: sort" in text.layer_table(Calls(lambda x: jnp.sort(x, axis=1)), (28, 28, 1))


def test_an_experiment_is_described_with_its_memory(few):
    """The memory is that of the state, the training images and their labels, and temporary arrays."""
    description = text.describe_experiment(small(epochs=2, steps=None), few)
    assert '"steps": 10' in description and "steps                10 of 16 images" in description
    numbers = re.search(r"memory +(\S+) MB: state (\S+) MB, training images (\S+) MB, temporary (\S+) MB", description)
    assert numbers is not None
    total, *parts = map(float, numbers.groups())
    assert total == pytest.approx(sum(parts), abs=0.2)
    assert parts[1] == pytest.approx((few.train.images.nbytes + few.train.labels.nbytes) / 1e6, abs=0.05)


# --- Runs -----------------------------------------------------------------------------------------------------------


def test_the_summary_of_a_run_ends_with_commands_to_try_next(run):
    summary = text.run_summary(
        run, Path("runs/a b"), Path("my data"), Path("experiment.py"), "flaxmnist {}".format
    ).splitlines()
    result = run.result
    assert (
        summary[0]
        == f"test accuracy {result.test_accuracy:.4f} of 45 images, loss {result.test_loss:.4f}, after 20 steps"
    )
    assert text.parameter_table(run.state.params) in "\n".join(summary)
    assert summary[-4:] == [
        "run folder runs/a b",
        "next: flaxmnist evaluate 'runs/a b' --data-dir 'my data'",
        "      flaxmnist report 'runs/a b' --data-dir 'my data'",
        "      flaxmnist predict 'runs/a b' IMAGE.png",
    ]
    without_data = text.run_summary(run, Path("run"), None, Path("experiment.py"), "flaxmnist {}".format)
    assert "next: flaxmnist evaluate run\n" in without_data


def test_the_parameters_of_a_deep_network_are_cut_in_the_middle(few):
    deep = fm.fit(small(MLPConfig(hidden=(4,) * 20, kernel_init=Constant(0.1)), steps=1), few, devices=1)
    summary = text.run_summary(deep, Path("run"), None, Path("experiment.py"), str).splitlines()
    table = summary[summary.index("…") - 15 : summary.index("…") + 15]
    assert table[0].startswith("parameter ") and table[-1].startswith("all ")
    assert len(summary) < 60


def test_the_time_table_adds_up():
    seconds = {"import": 1.0, "data": 0.5, "compile": 2.0, "train": 4.0, "evaluate": 0.25, "checkpoint": 0.25}
    lines = text.time_table(seconds | {"total": 10.0}).splitlines()
    assert cells(lines[0]) == ["time", "seconds", "share"]
    table = {name: (float(spent), percent) for name, spent, percent in map(cells, lines[1:])}
    assert list(table) == ["import", "data", "compile", "train", "evaluate", "save", "other", "all"]
    assert table["save"] == (0.25, "2%") and table["other"] == (2.0, "20%") and table["all"] == (10.0, "100%")
    assert sum(spent for spent, _ in table.values()) == 2 * 10.0


def test_more_measured_than_total_seconds_leave_no_negative_rest():
    """Two activities may overlap by rounding."""
    seconds = dict.fromkeys(("import", "data", "compile", "train", "evaluate", "checkpoint"), 1.0)
    assert cells(text.time_table(seconds | {"total": 5.9}).splitlines()[-2]) == ["other", "0.00", "0%"]


# --- Predictions ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scores():
    """Scores of random predictions of four classes; the last one has no images, and the third no predictions."""
    logits = np.random.default_rng(0).normal(0, 1, (40, 4))
    logits[:, 2] = -9
    return score(logits, np.arange(40) % 3)


def test_scores_of_each_class_are_those_of_scikit_learn(scores):
    labels, predictions = np.divmod(np.arange(16), 4)
    expected = precision_recall_fscore_support(
        labels, predictions, sample_weight=scores.confusion.reshape(-1), zero_division=0.0
    )
    header, *lines = map(cells, text.class_scores(scores).splitlines())
    assert header == ["class", "precision", "recall", "F1", "images"]
    for label, line in enumerate(lines):
        assert line[0] == str(label) and line[4] == f"{expected[3][label]:.0f}"
        assert line[1:4] == [f"{expected[i][label]:.4f}" for i in range(3)]
    assert lines[2][1:4] == ["0.0000"] * 3 and lines[3][2:] == ["0.0000", "0.0000", "0"]


def test_the_class_report_ends_with_the_confusion_matrix(scores):
    lines = text.class_report(scores).splitlines()
    top2, error = (scores.scores[name] for name in ("top2_accuracy", "calibration_error"))
    first, last = f"accuracy {scores.accuracy:.4f}, loss {scores.loss:.4f}", f"calibration error {error:.4f}, 40 images"
    assert lines[0] == f"{first}, top-2 accuracy {top2:.4f}, {last}"
    assert lines[1] == f"{round(40 * (1 - scores.accuracy))} mistakes"
    assert cells(lines[-5]) == ["true \\ predicted", "0", "1", "2", "3"]
    assert [cells(line) for line in lines[-4:]] == [
        [str(label), *map(str, row)] for label, row in enumerate(scores.confusion)
    ]


def test_image_is_shown_next_to_its_prediction():
    image = np.zeros((28, 28, 1), np.uint8)
    image[4:6, 10], image[7, 3] = 255, 128
    lines = text.show_prediction("a.png", image, np.array([0.25, 0.75, *[0.0] * 8]), list("0123456789")).splitlines()
    assert len(lines) == 14
    assert lines[2][11] == "█" and lines[3][4] == "░", "two rows of pixels per line"
    assert {line[1:29] for line in lines} - {lines[2][1:29], lines[3][1:29]} == {" " * 28}
    assert lines[0].endswith("│  a.png: 1")
    assert lines[3].endswith(f"│  1  0.7500  {15 * '▪'}") and lines[11].endswith("│  9  0.0000")


def test_only_the_ten_most_probable_classes_are_shown():
    probabilities = np.full(26, 0.001)
    probabilities[16:] = 0.1
    shown = text.show_prediction(
        "a.png", np.zeros((28, 28, 1), np.uint8), probabilities, list(map(str, range(len(probabilities))))
    )
    assert re.findall(r"│  (\d+)  0\.1000", shown) == [str(label) for label in range(16, 26)]


# --- Sweeps ---------------------------------------------------------------------------------------------------------


def test_a_sweep_is_summarised_by_setting(sweep):
    lines = text.sweep_report(sweep).splitlines()
    assert lines[0] == "validation accuracy by setting"
    assert cells(lines[2]) == ["setting", "n", "mean", "std", "95 % interval", "min", "max", "failed"]
    for line, group in zip(lines[3:5], sweep.groups, strict=True):
        low, high = group.ci95
        numbers = [f"{group.mean:.4f}", f"{group.std:.4f}", f"{low:.4f} – {high:.4f}"]
        assert cells(line) == [group.title, "3", *numbers, f"{group.min:.4f}", f"{group.max:.4f}"]
    best, comparison = sweep.result.best, sweep.result.comparisons[0]
    assert lines[6] == f"best: {best.title}: test accuracy {best.test.mean:.4f} ± {best.test.std:.4f} (std), n = 3"
    titles = f"{comparison.title} − {best.title}, same seeds: "
    assert lines[7].startswith(f"{titles}accuracy {comparison.mean:+.4f} [")
    assert f"), loss {comparison.loss.mean:+.4f} [" in lines[7]
    assert lines[8] == f"{sweep.result.replica_steps_per_second:,.0f} steps/s, all trials together"


def test_failed_trials_are_listed(sweep):
    first, *others = sweep.result.members
    members = (replace(first, failed="the loss is nan"), *others)
    groups = (replace(sweep.groups[0], n=2, failed=1), *sweep.groups[1:])
    failed = replace(sweep, result=replace(sweep.result, members=members, groups=groups))
    lines = text.sweep_report(failed).splitlines()
    assert cells(lines[3])[-1] == "1" and "failed: small optimizer.learning_rate=0.01, seed 0: the loss is nan" in lines


def test_a_single_seed_has_no_spread(few):
    lines = text.sweep_report(fm.sweep(small(steps=3), few, seeds=1, devices=1)).splitlines()
    assert len(cells(lines[3])) == 5, "no std and no interval"
    assert lines[5].endswith(", n = 1") and "±" not in lines[5]


def test_the_ensemble_is_compared_with_its_members():
    def scores(accuracy, error):
        return evaluated(45, accuracy=accuracy, calibration_error=error)

    members = [scores(0.8, 0.05), scores(0.9, 0.15)]
    lines = text.ensemble_report(Ensemble("small", members, scores(0.95, 0.025))).splitlines()
    assert [cells(line) for line in lines] == [
        ["small", "accuracy", "calibration error"],
        ["members, mean", "0.8500", "0.1000"],
        ["members, std", "0.0707", "0.0707"],
        ["members, min", "0.8000", "0.0500"],
        ["members, max", "0.9000", "0.1500"],
        ["ensemble of 2", "0.9500", "0.0250"],
        ["45 images; the ensemble makes 0 mistakes"],
    ]
    alone = text.ensemble_report(Ensemble("small", members[:1], members[0])).splitlines()
    assert cells(alone[2]) == ["members, std"]
