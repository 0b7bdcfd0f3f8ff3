"""Train many trials at once."""

from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from flaxmnist import console
from flaxmnist.commands import command
from flaxmnist.data.sets import load_data
from flaxmnist.devices import program, signals
from flaxmnist.errors import UserError, exit_code
from flaxmnist.experiment import read_experiment
from flaxmnist.show import reports, text
from flaxmnist.sweeps import settings
from flaxmnist.sweeps.plan import Experiment
from flaxmnist.sweeps.runner import run_sweep


@dataclass(frozen=True)
class Arguments:
    experiments: tyro.conf.Positional[tuple[Path, ...]]  # names or files of experiments; if several, they are compared
    workdir: Path  # folder of the sweep
    seeds: int = 8  # trials of each setting, with seeds 0, 1, …
    over: tyro.conf.UseAppendAction[tuple[str, ...]] = ()  # FIELD=V1,V2,… or, with --random, FIELD=LOW..HIGH[,log]
    random: int | None = None  # sample N random settings instead of all combinations
    validation: int | None = None  # training images to hold out; default: those of the experiment
    share_order: bool = False  # train all trials on the batches of the first seed: faster for small models
    exact: bool = False  # make every trial bitwise identical to a run trained by itself
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
    experiments = [load(arguments, file) for file in arguments.experiments]
    program.use_compilation_cache()
    with signals.stop_on_signals(arguments.grace) as stop:
        result = run_sweep(
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


def load(arguments: Arguments, file: Path) -> Experiment:
    """Return an experiment with its data, of which ``--validation`` images are held out."""
    config, functions = read_experiment(file)
    if arguments.validation is not None:
        config = replace(config, data=replace(config.data, validation=arguments.validation))
    return Experiment(config, load_data(config.data, arguments.data_dir), **functions)


def main(argv: list[str]) -> int:
    return exit_code(lambda: sweep(tyro.cli(Arguments, args=argv, prog=command("sweep"), description=__doc__)))
