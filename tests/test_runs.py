"""Whole runs on a few digits: what they record and keep, and how they go on."""

import json
import threading
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MODELS, assert_same, small

import flaxmnist as fm
from flaxmnist import logs, program, runs, trained
from flaxmnist.config import CNN, SGD, Adam, Augment, Data, Objective
from flaxmnist.errors import Diverged, Stopped, UserError


def fit(config, data, *arguments, **options):
    """A run on one device, of the eight that the tests see."""
    return fm.fit(config, data, *arguments, devices=1, **options)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def stop_at(monkeypatch, step: int) -> threading.Event:
    """A signal that comes while the chunk that ends at ``step`` is computed."""
    stop, call = threading.Event(), program.Program.__call__

    def calling(compiled, state, start, count):
        if start + count == step:
            stop.set()
        return call(compiled, state, start, count)

    monkeypatch.setattr(program.Program, "__call__", calling)
    monkeypatch.setattr(program, "LONGEST", 1)
    return stop


def records(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_without_a_folder_touches_no_disk(few, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = fit(small(), few)
    assert not list(tmp_path.iterdir())
    assert run.result["test_count"] == 45
    assert [record["step"] for record in run.history if record["split"] == "train"] == list(range(20))
    classes, _ = fm.predict(run.model, few.test.images)
    assert (classes == few.test.labels).mean() == run.result["test_accuracy"]


def test_the_run_folder(few, tmp_path):
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
def test_equal_runs_have_equal_files_and_parameters(devices, backend, few, tmp_path):
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
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(name, stop, few, tmp_path, monkeypatch):
    config = RESUMABLE[name]
    whole = fit(config, few, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Stopped, match="--resume goes on"):
        fit(config, few, tmp_path / "cut", stop=stop_at(patch, stop))
    assert [path.name for path in (tmp_path / "cut/checkpoints").iterdir() if int(path.name) > stop] == []
    resumed = fit(config, few, tmp_path / "cut", resume=True)
    assert_same(whole.state, resumed.state)
    assert (tmp_path / "whole/metrics.jsonl").read_bytes() == (tmp_path / "cut/metrics.jsonl").read_bytes()
    assert whole.result["params_sha256"] == resumed.result["params_sha256"]


@pytest.mark.parametrize("moment", ["before the first step", "while looking at a batch"])
def test_a_signal_between_chunks_leaves_no_record_twice(moment, few, tmp_path, monkeypatch):
    config = small(report="batch_accuracy", log_every=3, evaluate_every=6)
    whole = fit(config, few, tmp_path / "whole")
    stop = threading.Event()
    if moment == "before the first step":
        stop.set()
    look = runs.Loop.look_at_batch
    with monkeypatch.context() as patch:
        patch.setattr(runs.Loop, "look_at_batch", lambda loop: look(loop) or (loop.step == 6 and stop.set()))
        patch.setattr(program, "LONGEST", 1)
        with pytest.raises(Stopped):
            fit(config, few, tmp_path / "cut", stop=stop)
    resumed = fit(config, few, tmp_path / "cut", resume=True)
    assert_same(whole.state, resumed.state)
    assert (tmp_path / "whole/metrics.jsonl").read_bytes() == (tmp_path / "cut/metrics.jsonl").read_bytes()


def test_records_after_the_checkpoint_are_written_again(few, tmp_path, monkeypatch):
    """As after a kill: the newest checkpoint lies behind the records."""
    config = small(checkpoint_every=5, steps=12)
    whole = fit(config, few, tmp_path / "whole")

    def killed(loop, split, images):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs.Loop, "evaluate", killed)
        with pytest.raises(KeyboardInterrupt):
            fit(config, few, tmp_path / "cut")
    assert len(records(tmp_path / "cut")) > 5
    resumed = fit(config, few, tmp_path / "cut", resume=True)
    assert_same(whole.state, resumed.state)
    assert (tmp_path / "whole/metrics.jsonl").read_bytes() == (tmp_path / "cut/metrics.jsonl").read_bytes()


def test_resuming_where_nothing_lies_begins_at_the_beginning(few, tmp_path):
    assert fit(small(), few, tmp_path / "new", resume=True).result["steps"] == 20


def test_resuming_a_finished_run_repeats_its_result(few, tmp_path):
    first = fit(small(), few, tmp_path / "run")
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    again = fit(small(), few, tmp_path / "run", resume=True)
    assert again.result == first.result
    assert again.history == first.history
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


def test_a_finished_run_can_be_made_longer_but_not_shorter(few, tmp_path):
    fit(small(steps=7), few, tmp_path / "run")
    longer = fit(small(steps=20), few, tmp_path / "run", resume=True)
    assert_same(longer.state, fit(small(steps=20), few).state)
    assert [record["step"] for record in longer.history if record["split"] == "train"] == list(range(20))
    with pytest.raises(UserError, match="has 20 steps already"):
        fit(small(steps=19), few, tmp_path / "run", resume=True)


def test_a_used_folder_needs_resume_or_overwrite(few, tmp_path):
    fit(small(), few, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "export").mkdir()
    with pytest.raises(UserError, match=r"--resume .* --overwrite"):
        fit(small(), few, tmp_path)
    fit(replace(small(), seed=1), few, tmp_path, overwrite=True)
    assert json.loads((tmp_path / "result.json").read_text())["seed"] == 1
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "export").exists(), "of the run before"


