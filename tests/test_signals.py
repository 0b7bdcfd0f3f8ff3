"""Being told to stop, at any time."""

import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT

from flaxmnist import signals

SMALL = """
from flaxmnist.config import *
config = Config(
    name="small",
    model=CNN(features=(8,), kernel=(3,), dense=64),
    optimizer=Adam(),
    data=Data(name="digits"),
    train=Train(batch_size=64, steps=1_000_000, log_every=10),
)
"""

BUSY = """
import hashlib
from flaxmnist import signals
with signals.stop_on_signals({grace}):
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)  # minutes in which no handler of Python's runs
"""


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_a_signal_sets_the_event_and_what_was_handled_before_is_handled_again(number):
    before = [signal.getsignal(each) for each in signals.SIGNALS]
    with signals.stop_on_signals() as stop:
        assert not stop.is_set()
        signal.raise_signal(number)
        assert stop.wait(5)
    assert [signal.getsignal(each) for each in signals.SIGNALS] == before
    assert "watch" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("grace", "count", "told"),
    [(2, 1, "the run did not stop within 2 s of a signal"), (600, 2, "ended by a second signal")],
)
def test_it_ends_though_the_main_thread_is_busy(grace, count, told):
    with subprocess.Popen(
        [sys.executable, "-c", BUSY.format(grace=grace)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.readline()
        began = time.monotonic()
        for _ in range(count):
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGTERM)  # as `timeout` does: one signal all the same
            time.sleep(1.2)
        _, errors = process.communicate(timeout=60)
        assert time.monotonic() - began < 10
    assert process.returncode == 75
    assert errors == f"flaxmnist: {told}; --resume goes on\n"


@pytest.mark.slow
@pytest.mark.parametrize("number", signals.SIGNALS)
@pytest.mark.parametrize("moment", [0.5, 1.0, 1.5, 2.0, 3.0, 6.0])
def test_a_run_ends_with_75_at_any_time(number, moment, tmp_path):
    """While Python imports, while data are read, while it compiles, trains and saves."""
    (tmp_path / "small.py").write_text(SMALL)
    command = [sys.executable, ROOT / "launch/train.py", tmp_path / "small.py", "--workdir", tmp_path / "run"]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        time.sleep(moment)
        began = time.monotonic()
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert time.monotonic() - began < 30
    assert process.returncode == 75, errors
    assert "Traceback" not in errors
    if stopped := re.search(r"stopped at step (\d+) of 1000000; --resume goes on", errors):
        assert (tmp_path / "run/checkpoints" / stopped[1]).is_dir()
