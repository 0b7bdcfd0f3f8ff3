"""Processes of a run: which launchers start several, what they print, and detecting a lost one."""

import importlib.machinery
import os
import socket
import subprocess
import sys
import types

import pytest
from conftest import ROOT, free_port

from flaxmnist.devices import processes
from flaxmnist.errors import UserError

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


@pytest.fixture
def packages(monkeypatch):
    """A function that makes ``kubernetes`` importable, or not; ``libtpu`` is not."""
    monkeypatch.setitem(sys.modules, "libtpu", None)

    def install(kubernetes: bool) -> None:
        module = types.ModuleType("kubernetes")
        module.__spec__ = importlib.machinery.ModuleSpec("kubernetes", None)
        monkeypatch.setitem(sys.modules, "kubernetes", module if kubernetes else None)

    return install


@pytest.mark.parametrize("launcher", SINGLE | LAUNCHED)
def test_only_a_launcher_of_several_processes_is_detected(launcher, packages, monkeypatch):
    packages(kubernetes=True)
    monkeypatch.setattr(os, "environ", (SINGLE | LAUNCHED)[launcher])
    assert processes.is_launched() == (launcher in LAUNCHED)


def test_a_kubernetes_job_without_the_kubernetes_package_is_an_error(packages, monkeypatch):
    packages(kubernetes=False)
    monkeypatch.setattr(os, "environ", LAUNCHED["a job's pod"])
    with pytest.raises(UserError, match="needs the extra kubernetes"):
        processes.is_launched()


def test_a_single_process_joins_nothing(packages, monkeypatch):
    packages(kubernetes=False)
    monkeypatch.setattr(os, "environ", {})
    stdout = sys.stdout
    with processes.join_processes():
        assert sys.stdout is stdout
        assert processes.is_first_process()
        assert processes.agree(True, False, 2.5) == (True, False, 2.5)
        assert processes.on_first_process(lambda: (1, "value")) == (1, "value")


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


PRINT = """
import ctypes
import os
import sys
from flaxmnist.devices import processes

def write(where):
    print("Python", where, flush=True)
    os.write(1, f"library {where}\\n".encode())

stdout = sys.stdout
write("before")
with processes.join_processes("127.0.0.1:PORT", 1, 0):
    write("within")
    print("Python at the end")
assert sys.stdout is stdout
write("after")
os.system("echo child after")
"""


def test_what_libraries_print_goes_to_standard_error_only_within_the_block():
    code = PRINT.replace("PORT", str(free_port()))
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert completed.stdout.splitlines() == [
        "Python before",
        "library before",
        "Python within",
        "Python at the end",
        "Python after",
        "library after",
        "child after",
    ]
    assert "library within" in completed.stderr.splitlines()


# --- The watchdog ---------------------------------------------------------------------------------------------------

# The watchdog of process INDEX has a timeout of one second, the others have none. All exchange heartbeats through one
# store, which hangs if the coordinator does not LISTEN, until process SILENT stops (-1: none does).
WATCH = """
import socket
import sys
import time
from types import SimpleNamespace
from flaxmnist.devices import processes

processes.HEARTBEAT_INTERVAL = 0.02
index, silent, listen = map(int, sys.argv[1:])
listener = socket.create_server(("127.0.0.1", 0))
address = f"127.0.0.1:{listener.getsockname()[1] if listen else 1}"

class Store(dict):
    def key_value_set(self, key, value, *, allow_overwrite):
        self[key] = value

    def key_value_dir_get(self, prefix):
        time.sleep(0 if listen else 100)
        return [(key, value) for key, value in list(self.items()) if key.startswith(prefix)]

store, running = Store(), {}
for other in range(3) if listen else [index]:
    state = SimpleNamespace(client=store, process_id=other, num_processes=3, coordinator_address=address)
    running[other] = processes.Watchdog(state, heartbeat=1.0 if listen and other == index else 1e9)
time.sleep(0.2)
if silent >= 0:
    running[silent].close()
time.sleep(2 if listen and silent < 0 else 30)
for watchdog in running.values():
    watchdog.close()
print("nothing was lost")
"""


def watch(index: int, silent: int = -1, listen: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WATCH, str(index), str(silent), str(int(listen))]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def test_no_process_with_heartbeats_is_lost():
    completed = watch(0)
    assert (completed.returncode, completed.stdout) == (0, "nothing was lost\n"), completed.stderr


@pytest.mark.parametrize("index", [0, 1])
def test_a_process_without_heartbeats_is_lost(index):
    completed = watch(index, silent=2)
    assert (completed.returncode, completed.stdout) == (75, "")
    assert completed.stderr == "flaxmnist: process 2 of the run was lost; --resume continues\n"


def test_a_coordinator_that_neither_replies_nor_listens_is_lost_at_once():
    completed = watch(1, listen=False)
    assert (completed.returncode, completed.stdout) == (75, "")
    assert completed.stderr == "flaxmnist: process 0 of the run was lost; --resume continues\n"