def test_a_changed_config_is_refused_by_the_names_of_its_fields(few, tmp_path):
    fit(small(steps=7), few, tmp_path)
    changed = replace(small(steps=9, batch_size=8, log_every=3), seed=3)
    with pytest.raises(UserError, match=r"seed \(0 before, 3 now\), train.batch_size \(16 before, 8 now\); "):
        fit(changed, few, tmp_path, resume=True)
    assert fit(changed, few, tmp_path, resume=True, allow_config_change=True).result["steps"] == 9


IMPOSSIBLE = {
    "no pixel left": small(CNN(features=(2, 2, 2), padding="VALID")),
    "leaves no batch": small(batch_size=80, data=Data(name="digits", last_batch="drop")),
}


@pytest.mark.parametrize("message", IMPOSSIBLE)
def test_nothing_is_lost_to_a_run_that_cannot_begin(message, few, tmp_path):
    first = fit(small(), few, tmp_path)
    for options in ({"overwrite": True}, {"resume": True, "allow_config_change": True}):
        with pytest.raises(UserError, match=message):
            fit(IMPOSSIBLE[message], few, tmp_path, **options)
    assert fit(small(), few, tmp_path, resume=True).result == first.result


def test_a_resume_that_does_not_fit_changes_nothing(few, tmp_path):
    fit(small(steps=7), few, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.json*")}
    with pytest.raises(UserError, match="is of another model"):
        fit(small("mlp", steps=9), few, tmp_path, resume=True, allow_config_change=True)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.json*")} == before


def test_overwrite_leaves_alone_what_is_no_run(few, tmp_path):
    (tmp_path / "plots").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is no run folder"):
        fit(small(), few, tmp_path, overwrite=True)
    assert (tmp_path / "plots").exists()


def test_a_run_is_not_evaluated_on_other_data(few, digits, tmp_path):
    fit(replace(small(), data=Data(name="mnist")), few, tmp_path)
    assert trained.evaluate_run(tmp_path).count == len(digits.test.labels), (
        "the data it saw, not those its config names"
    )
    config = json.loads((tmp_path / "config.json").read_text())
    config["data"]["source"] = "elsewhere"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="was trained on elsewhere with 10 classes, but here are scikit-learn"):
        trained.evaluate_run(tmp_path)


def test_weights_that_end_infinite_are_a_divergence(few, tmp_path):
    """Though every loss that a step saw was finite."""
    config = small(optimizer=SGD(learning_rate=3e38), steps=1)
    for folder in (None, tmp_path):
        with pytest.raises(Diverged, match="after step 1"):
            fit(config, few, folder)


