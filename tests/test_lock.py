"""Only one run or sweep at a time in a folder."""

import os
import threading

import pytest
from conftest import fit_on_one, small

from flaxmnist.errors import Stopped, UserError
from flaxmnist.store.lock import Lock
from flaxmnist.sweeps.plan import Experiment
from flaxmnist.sweeps.runner import run_sweep

CONFIG = small(evaluate_every=5, checkpoint_every=5)


@pytest.mark.parametrize("options", [{"resume": True}, {"overwrite": True}])
def test_second_run_in_the_same_folder_is_refused(options, few, tmp_path):
    errors = []

    def start_second_run(step, split, scores):
        if step == 10:
            with pytest.raises(UserError, match=rf"is in use by process {os.getpid()} on \S+: wait until it ends"):
                fit_on_one(CONFIG, few, tmp_path, **options)
            errors.append(step)

    run = fit_on_one(CONFIG, few, tmp_path, on_evaluation=start_second_run)
    assert errors == [10]
    assert not (tmp_path / "lock").exists()
    assert fit_on_one(CONFIG, few, tmp_path, resume=True).result == run.result


def test_lock_file_of_a_killed_run_is_ignored(few, tmp_path):
    (tmp_path / "lock").write_text("process 1 on another-host")
    assert fit_on_one(CONFIG, few, tmp_path, resume=True).result.steps == 20


def test_stopped_run_removes_its_lock(few, tmp_path):
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        fit_on_one(CONFIG, few, tmp_path / "run", stop=stop)
    assert not (tmp_path / "run/lock").exists()


def test_second_sweep_in_the_same_folder_is_refused(few, tmp_path):
    lock = Lock()
    lock.take(tmp_path)
    with pytest.raises(UserError, match="is in use by process"):
        run_sweep([Experiment(CONFIG, few)], [0], [{}], workdir=tmp_path, devices=1, resume=True)
    lock.release()
