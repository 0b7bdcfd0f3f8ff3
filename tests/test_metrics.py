"""The metrics of an evaluation: their values, and everything that a new one reaches."""

import json

import numpy as np
import pytest
from conftest import fit_on_one, main, score, small

import flaxmnist as fm
from flaxmnist.core import metrics
from flaxmnist.core.metrics import METRICS, Metric, goodness
from flaxmnist.errors import UserError
from flaxmnist.store.tensorboard import read_events


def test_metrics_by_hand():
    """The labels are first, second, second and third; the confidences lie in two bins."""
    probabilities = np.array([[0.9, 0.06, 0.04], [0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.9, 0.06, 0.04]], np.float32)
    scores = score(np.log(probabilities), np.array([0, 1, 1, 2])).scores
    assert scores["accuracy"] == 0.25 and scores["top2_accuracy"] == 0.75
    assert scores["loss"] == pytest.approx(-np.log(0.9 * 0.3 * 0.3 * 0.04) / 4)
    assert scores["calibration_error"] == pytest.approx((abs(1 - 1.8) + abs(0 - 1.0)) / 4)


def test_of_equal_logits_the_first_are_the_most_probable():
    scores = score(np.zeros((4, 4), np.float32), np.arange(4)).scores
    assert scores["accuracy"] == 0.25 and scores["top2_accuracy"] == 0.5


def test_calibration_error_by_hand():
    """Two predictions at 0.9, one of them correct, and two at 0.6, both correct: each pair is off by 0.4."""
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.4, 0.6]])
    assert metrics.reliability(probabilities, np.array([0, 1, 1, 1], np.int32)).error() == pytest.approx(0.4)
    assert metrics.reliability(np.eye(3), np.arange(3, dtype=np.int32)).error() == 0


def test_larger_is_better_for_the_goodness():
    scores = {"loss": 0.25, "accuracy": 0.75}
    assert (goodness("loss", scores), goodness("accuracy", scores)) == (-0.25, 0.75)


@pytest.mark.slow
def test_a_new_metric_reaches_records_results_pages_and_the_choice_of_the_best(few, tmp_path, monkeypatch, capsys):
    """The new one prefers the first checkpoints, because it grows with the loss."""
    monkeypatch.setitem(METRICS, "doubt", Metric(lambda logits, labels: 2 * metrics.cross_entropy(logits, labels)))
    config = small(steps=50, evaluate_every=5, checkpoint_every=5, keep=1, monitor="doubt", patience=2)
    run = fit_on_one(config, few, tmp_path / "run")
    assert run.result.steps == 15, "no improvement after the first evaluation"
    evaluated = [record for record in run.history if record["split"] in ("validation", "test")]
    assert all(record["doubt"] == pytest.approx(2 * record["loss"]) for record in evaluated)
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert [result[split]["doubt"] for split in ("validation", "test")] == [r["doubt"] for r in evaluated[-2:]]
    assert fm.load_run(tmp_path / "run", "best").state.step == 5
    (file,) = (tmp_path / "run/tensorboard").iterdir()
    tags = {value.tag for event in read_events(file)[0] for value in event.summary.value}
    assert {"validation/doubt", "test/doubt"} <= tags
    assert main("report")([str(tmp_path / "run")]) == main("evaluate")([str(tmp_path / "run")]) == 0
    assert "test doubt" in (tmp_path / "run/report.html").read_text()
    assert ", doubt " in capsys.readouterr().out
    trial = fm.sweep(small(steps=5), few, seeds=1, devices=1).members[0]
    assert trial.test["doubt"] == pytest.approx(2 * trial.test_loss) and trial.validation["doubt"] > 0


def test_an_unknown_metric_cannot_be_monitored(few, tmp_path):
    names = "loss, accuracy, top2_accuracy, calibration_error"
    with pytest.raises(UserError, match=f"train.monitor must be one of {names}, but is 'speed'"):
        fit_on_one(small(monitor="speed"), few, tmp_path / "run")
    assert not (tmp_path / "run").exists()
