"""Runs of several processes, on one host or many: joining, agreeing, and detecting a lost process."""

import atexit
import contextlib
import ctypes
import importlib.util
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

from flaxmnist.devices.signals import exit_process
from flaxmnist.errors import BelowTarget, Diverged, Stopped, UserError

# Seconds without a heartbeat after which a process counts as lost, and between two heartbeats.
HEARTBEAT_TIMEOUT, HEARTBEAT_INTERVAL = 20.0, 0.5

# Seconds in which all processes must have joined the run.
JOIN_SECONDS = 300.0

Value = TypeVar("Value")


def is_launched() -> bool:
    """Return True if a launcher that JAX supports started this process as one of several.

    A scheduler's variables are not enough: an interactive SLURM shell, or a pod outside of a job, has many of them.
    This job step itself must have several tasks.
    """
    if any(int(os.environ.get(name, 1)) > 1 for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")):
        return True
    if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= os.environ.keys():
        if importlib.util.find_spec("kubernetes") is None:
            command = "pip install -c constraints.txt '.[kubernetes]'"
            raise UserError(f"a Kubernetes job needs the extra kubernetes: {command}")
        return True
    return importlib.util.find_spec("libtpu") is not None


def check_address(coordinator: str | None, processes: int | None, process_id: int | None) -> None:
    """Raise UserError unless the three are valid together, or all None."""
    if coordinator is processes is process_id is None:
        return
    if coordinator is None or processes is None or process_id is None:
        raise UserError("pass --coordinator, --processes and --process-id together, or omit all three")
    if not 0 <= process_id < processes:
        raise UserError(f"--process-id must be in [0, --processes {processes}), but is {process_id}")
    _, colon, port = coordinator.rpartition(":")
    if not colon or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator must be HOST:PORT, but is {coordinator}")
    if process_id == 0:
        try:
            socket.create_server(("", int(port))).close()
        except OSError as error:
            reason = f"cannot listen on the port of --coordinator {coordinator} ({error.strerror})"
            raise UserError(f"{reason}: use another port") from None


def connect(address: tuple[str | None, int | None, int | None], heartbeat: float) -> bool:
    """Wait until all processes have joined; return False if a TPU library is installed, but this is not a TPU pod."""
    # JAX's preemption service would replace our handler of SIGTERM.
    jax.config.update("jax_enable_preemption_service", False)
    # JAX's timeouts are longer than ours, because its messages about missing and lost processes are hard to read.
    timeout = round(2 * heartbeat + 10)
    reason = f"not all processes joined the run within {JOIN_SECONDS:.0f} s"
    timer = threading.Timer(JOIN_SECONDS, exit_process, [reason])
    timer.start()
    try:
        jax.distributed.initialize(
            *address,
            initialization_timeout=round(JOIN_SECONDS + timeout),
            heartbeat_timeout_seconds=timeout,
            shutdown_timeout_seconds=timeout,
        )
    except ValueError as error:
        if "coordinator_address should be defined" in str(error):
            return False
        raise
    finally:
        timer.cancel()
    return True


@contextlib.contextmanager
def join_processes(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    heartbeat: float = HEARTBEAT_TIMEOUT,
) -> Iterator[None]:
    """Within the block, this process is one of a run's, and exits with code 75 if another one is lost.

    The arguments are HOST:PORT of process 0, the number of processes, the index of this one, and the seconds without a
    heartbeat after which a process counts as lost. If the first three are None, they come from the launcher, or this is
    the only process if no launcher started several. Raise UserError for invalid arguments.
    """
    address = coordinator, processes, process_id
    check_address(*address)
    if (address == (None, None, None) and not is_launched()) or not connect(address, heartbeat):
        yield
        return
    # When process 0 dies, JAX aborts the others at once, on a thread that runs no Python. With sleep() as the handler
    # of SIGABRT, which gets the signal's number, 6, as seconds, the watchdog has time to print its message first.
    libc = ctypes.CDLL(None)
    libc.signal(signal.SIGABRT, libc.sleep)
    with results_only(), contextlib.closing(Watchdog(distributed.global_state, heartbeat)):
        try:
            yield
        except (BelowTarget, Diverged, Stopped) as error:
            # All processes end this way; only the first prints the message.
            if is_first_process():
                raise
            raise SystemExit(error.exit_code) from None
        except Exception as error:
            if not isinstance(error, UserError):
                # A lost process shows first as a failed collective: let the watchdog find out which, and end this one.
                time.sleep(heartbeat + 6 * HEARTBEAT_INTERVAL)
            # JAX would wait for the others at exit, but they may still be running: skip that.
            atexit.register(os._exit, getattr(error, "exit_code", 1))
            raise


@contextlib.contextmanager
def results_only() -> Iterator[None]:
    """Within the block, only Python writes to standard output; what Gloo logs there goes to standard error."""
    sys.stdout.flush()
    results = os.dup(1)
    os.dup2(2, 1)
    try:
        with os.fdopen(results, "w", closefd=False) as stream, contextlib.redirect_stdout(stream):
            yield
    finally:
        os.dup2(results, 1)
        os.close(results)


class Watchdog:
    """Two threads that end this process if another is lost: one exchanges heartbeats, the other checks their age."""

    def __init__(self, state: Any, heartbeat: float):
        # ``state`` is JAX's. There is no public access to its coordinator and key-value store, which orbax uses too.
        self.timeout, self.closed = heartbeat, threading.Event()
        assert state.client is not None and state.coordinator_address is not None
        self.client, self.process_id = state.client, state.process_id
        host, port = state.coordinator_address.rsplit(":", 1)
        self.coordinator = host, int(port)
        now = time.monotonic()
        self.last_heartbeat = {other: now for other in range(state.num_processes) if other != self.process_id}
        self.threads = [threading.Thread(target=target, daemon=True) for target in (self.exchange, self.check)]
        for thread in self.threads:
            thread.start()

    def exchange(self) -> None:
        """Send heartbeats, which are counters in JAX's key-value store, and receive those of the others."""
        previous: dict[int, str | None] = {}
        count = 0
        while not self.closed.wait(HEARTBEAT_INTERVAL):
            count += 1
            try:
                self.client.key_value_set(f"alive/{self.process_id}", str(count), allow_overwrite=True)
                counters = dict(self.client.key_value_dir_get("alive/"))
            except jax.errors.JaxRuntimeError:
                self.exit_without(0)
            else:
                now = time.monotonic()
                for other in self.last_heartbeat:
                    counter = counters.get(f"alive/{other}")
                    # Process 0 holds the store, so that any reply is its heartbeat.
                    if other == 0 or counter != previous.get(other):
                        self.last_heartbeat[other], previous[other] = now, counter

    def check(self) -> None:
        while not self.closed.wait(HEARTBEAT_INTERVAL):
            for other, last in self.last_heartbeat.items():
                age = time.monotonic() - last
                if age > self.timeout or (other == 0 and age > 2 * HEARTBEAT_INTERVAL and self.is_refused()):
                    self.exit_without(other)

    def is_refused(self) -> bool:
        """Return True if nothing listens on the coordinator's port."""
        try:
            socket.create_connection(self.coordinator, timeout=HEARTBEAT_INTERVAL).close()
        except OSError as error:
            return isinstance(error, ConnectionRefusedError)
        return False

    def exit_without(self, other: int) -> None:
        """Exit because process ``other`` is lost, unless the run has ended."""
        if not self.closed.is_set():
            # Process 0 lets the others notice the loss first: without its coordinator, they would report process 0.
            delay = 4 * HEARTBEAT_INTERVAL if self.process_id == 0 else 0
            exit_process(f"process {other} of the run was lost", delay)

    def close(self) -> None:
        self.closed.set()
        for thread in self.threads:
            thread.join(HEARTBEAT_INTERVAL)


def is_first_process() -> bool:
    """Return True in process 0, the only one that writes files and prints."""
    return jax.process_index() == 0


def agree(stop: bool, pause: bool, rate: float) -> tuple[bool, bool, float]:
    """Return in all processes the same: if any is to ``stop``, or to ``pause``, and the ``rate`` of process 0."""
    if jax.process_count() == 1:
        return stop, pause, rate
    gathered = np.asarray(multihost_utils.process_allgather(np.array([stop, pause, rate], np.float32)))
    return bool(gathered[:, 0].any()), bool(gathered[:, 1].any()), float(gathered[0, 2])


def on_first_process(function: Callable[[], Value]) -> Value:
    """Call ``function`` in process 0 only; return its value, or raise its UserError, in all processes.

    The value must be serializable as JSON.
    """
    if jax.process_count() == 1:
        return function()
    message = b""
    if is_first_process():
        try:
            message = json.dumps({"value": function()}).encode()
        except UserError as error:
            message = json.dumps({"error": str(error)}).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.array(len(message))))
    buffer = np.frombuffer(message.ljust(size)[:size], np.uint8)
    outcome = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(buffer)).astype(np.uint8).tobytes())
    if "error" in outcome:
        raise UserError(outcome["error"])
    return outcome["value"]
