"""Runs of several processes: joining, agreeing, sharing a run folder, and detecting a lost process."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import ROOT

import flaxmnist as fm
from flaxmnist.devices import processes
from flaxmnist.errors import UserError

SMALL = """
from flaxmnist.config import *
config = Config(
    name="small",
    model=CNN(features=(4,), kernel=(3,), dense=16, dropout=0.5),
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
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        started = []
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
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records]


# --- Joining --------------------------------------------------------------------------------------------------------

SINGLE = {
    "a laptop": {},
    "a login node": {"SLURM_CONF": "/etc/slurm.conf", "SLURM_CLUSTER_NAME": "big"},
    "salloc's shell": {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
    "srun --pty bash": {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
    "a notebook's pod": {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
    "mpirun -n 1": {"OMPI_COMM_WORLD_SIZE": "1"},
}
LAUNCHED = {
    "srun -n 2": {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"},
    "mpirun -n 2": {"OMPI_COMM_WORLD_SIZE": "2"},
    "a job's pod": {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"},
}


@pytest.mark.parametrize("launcher", SINGLE | LAUNCHED)
def test_only_a_launcher_of_several_processes_is_detected(launcher, monkeypatch):
    monkeypatch.setattr(os, "environ", (SINGLE | LAUNCHED)[launcher])
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: name == "kubernetes" or None)
    assert processes.is_launched() == (launcher in LAUNCHED)


def test_a_kubernetes_job_without_the_kubernetes_package_is_an_error(monkeypatch):
    monkeypatch.setattr(os, "environ", LAUNCHED["a job's pod"])
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the extra kubernetes"):
        processes.is_launched()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("127.0.0.1:1", 2, None), "--coordinator, --processes and --process-id together"),
        (("127.0.0.1:1", 2, 2), r"--process-id must be in \[0, --processes 2\), but is 2"),
        (("127.0.0.1", 2, 0), "--coordinator must be HOST:PORT, but is 127.0.0.1"),
        (("host:ssh", 2, 0), "must be HOST:PORT, but is host:ssh"),
        (("127.0.0.1:99999", 2, 0), "must be HOST:PORT, but is 127.0.0.1:99999"),
    ],
)
def test_invalid_addresses(arguments, message):
    with pytest.raises(UserError, match=message), processes.join_processes(*arguments):
        pass


def test_a_port_in_use():
    with socket.create_server(("", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(UserError, match="cannot listen on the port"), processes.join_processes(address, 2, 0):
            pass


# --- The watchdog ---------------------------------------------------------------------------------------------------


class Store(dict):
    """A stand-in for the client of the coordinator's key-value store."""

    def key_value_set(self, key, value, *, allow_overwrite):
        self[key] = value

    def key_value_dir_get(self, prefix):
        return [(key, value) for key, value in self.items() if key.startswith(prefix)]


@pytest.fixture
def watchdogs(monkeypatch):
    """A function that makes the watchdog of a process, and the list of (process, lost process) they report."""
    monkeypatch.setattr(processes, "HEARTBEAT_INTERVAL", 0.02)
    lost: list[tuple[int, int]] = []
    monkeypatch.setattr(processes.Watchdog, "exit_without", lambda dog, other: lost.append((dog.process_id, other)))

    def make(index: int, count: int, store) -> processes.Watchdog:
        state = SimpleNamespace(client=store, process_id=index, num_processes=count, coordinator_address="127.0.0.1:1")
        monkeypatch.setattr(processes.distributed, "global_state", state)
        return processes.Watchdog(heartbeat=0.3)

    return make, lost


def test_no_process_with_heartbeats_is_lost(watchdogs):
    make, lost = watchdogs
    store = Store()
    running = [make(index, 3, store) for index in range(3)]
    time.sleep(0.6)
    for watchdog in running:
        watchdog.close()
    assert lost == []


def test_a_process_without_heartbeats_is_lost(watchdogs):
    make, lost = watchdogs
    store = Store()
    running = [make(index, 3, store) for index in range(3)]
    time.sleep(0.1)
    running[2].close()
    time.sleep(0.6)
    for watchdog in running:
        watchdog.close()
    assert {(0, 2), (1, 2)} <= set(lost)
    assert {other for _, other in lost} == {2}


def test_a_coordinator_that_neither_replies_nor_listens_is_lost_at_once(watchdogs):
    """The address has port 1, on which nothing listens."""
    make, lost = watchdogs

    class Hanging(Store):
        def key_value_dir_get(self, prefix):
            time.sleep(1)
            return []

    watchdog = make(1, 2, Hanging())
    time.sleep(0.2)
    assert lost
    assert set(lost) == {(1, 0)}
    watchdog.close()


# --- Complete runs --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [(2, 2), (4, 1)])
def test_several_processes_train_as_one(processes, devices, experiment, digits, tmp_path):
    """On four devices in all; one process writes and prints, and the run folder is as usual."""
    completed = run_local(processes, experiment, "--workdir", tmp_path / "run", devices=devices)
    assert completed.returncode == 0, completed.stderr
    assert len(re.findall("test accuracy", completed.stdout)) == 1
    assert completed.stdout.startswith("test accuracy"), "only results on standard output"
    expected = fm.fit(fm.load_experiment(experiment), digits, devices=4)
    loaded = fm.load_run(tmp_path / "run")
    for a, b in zip(*(jax.tree.leaves(run.state.params) for run in (loaded, expected)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    np.testing.assert_allclose(losses(tmp_path / "run"), [record["loss"] for record in expected.history], rtol=1e-4)
    described = json.loads((tmp_path / "run/config.json").read_text())["devices"]
    assert (described["count"], described["processes"]) == (4, processes)
    assert result(tmp_path / "run")["test_accuracy"] == expected.result["test_accuracy"]


@pytest.mark.slow
@pytest.mark.parametrize(("first", "last"), [(8, 1), (1, 8)])
def test_a_run_resumes_on_other_devices_and_processes(first, last, experiment, digits, tmp_path):
    """From one process to two with two devices each, and back to one process."""
    config = fm.load_experiment(experiment)
    expected = fm.fit(config, digits, devices=1)
    folder = tmp_path / "run"
    fm.fit(replace(config, train=replace(config.train, steps=20)), digits, folder, devices=first)
    completed = run_local(2, experiment, "--workdir", folder, "--resume", "--train.steps", 40, devices=2)
    assert completed.returncode == 0, completed.stderr
    assert "resuming from the checkpoint at step 20" in completed.stderr
    fm.fit(config, digits, folder, devices=last, resume=True)
    wanted = {record["step"]: record["loss"] for record in expected.history if record["split"] == "train"}
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    resumed = {record["step"]: record["loss"] for record in records if record["split"] == "train"}
    assert list(resumed) == list(wanted)
    np.testing.assert_allclose(list(resumed.values()), list(wanted.values()), rtol=1e-3)


LONG = ("--train.steps", "4000", "--train.checkpoint-every", "100", "--train.evaluate-every", "None")


def wait_for_step(process: subprocess.Popen, step: int) -> None:
    """Wait until the process has logged ``step``."""
    for line in process.stderr:
        if line.startswith(f"step {step},"):
            return
    raise AssertionError("the run ended early")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_lost_process_ends_the_others(victim, how, experiment, tmp_path):
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
    uninterrupted = run_local(2, experiment, "--workdir", tmp_path / "uninterrupted", *LONG, "--train.steps", "400")
    assert uninterrupted.returncode == 0, uninterrupted.stderr
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (tmp_path / "uninterrupted/metrics.jsonl").read_bytes()
    assert result(tmp_path / "run")["params_sha256"] == result(tmp_path / "uninterrupted")["params_sha256"]


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
