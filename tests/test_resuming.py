"""Runs that are stopped or killed and resumed, and folders that a run may or may not use."""

import json
import logging
import threading
from dataclasses import replace

import pytest
from conftest import MODELS, assert_same, fit_on_one, read_lines, slow, small

from flaxmnist.config import SGD, Adam, Augment, CNNConfig, Data
from flaxmnist.console import logger
from flaxmnist.devices import program
from flaxmnist.errors import Stopped, UserError

RESUMABLE = {
    "softmax": small(evaluate_every=2, checkpoint_every=4),
    "cnn": replace(
        small(
            "cnn",
            optimizer=Adam(),
            evaluate_every=2,
            checkpoint_every=5,
            ema_decay=0.9,
            report="batch_accuracy",
            log_every=3,
        ),
        data=Data(name="digits", augment=Augment(shift=1.0, rotate=5.0)),
    ),
    "mlp": replace(
        small(
            optimizer=SGD(momentum=0.9, accumulate=2),
            evaluate_every=2,
            checkpoint_every=3,
            report="probabilities",
            log_every=4,
        ),
        model=replace(MODELS["mlp"], dropout=0.5),
        data=Data(name="digits", order="file", last_batch="drop"),
    ),
}


@pytest.mark.parametrize(
    ("name", "stop"),
    [("softmax", 5), slow("softmax", 7), slow("mlp", 5), slow("mlp", 7), slow("cnn", 5), slow("cnn", 7)],
)
def test_resumed_run_is_bitwise_identical(name, stop, few, fit_until, tmp_path):
    config = RESUMABLE[name]
    full = fit_on_one(config, few, tmp_path / "full")
    fit_until(stop, config, few, tmp_path / "stopped")
    assert max(int(path.name) for path in (tmp_path / "stopped/checkpoints").iterdir()) == stop
    resumed = fit_on_one(config, few, tmp_path / "stopped", resume=True)
    assert_same(full.state, resumed.state)
    assert (tmp_path / "full/metrics.jsonl").read_bytes() == (tmp_path / "stopped/metrics.jsonl").read_bytes()
    assert full.result.params_sha256 == resumed.result.params_sha256


class OnMessage(logging.Handler):
    """Handler that sets ``event`` when a message with this beginning is logged."""

    def __init__(self, beginning: str, event: threading.Event):
        super().__init__()
        self.beginning, self.event = beginning, event

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith(self.beginning):
            self.event.set()


@pytest.mark.parametrize("moment", ["before the first step", "during a batch report"])
def test_signal_between_chunks_does_not_duplicate_records(moment, few, tmp_path, monkeypatch, caplog):
    config = small(report="batch_accuracy", log_every=3, evaluate_every=6)
    full = fit_on_one(config, few, tmp_path / "full")
    stop = threading.Event()
    if moment == "before the first step":
        stop.set()
    caplog.set_level(logging.INFO, logger="flaxmnist")
    handler = OnMessage("step 6, training accuracy", stop)
    with monkeypatch.context() as patch:
        patch.setattr(program, "MAX_STEPS", 1)
        patch.setattr(logger, "handlers", [*logger.handlers, handler])
        with pytest.raises(Stopped, match="step 1 of" if stop.is_set() else "step 7 of"):
            fit_on_one(config, few, tmp_path / "stopped", stop=stop)
    resumed = fit_on_one(config, few, tmp_path / "stopped", resume=True)
    assert_same(full.state, resumed.state)
    assert (tmp_path / "full/metrics.jsonl").read_bytes() == (tmp_path / "stopped/metrics.jsonl").read_bytes()


def test_a_signal_stops_the_run_after_the_next_chunk(few):
    stop = threading.Event()
    with pytest.raises(Stopped, match="stopped at step 8 of 20; nothing was saved without a workdir"):
        fit_on_one(small(evaluate_every=4), few, stop=stop, on_evaluation=lambda *_: stop.set())


def test_a_signal_during_the_last_chunk_does_not_stop_the_run(few, tmp_path):
    stop = threading.Event()
    run = fit_on_one(
        small(evaluate_every=19), few, tmp_path, stop=stop, on_evaluation=lambda step, *_: step == 19 and stop.set()
    )
    assert stop.is_set()
    assert run.result.steps == 20


