"""Train many trials at once: python launch/sweep.py EXPERIMENT.py… --seeds N [--over FIELD=V1,V2,…]… --workdir DIR"""

import os
import signal
import sys


def stop(*_) -> None:
    """Exit at once, because nothing needs saving yet; some callbacks during imports would swallow an exception."""
    os.write(2, b"flaxmnist: stopped; --resume continues\n")
    os._exit(75)


if __name__ == "__main__":
    # Before the imports, which take a second.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, stop)

from dataclasses import dataclass
from pathlib import Path

import tyro

import flaxmnist as fm
from flaxmnist import console
from flaxmnist.devices import program, signals
from flaxmnist.errors import UserError, exit_code
from flaxmnist.show import reports, text
from flaxmnist.sweeps import settings, sweeps


@dataclass(frozen=True)
class Arguments:
    experiments: tyro.conf.Positional[tuple[Path, ...]]  # experiment files; if several, they are compared
    workdir: Path  # folder of the sweep
    seeds: int = 8  # trials of each setting, with seeds 0, 1, …
    over: tyro.conf.UseAppendAction[tuple[str, ...]] = ()  # FIELD=V1,V2,… or, with --random, FIELD=LOW..HIGH[,log]
    random: int | None = None  # sample N random settings instead of all combinations
    share_order: bool = False  # train all trials on the batches of the first seed: faster for small models
    exact: bool = False  # make every trial bitwise identical to a run of launch/train.py
    resume: bool = False  # continue the unfinished trials in --workdir
    overwrite: bool = False  # delete the previous contents of --workdir
    data_dir: Path | None = None  # folder of the data sets; default: $TFDS_DATA_DIR, then ~/tensorflow_datasets
    devices: int | None = None  # use only the first N devices; default: all
    grace: float = signals.GRACE  # seconds from a signal to the exit, even if saving is not done


def sweep(arguments: Arguments) -> None:
    """Train, print the tables, and draw the figures."""
    console.show_messages("info")
    if arguments.resume and arguments.overwrite:
        raise UserError("--resume continues a sweep and --overwrite deletes it: use only one of them")
    if not 0 < arguments.grace <= 86400:
        raise UserError(f"--grace must be in (0, 86400] seconds, but is {arguments.grace}")
    if arguments.seeds < 1:
        raise UserError(f"--seeds must be at least 1, but is {arguments.seeds}")
    configs = [fm.load_experiment(path) for path in arguments.experiments]
    experiments = [(config, fm.load_data(config.data, arguments.data_dir)) for config in configs]
    program.use_compilation_cache()
    with signals.stop_on_signals(arguments.grace) as stop:
        result = sweeps.run(
            experiments,
            range(arguments.seeds),
            settings.parse_settings(arguments.over, arguments.random),
            share_order=arguments.share_order,
            exact=arguments.exact,
            devices=arguments.devices,
            workdir=arguments.workdir,
            resume=arguments.resume,
            overwrite=arguments.overwrite,
            stop=stop,
        )
    reports.write_sweep(result, arguments.workdir)
    print(text.sweep_report(result))


def main(argv: list[str]) -> int:
    return exit_code(lambda: sweep(tyro.cli(Arguments, args=argv, prog="launch/sweep.py", description=__doc__)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
