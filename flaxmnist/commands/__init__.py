"""The commands: one module a verb, each with ``main(argv)``, which returns the exit code. Only here tyro.

This file imports nothing slow, so that signals work from the start: JAX alone takes a second.
"""

import importlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from flaxmnist.devices.signals import SIGNALS, exit_process
from flaxmnist.errors import UserError, exit_code, print_message

if TYPE_CHECKING:
    from flaxmnist.config import Config

# The value of time.perf_counter() at the start of the command.
START = time.perf_counter()

VERBS = {
    "train": "train an experiment",
    "evaluate": "evaluate a run, a sweep or an export",
    "predict": "classify digits in image files",
    "sweep": "train many trials at once",
    "report": "draw a run, several runs side by side, or a sweep",
    "export": "export a run for use elsewhere, and a page to draw digits on",
    "benchmark": "measure speed",
}

USAGE = "\n".join(
    [
        "usage: flaxmnist VERB [OPTION ...]",
        "",
        *(f"  {verb:<9}  {meaning}" for verb, meaning in VERBS.items()),
        "",
        "The options of a verb: flaxmnist VERB --help",
    ]
)


def main() -> int:
    """Run the console script: ``flaxmnist VERB …``."""
    verb, *argv = sys.argv[1:] or [""]
    if verb in VERBS:
        return run(verb, argv)
    if verb in ("-h", "--help"):
        return exit_code(lambda: print(USAGE))
    print_message(f"{f'there is no verb {verb!r}' if verb else 'no verb'}: use one of these\n{USAGE}")
    return UserError.exit_code


def run(verb: str, argv: list[str]) -> int:
    """Run a verb and return its exit code."""
    if verb in ("train", "sweep"):
        # Exit at once, because nothing needs saving yet. Some callbacks during imports would swallow an exception.
        for number in SIGNALS:
            signal.signal(number, lambda *_: exit_process("stopped"))
    return importlib.import_module(f"flaxmnist.commands.{verb}").main(argv)


def load_classes(experiment: Path | None) -> "Config | None":
    """Return the config of the experiment file that a user passes for its classes, if any."""
    from flaxmnist.experiment import load_experiment

    return None if experiment is None else load_experiment(experiment)


def command(verb: str) -> str:
    """Return how the user calls a verb: "python launch/train.py" or "flaxmnist train"."""
    script = os.path.basename(sys.argv[0]).removesuffix(".py")
    return f"python launch/{verb}.py" if script in VERBS else f"flaxmnist {verb}"
