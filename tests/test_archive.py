"""Write errors during a run: training continues, and nothing is lost. Locks of run folders."""

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
import threading

import pytest
from conftest import assert_same, small

import flaxmnist as fm
from flaxmnist import runs
from flaxmnist.config import MLP
from flaxmnist.errors import Stopped, UserError
from flaxmnist.store import archive, folders
from flaxmnist.sweeps import sweeps

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


@contextlib.contextmanager
def mounted(folder, *options):
    """Mount a small file system in memory at ``folder``."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch, tmp_path):
    """Retry without waiting, and rescue runs to a folder of the test."""
    monkeypatch.setattr(archive, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(folders, "LAST_RETRIES", ())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))


def at_step(monkeypatch, step: int, action) -> None:
    """Call ``action`` once, after a run was evaluated on the validation images at ``step``."""
    evaluate, actions = runs.Loop.evaluate, [action]

    def evaluate_and_act(loop, split, images):
        result = evaluate(loop, split, images)
        if loop.step == step and split == "validation" and actions:
            loop.archive.checkpoints.wait()
            actions.pop()()
        return result

    monkeypatch.setattr(runs.Loop, "evaluate", evaluate_and_act)


def fit(config, few, folder, **options):
    return fm.fit(config, few, folder, devices=1, **options)


CONFIG = small(evaluate_every=5, checkpoint_every=5)


def check_rescued(error, few, tmp_path):
    """Check that the run was saved to the folder in the message, and finishes there as if never interrupted."""
    elsewhere = re.search(r"step 20 is saved in (\S+); pass --workdir (\S+) --resume to continue", str(error.value))
    assert elsewhere[1] == elsewhere[2]
    assert elsewhere[1].startswith(str(tmp_path / "elsewhere"))
    finished = fit(CONFIG, few, elsewhere[1], resume=True)
    uninterrupted = fit(CONFIG, few, tmp_path / "uninterrupted")
    assert_same(finished.state, uninterrupted.state)
    assert finished.history == uninterrupted.history


@needs_root
def test_disk_becomes_full(few, tmp_path, monkeypatch, caplog):
    disk = tmp_path / "disk"
    with mounted(disk, "-o", "size=2m"):
        at_step(monkeypatch, 10, lambda: fill(disk))
        with pytest.raises(UserError, match=r"cannot save to .*run \(No space left on device\)") as error:
            fit(CONFIG, few, disk / "run")
        assert "No space left on device): retrying in 0 s" in caplog.text
        assert fm.load_run(disk / "run").state.step == 5, "the earlier checkpoint is intact"
        check_rescued(error, few, tmp_path)
        (disk / "filling").unlink()
        assert fit(CONFIG, few, disk / "run", resume=True).result["steps"] == 20


def fill(disk) -> None:
    """Fill up ``disk`` with a file."""
    with (disk / "filling").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


@needs_root
def test_full_disk_with_space_again_before_the_end(few, tmp_path, monkeypatch, caplog):
    disk = tmp_path / "disk"
    with mounted(disk, "-o", "size=2m"):
        at_step(monkeypatch, 5, lambda: fill(disk))
        at_step(monkeypatch, 15, (disk / "filling").unlink)
        run = fit(CONFIG, few, disk / "run")
        assert "No space left on device" in caplog.text
        assert [record["step"] for record in run.history if record["split"] == "train"] == list(range(20))
        assert fm.load_run(disk / "run").state.step == 20


@needs_root
def test_folder_becomes_read_only(few, tmp_path, monkeypatch):
    folder = tmp_path / "run"

    def protect():
        subprocess.run(["mount", "--bind", folder, folder], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)

    try:
        at_step(monkeypatch, 10, protect)
        with pytest.raises(UserError, match=r"\(Read-only file system\)") as error:
            fit(CONFIG, few, folder)
        check_rescued(error, few, tmp_path)
        with pytest.raises(UserError, match=r"cannot write to .*run: Read-only file system"):
            fit(CONFIG, few, folder, resume=True)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_folder_is_removed_during_a_run(few, tmp_path, monkeypatch):
    at_step(monkeypatch, 10, lambda: shutil.rmtree(tmp_path / "run"))
    with pytest.raises(UserError, match="was removed or replaced") as error:
        fit(CONFIG, few, tmp_path / "run")
    assert not (tmp_path / "run").exists(), "after an unmount, nothing is written to the mount point"
    check_rescued(error, few, tmp_path)


def test_removed_records_are_written_again(few, tmp_path, monkeypatch):
    at_step(monkeypatch, 10, (tmp_path / "run/metrics.jsonl").unlink)
    fit(CONFIG, few, tmp_path / "run")
    fit(CONFIG, few, tmp_path / "intact")
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (tmp_path / "intact/metrics.jsonl").read_bytes()


def test_run_that_cannot_save_is_stopped(few, tmp_path, monkeypatch):
    stop = threading.Event()
    at_step(monkeypatch, 10, lambda: (shutil.rmtree(tmp_path / "run"), stop.set()))
    with pytest.raises(UserError, match=r"step \d+ is saved in"):
        fit(CONFIG, few, tmp_path / "run", stop=stop)


def test_nothing_can_be_saved_anywhere_else(few, tmp_path, monkeypatch):
    at_step(monkeypatch, 10, lambda: shutil.rmtree(tmp_path / "run"))
    for name in ("home", "cwd"):
        monkeypatch.setattr(folders.Path, name, lambda: tmp_path / "none")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(UserError, match="or anywhere else"):
        fit(CONFIG, few, tmp_path / "run")


@needs_root
def test_sweep_on_a_full_disk(few, tmp_path, caplog):
    """Results rescued elsewhere can be moved back, and their trials are not trained again."""
    disk = tmp_path / "disk"
    config = small(MLP(hidden=(64,)), evaluate_every=10)
    options = {"workdir": disk / "sweep", "devices": 1}

    def sweep(**more):
        return sweeps.run(
            [(config, few)], [0, 1], [{"train.batch_size": 8}, {"train.batch_size": 16}], **options, **more
        )

    with mounted(disk, "-o", "size=700k"):
        with pytest.raises(UserError, match="No space left on device") as error:
            sweep()
        elsewhere = re.search(r"unsaved results are in (\S+): copy", str(error.value))[1]
        subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
        for part in folders.Path(elsewhere, "parts").iterdir():
            shutil.move(part, disk / "sweep/parts")
        caplog.set_level("INFO", logger="flaxmnist")
        resumed = sweep(resume=True)
        assert "resuming: 4 trials are finished" in caplog.text
        assert [line["seed"] for line in resumed.members] == [0, 1, 0, 1]


# --- Two runs in a folder -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"resume": True}, {"overwrite": True}])
def test_second_run_in_the_same_folder_is_refused(options, few, tmp_path, monkeypatch):
    errors = []

    def start_second_run():
        with pytest.raises(UserError, match=rf"is in use by process {os.getpid()} on \S+: wait until it ends") as error:
            fit(CONFIG, few, tmp_path / "run", **options)
        errors.append(error)

    at_step(monkeypatch, 10, start_second_run)
    run = fit(CONFIG, few, tmp_path / "run")
    assert errors
    assert not (tmp_path / "run/lock").exists()
    monkeypatch.undo()
    assert fit(CONFIG, few, tmp_path / "run", resume=True).result == run.result


def test_lock_file_of_a_killed_run_is_ignored(few, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/lock").write_text("process 1 on another-host")
    assert fit(CONFIG, few, tmp_path / "run", resume=True).result["steps"] == 20


def test_stopped_run_removes_its_lock(few, tmp_path):
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        fit(CONFIG, few, tmp_path / "run", stop=stop)
    assert not (tmp_path / "run/lock").exists()


def test_second_sweep_in_the_same_folder_is_refused(few, tmp_path):
    tmp_path /= "sweep"
    first = sweeps.Kept(tmp_path, {"experiments": []}, resume=False, overwrite=False)
    with pytest.raises(UserError, match="is in use by process"):
        sweeps.Kept(tmp_path, {"experiments": []}, resume=True, overwrite=False)
    first.lock.release()
