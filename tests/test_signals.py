"""Signals stop a run at any time."""

import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT

from flaxmnist.devices import signals

SMALL = """
from flaxmnist.config import *
config = Config(
    name="small",
    model=CNNConfig(features=(8,), kernel=(3,), dense=64),
    optimizer=Adam(),
    data=Data(name="digits"),
    train=Train(batch_size=64, steps=1_000_000, log_every=10),
)
"""

BUSY = """
import hashlib
from flaxmnist.devices import signals
with signals.stop_on_signals({grace}):
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)  # takes minutes, without running Python's signal handlers
"""


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_a_signal_sets_the_event_and_the_previous_handlers_are_restored(number):
    handlers = [signal.getsignal(other) for other in signals.SIGNALS]
    with signals.stop_on_signals() as stop:
        assert not stop.is_set()
        signal.raise_signal(number)
        assert stop.wait(5)
    assert [signal.getsignal(other) for other in signals.SIGNALS] == handlers
    assert not any("watch" in thread.name for thread in threading.enumerate())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("grace", "count", "message"),
    [(2, 1, "the run did not stop within 2 s of a signal"), (600, 2, "stopped by a second signal")],
)
def test_a_process_exits_while_its_main_thread_is_busy(grace, count, message):
    with subprocess.Popen(
        [sys.executable, "-c", BUSY.format(grace=grace)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.readline()
        start = time.monotonic()
        for _ in range(count):
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGTERM)  # `timeout` does this too; it counts as one signal
            time.sleep(1.2)
        _, errors = process.communicate(timeout=60)
        assert time.monotonic() - start < 10
    assert process.returncode == 75
    assert errors == f"flaxmnist: {message}; --resume continues\n"


@pytest.mark.parametrize("verb", ["train", "sweep"])
@pytest.mark.parametrize("command", [["launch/{}.py"], ["-m", "flaxmnist.commands", "{}"]], ids=" ".join)
def test_a_command_exits_at_once_before_its_imports_are_done(verb, command):
    command = [sys.executable, *(word.format(verb) for word in command), "nowhere.py", "--workdir", "nowhere"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        while process.poll() is None and not handles(process.pid, signal.SIGUSR1):
            time.sleep(0.001)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 75
    assert errors == "flaxmnist: stopped; --resume continues\n"


def handles(process: int, number: int) -> bool:
    """Return True if a process has a handler for a signal."""
    mask = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process}/status").read_text())[1]
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("delay", "number"), list(zip([0.5, 1.0, 1.5, 2.0, 3.0, 6.0], itertools.cycle(signals.SIGNALS), strict=False))
)
def test_a_run_exits_with_75_at_any_time(delay, number, tmp_path):
    """While it imports modules, loads data, compiles, trains or saves."""
    (tmp_path / "small.py").write_text(SMALL)
    command = [sys.executable, ROOT / "launch/train.py", tmp_path / "small.py", "--workdir", tmp_path / "run"]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        time.sleep(delay)
        start = time.monotonic()
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert time.monotonic() - start < 30
    assert process.returncode == 75, errors
    assert "Traceback" not in errors
    if stopped := re.search(r"stopped at step (\d+) of 1000000; --resume continues", errors):
        assert (tmp_path / "run/checkpoints" / stopped[1]).is_dir()
