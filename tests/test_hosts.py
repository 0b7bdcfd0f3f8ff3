"""Runs of several processes: they find each other, agree, share a run folder, and notice when one is lost."""

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
from flaxmnist import hosts
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
    """Ours, with the commands of this Python first, and so many devices to a process."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "PATH": path}


def local(processes: int, *arguments, devices: int = 1) -> subprocess.CompletedProcess[str]:
    """A run by launch/local.sh."""
    command = ["bash", ROOT / "launch/local.sh", processes, *arguments]
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment(devices), timeout=300, check=False
    )


@contextlib.contextmanager
def started(processes: int, *arguments, last=()):
    """The processes of a run, each to be watched by itself; ``last`` are options of the last one alone."""
    with contextlib.ExitStack() as stack:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        run = []
        for number in range(processes):
            command = [sys.executable, ROOT / "launch/train.py", *arguments, "--coordinator", f"127.0.0.1:{port}"]
            command += ["--processes", processes, "--process-id", number]
            command += last if number == processes - 1 else ()
            process = subprocess.Popen(
                list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
            )
            run.append(stack.enter_context(process))
            stack.callback(process.kill)
        yield run


def result(folder) -> dict:
    return json.loads((folder / "result.json").read_text())


def losses(folder) -> list[float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records]


# --- Finding each other ---------------------------------------------------------------------------------------------

SHELLS = {
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


@pytest.mark.parametrize("where", SHELLS | LAUNCHED)
def test_only_a_launcher_of_several_processes_makes_a_run_of_several(where, monkeypatch):
    monkeypatch.setattr(os, "environ", (SHELLS | LAUNCHED)[where])
    monkeypatch.setattr(hosts.importlib.util, "find_spec", lambda name: name == "kubernetes" or None)
    assert hosts.is_launched() == (where in LAUNCHED)


def test_a_kubernetes_job_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(os, "environ", LAUNCHED["a job's pod"])
    monkeypatch.setattr(hosts.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the extra kubernetes"):
        hosts.is_launched()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("127.0.0.1:1", 2, None), "--coordinator, --processes and --process-id together"),
        (("127.0.0.1:1", 2, 2), r"--process-id 2 must lie in \[0, --processes 2\)"),
        (("127.0.0.1", 2, 0), "--coordinator 127.0.0.1 must be HOST:PORT"),
        (("host:ssh", 2, 0), "must be HOST:PORT"),
        (("127.0.0.1:99999", 2, 0), "must be HOST:PORT"),
    ],
)
def test_addresses_that_make_no_sense(arguments, message):
    with pytest.raises(UserError, match=message), hosts.joined(*arguments):
        pass


def test_a_port_that_is_taken():
    with socket.create_server(("", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UserError, match="nothing can listen on the port"), hosts.joined(address, 2, 0):
            pass


# --- The watch ------------------------------------------------------------------------------------------------------


class Store(dict):
    """The coordinator's store, as its client shows it."""

    def key_value_set(self, key, value, *, allow_overwrite):
        self[key] = value

    def key_value_dir_get(self, prefix):
        return [(key, value) for key, value in self.items() if key.startswith(prefix)]


@pytest.fixture
def watched(monkeypatch):
    """Watches of processes that share a store; what each says it lost."""
    monkeypatch.setattr(hosts, "BEAT", 0.02)
    lost: list[tuple[int, int]] = []
    monkeypatch.setattr(hosts.Watch, "lose", lambda watch, other: lost.append((watch.me, other)))

    def watch(me: int, count: int, store) -> hosts.Watch:
        known = SimpleNamespace(client=store, process_id=me, num_processes=count, coordinator_address="127.0.0.1:1")
        monkeypatch.setattr(hosts.distributed, "global_state", known)
        return hosts.Watch(heartbeat=0.3)

    return watch, lost


def test_processes_that_give_signs_of_life_lose_nobody(watched):
    watch, lost = watched
    store = Store()
    watches = [watch(me, 3, store) for me in range(3)]
    time.sleep(0.6)
    for each in watches:
        each.close()
    assert lost == []


def test_a_silent_process_is_lost(watched):
    watch, lost = watched
    store = Store()
    watches = [watch(me, 3, store) for me in range(3)]
    time.sleep(0.1)
    watches[2].close()
    time.sleep(0.6)
    for each in watches:
        each.close()
    assert {(0, 2), (1, 2)} <= set(lost)
    assert {other for _, other in lost} == {2}


def test_a_coordinator_that_does_not_answer_and_does_not_listen_is_lost_at_once(watched):
    """Nothing listens on port 1."""
    watch, lost = watched

    class Hanging(Store):
        def key_value_dir_get(self, prefix):
            time.sleep(1)
            return []

    process = watch(1, 2, Hanging())
    time.sleep(0.2)
    assert lost
    assert set(lost) == {(1, 0)}
    process.close()


