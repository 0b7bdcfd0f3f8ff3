"""Signals that stop a run: ``runs.train`` then saves a checkpoint and raises Stopped, exit code 75."""

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Iterator

from flaxmnist.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

# Seconds that a run has to stop after the first signal.
GRACE = 30.0

# Seconds in which further signals count as the first: process managers often signal a group and each of its processes.
REPEAT_SECONDS = 1.0


@contextlib.contextmanager
def stop_on_signals(grace: float = GRACE) -> Iterator[threading.Event]:
    """Within the block, the first signal sets the event, and the process exits after ``grace`` seconds at the latest.

    A second signal exits at once. A thread does this, because Python runs signal handlers on the main thread, which
    may be compiling.
    """
    stop = threading.Event()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch() -> None:
        if not os.read(reader, 1):
            return
        stop.set()
        first = time.monotonic()
        while (left := first + grace - time.monotonic()) > 0:
            ready, _, _ = select.select([reader], [], [], left)
            if ready and not os.read(reader, 1):
                return
            if ready and time.monotonic() - first > REPEAT_SECONDS:
                exit_process("stopped by a second signal")
        exit_process(f"the run did not stop within {grace:g} s of a signal")

    thread = threading.Thread(target=watch, daemon=True)
    # The handler sets the event too, in case an event loop in the main thread replaces the wake-up file descriptor.
    handlers = {number: signal.signal(number, lambda *_: stop.set()) for number in SIGNALS}
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread.start()
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(wakeup)
        os.close(writer)  # ends the thread, which reads the end of the pipe
        thread.join()
        os.close(reader)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def exit_process(reason: str, delay: float = 0) -> None:
    """Print ``reason`` and exit ``delay`` seconds later with code 75, even if the main thread is busy."""
    with contextlib.suppress(OSError):
        os.write(2, f"flaxmnist: {reason}; --resume continues\n".encode())
    time.sleep(delay)
    os._exit(Stopped.exit_code)