def test_records_newer_than_the_checkpoint_are_replaced(few, tmp_path):
    """The process is killed when there are records that are newer than the last checkpoint."""
    config = small(checkpoint_every=5, steps=12)
    full = fit_on_one(config, few, tmp_path / "full")

    def kill(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_on_one(config, few, tmp_path / "killed", on_evaluation=kill)
    checkpoints = [int(path.name) for path in (tmp_path / "killed/checkpoints").iterdir()]
    assert read_lines(tmp_path / "killed")[-1]["step"] > max(checkpoints) == 10
    resumed = fit_on_one(config, few, tmp_path / "killed", resume=True)
    assert_same(full.state, resumed.state)
    assert (tmp_path / "full/metrics.jsonl").read_bytes() == (tmp_path / "killed/metrics.jsonl").read_bytes()


def test_a_run_killed_after_its_last_checkpoint_only_has_to_be_evaluated(few, tmp_path):
    def kill(_, split, __):
        if split == "test":
            raise KeyboardInterrupt

    full = fit_on_one(small(), few, tmp_path / "full")
    with pytest.raises(KeyboardInterrupt):
        fit_on_one(small(), few, tmp_path / "killed", on_evaluation=kill)
    resumed = fit_on_one(small(), few, tmp_path / "killed", resume=True)
    assert_same(full.state, resumed.state)
    assert (tmp_path / "full/metrics.jsonl").read_bytes() == (tmp_path / "killed/metrics.jsonl").read_bytes()


def test_resume_in_an_empty_folder_starts_from_scratch(few, tmp_path):
    assert fit_on_one(small(), few, tmp_path / "new", resume=True).result.steps == 20


def test_resume_of_a_finished_run_returns_its_result(few, tmp_path):
    first = fit_on_one(small(), few, tmp_path / "run")
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    again = fit_on_one(small(), few, tmp_path / "run", resume=True)
    assert again.result == first.result
    assert again.history == first.history
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


def test_finished_run_can_be_extended_but_not_shortened(few, tmp_path):
    fit_on_one(small(steps=7), few, tmp_path / "run")
    longer = fit_on_one(small(steps=20), few, tmp_path / "run", resume=True)
    assert_same(longer.state, fit_on_one(small(steps=20), few).state)
    assert [record["step"] for record in longer.history if record["split"] == "train"] == list(range(20))
    with pytest.raises(UserError, match="already has 20 steps"):
        fit_on_one(small(steps=19), few, tmp_path / "run", resume=True)


def test_seconds_continue_after_a_resume(few, tmp_path):
    first = fit_on_one(small(steps=7), few, tmp_path).result.seconds
    second = fit_on_one(small(steps=20), few, tmp_path, resume=True).result.seconds
    assert all(second[name] >= first[name] for name in ("compile", "train"))


def test_nonempty_folder_needs_resume_or_overwrite(few, tmp_path):
    fit_on_one(small(), few, tmp_path)
    (tmp_path / "notes.txt").write_text("keep")
    (tmp_path / "export").mkdir()
    with pytest.raises(UserError, match=r"--resume .* --overwrite"):
        fit_on_one(small(), few, tmp_path)
    fit_on_one(replace(small(), seed=1), few, tmp_path, overwrite=True)
    assert json.loads((tmp_path / "result.json").read_text())["seed"] == 1
    assert (tmp_path / "notes.txt").read_text() == "keep"
    assert not (tmp_path / "export").exists(), "it belonged to the overwritten run"


def test_resume_with_changed_config_names_the_fields(few, tmp_path):
    fit_on_one(small(steps=7), few, tmp_path)
    changed = replace(small(steps=9, batch_size=8, log_every=3), seed=3)
    with pytest.raises(UserError, match=r"seed \(0 before, 3 now\), train.batch_size \(16 before, 8 now\); "):
        fit_on_one(changed, few, tmp_path, resume=True)
    assert fit_on_one(changed, few, tmp_path, resume=True, allow_config_change=True).result.steps == 9


INVALID = {
    "no pixel left": small(CNNConfig(features=(2, 2, 2), padding="VALID")),
    "leaves no batch": small(batch_size=80, data=Data(name="digits", last_batch="drop")),
}


@pytest.mark.parametrize("message", INVALID)
def test_run_that_cannot_start_deletes_nothing(message, few, tmp_path):
    first = fit_on_one(small(), few, tmp_path)
    for options in ({"overwrite": True}, {"resume": True, "allow_config_change": True}):
        with pytest.raises(UserError, match=message):
            fit_on_one(INVALID[message], few, tmp_path, **options)
    assert fit_on_one(small(), few, tmp_path, resume=True).result == first.result


def test_resume_with_another_model_writes_nothing(few, tmp_path):
    fit_on_one(small(steps=7), few, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.json*")}
    with pytest.raises(UserError, match="cannot be restored as this model"):
        fit_on_one(small("mlp", steps=9), few, tmp_path, resume=True, allow_config_change=True)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.json*")} == before


def test_overwrite_refuses_other_folders(few, tmp_path):
    (tmp_path / "plots").mkdir()
    (tmp_path / "notes.txt").write_text("keep")
    with pytest.raises(UserError, match="is not a run folder"):
        fit_on_one(small(), few, tmp_path, overwrite=True)
    assert (tmp_path / "plots").exists()
