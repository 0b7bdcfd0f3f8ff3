"""A run folder that cannot be written to while a run goes: nothing ends at once, and nothing is lost."""

import contextlib
import os
import re
import shutil
import subprocess
import tempfile

import pytest
from conftest import assert_same, small

import flaxmnist as fm
from flaxmnist import archive, folders, runs, sweeps
from flaxmnist.config import MLP
from flaxmnist.errors import Stopped, UserError

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


@contextlib.contextmanager
def mounted(folder, *options):
    """``folder`` as a small file system in memory."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture(autouse=True)
def quickly(monkeypatch, tmp_path):
    """No waiting between attempts, and a place of its own for what is rescued."""
    monkeypatch.setattr(archive, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(folders, "LAST_RETRIES", ())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))


def at_step(monkeypatch, step: int, action) -> None:
    """Does ``action`` once, when a run has evaluated itself at ``step``."""
    evaluate, actions = runs.Loop.evaluate, [action]

    def evaluating(loop, split, images):
        seen = evaluate(loop, split, images)
        if loop.step == step and split == "validation" and actions:
            loop.archive.checkpoints.wait()
            actions.pop()()
        return seen

    monkeypatch.setattr(runs.Loop, "evaluate", evaluating)


def fit(config, few, folder, **options):
    return fm.fit(config, few, folder, devices=1, **options)


CONFIG = small(evaluate_every=5, checkpoint_every=5)


def check_rescued(ended, few, run, tmp_path):
    """The run is in the folder that the message names, and can be finished there."""
    elsewhere = re.search(r"step 20 is kept in (\S+), --workdir (\S+) --resume goes on from there", str(ended.value))
    assert elsewhere[1] == elsewhere[2]
    assert elsewhere[1].startswith(str(tmp_path / "elsewhere"))
    finished = fit(CONFIG, few, elsewhere[1], resume=True)
    whole = fit(CONFIG, few, tmp_path / "whole")
    assert_same(finished.state, whole.state)
    assert finished.history == whole.history


@needs_root
def test_a_disk_that_fills_up(few, tmp_path, monkeypatch, caplog):
    disk = tmp_path / "disk"
    with mounted(disk, "-o", "size=2m"):
        at_step(monkeypatch, 10, lambda: fill(disk))
        with pytest.raises(UserError, match=r"cannot save to .*run \(No space left on device\)") as ended:
            fit(CONFIG, few, disk / "run")
        assert "No space left on device): tried again in 0 s" in caplog.text
        assert fm.load_run(disk / "run").state.step == 5, "what was saved before is whole"
        check_rescued(ended, few, disk / "run", tmp_path)
        (disk / "filling").unlink()
        assert fit(CONFIG, few, disk / "run", resume=True).result["steps"] == 20


def fill(disk) -> None:
    """Leaves no room on ``disk``."""
    with (disk / "filling").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


@needs_root
def test_a_disk_that_has_room_again(few, tmp_path, monkeypatch, caplog):
    disk = tmp_path / "disk"
    with mounted(disk, "-o", "size=2m"):
        at_step(monkeypatch, 5, lambda: fill(disk))
        at_step(monkeypatch, 15, (disk / "filling").unlink)
        run = fit(CONFIG, few, disk / "run")
        assert "No space left on device" in caplog.text
        assert [record["step"] for record in run.history if record["split"] == "train"] == list(range(20))
        assert fm.load_run(disk / "run").state.step == 20


@needs_root
def test_a_folder_that_may_no_longer_be_written_to(few, tmp_path, monkeypatch):
    folder = tmp_path / "run"

    def protect():
        subprocess.run(["mount", "--bind", folder, folder], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)

    try:
        at_step(monkeypatch, 10, protect)
        with pytest.raises(UserError, match=r"\(Read-only file system\)") as ended:
            fit(CONFIG, few, folder)
        check_rescued(ended, few, folder, tmp_path)
        with pytest.raises(UserError, match=r"cannot write to .*run: Read-only file system"):
            fit(CONFIG, few, folder, resume=True)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_folder_that_vanishes(few, tmp_path, monkeypatch):
    at_step(monkeypatch, 10, lambda: shutil.rmtree(tmp_path / "run"))
    with pytest.raises(UserError, match="has vanished") as ended:
        fit(CONFIG, few, tmp_path / "run")
    assert not (tmp_path / "run").exists(), "where a disk was mounted, another one is not written to"
    check_rescued(ended, few, tmp_path / "run", tmp_path)


def test_records_that_vanish_are_written_again(few, tmp_path, monkeypatch):
    at_step(monkeypatch, 10, (tmp_path / "run/metrics.jsonl").unlink)
    fit(CONFIG, few, tmp_path / "run")
    fit(CONFIG, few, tmp_path / "whole")
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


def test_being_stopped_where_nothing_can_be_saved(few, tmp_path, monkeypatch):
    import threading

    stop = threading.Event()
    at_step(monkeypatch, 10, lambda: (shutil.rmtree(tmp_path / "run"), stop.set()))
    with pytest.raises(UserError, match=r"step \d+ is kept in"):
        fit(CONFIG, few, tmp_path / "run", stop=stop)


def test_nothing_can_be_saved_anywhere(few, tmp_path, monkeypatch):
    at_step(monkeypatch, 10, lambda: shutil.rmtree(tmp_path / "run"))
    for name in ("home", "cwd"):
        monkeypatch.setattr(folders.Path, name, lambda: tmp_path / "none")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(UserError, match="nor anywhere else"):
        fit(CONFIG, few, tmp_path / "run")


@needs_root
def test_a_sweep_whose_disk_is_full(few, tmp_path, caplog):
    """What could not be written is kept elsewhere; moved back, it is not trained again."""
    disk = tmp_path / "disk"
    config = small(MLP(hidden=(64,)), evaluate_every=10)
    options = {"workdir": disk / "sweep", "devices": 1}

    def sweep(**more):
        return sweeps.run(
            [(config, few)], [0, 1], [{"train.batch_size": 8}, {"train.batch_size": 16}], **options, **more
        )

    with mounted(disk, "-o", "size=700k"):
        with pytest.raises(UserError, match="No space left on device") as ended:
            sweep()
        elsewhere = re.search(r"what is not there is kept in (\S+): copy", str(ended.value))[1]
        subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
        for part in folders.Path(elsewhere, "parts").iterdir():
            shutil.move(part, disk / "sweep/parts")
        caplog.set_level("INFO", logger="flaxmnist")
        again = sweep(resume=True)
        assert "going on with 4 members finished" in caplog.text
        assert [line["seed"] for line in again.members] == [0, 1, 0, 1]


# --- Two runs in a folder -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"resume": True}, {"overwrite": True}])
def test_a_second_run_in_the_folder_is_refused_while_the_first_goes(options, few, tmp_path, monkeypatch):
    refused = []

    def second():
        with pytest.raises(UserError, match=rf"is in use by process {os.getpid()} on \S+: wait until it ends") as ended:
            fit(CONFIG, few, tmp_path / "run", **options)
        refused.append(ended)

    at_step(monkeypatch, 10, second)
    run = fit(CONFIG, few, tmp_path / "run")
    assert refused
    assert not (tmp_path / "run/lock").exists()
    monkeypatch.undo()
    assert fit(CONFIG, few, tmp_path / "run", resume=True).result == run.result


def test_the_lock_of_a_killed_run_holds_nobody_up(few, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/lock").write_text("process 1 on another-host")
    assert fit(CONFIG, few, tmp_path / "run", resume=True).result["steps"] == 20


def test_a_stopped_run_leaves_no_lock(few, tmp_path):
    import threading

    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        fit(CONFIG, few, tmp_path / "run", stop=stop)
    assert not (tmp_path / "run/lock").exists()


def test_a_second_sweep_in_the_folder_is_refused(few, tmp_path):
    tmp_path /= "sweep"
    one = sweeps.Kept(tmp_path, {"experiments": []}, resume=False, overwrite=False)
    with pytest.raises(UserError, match="is in use by process"):
        sweeps.Kept(tmp_path, {"experiments": []}, resume=True, overwrite=False)
    one.lock.release()
