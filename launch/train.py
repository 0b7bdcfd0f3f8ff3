"""Trains an experiment: python launch/train.py EXPERIMENT.py [--workdir DIR] [--FIELD VALUE …]"""

import os
import signal
import sys
import time

BEGAN = time.perf_counter()


def stop(*_) -> None:
    """Ends this process, as is right while nothing needs saving; an exception would be lost in some callbacks."""
    os.write(2, b"flaxmnist: stopped; --resume goes on\n")
    os._exit(75)


if __name__ == "__main__":
    # Before imports that take a second.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, stop)

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

import flaxmnist as fm
from flaxmnist import folders, hosts, inspection, logs, program, results, signals
from flaxmnist.errors import BelowTarget, UserError, exit_code


@dataclass(frozen=True)
class Arguments:
    experiment: tyro.conf.Suppress[Path]  # the experiment file, which is read before the options are
    config: Annotated[fm.Config, tyro.conf.arg(name="")]
    workdir: Path | None = None  # where the run is kept; default: a fresh runs/NAME-YYYYMMDD-HHMMSS
    data_dir: Path | None = None  # where data sets lie; default: $TFDS_DATA_DIR, then ~/tensorflow_datasets
    resume: bool = False  # go on from the newest checkpoint in --workdir; from step 0 where there is none
    overwrite: bool = False  # throw away what lies in --workdir
    allow_config_change: bool = False  # resume although fields differ
    devices: int | None = None  # use the first so many devices; default: all
    backend: program.Backend = "jit"  # how training is compiled for several devices
    model_parallel: int = 1  # split each dense kernel, and its optimizer state, over so many devices
    coordinator: str | None = None  # HOST:PORT of process 0, for several processes that no launcher JAX knows started
    processes: int | None = None  # how many there are
    process_id: int | None = None  # which one this is, from 0 on
    grace: float = signals.GRACE  # seconds from a signal to the end, whatever is not saved by then
    deterministic: bool = False  # on GPU, the same bits every time, at a cost in speed; CPU and TPU need no telling
    heartbeat: float = hosts.HEARTBEAT  # seconds without a sign of life after which a process counts as lost
    min_accuracy: float | None = None  # exit with 4 where the test accuracy, a fraction, is under this
    print_config: bool = False  # print the config, parameters, operations and memory, and exit
    profile: Path | None = None  # write a trace of a few steady steps to this folder
    log_level: Literal["debug", "info", "warning", "error"] = "info"  # what to tell on standard error


def read(argv: list[str]) -> Arguments:
    """The arguments; every default of ``--FIELD`` is the experiment's own."""
    if not argv or argv[0].startswith("-"):
        if {"-h", "--help"} & set(argv):
            print(f"{__doc__}\n\nAll options and fields: python launch/train.py experiments/quickstart.py --help")
            raise SystemExit(0)
        raise UserError("give an experiment file first: python launch/train.py experiments/quickstart.py")
    config = fm.load_experiment(argv[0])
    # A length on the command line takes the place of the experiment's, whichever of the two that is.
    for given, other in (("steps", "epochs"), ("epochs", "steps")):
        if any(argument.split("=")[0] == f"--train.{given}" for argument in argv):
            config = replace(config, train=replace(config.train, **{given: 1, other: None}))
    default = Arguments(Path(argv[0]), config)
    options = (tyro.conf.AvoidSubcommands,)
    prog = f"launch/train.py {argv[0]}"
    return tyro.cli(Arguments, default=default, args=argv[1:], config=options, prog=prog, description=__doc__)


def train(arguments: Arguments, clock: logs.Clock) -> None:
    """Does what the arguments say, and prints the result."""
    logs.show(arguments.log_level)
    if arguments.resume and arguments.overwrite:
        raise UserError("--resume goes on with a run and --overwrite throws it away: give one of them")
    if arguments.resume and arguments.workdir is None:
        raise UserError("--resume needs the --workdir to go on in")
    if arguments.min_accuracy is not None and not 0 <= arguments.min_accuracy <= 1:
        raise UserError(f"--min-accuracy is a fraction in [0, 1], but is {arguments.min_accuracy}")
    if not 1 <= arguments.heartbeat <= 3600:
        raise UserError(f"--heartbeat must lie in [1, 3600] seconds, but is {arguments.heartbeat}")
    if not 0 < arguments.grace <= 86400:
        raise UserError(f"--grace is a number of seconds in (0, 86400], but is {arguments.grace}")
    if arguments.deterministic:
        program.make_deterministic()
    if arguments.print_config:
        data = fm.load_data(arguments.config.data, arguments.data_dir)
        print(inspection.describe(arguments.config, data))
        return
    with hosts.joined(arguments.coordinator, arguments.processes, arguments.process_id, arguments.heartbeat):
        run_on(arguments, clock)


def run_on(arguments: Arguments, clock: logs.Clock) -> None:
    """This process' part of the run."""
    config = arguments.config
    logs.show(arguments.log_level if hosts.is_first() else "warning")
    with clock("data"):
        data = fm.load_data(config.data, arguments.data_dir)
    program.keep_programs()
    workdir = arguments.workdir or Path(hosts.on_first(lambda: str(folders.fresh(config.name))))
    with signals.stop_on_signals(arguments.grace) as stop:
        run = fm.fit(
            config,
            data,
            workdir,
            resume=arguments.resume,
            overwrite=arguments.overwrite,
            allow_config_change=arguments.allow_config_change,
            devices=arguments.devices,
            backend=arguments.backend,
            model_parallel=arguments.model_parallel,
            profile=arguments.profile,
            experiment=arguments.experiment,
            stop=stop,
            clock=clock,
        )
    if hosts.is_first():
        print(results.summary(run, workdir, arguments.data_dir))
    accuracy = run.result["test_accuracy"]
    if arguments.min_accuracy is not None and accuracy < arguments.min_accuracy:
        raise BelowTarget(f"test accuracy {accuracy:.4f} is under --min-accuracy {arguments.min_accuracy}")


def main(argv: list[str]) -> int:
    clock = logs.Clock(BEGAN)
    clock.seconds["import"] = clock.total()
    return exit_code(lambda: train(read(argv), clock))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
