"""The processes of a run, on one machine or many: how they find each other, agree, and notice that one is lost."""

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
from typing import TypeVar

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

from flaxmnist.errors import BelowTarget, Diverged, Stopped, UserError
from flaxmnist.signals import end

# Seconds without a sign of life after which a process counts as lost.
HEARTBEAT = 20.0

# Seconds in which all processes of a run must have come.
GATHERING = 300.0

# Seconds between two signs of life.
BEAT = 0.5

Value = TypeVar("Value")


def is_launched() -> bool:
    """Whether a launcher that JAX knows started this process as one of several.

    A variable of a scheduler alone says little: an interactive shell of SLURM, or a pod that is no part of a job, has
    many of them. What counts is that this very step has several tasks.
    """
    several = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    if any(int(os.environ.get(name, 1)) > 1 for name in several):
        return True
    if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= os.environ.keys():
        if importlib.util.find_spec("kubernetes") is None:
            raise UserError(
                "a Kubernetes job needs the extra kubernetes: pip install -c constraints.txt '.[kubernetes]'"
            )
        return True
    return importlib.util.find_spec("libtpu") is not None


def check(coordinator: str | None, processes: int | None, process_id: int | None) -> None:
    """Raises UserError unless the three make sense together, or none is given."""
    if coordinator is processes is process_id is None:
        return
    if coordinator is None or processes is None or process_id is None:
        raise UserError("give --coordinator, --processes and --process-id together, or none of them")
    if not 0 <= process_id < processes:
        raise UserError(f"--process-id {process_id} must lie in [0, --processes {processes})")
    _, colon, port = coordinator.rpartition(":")
    if not colon or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator {coordinator} must be HOST:PORT")
    if process_id == 0:
        try:
            socket.create_server(("", int(port))).close()
        except OSError as error:
            raise UserError(
                f"nothing can listen on the port of --coordinator {coordinator}: {error.strerror}; take another"
            ) from None


def connect(given: tuple[str | None, int | None, int | None], heartbeat: float) -> bool:
    """Returns when all processes have come; False at once where a TPU library is installed, but this is no pod."""
    # Ours is the only way to be told to stop; JAX's would take SIGTERM away.
    jax.config.update("jax_enable_preemption_service", False)
    # Ours is also to say first that a process is missing or lost: what JAX says of it, few would understand.
    patience = round(2 * heartbeat + 10)
    alarm = threading.Timer(GATHERING, end, [f"not all processes of the run came within {GATHERING:.0f} s"])
    alarm.start()
    try:
        jax.distributed.initialize(
            *given,
            initialization_timeout=round(GATHERING + patience),
            heartbeat_timeout_seconds=patience,
            shutdown_timeout_seconds=patience,
        )
    except ValueError as error:
        if "coordinator_address should be defined" in str(error):
            return False
        raise
    finally:
        alarm.cancel()
    return True


@contextlib.contextmanager
def joined(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    heartbeat: float = HEARTBEAT,
) -> Iterator[None]:
    """Within the block, this process is one of those of a run, and is ended, with 75, when another is lost.

    The three are those of ``jax.distributed.initialize``: HOST:PORT of process 0, how many there are, which one this
    is. Without them they are found out where a launcher started several processes; else this one is alone. A process
    counts as lost after ``heartbeat`` seconds without a sign of life. Raises UserError for what makes no sense.
    """
    given = coordinator, processes, process_id
    check(*given)
    if (given == (None, None, None) and not is_launched()) or not connect(given, heartbeat):
        yield
        return
    # Gloo tells of its connections on standard output, where only results belong.
    sys.stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # When process 0 dies, JAX aborts the others at once, on a thread where no Python runs. To sleep first, as many
    # seconds as the signal's number, which is 6, leaves the watch the time to speak.
    libc = ctypes.CDLL(None)
    libc.signal(signal.SIGABRT, libc.sleep)
    watch = Watch(heartbeat)
    try:
        yield
    except (BelowTarget, Diverged, Stopped) as ending:
        # All of them end so: one says it.
        if is_first():
            raise
        raise SystemExit(ending.exit_code) from None
    except Exception as error:
        if not isinstance(error, UserError):
            # A broken exchange is how a loss shows first. The watch finds out whose, and ends this process.
            time.sleep(heartbeat + 6 * BEAT)
        # This process may be the only one to end so: it leaves without waiting for the others, as JAX would at exit.
        atexit.register(os._exit, getattr(error, "exit_code", 1))
        raise
    finally:
        watch.close()


