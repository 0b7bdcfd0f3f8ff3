"""Complete runs on a few digits: their records, files and results."""

import gzip
import json
import logging
import re
from dataclasses import replace

import numpy as np
import pytest
from conftest import MODELS, assert_same, fit_on_one, read_lines, slow, small

import flaxmnist as fm
from flaxmnist import console
from flaxmnist.config import SGD, Adam, Cosine, Data, Exponential, Muon
from flaxmnist.data import order
from flaxmnist.errors import UserError
from flaxmnist.store import provenance
from flaxmnist.store.load import evaluate_run


def test_run_without_folder_writes_nothing(few, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = fit_on_one(small(), few)
    assert not list(tmp_path.iterdir())
    assert run.result.test_count == 45
    assert [record["step"] for record in run.history if record["split"] == "train"] == list(range(20))
    classes, _ = fm.predict(run.model, few.test.images)
    assert (classes == few.test.labels).mean() == run.result.test_accuracy


def test_run_folder_contents(few, tmp_path):
    run = fit_on_one(small(evaluate_every=10, log_every=8), few, tmp_path / "run")
    config, result = (json.loads((tmp_path / "run" / name).read_text()) for name in ("config.json", "result.json"))
    assert config["config"]["optimizer"]["kind"] == "SGD"
    sizes = {"train": 70, "validation": 30, "test": 45}
    names = {"class_names": list("0123456789")}
    assert (
        config["data"] == {"name": "digits", "source": few.source, "shape": [28, 28, 1], "classes": 10} | sizes | names
    )
    assert result == vars(run.result)
    assert result["steps"] == 20
    assert result["epochs"] == 4
    assert result["params"] == 7850
    assert result["steps_per_second"] == result["steps"] / result["seconds"]["train"]
    assert [(r["step"], r["epoch"], r["split"]) for r in read_lines(tmp_path / "run")] == [
        (0, 0, "train"),
        (5, 1, "epoch"),
        (8, 1, "train"),
        (10, 2, "epoch"),
        (10, 2, "validation"),
        (15, 3, "epoch"),
        (16, 3, "train"),
        (20, 4, "epoch"),
        (20, 4, "validation"),
        (20, 4, "test"),
    ]
    assert not [key for record in run.history for key in record if "second" in key or "time" in key]


@pytest.mark.parametrize(("devices", "backend"), [(1, "jit"), slow(8, "jit"), slow(8, "pmap")])
def test_equal_runs_have_identical_records_and_parameters(devices, backend, few, tmp_path):
    options = {"devices": devices, "backend": backend}
    one, other = (fm.fit(small("cnn", optimizer=Adam()), few, tmp_path / name, **options) for name in "ab")
    assert_same(one.state, other.state)
    assert one.result.params_sha256 == other.result.params_sha256
    assert (one.result.devices, one.result.backend) == (devices, backend)
    assert (tmp_path / "a/metrics.jsonl").read_bytes() == (tmp_path / "b/metrics.jsonl").read_bytes()


def test_each_evaluation_is_passed_on(few):
    """With the number of steps and the scores of which loss and accuracy are recorded."""
    calls = []
    run = fit_on_one(small(evaluate_every=8), few, on_evaluation=lambda *call: calls.append(call))
    assert [call[:2] for call in calls] == [(8, "validation"), (16, "validation"), (20, "validation"), (20, "test")]
    recorded = [(r["loss"], r["accuracy"]) for r in run.history if r["split"] in ("validation", "test")]
    assert [(scores.loss, scores.accuracy) for *_, scores in calls] == recorded
    assert [scores.count for *_, scores in calls] == [30, 30, 30, 45]


def test_each_checkpoint_is_passed_on(few):
    steps = []
    fit_on_one(small(checkpoint_every=8), few, on_checkpoint=lambda state: steps.append(int(state.step)))
    assert steps == [8, 16, 20]


def test_without_validation_images_only_the_test_images_are_evaluated(few):
    run = fit_on_one(small(evaluate_every=8), replace(few, validation=None))
    assert [record["split"] for record in run.history if record["split"] not in ("train", "epoch")] == ["test"]
    assert run.result.validation_accuracy is None


def test_run_without_git(few, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(provenance, "git_commit", provenance.git_commit.__wrapped__)  # without its cache
    fit_on_one(small(), few, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["git_commit"] is None


def test_newest_and_best_checkpoints_are_kept(few, tmp_path):
    run = fit_on_one(small(evaluate_every=2, checkpoint_every=2, keep=2), few, tmp_path)
    accuracies = {r["step"]: r["accuracy"] for r in run.history if r["split"] == "validation"}
    kept = {int(path.name) for path in (tmp_path / "checkpoints").iterdir()}
    assert {18, 20} <= kept
    best = max(accuracies.values())
    assert any(accuracies[step] == best for step in kept)
    assert len(kept) <= 3


def test_run_loads_from_its_folder(few, tmp_path):
    run = fit_on_one(small("cnn", evaluate_every=10, checkpoint_every=10), few, tmp_path)
    loaded = fm.load_run(tmp_path)
    assert loaded.config == run.config
    assert_same(loaded.state, run.state)
    assert fm.load_run(tmp_path, "10").state.step == 10
    with pytest.raises(UserError, match=r"no checkpoint 11: use latest, best or one of \[10, 20\]"):
        fm.load_run(tmp_path, "11")


def test_best_needs_validation_images(few, tmp_path):
    fit_on_one(small(), replace(few, validation=None), tmp_path)
    with pytest.raises(UserError, match="no best checkpoint"):
        fm.load_run(tmp_path, "best")


def test_run_is_evaluated_only_on_its_data_set(few, digits, tmp_path):
    fit_on_one(replace(small(), data=Data(name="mnist")), few, tmp_path)
    assert evaluate_run(tmp_path).count == len(digits.test.labels), "not the data set named in the config"
    config = json.loads((tmp_path / "config.json").read_text())
    config["data"]["source"] = "elsewhere"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="was trained on elsewhere with 10 classes, but this data set is scikit-learn"):
        evaluate_run(tmp_path)


@pytest.mark.parametrize(("field", "value", "steps"), [("stop_accuracy", 0.1, 4), ("patience", 2, 12)])
def test_early_stopping(field, value, steps, few, tmp_path):
    # A learning rate this small changes no prediction, so no evaluation is better than the first.
    optimizer = SGD(learning_rate=1e-9 if field == "patience" else 0.1)
    run = fit_on_one(small(optimizer=optimizer, evaluate_every=4, **{field: value}), few, tmp_path)
    assert run.result.steps == steps
    assert run.history[-1]["split"] == "test"
    assert fm.load_run(tmp_path).state.step == steps, "a checkpoint at the early end"


# What each report prints, in the formats of the tutorials.
REPORTS = {
    "loss": r"step 8, loss \d+\.\d{4}, accuracy \d\.\d{4}",
    "epoch_cost": r"Epoch: 0004, Cost: \d+\.\d{9}",
    "batch_loss": r"epoch 3, batch 4, loss \d+\.\d{6}",
    "batch_accuracy": r"step 8, training accuracy \d(\.\d+)?",
    "probabilities": r"step 8, probabilities\n\[\[",
}


@pytest.mark.parametrize("report", REPORTS)
def test_console_lines(report, few, caplog):
    caplog.set_level(logging.INFO, logger="flaxmnist")
    fit_on_one(small(report=report, log_every=4), few)
    assert re.search(REPORTS[report], caplog.text), caplog.text


def test_probabilities_match_the_next_step(few):
    """The loss computed from the probabilities equals the loss of the step, also with dropout."""
    config = replace(small("mlp", report="probabilities", log_every=4), model=replace(MODELS["mlp"], dropout=0.5))
    run = fit_on_one(config, few)
    by_step = {(record["step"], record["split"]): record for record in run.history}
    indices = order.batch_indices(run.config, 70, 4, 5)[0]
    probabilities = np.array(by_step[4, "batch"]["probabilities"])
    assert probabilities.shape == (6 if -1 in indices else 16, 10)
    labels = few.train.labels[indices[indices >= 0]]
    loss = -np.log(probabilities[np.arange(len(labels)), labels]).mean()
    assert loss == pytest.approx(by_step[4, "train"]["loss"], rel=1e-3)


@pytest.mark.parametrize("at", [None, 7, 29])
def test_profile_writes_a_trace_of_numbered_steps_and_does_not_affect_the_run(at, few, tmp_path):
    run = fit_on_one(small(steps=30), few, profile=tmp_path, profile_at=at)
    assert_same(run.state, fit_on_one(small(steps=30), few).state)
    (file,) = tmp_path.rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    numbers = [int(event["args"]["step_num"]) for event in events if event.get("name") == "train"]
    assert numbers == list(range(at or 0, min((at or 0) + 10, 30)))


def test_a_trace_that_cannot_be_written_is_refused_before_training(few, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write a trace to .*/trace: Not a directory; use another --profile"):
        fit_on_one(small(steps=30), few, profile=tmp_path / "file/trace")
    with pytest.raises(UserError, match=r"--profile-at must be in \[0, 29\], but is 30"):
        fit_on_one(small(steps=30), few, profile=tmp_path / "trace", profile_at=30)


def test_file_order_needs_the_original_files(few):
    array_record = replace(few, file_order=False, source="array_record")
    with pytest.raises(UserError, match="needs the original files, not array_record: use"):
        fit_on_one(small(data=Data(name="digits", order="file")), array_record)


def test_seconds_by_activity(few):
    clock = console.Clock()
    with clock("import"):
        pass
    seconds = fit_on_one(small(), few, clock=clock).result.seconds
    assert set(seconds) == {"import", "data", "compile", "train", "evaluate", "checkpoint", "total"}
    assert sum(seconds.values()) - seconds["total"] <= seconds["total"]


RATES = {
    "flat": (SGD(learning_rate=0.5), [0.5] * 4),
    "accumulated": (
        SGD(learning_rate=0.5, schedule=Exponential(decay=0.5, every=1), accumulate=2),
        [0.5, 0.5, 0.25, 0.25],
    ),
    "warm-up": (Muon(learning_rate=0.5, schedule=Cosine(warmup_steps=2)), [0, 0.25, 0.5, 0.25]),
}


@pytest.mark.parametrize("name", RATES)
def test_the_learning_rate_of_each_step_is_recorded(name, few):
    optimizer, rates = RATES[name]
    history = fit_on_one(small(optimizer=optimizer, steps=4), few).history
    assert [r["learning_rate"] for r in history if r["split"] == "train"] == pytest.approx(rates)
