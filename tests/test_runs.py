"""Complete runs on a few digits: records, files, resuming, divergence and early stopping."""

import json
import threading
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MODELS, assert_same, small

import flaxmnist as fm
from flaxmnist import console, runs
from flaxmnist.config import CNN, SGD, Adam, Augment, Data, Objective
from flaxmnist.devices import program
from flaxmnist.errors import Diverged, Stopped, UserError
from flaxmnist.store import trained


def fit(config, data, *arguments, **options):
    """Train on one of the eight devices of the test process."""
    return fm.fit(config, data, *arguments, devices=1, **options)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def stop_at(monkeypatch, step: int) -> threading.Event:
    """Return an event that is set during the chunk that ends at ``step``."""
    stop, call = threading.Event(), program.Program.__call__

    def stopping(compiled, state, start, count):
        if start + count == step:
            stop.set()
        return call(compiled, state, start, count)

    monkeypatch.setattr(program.Program, "__call__", stopping)
    monkeypatch.setattr(program, "MAX_STEPS", 1)
    return stop


def records(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_run_without_folder_writes_nothing(few, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = fit(small(), few)
    assert not list(tmp_path.iterdir())
    assert run.result["test_count"] == 45
    assert [record["step"] for record in run.history if record["split"] == "train"] == list(range(20))
    classes, _ = fm.predict(run.model, few.test.images)
    assert (classes == few.test.labels).mean() == run.result["test_accuracy"]


def test_run_folder_contents(few, tmp_path):
    run = fit(small(evaluate_every=10, log_every=8), few, tmp_path / "run")
    config, result = (json.loads((tmp_path / "run" / name).read_text()) for name in ("config.json", "result.json"))
    assert config["config"]["optimizer"]["kind"] == "SGD"
    sizes = {"train": 70, "validation": 30, "test": 45}
    assert config["data"] == {"name": "digits", "source": few.source, "shape": [28, 28], "classes": 10} | sizes
    assert result == run.result
    assert result["steps"] == 20
    assert result["epochs"] == 4
    assert result["params"] == 7850
    assert result["steps_per_second"] == result["steps"] / result["seconds"]["train"]
    assert [(r["step"], r["epoch"], r["split"]) for r in records(tmp_path / "run")] == [
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
    assert one.result["params_sha256"] == other.result["params_sha256"]
    assert (tmp_path / "a/metrics.jsonl").read_bytes() == (tmp_path / "b/metrics.jsonl").read_bytes()


RESUMABLE = {
    "softmax": small(evaluate_every=6, checkpoint_every=4),
    "cnn": replace(
        small(
            "cnn",
            optimizer=Adam(),
            evaluate_every=5,
            checkpoint_every=5,
            ema_decay=0.9,
            report="batch_accuracy",
            log_every=3,
        ),
        data=Data(name="digits", augment=Augment(shift=1.0, rotate=5.0)),
    ),
    "mlp": replace(
        small(optimizer=SGD(momentum=0.9, accumulate=2), checkpoint_every=3, report="probabilities", log_every=4),
        model=replace(MODELS["mlp"], dropout=0.5),
        data=Data(name="digits", order="file", last_batch="drop"),
    ),
}


@pytest.mark.parametrize(
    ("name", "stop"), [("softmax", 5), ("softmax", 7), slow("mlp", 5), ("mlp", 7), slow("cnn", 5), slow("cnn", 7)]
)
def test_resumed_run_is_bitwise_identical(name, stop, few, tmp_path, monkeypatch):
    config = RESUMABLE[name]
    full = fit(config, few, tmp_path / "full")
    with monkeypatch.context() as patch, pytest.raises(Stopped, match="--resume continues"):
        fit(config, few, tmp_path / "stopped", stop=stop_at(patch, stop))
    assert [path.name for path in (tmp_path / "stopped/checkpoints").iterdir() if int(path.name) > stop] == []
    resumed = fit(config, few, tmp_path / "stopped", resume=True)
    assert_same(full.state, resumed.state)
    assert (tmp_path / "full/metrics.jsonl").read_bytes() == (tmp_path / "stopped/metrics.jsonl").read_bytes()
    assert full.result["params_sha256"] == resumed.result["params_sha256"]


@pytest.mark.parametrize("moment", ["before the first step", "during a batch report"])
def test_signal_between_chunks_does_not_duplicate_records(moment, few, tmp_path, monkeypatch):
    config = small(report="batch_accuracy", log_every=3, evaluate_every=6)
    full = fit(config, few, tmp_path / "full")
    stop = threading.Event()
    if moment == "before the first step":
        stop.set()
    report_batch = runs.Loop.report_batch
    with monkeypatch.context() as patch:
        patch.setattr(runs.Loop, "report_batch", lambda loop: report_batch(loop) or (loop.step == 6 and stop.set()))
        patch.setattr(program, "MAX_STEPS", 1)
        with pytest.raises(Stopped):
            fit(config, few, tmp_path / "stopped", stop=stop)
    resumed = fit(config, few, tmp_path / "stopped", resume=True)
    assert_same(full.state, resumed.state)
    assert (tmp_path / "full/metrics.jsonl").read_bytes() == (tmp_path / "stopped/metrics.jsonl").read_bytes()


def test_records_newer_than_the_checkpoint_are_replaced(few, tmp_path, monkeypatch):
    """Simulate a kill after records were written that are newer than the last checkpoint."""
    config = small(checkpoint_every=5, steps=12)
    full = fit(config, few, tmp_path / "full")

    def interrupt(loop, split, images):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs.Loop, "evaluate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fit(config, few, tmp_path / "killed")
    assert len(records(tmp_path / "killed")) > 5
    resumed = fit(config, few, tmp_path / "killed", resume=True)
    assert_same(full.state, resumed.state)
    assert (tmp_path / "full/metrics.jsonl").read_bytes() == (tmp_path / "killed/metrics.jsonl").read_bytes()


def test_resume_in_an_empty_folder_starts_from_scratch(few, tmp_path):
    assert fit(small(), few, tmp_path / "new", resume=True).result["steps"] == 20


def test_resume_of_a_finished_run_returns_its_result(few, tmp_path):
    first = fit(small(), few, tmp_path / "run")
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    again = fit(small(), few, tmp_path / "run", resume=True)
    assert again.result == first.result
    assert again.history == first.history
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


def test_finished_run_can_be_extended_but_not_shortened(few, tmp_path):
    fit(small(steps=7), few, tmp_path / "run")
    longer = fit(small(steps=20), few, tmp_path / "run", resume=True)
    assert_same(longer.state, fit(small(steps=20), few).state)
    assert [record["step"] for record in longer.history if record["split"] == "train"] == list(range(20))
    with pytest.raises(UserError, match="already has 20 steps"):
        fit(small(steps=19), few, tmp_path / "run", resume=True)


def test_nonempty_folder_needs_resume_or_overwrite(few, tmp_path):
    fit(small(), few, tmp_path)
    (tmp_path / "notes.txt").write_text("keep")
    (tmp_path / "export").mkdir()
    with pytest.raises(UserError, match=r"--resume .* --overwrite"):
        fit(small(), few, tmp_path)
    fit(replace(small(), seed=1), few, tmp_path, overwrite=True)
    assert json.loads((tmp_path / "result.json").read_text())["seed"] == 1
    assert (tmp_path / "notes.txt").read_text() == "keep"
    assert not (tmp_path / "export").exists(), "it belonged to the overwritten run"


def test_resume_with_changed_config_names_the_fields(few, tmp_path):
    fit(small(steps=7), few, tmp_path)
    changed = replace(small(steps=9, batch_size=8, log_every=3), seed=3)
    with pytest.raises(UserError, match=r"seed \(0 before, 3 now\), train.batch_size \(16 before, 8 now\); "):
        fit(changed, few, tmp_path, resume=True)
    assert fit(changed, few, tmp_path, resume=True, allow_config_change=True).result["steps"] == 9


INVALID = {
    "no pixel left": small(CNN(features=(2, 2, 2), padding="VALID")),
    "leaves no batch": small(batch_size=80, data=Data(name="digits", last_batch="drop")),
}


@pytest.mark.parametrize("message", INVALID)
def test_run_that_cannot_start_deletes_nothing(message, few, tmp_path):
    first = fit(small(), few, tmp_path)
    for options in ({"overwrite": True}, {"resume": True, "allow_config_change": True}):
        with pytest.raises(UserError, match=message):
            fit(INVALID[message], few, tmp_path, **options)
    assert fit(small(), few, tmp_path, resume=True).result == first.result


def test_resume_with_another_model_writes_nothing(few, tmp_path):
    fit(small(steps=7), few, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.json*")}
    with pytest.raises(UserError, match="belongs to another model"):
        fit(small("mlp", steps=9), few, tmp_path, resume=True, allow_config_change=True)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.json*")} == before


def test_overwrite_refuses_other_folders(few, tmp_path):
    (tmp_path / "plots").mkdir()
    (tmp_path / "notes.txt").write_text("keep")
    with pytest.raises(UserError, match="is not a run folder"):
        fit(small(), few, tmp_path, overwrite=True)
    assert (tmp_path / "plots").exists()


def test_run_is_evaluated_only_on_its_data_set(few, digits, tmp_path):
    fit(replace(small(), data=Data(name="mnist")), few, tmp_path)
    assert trained.evaluate_run(tmp_path).count == len(digits.test.labels), "not the data set named in the config"
    config = json.loads((tmp_path / "config.json").read_text())
    config["data"]["source"] = "elsewhere"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="was trained on elsewhere with 10 classes, but this data set is scikit-learn"):
        trained.evaluate_run(tmp_path)


def test_infinite_final_weights_raise_diverged(few, tmp_path):
    """Every recorded loss is finite, because the last update is the first to overflow."""
    config = small(optimizer=SGD(learning_rate=3e38), steps=1)
    for folder in (None, tmp_path):
        with pytest.raises(Diverged, match="after step 1"):
            fit(config, few, folder)


def test_run_without_git(few, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    fit(small(), few, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["git_commit"] is None


def test_newest_and_best_checkpoints_are_kept(few, tmp_path):
    run = fit(small(evaluate_every=2, checkpoint_every=2, keep=2), few, tmp_path)
    accuracies = {r["step"]: r["accuracy"] for r in run.history if r["split"] == "validation"}
    kept = {int(path.name) for path in (tmp_path / "checkpoints").iterdir()}
    assert {18, 20} <= kept
    best = max(accuracies.values())
    assert any(accuracies[step] == best for step in kept)
    assert len(kept) <= 3


def test_run_loads_from_its_folder(few, tmp_path):
    run = fit(small("cnn", evaluate_every=10, checkpoint_every=10), few, tmp_path)
    loaded = fm.load_run(tmp_path)
    assert loaded.config == run.config
    assert_same(loaded.state, run.state)
    assert fm.load_run(tmp_path, "10").state.step == 10
    with pytest.raises(UserError, match=r"no checkpoint 11: use latest, best or one of \[10, 20\]"):
        fm.load_run(tmp_path, "11")


def test_best_needs_validation_images(few, tmp_path):
    fit(small(), replace(few, validation=None), tmp_path)
    with pytest.raises(UserError, match="no best checkpoint"):
        fm.load_run(tmp_path, "best")


def test_training_is_compiled_once(few, tmp_path, monkeypatch):
    traces = []
    original = program.steps.train_steps
    monkeypatch.setattr(program.steps, "train_steps", lambda *a, **k: traces.append(1) or original(*a, **k))
    fit(small(evaluate_every=7, checkpoint_every=3, log_every=2, report="batch_accuracy"), few, tmp_path)
    assert len(traces) == 1


def test_divergence_message_names_step_and_checkpoint(few, tmp_path):
    unstable = Objective(labels="one_hot", form="probabilities")
    config = replace(small(optimizer=SGD(learning_rate=1e3), checkpoint_every=1, keep=1), objective=unstable)
    with pytest.raises(
        Diverged, match=r"the loss at step (\d+) is (inf|nan): training diverged, the checkpoint"
    ) as error:
        fit(config, few, tmp_path)
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    assert f"the checkpoint at step {checkpoint.name} is kept" in str(error.value)
    loaded = fm.load_run(tmp_path, checkpoint.name)
    assert np.isfinite(fm.evaluate(loaded.model, *few.train).loss)


@pytest.fixture
def make_nan_gradients(monkeypatch):
    """Return a function that makes the gradients, but not the losses, of the given steps NaN."""

    def patch(*steps: int) -> None:
        original = program.steps.train_logits

        def train_logits(config, graphdef, params, images, step, **options):
            factor = jnp.where(jnp.isin(step, jnp.array(steps)), jnp.nan, 1.0)
            return scale_gradient(original(config, graphdef, params, images, step, **options), factor)

        monkeypatch.setattr(program.steps, "train_logits", train_logits)

    return patch


@jax.custom_vjp
def scale_gradient(x, factor):
    return x


scale_gradient.defvjp(lambda x, factor: (x, factor), lambda factor, g: (g * factor, None))


def test_nonfinite_gradient_raises_diverged(few, make_nan_gradients):
    make_nan_gradients(7)
    with pytest.raises(Diverged, match="the gradient norm at step 7 is nan: training diverged"):
        fit(small(), few)


def test_nonfinite_steps_can_be_skipped(few, make_nan_gradients, tmp_path, monkeypatch):
    """The count of skipped steps continues if the run is stopped and resumed between them."""
    config = small("mlp", optimizer=Adam(), skip_nonfinite=2, ema_decay=0.9)
    make_nan_gradients(3, 4, 9)
    full = fit(config, few, tmp_path / "full")
    assert np.isfinite(fm.evaluate(full.model, *few.test).loss)
    skipped = [(record["step"], record["count"]) for record in full.history if record["split"] == "skipped"]
    assert skipped == [(3, 1), (4, 2), (9, 3)]
    trained = [record["step"] for record in full.history if record["split"] == "train"]
    assert trained == [step for step in range(20) if step not in (3, 4, 9)]
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        fit(config, few, tmp_path / "stopped", stop=stop_at(patch, 4))
    assert_same(fit(config, few, tmp_path / "stopped", resume=True).state, full.state)
    assert (tmp_path / "stopped/metrics.jsonl").read_bytes() == (tmp_path / "full/metrics.jsonl").read_bytes()


def test_skipped_step_changes_nothing(few, make_nan_gradients):
    config = small("mlp", optimizer=Adam(), skip_nonfinite=1)
    before = fit(replace(config, train=replace(config.train, steps=19)), few)
    make_nan_gradients(19)
    after = fit(config, few)
    assert_same((after.state.params, after.state.opt_state), (before.state.params, before.state.opt_state))


@pytest.mark.parametrize("stop", [None, 4])
def test_too_many_consecutive_skipped_steps_raise_diverged(stop, few, make_nan_gradients, tmp_path, monkeypatch):
    make_nan_gradients(3, 4, 5)
    config = small(skip_nonfinite=2)
    if stop:
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            fit(config, few, tmp_path, stop=stop_at(patch, stop))
    with pytest.raises(Diverged, match="the gradient norm at step 5 is nan, after 2 steps in a row were skipped"):
        fit(config, few, tmp_path, resume=True)


@pytest.mark.parametrize(("field", "value", "steps"), [("stop_accuracy", 0.1, 4), ("patience", 2, None)])
def test_early_stopping(field, value, steps, few):
    # A learning rate this small changes no prediction, so no evaluation is better than the first.
    config = small(
        optimizer=SGD(learning_rate=1e-9 if field == "patience" else 0.1), evaluate_every=4, **{field: value}
    )
    run = fit(config, few)
    assert run.result["steps"] == (steps or 12)
    assert run.history[-1]["split"] == "test"


REPORTS = {
    "loss": r"step 8, loss \d+\.\d{4}, accuracy \d\.\d{4}",
    "epoch_cost": r"Epoch: 0004, Cost: \d+\.\d{9}",
    "batch_loss": r"epoch 3, batch 4, loss \d+\.\d{6}",
    "batch_accuracy": r"step 8, training accuracy \d(\.\d+)?",
    "probabilities": r"step 8, probabilities\n\[\[",
}


@pytest.mark.parametrize("report", REPORTS)
def test_console_lines(report, few, caplog):
    import logging
    import re

    caplog.set_level(logging.INFO, logger="flaxmnist")
    fit(small(report=report, log_every=4), few)
    assert re.search(REPORTS[report], caplog.text), caplog.text


def test_probabilities_match_the_next_step(few):
    """The loss computed from the probabilities equals the loss of the step, also with dropout."""
    config = replace(small("mlp", report="probabilities", log_every=4), model=replace(MODELS["mlp"], dropout=0.5))
    run = fit(config, few)
    by_step = {(record["step"], record["split"]): record for record in run.history}
    indices = runs.order.batch_indices(run.config, 70, 4, 5)[0]
    probabilities = np.array(by_step[4, "batch"]["probabilities"])
    assert probabilities.shape == (6 if -1 in indices else 16, 10)
    labels = few.train.labels[indices[indices >= 0]]
    loss = -np.log(probabilities[np.arange(len(labels)), labels]).mean()
    assert loss == pytest.approx(by_step[4, "train"]["loss"], rel=1e-3)


def test_profile_writes_a_trace(few, tmp_path):
    fit(small(steps=30), few, profile=tmp_path / "trace")
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))


def test_file_order_needs_the_original_files(few):
    array_record = replace(few, file_order=False, source="array_record")
    with pytest.raises(UserError, match="needs the original files, not array_record: use"):
        fit(small(data=Data(name="digits", order="file")), array_record)


def test_seconds_by_kind_of_work(few):
    clock = console.Clock()
    with clock("import"):
        pass
    seconds = fit(small(), few, clock=clock).result["seconds"]
    assert set(seconds) == {"import", "data", "compile", "train", "evaluate", "checkpoint", "total"}
    assert sum(seconds.values()) - seconds["total"] <= seconds["total"]
