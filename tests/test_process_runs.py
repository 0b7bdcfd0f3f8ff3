"""Complete runs of several processes: they train as one, share a run folder, and end together."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import ROOT, free_port, read_lines

import flaxmnist as fm

SMALL = """
from flaxmnist.config import *
config = Config(
    name="small",
    model=CNNConfig(features=(4,), kernel=(3,), dense=16, dropout=0.5),
    optimizer=Adam(learning_rate=1e-3),
    data=Data(name="digits"),
    train=Train(batch_size=64, steps=60, log_every=10, evaluate_every=20, checkpoint_every=20),
)
"""


@pytest.fixture
def experiment(tmp_path) -> Path:
    path = tmp_path / "small.py"
    path.write_text(SMALL)
    return path


def environment(devices: int = 1) -> dict[str, str]:
    """Return the environment with this Python first in PATH, and ``devices`` CPU devices per process."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "PATH": path}


def run_local(processes: int, *arguments, devices: int = 1) -> subprocess.CompletedProcess[str]:
    """Run launch/local.sh."""
    command = ["bash", ROOT / "launch/local.sh", processes, *arguments]
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment(devices), timeout=300, check=False
    )


@contextlib.contextmanager
def start_processes(processes: int, *arguments, last=()):
    """Within the block, run ``processes`` processes of a run; ``last`` are options of the last one only."""
    with contextlib.ExitStack() as stack:
        started, port = [], free_port()
        for index in range(processes):
            command = [sys.executable, ROOT / "launch/train.py", *arguments, "--coordinator", f"127.0.0.1:{port}"]
            command += ["--processes", processes, "--process-id", index]
            command += last if index == processes - 1 else ()
            process = subprocess.Popen(
                list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
            )
            started.append(stack.enter_context(process))
            stack.callback(process.kill)
        yield started


def result(folder) -> dict:
    return json.loads((folder / "result.json").read_text())


def losses(folder) -> list[float]:
    return [record["loss"] for record in read_lines(folder)]