def test_a_machine_without_git(few, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    fit(small(), few, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["git_commit"] is None


def test_checkpoints_kept_are_the_newest_and_the_best(few, tmp_path):
    run = fit(small(evaluate_every=2, checkpoint_every=2, keep=2), few, tmp_path)
    accuracies = {r["step"]: r["accuracy"] for r in run.history if r["split"] == "validation"}
    kept = {int(path.name) for path in (tmp_path / "checkpoints").iterdir()}
    assert {18, 20} <= kept
    best = max(accuracies.values())
    assert any(accuracies[step] == best for step in kept)
    assert len(kept) <= 3


def test_weights_load_from_the_run_folder_alone(few, tmp_path):
    run = fit(small("cnn", evaluate_every=10, checkpoint_every=10), few, tmp_path)
    loaded = fm.load_run(tmp_path)
    assert loaded.config == run.config
    assert_same(loaded.state, run.state)
    assert fm.load_run(tmp_path, "10").state.step == 10
    with pytest.raises(UserError, match=r"no checkpoint 11: give latest, best or one of \[10, 20\]"):
        fm.load_run(tmp_path, "11")


def test_best_needs_validation_images(few, tmp_path):
    fit(small(), replace(few, validation=None), tmp_path)
    with pytest.raises(UserError, match="no best checkpoint"):
        fm.load_run(tmp_path, "best")


def test_one_training_program_however_the_events_fall(few, tmp_path, monkeypatch):
    traced = []
    original = program.steps.train_steps
    monkeypatch.setattr(program.steps, "train_steps", lambda *a, **k: traced.append(1) or original(*a, **k))
    fit(small(evaluate_every=7, checkpoint_every=3, log_every=2, report="batch_accuracy"), few, tmp_path)
    assert len(traced) == 1


def test_divergence_is_told_with_its_step_and_what_is_left(few, tmp_path):
    written_out = Objective(labels="one_hot", form="probabilities")
    config = replace(small(optimizer=SGD(learning_rate=1e3), checkpoint_every=1, keep=1), objective=written_out)
    with pytest.raises(
        Diverged, match=r"the loss at step (\d+) is (inf|nan): training diverged, the checkpoint"
    ) as ended:
        fit(config, few, tmp_path)
    (kept,) = (tmp_path / "checkpoints").iterdir()
    assert f"the checkpoint at step {kept.name} is kept" in str(ended.value)
    loaded = fm.load_run(tmp_path, kept.name)
    assert np.isfinite(fm.evaluate(loaded.model, *few.train).loss)


@pytest.fixture
def spoilt(monkeypatch):
    """Makes the gradients of some steps NaN, and leaves their losses as they are."""

    def spoil(*bad: int) -> None:
        honest = program.steps.train_logits

        def logits(config, graphdef, params, images, step, **options):
            poison = jnp.where(jnp.isin(step, jnp.array(bad)), jnp.nan, 1.0)
            return spoil_gradient(honest(config, graphdef, params, images, step, **options), poison)

        monkeypatch.setattr(program.steps, "train_logits", logits)

    return spoil


@jax.custom_vjp
def spoil_gradient(x, factor):
    return x


spoil_gradient.defvjp(lambda x, factor: (x, factor), lambda factor, g: (g * factor, None))


def test_a_gradient_that_is_not_finite_ends_the_run(few, spoilt):
    spoilt(7)
    with pytest.raises(Diverged, match="the gradient norm at step 7 is nan: training diverged"):
        fit(small(), few)


def test_steps_that_are_not_finite_can_be_left_out(few, spoilt, tmp_path, monkeypatch):
    """Also where the run is stopped among them: the count goes on."""
    config = small("mlp", optimizer=Adam(), skip_nonfinite=2, ema_decay=0.9)
    spoilt(3, 4, 9)
    whole = fit(config, few, tmp_path / "whole")
    assert np.isfinite(fm.evaluate(whole.model, *few.test).loss)
    skipped = [(record["step"], record["count"]) for record in whole.history if record["split"] == "skipped"]
    assert skipped == [(3, 1), (4, 2), (9, 3)]
    trained = [record["step"] for record in whole.history if record["split"] == "train"]
    assert trained == [step for step in range(20) if step not in (3, 4, 9)]
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        fit(config, few, tmp_path / "cut", stop=stop_at(patch, 4))
    assert_same(fit(config, few, tmp_path / "cut", resume=True).state, whole.state)
    assert (tmp_path / "cut/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


def test_a_step_that_is_left_out_changes_nothing(few, spoilt):
    config = small("mlp", optimizer=Adam(), skip_nonfinite=1)
    before = fit(replace(config, train=replace(config.train, steps=19)), few)
    spoilt(19)
    after = fit(config, few)
    assert_same((after.state.params, after.state.opt_state), (before.state.params, before.state.opt_state))


@pytest.mark.parametrize("cut", [None, 4])
def test_too_many_in_a_row_end_the_run(cut, few, spoilt, tmp_path, monkeypatch):
    spoilt(3, 4, 5)
    config = small(skip_nonfinite=2)
    if cut:
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            fit(config, few, tmp_path, stop=stop_at(patch, cut))
    with pytest.raises(Diverged, match="the gradient norm at step 5 is nan, after 2 steps in a row were left out"):
        fit(config, few, tmp_path, resume=True)


@pytest.mark.parametrize(("field", "value", "steps"), [("stop_accuracy", 0.1, 4), ("patience", 2, None)])
def test_early_stopping(field, value, steps, few):
    # A rate this small changes no answer, so that no evaluation is better than the first.
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


def test_probabilities_are_those_of_the_step_that_follows(few):
    """With dropout on: the loss of the batch computed from them is the step's own."""
    config = replace(small("mlp", report="probabilities", log_every=4), model=replace(MODELS["mlp"], dropout=0.5))
    run = fit(config, few)
    seen = {(r["step"], r["split"]): r for r in run.history}
    order = runs.order.batch_indices(run.config, 70, 4, 5)[0]
    probabilities = np.array(seen[4, "batch"]["probabilities"])
    assert probabilities.shape == (6 if -1 in order else 16, 10)
    labels = few.train.labels[order[order >= 0]]
    loss = -np.log(probabilities[np.arange(len(labels)), labels]).mean()
    assert loss == pytest.approx(seen[4, "train"]["loss"], rel=1e-3)


def test_a_trace_of_steady_steps(few, tmp_path):
    fit(small(steps=30), few, profile=tmp_path / "trace")
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))


def test_file_order_needs_the_original_files(few):
    prepared = replace(few, file_order=False, source="array_record")
    with pytest.raises(UserError, match="original files"):
        fit(small(data=Data(name="digits", order="file")), prepared)


def test_time_is_told_by_what_it_was_spent_on(few):
    clock = logs.Clock()
    with clock("import"):
        pass
    seconds = fit(small(), few, clock=clock).result["seconds"]
    assert set(seconds) == {"import", "data", "compile", "train", "evaluate", "checkpoint", "total"}
    assert sum(seconds.values()) - seconds["total"] <= seconds["total"]
