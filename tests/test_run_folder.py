"""Write errors during a run or a sweep: training continues, and nothing is lost."""

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import assert_same, fit_on_one, small

import flaxmnist as fm
from flaxmnist.config import MLPConfig
from flaxmnist.errors import UserError
from flaxmnist.loop import advance
from flaxmnist.store import rescue, run_folder
from flaxmnist.sweeps.plan import Experiment
from flaxmnist.sweeps.runner import run_sweep

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")

CONFIG = small(evaluate_every=5, checkpoint_every=5)


@contextlib.contextmanager
def mounted(folder, *options):
    """Mount a small file system in memory at ``folder``."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(disk) -> None:
    """Fill ``disk`` with a file."""
    with (disk / "filling").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch, tmp_path):
    """Retry without waiting, and rescue runs to a folder of the test."""
    monkeypatch.setattr(run_folder, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(rescue, "RETRY_PAUSES", ())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))


def at_step_10(folder: Path, action: Callable[[], object]) -> dict:
    """Return options of fit: call ``action`` in the evaluation at step 10, once the checkpoint at step 5 is saved."""

    def act(step, split, scores):
        if (step, split) == (10, "validation"):
            while not (folder / "checkpoints/5").exists():
                time.sleep(0.01)
            action()

    return {"on_evaluation": act}


def check_rescued(error, few, tmp_path):
    """Check that the run was saved to the folder in the message, and finishes there as if never interrupted."""
    elsewhere = re.search(r"step 20 is saved in (\S+); pass --workdir (\S+) --resume to continue", str(error.value))
    assert elsewhere[1] == elsewhere[2]
    assert elsewhere[1].startswith(str(tmp_path / "elsewhere"))
    finished = fit_on_one(CONFIG, few, elsewhere[1], resume=True)
    uninterrupted = fit_on_one(CONFIG, few, tmp_path / "uninterrupted")
    assert_same(finished.state, uninterrupted.state)
    assert finished.history == uninterrupted.history


@needs_root
def test_disk_becomes_full(few, tmp_path, caplog):
    disk = tmp_path / "disk"
    with mounted(disk, "-o", "size=2m"):
        with pytest.raises(UserError, match=r"cannot save to .*run \(No space left on device\)") as error:
            fit_on_one(CONFIG, few, disk / "run", **at_step_10(disk / "run", lambda: fill(disk)))
        assert "No space left on device): retrying in 0 s" in caplog.text
        assert fm.load_run(disk / "run").state.step == 5, "the earlier checkpoint is intact"
        check_rescued(error, few, tmp_path)
        (disk / "filling").unlink()
        assert fit_on_one(CONFIG, few, disk / "run", resume=True).result.steps == 20


@needs_root
def test_full_disk_with_space_again_before_the_end(few, tmp_path, caplog):
    disk = tmp_path / "disk"
    actions = {5: lambda: fill(disk), 15: (disk / "filling").unlink}
    with mounted(disk, "-o", "size=2m"):
        run = fit_on_one(CONFIG, few, disk / "run", on_evaluation=lambda step, *_: actions.pop(step, lambda: None)())
        assert not actions
        assert "No space left on device" in caplog.text
        assert [record["step"] for record in run.history if record["split"] == "train"] == list(range(20))
        assert fm.load_run(disk / "run").state.step == 20


@needs_root
def test_folder_becomes_read_only(few, tmp_path, caplog):
    folder = tmp_path / "run"

    def protect():
        subprocess.run(["mount", "--bind", folder, folder], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)

    try:
        with pytest.raises(UserError, match=r"\(Read-only file system\)") as error:
            fit_on_one(CONFIG, few, folder, **at_step_10(folder, protect))
        assert {record.name for record in caplog.records} == {"flaxmnist"}, "and no tracebacks of Orbax"
        check_rescued(error, few, tmp_path)
        with pytest.raises(UserError, match=r"cannot write to .*run: Read-only file system"):
            fit_on_one(CONFIG, few, folder, resume=True)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize(("every", "saved"), [(None, list(range(1, 21))), (5, [5, 10, 15, 20])])
def test_a_run_saves_as_time_goes_by_unless_a_number_of_steps_is_given(every, saved, few, tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(advance, "CHUNK_SECONDS", 0.0)  # one step at a time
    config, steps = fm.replace(CONFIG, "train.checkpoint_every", every), []
    run = fit_on_one(config, few, tmp_path / "run", on_checkpoint=lambda state: steps.append(int(state.step)))
    assert steps == saved
    assert_same(run.state, fit_on_one(config, few).state)


def test_folder_is_removed_during_a_run(few, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(UserError, match="was removed or replaced") as error:
        fit_on_one(CONFIG, few, folder, **at_step_10(folder, lambda: shutil.rmtree(folder)))
    assert not folder.exists(), "after an unmount, nothing is written to the mount point"
    check_rescued(error, few, tmp_path)


def test_removed_records_are_written_again(few, tmp_path):
    folder = tmp_path / "run"
    fit_on_one(CONFIG, few, folder, **at_step_10(folder, (folder / "metrics.jsonl").unlink))
    fit_on_one(CONFIG, few, tmp_path / "intact")
    assert (folder / "metrics.jsonl").read_bytes() == (tmp_path / "intact/metrics.jsonl").read_bytes()


def test_run_that_cannot_save_is_stopped(few, tmp_path):
    stop, folder = threading.Event(), tmp_path / "run"
    with pytest.raises(UserError, match=r"step \d+ is saved in"):
        fit_on_one(CONFIG, few, folder, stop=stop, **at_step_10(folder, lambda: (shutil.rmtree(folder), stop.set())))


def test_nothing_can_be_saved_anywhere_else(few, tmp_path, monkeypatch):
    """Neither the folder of temporary files nor the home nor the working directory exists."""
    folder, here = tmp_path / "run", tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(tmp_path / "none"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(UserError, match="or anywhere else"):
        fit_on_one(CONFIG, few, folder, **at_step_10(folder, lambda: (shutil.rmtree(folder), here.rmdir())))


@pytest.mark.slow
@needs_root
def test_sweep_on_a_full_disk(few, tmp_path, caplog):
    """Results rescued elsewhere can be moved back, and their trials are not trained again."""
    disk = tmp_path / "disk"
    config = small(MLPConfig(hidden=(64,)), evaluate_every=10)
    settings = [{"train.batch_size": 8}, {"train.batch_size": 16}]

    def sweep(**options):
        return run_sweep([Experiment(config, few)], [0, 1], settings, workdir=disk / "sweep", devices=1, **options)

    with mounted(disk, "-o", "size=700k"):
        with pytest.raises(UserError, match="No space left on device") as error:
            sweep()
        elsewhere = re.search(r"unsaved results are in (\S+): copy", str(error.value))[1]
        subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
        for part in Path(elsewhere, "parts").iterdir():
            shutil.move(part, disk / "sweep/parts")
        caplog.set_level("INFO", logger="flaxmnist")
        resumed = sweep(resume=True)
        assert "resuming: finished trials: 4" in caplog.text
        assert [trial.seed for trial in resumed.members] == [0, 1, 0, 1]