# --- Whole runs -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [(2, 2), (4, 1)])
def test_several_processes_train_as_one(processes, devices, experiment, digits, tmp_path):
    """Four devices each time; one process writes and prints, and the folder is that of any run."""
    ended = local(processes, experiment, "--workdir", tmp_path / "run", devices=devices)
    assert ended.returncode == 0, ended.stderr
    assert len(re.findall("test accuracy", ended.stdout)) == 1
    assert ended.stdout.startswith("test accuracy"), "nothing but results on standard output"
    whole = fm.fit(fm.load_experiment(experiment), digits, devices=4)
    loaded = fm.load_run(tmp_path / "run")
    for a, b in zip(*(jax.tree.leaves(run.state.params) for run in (loaded, whole)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    np.testing.assert_allclose(losses(tmp_path / "run"), [record["loss"] for record in whole.history], rtol=1e-4)
    described = json.loads((tmp_path / "run/config.json").read_text())["devices"]
    assert (described["count"], described["processes"]) == (4, processes)
    assert result(tmp_path / "run")["test_accuracy"] == whole.result["test_accuracy"]


@pytest.mark.slow
@pytest.mark.parametrize(("first", "last"), [(8, 1), (1, 8)])
def test_a_run_goes_on_with_other_devices_and_hosts(first, last, experiment, digits, tmp_path):
    """From one process to two with two devices each, and back to one."""
    config = fm.load_experiment(experiment)
    whole = fm.fit(config, digits, devices=1)
    folder = tmp_path / "run"
    fm.fit(replace(config, train=replace(config.train, steps=20)), digits, folder, devices=first)
    ended = local(2, experiment, "--workdir", folder, "--resume", "--train.steps", 40, devices=2)
    assert ended.returncode == 0, ended.stderr
    assert "going on from the checkpoint at step 20" in ended.stderr
    fm.fit(config, digits, folder, devices=last, resume=True)
    steps = {record["step"]: record["loss"] for record in whole.history if record["split"] == "train"}
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    again = {record["step"]: record["loss"] for record in records if record["split"] == "train"}
    assert list(again) == list(steps)
    np.testing.assert_allclose(list(again.values()), list(steps.values()), rtol=1e-3)


LONG = ("--train.steps", "4000", "--train.checkpoint-every", "100", "--train.evaluate-every", "None")


def reach(process: subprocess.Popen, step: int) -> None:
    """Returns when the process has told of ``step``."""
    for line in process.stderr:
        if line.startswith(f"step {step},"):
            return
    raise AssertionError("the run ended early")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_lost_process_ends_the_others(victim, how, experiment, tmp_path):
    with started(2, experiment, "--workdir", tmp_path / "run", "--heartbeat", "10", *LONG) as run:
        reach(run[0], 250)
        run[victim].send_signal({"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}[how])
        began = time.monotonic()
        _, told = run[1 - victim].communicate(timeout=60)
        assert time.monotonic() - began < 20
    assert run[1 - victim].returncode == 75, told
    assert f"flaxmnist: process {victim} of the run was lost; --resume goes on\n" in told
    resumed = local(2, experiment, "--workdir", tmp_path / "run", "--resume", *LONG, "--train.steps", "400")
    assert resumed.returncode == 0, resumed.stderr
    step = int(re.search(r"going on from the checkpoint at step (\d+)", resumed.stderr)[1])
    assert step >= 200, "at most the steps since the last checkpoint are lost"
    whole = local(2, experiment, "--workdir", tmp_path / "whole", *LONG, "--train.steps", "400")
    assert whole.returncode == 0, whole.stderr
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    assert result(tmp_path / "run")["params_sha256"] == result(tmp_path / "whole")["params_sha256"]


@pytest.mark.slow
def test_a_process_that_fails_by_itself_ends_the_others(experiment, tmp_path):
    """The second one does not find its data."""
    missing = ("--data.name", "idx", "--data-dir", "nowhere")
    with started(2, experiment, "--workdir", tmp_path / "run", "--heartbeat", "3", last=missing) as run:
        told = [process.communicate(timeout=60)[1] for process in run]
    assert [process.returncode for process in run] == [75, 2], told
    assert "process 1 of the run was lost" in told[0]
    assert "nowhere" in told[1]


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all(experiment, tmp_path):
    with started(2, experiment, "--workdir", tmp_path / "run", *LONG) as run:
        reach(run[0], 250)
        run[1].send_signal(signal.SIGUSR1)
        told = [process.communicate(timeout=60)[1] for process in run]
    assert [process.returncode for process in run] == [75, 75], told
    stopped = int(re.search(r"stopped at step (\d+) of 4000; --resume goes on", told[0])[1])
    assert "stopped at step" not in told[1], "one says it"
    resumed = local(2, experiment, "--workdir", tmp_path / "run", "--resume", *LONG, "--train.steps", stopped + 50)
    assert f"going on from the checkpoint at step {stopped}" in resumed.stderr
    assert resumed.returncode == 0