class Watch:
    """Two threads: one gives signs of life through JAX's coordinator and looks for the others', one judges by them."""

    def __init__(self, heartbeat: float):
        self.heartbeat, self.over = heartbeat, threading.Event()
        # Nothing public leads to the coordinator and its store, which orbax uses too.
        known = distributed.global_state
        assert known.client is not None and known.coordinator_address is not None
        self.client, self.me = known.client, known.process_id
        host, port = known.coordinator_address.rsplit(":", 1)
        self.coordinator = host, int(port)
        self.heard = {other: time.monotonic() for other in range(known.num_processes) if other != self.me}
        self.threads = [threading.Thread(target=each, daemon=True) for each in (self.beat, self.judge)]
        for thread in self.threads:
            thread.start()

    def beat(self) -> None:
        signs: dict[int, str | None] = {}
        count = 0
        while not self.over.wait(BEAT):
            count += 1
            try:
                self.client.key_value_set(f"alive/{self.me}", str(count), allow_overwrite=True)
                said = dict(self.client.key_value_dir_get("alive/"))
            except jax.errors.JaxRuntimeError:
                self.lose(0)
            else:
                now = time.monotonic()
                for other in self.heard:
                    sign = said.get(f"alive/{other}")
                    # That process 0 answers is its sign.
                    if other == 0 or sign != signs.get(other):
                        self.heard[other], signs[other] = now, sign

    def judge(self) -> None:
        while not self.over.wait(BEAT):
            for other, heard in self.heard.items():
                silence = time.monotonic() - heard
                if silence > self.heartbeat or (other == 0 and silence > 2 * BEAT and not self.is_coordinated()):
                    self.lose(other)

    def is_coordinated(self) -> bool:
        """Whether anything answers where process 0 listens, or could not be asked."""
        try:
            socket.create_connection(self.coordinator, timeout=BEAT).close()
        except ConnectionRefusedError:
            return False
        except OSError:
            pass
        return True

    def lose(self, other: int) -> None:
        """Ends this process, unless the run is over."""
        if not self.over.is_set():
            # The others are about to notice the same. Without a coordinator, they would think process 0 lost.
            end(f"process {other} of the run was lost", linger=4 * BEAT if self.me == 0 else 0)

    def close(self) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join(BEAT)


def is_first() -> bool:
    """Whether this is the process that alone writes and prints."""
    return jax.process_index() == 0


def agree(stop: bool, rate: float) -> tuple[bool, float]:
    """Whether any process wants to ``stop``, and the ``rate`` of the first."""
    if jax.process_count() == 1:
        return stop, rate
    said = np.asarray(multihost_utils.process_allgather(np.array([stop, rate], np.float32)))
    return bool(said[:, 0].any()), float(said[0, 1])


def on_first(function: Callable[[], Value]) -> Value:
    """What ``function`` gives in the first process, or the UserError that it raises there, in every process.

    The others do not call it. Its value must be one that JSON knows.
    """
    if jax.process_count() == 1:
        return function()
    said = b""
    if is_first():
        try:
            said = json.dumps({"value": function()}).encode()
        except UserError as error:
            said = json.dumps({"error": str(error)}).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.array(len(said))))
    letters = np.frombuffer(said.ljust(size)[:size], np.uint8)
    outcome = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(letters)).astype(np.uint8).tobytes())
    if "error" in outcome:
        raise UserError(outcome["error"])
    return outcome["value"]
