"""Being told to stop."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from flaxmnist.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


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
def raise_on_signals() -> Iterator[None]:
    """Within the block, a signal raises Stopped."""

    def handler(number: int, frame: FrameType | None) -> None:
        raise Stopped("stopped before training began")

    with handled(handler):
        yield


@contextlib.contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """Within the block, the first signal sets the event; a second one ends the process at once."""
    stop = threading.Event()

    def handler(number: int, frame: FrameType | None) -> None:
        stop.set()
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)

    with handled(handler):
        yield stop
