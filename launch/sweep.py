"""Trains many runs at once: python launch/sweep.py EXPERIMENT.py… --seeds N [--over FIELD=V1,V2,…]… --workdir DIR"""

import os
import signal
import sys


def stop(*_) -> None:
    """Ends this process, as is right while nothing needs saving; an exception would be lost in some callbacks."""
    os.write(2, b"flaxmnist: stopped; --resume goes on\n")
    os._exit(75)


if __name__ == "__main__":
    # Before imports that take a second.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, stop)

from dataclasses import dataclass
from pathlib import Path

import tyro

import flaxmnist as fm
from flaxmnist import logs, parts, program, reports, settings, signals, sweeps
from flaxmnist.errors import UserError, exit_code


@dataclass(frozen=True)
class Arguments:
    experiments: tyro.conf.Positional[tuple[Path, ...]]  # experiment files; several are compared
    workdir: Path  # where the sweep is kept
    seeds: int = 8  # runs of each setting, with the seeds 0, 1, …
    over: tyro.conf.UseAppendAction[tuple[str, ...]] = ()  # FIELD=V1,V2,… or, with --random, FIELD=LOW..HIGH[,log]
    random: int | None = None  # draw so many settings in place of all combinations
    share_order: bool = False  # all runs see the batches of the first seed: faster for small models
    exact: bool = False  # every run is to the bit what launch/train.py would give
    resume: bool = False  # go on with the runs that are not finished in --workdir
    overwrite: bool = False  # throw away what lies in --workdir
    data_dir: Path | None = None  # where data sets lie; default: $TFDS_DATA_DIR, then ~/tensorflow_datasets
    devices: int | None = None  # use the first so many devices; default: all
    grace: float = signals.GRACE  # seconds from a signal to the end, whatever is not saved by then


def sweep(arguments: Arguments) -> None:
    """Trains, prints the tables, and draws the pictures."""
    logs.show("info")
    if arguments.resume and arguments.overwrite:
        raise UserError("--resume goes on with a sweep and --overwrite throws it away: give one of them")
    if not 0 < arguments.grace <= 86400:
        raise UserError(f"--grace is a number of seconds in (0, 86400], but is {arguments.grace}")
    if arguments.seeds < 1:
        raise UserError(f"--seeds is a number from 1 on, but is {arguments.seeds}")
    configs = [fm.load_experiment(path) for path in arguments.experiments]
    experiments = [(config, fm.load_data(config.data, arguments.data_dir)) for config in configs]
    program.keep_programs()
    with signals.stop_on_signals(arguments.grace) as stop:
        swept = sweeps.run(
            experiments,
            range(arguments.seeds),
            settings.read(arguments.over, arguments.random),
            share_order=arguments.share_order,
            exact=arguments.exact,
            devices=arguments.devices,
            workdir=arguments.workdir,
            resume=arguments.resume,
            overwrite=arguments.overwrite,
            stop=stop,
        )
    reports.write_sweep(swept, arguments.workdir)
    print(parts.report(swept))


def main(argv: list[str]) -> int:
    return exit_code(lambda: sweep(tyro.cli(Arguments, args=argv, prog="launch/sweep.py", description=__doc__)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
