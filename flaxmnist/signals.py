"""Being told to stop."""

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from flaxmnist.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

# Seconds from the first signal to the end at the latest; and those in which another one does not count as a second.
GRACE, REPEAT = 30.0, 1.0


@contextlib.contextmanager
def handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Within the block, ``handler`` is called for each of SIGNALS."""
    before = {each: signal.signal(each, handler) for each in SIGNALS}
    try:
        yield
    finally:
        for each, previous in before.items():
            signal.signal(each, previous)


@contextlib.contextmanager
def stop_on_signals(grace: float = GRACE) -> Iterator[threading.Event]:
    """Within the block, the first signal sets the event; the process ends ``grace`` seconds later at the latest.

    A second signal ends it at once. A thread sees to that, because Python's handlers wait for the main thread, which
    may be compiling.
    """
    stop = threading.Event()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def watch() -> None:
        if not os.read(reading, 1):
            return
        stop.set()
        first = time.monotonic()
        while (left := first + grace - time.monotonic()) > 0:
            ready, _, _ = select.select([reading], [], [], left)
            if ready and not os.read(reading, 1):
                return
            # Who tells a whole group of processes to stop often tells each of them twice: that is one signal.
            if ready and time.monotonic() - first > REPEAT:
                end("ended by a second signal")
        end(f"the run did not stop within {grace:g} s of a signal")

    thread = threading.Thread(target=watch, daemon=True)
    # The handler too sets it, in case an event loop in the main thread borrows Python's only wake-up file.
    with handled(lambda number, frame: stop.set()):
        before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        thread.start()
        try:
            yield stop
        finally:
            signal.set_wakeup_fd(before)
            # The thread reads the end of the pipe.
            os.close(writing)
            thread.join()
            os.close(reading)


def end(reason: str, linger: float = 0) -> None:
    """Ends this process, whatever its main thread does, ``linger`` seconds after it said why."""
    with contextlib.suppress(OSError):
        os.write(2, f"flaxmnist: {reason}; --resume goes on\n".encode())
    time.sleep(linger)
    os._exit(Stopped.exit_code)