@pytest.mark.slow
def test_several_processes_train_as_one(experiment, digits, tmp_path):
    """Three with two devices each; one process writes and prints, and the run folder is as usual."""
    completed = run_local(3, experiment, "--workdir", tmp_path / "run", devices=2)
    assert completed.returncode == 0, completed.stderr
    assert len(re.findall("test accuracy", completed.stdout)) == 1
    assert completed.stdout.startswith("test accuracy"), "only results on standard output"
    assert "Gloo" not in completed.stdout
    expected = fm.fit(fm.load_experiment(experiment), digits, devices=6)
    loaded = fm.load_run(tmp_path / "run")
    for a, b in zip(*(jax.tree.leaves(run.state.params) for run in (loaded, expected)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    np.testing.assert_allclose(losses(tmp_path / "run"), [record["loss"] for record in expected.history], rtol=1e-4)
    described = json.loads((tmp_path / "run/config.json").read_text())["devices"]
    assert (described["count"], described["processes"]) == (6, 3)
    assert result(tmp_path / "run")["test_accuracy"] == expected.result.test_accuracy


@pytest.mark.slow
def test_processes_save_together_though_their_clocks_differ(experiment, tmp_path):
    """Only process 1 wants to save, after each step."""
    text = SMALL.replace(", checkpoint_every=20", ", keep=60")
    experiment.write_text(f"""{text}
import sys
from flaxmnist.loop import advance
from flaxmnist.store import run_folder
advance.CHUNK_SECONDS = 0.0
if sys.argv[sys.argv.index("--process-id") + 1] == "1":
    run_folder.SAVE_SECONDS = 0.0
""")
    completed = run_local(2, experiment, "--workdir", tmp_path / "run")
    assert completed.returncode == 0, completed.stderr
    assert len(list((tmp_path / "run/checkpoints").iterdir())) == 60
    assert fm.load_run(tmp_path / "run", 31).step == 31


@pytest.mark.slow
def test_a_run_resumes_on_other_devices_and_processes(experiment, digits, tmp_path):
    """From one process with eight devices to two with two each, and back to one process with one device or eight."""
    config = fm.load_experiment(experiment)
    expected = fm.fit(config, digits, devices=1)
    folder = tmp_path / "run"
    fm.fit(replace(config, train=replace(config.train, steps=20)), digits, folder, devices=8)
    completed = run_local(2, experiment, "--workdir", folder, "--resume", "--train.steps", 40, devices=2)
    assert completed.returncode == 0, completed.stderr
    assert "resuming from the checkpoint at step 20" in completed.stderr
    wanted = {record["step"]: record["loss"] for record in expected.history if record["split"] == "train"}
    for devices in (1, 8):
        copy = shutil.copytree(folder, tmp_path / str(devices))
        run = fm.fit(config, digits, copy, devices=devices, resume=True)
        resumed = {record["step"]: record["loss"] for record in run.history if record["split"] == "train"}
        assert list(resumed) == list(wanted)
        np.testing.assert_allclose(list(resumed.values()), list(wanted.values()), rtol=1e-3)


LONG = ("--train.steps", "4000", "--train.checkpoint-every", "100", "--train.evaluate-every", "None")


def wait_for_step(process: subprocess.Popen, step: int) -> None:
    """Wait until the process has logged ``step``."""
    for line in process.stderr:
        if line.startswith(f"step {step},"):
            return
    raise AssertionError("the run ended early")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    """The folder of a run of two processes with 400 steps."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    (folder / "small.py").write_text(SMALL)
    completed = run_local(2, folder / "small.py", "--workdir", folder / "run", *LONG, "--train.steps", "400")
    assert completed.returncode == 0, completed.stderr
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_lost_process_ends_the_others(victim, how, uninterrupted, experiment, tmp_path):
    with start_processes(2, experiment, "--workdir", tmp_path / "run", "--heartbeat", "10", *LONG) as run:
        wait_for_step(run[0], 250)
        run[victim].send_signal({"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}[how])
        start = time.monotonic()
        _, stderr = run[1 - victim].communicate(timeout=60)
        assert time.monotonic() - start < 20
    assert run[1 - victim].returncode == 75, stderr
    assert f"flaxmnist: process {victim} of the run was lost; --resume continues\n" in stderr
    resumed = run_local(2, experiment, "--workdir", tmp_path / "run", "--resume", *LONG, "--train.steps", "400")
    assert resumed.returncode == 0, resumed.stderr
    step = int(re.search(r"resuming from the checkpoint at step (\d+)", resumed.stderr)[1])
    assert step >= 200, "only the steps since the last checkpoint are lost"
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (uninterrupted / "metrics.jsonl").read_bytes()
    assert result(tmp_path / "run")["params_sha256"] == result(uninterrupted)["params_sha256"]


@pytest.mark.slow
def test_a_process_that_fails_ends_the_others(experiment, tmp_path):
    """The second one does not find its data."""
    missing = ("--data.name", "idx", "--data-dir", "nowhere")
    with start_processes(2, experiment, "--workdir", tmp_path / "run", "--heartbeat", "3", last=missing) as run:
        stderrs = [process.communicate(timeout=60)[1] for process in run]
    assert [process.returncode for process in run] == [75, 2], stderrs
    assert "process 1 of the run was lost" in stderrs[0]
    assert "nowhere" in stderrs[1]


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all(experiment, tmp_path):
    with start_processes(2, experiment, "--workdir", tmp_path / "run", *LONG) as run:
        wait_for_step(run[0], 250)
        run[1].send_signal(signal.SIGUSR1)
        stderrs = [process.communicate(timeout=60)[1] for process in run]
    assert [process.returncode for process in run] == [75, 75], stderrs
    stopped = int(re.search(r"stopped at step (\d+) of 4000; --resume continues", stderrs[0])[1])
    assert "stopped at step" not in stderrs[1], "only the first process prints it"
    resumed = run_local(2, experiment, "--workdir", tmp_path / "run", "--resume", *LONG, "--train.steps", stopped + 50)
    assert f"resuming from the checkpoint at step {stopped}" in resumed.stderr
    assert resumed.returncode == 0


@pytest.mark.slow
def test_an_error_on_the_first_process_ends_all(experiment, tmp_path):
    (tmp_path / "notes.txt").touch()
    with start_processes(2, experiment, "--workdir", tmp_path) as run:
        stderrs = [process.communicate(timeout=60)[1] for process in run]
    assert [process.returncode for process in run] == [2, 2], stderrs
    assert all("is not empty: pass --resume to continue" in stderr for stderr in stderrs)


@pytest.mark.slow
def test_a_failure_to_save_ends_all(experiment, tmp_path):
    """Without further attempts: the others would wait for the process that cannot save."""
    with start_processes(2, experiment, "--workdir", tmp_path / "run", "--heartbeat", "3", *LONG) as run:
        wait_for_step(run[0], 250)
        (tmp_path / "run").rename(tmp_path / "moved")
        stderrs = [process.communicate(timeout=60)[1] for process in run]
    first, second = (process.returncode for process in run)
    assert first == 2, stderrs
    # Either it finds that the folder is another one, or a write that had begun fails.
    assert f"cannot save to {tmp_path / 'run'}: " in stderrs[0]
    assert "retrying" not in stderrs[0]
    # The second process may try to save its own part before it notices that the first is gone.
    message = {75: "process 0 of the run was lost", 2: f"cannot save to {tmp_path / 'run'}: No such file or directory"}
    assert message[second] in stderrs[1]
