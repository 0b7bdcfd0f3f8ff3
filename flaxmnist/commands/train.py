"""Train an experiment."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from flaxmnist import console
from flaxmnist.commands import START, command
from flaxmnist.config import Config
from flaxmnist.data.sets import load_data
from flaxmnist.devices import processes, program, signals
from flaxmnist.devices.processes import HEARTBEAT_TIMEOUT
from flaxmnist.errors import BelowTarget, UserError, exit_code
from flaxmnist.experiment import find_experiment, read_experiment
from flaxmnist.fields import bounds
from flaxmnist.runs import fit
from flaxmnist.show import text
from flaxmnist.store.claim import new_folder


@dataclass(frozen=True)
class Arguments:
    experiment: tyro.conf.Suppress[Path]  # experiment file, loaded before the options are parsed
    functions: tyro.conf.Suppress[dict[str, Any]]  # its step and arrays, if it defines them
    config: Annotated[Config, tyro.conf.arg(name="")]
    workdir: Path | None = None  # run folder; default: a new runs/NAME-YYYYMMDD-HHMMSS
    data_dir: Path | None = None  # folder of the data sets; default: $TFDS_DATA_DIR, then ~/tensorflow_datasets
    resume: bool = False  # resume from the newest checkpoint in --workdir, or start if there is none
    overwrite: bool = False  # delete the previous contents of --workdir
    allow_config_change: bool = False  # resume although config fields have changed
    devices: int | None = None  # use only the first N devices; default: all
    backend: program.Backend = "jit"  # compile training for several devices with jit or pmap
    model_parallel: int = 1  # shard each dense kernel and its optimizer state over N devices
    coordinator: str | None = None  # HOST:PORT of process 0, if no launcher that JAX supports starts the processes
    processes: int | None = None  # number of processes
    process_id: int | None = None  # index of this process, from 0
    grace: float = signals.GRACE  # seconds from a signal to the exit, even if saving is not done
    deterministic: bool = False  # on GPU, bitwise reproducible but slower; CPU and TPU always are
    heartbeat: float = HEARTBEAT_TIMEOUT  # seconds without a heartbeat after which a process counts as lost
    min_accuracy: float | None = None  # exit with code 4 if the test accuracy is below this fraction
    print_config: bool = False  # print the config, parameters, layers, operations and memory, then exit
    profile: Path | None = None  # write a profiler trace of a few steps to this folder
    profile_at: int | None = None  # first step of the trace; default: the first one trained
    log_level: Literal["debug", "info", "warning", "error"] = "info"  # messages on standard error


def parse_arguments(argv: list[str]) -> Arguments:
    """Parse the arguments; the defaults of ``--FIELD`` are the values of the experiment."""
    if not argv or argv[0].startswith("-"):
        if {"-h", "--help"} & set(argv):
            print(f"usage: {command('train')} EXPERIMENT [--workdir DIR] [--FIELD VALUE …]\n\n{__doc__}\n")
            print(f"All options and fields: {command('train')} quickstart --help")
            raise SystemExit(0)
        raise UserError(f"no experiment file: pass it first, as in {command('train')} quickstart")
    config, functions = read_experiment(argv[0])
    # --train.steps replaces the experiment's train.epochs, and vice versa.
    for given, other in (("steps", "epochs"), ("epochs", "steps")):
        if any(argument.split("=")[0] == f"--train.{given}" for argument in argv):
            config = replace(config, train=replace(config.train, **{given: 2**31 - 1, other: None}))
    default = Arguments(find_experiment(argv[0]), functions, config)
    options = {"config": (tyro.conf.AvoidSubcommands,), "prog": f"{command('train')} {argv[0]}"}
    with help_with_bounds():
        return tyro.cli(Arguments, default=default, args=argv[1:], description=__doc__, **options)


def help_with_bounds() -> ConstructorRegistry:
    """Return a registry of tyro's in which the help of each field ends with its bounds."""
    registry, pending = ConstructorRegistry(), []

    @registry.struct_rule
    def _(info: StructTypeInfo) -> Any:
        if info in pending:  # this rule calls itself
            return None
        pending.append(info)
        spec = ConstructorRegistry.get_struct_spec(info)
        pending.pop()
        if not isinstance(spec, StructConstructorSpec):
            return spec
        return replace(spec, fields=tuple(replace(field, helptext=partial(describe, field)) for field in spec.fields))

    return registry


def describe(field: StructFieldSpec) -> str | None:
    """Return the help text of a field: its meaning, and its bounds if it has any."""
    meaning = field.helptext() if callable(field.helptext) else field.helptext
    limits = [bound.describe() for bound in bounds(field.type)]
    return "; ".join([meaning or "", *limits]) if limits else meaning


def train(arguments: Arguments, clock: console.Clock) -> None:
    """Check the arguments, and train in all processes of the run."""
    console.show_messages(arguments.log_level)
    if arguments.resume and arguments.overwrite:
        raise UserError("--resume continues a run and --overwrite deletes it: use only one of them")
    if arguments.resume and arguments.workdir is None:
        raise UserError("--resume needs a run folder: pass --workdir")
    if arguments.profile_at is not None and arguments.profile is None:
        raise UserError("--profile-at is the first step of a trace: pass --profile with the folder for it")
    if arguments.min_accuracy is not None and not 0 <= arguments.min_accuracy <= 1:
        raise UserError(f"--min-accuracy must be a fraction in [0, 1], but is {arguments.min_accuracy}")
    if not 1 <= arguments.heartbeat <= 3600:
        raise UserError(f"--heartbeat must be in [1, 3600] seconds, but is {arguments.heartbeat}")
    if not 0 < arguments.grace <= 86400:
        raise UserError(f"--grace must be in (0, 86400] seconds, but is {arguments.grace}")
    if arguments.deterministic:
        program.make_deterministic()
    if arguments.print_config:
        data = load_data(arguments.config.data, arguments.data_dir)
        print(text.describe_experiment(arguments.config, data, **arguments.functions))
        return
    with processes.join_processes(
        arguments.coordinator, arguments.processes, arguments.process_id, arguments.heartbeat
    ):
        train_process(arguments, clock)


def train_process(arguments: Arguments, clock: console.Clock) -> None:
    """Train in this process; the first one prints the result."""
    config = arguments.config
    console.show_messages(arguments.log_level if processes.is_first_process() else "warning")
    with clock("data"):
        data = load_data(config.data, arguments.data_dir)
    program.use_compilation_cache()
    workdir = arguments.workdir or Path(processes.on_first_process(lambda: str(new_folder(config.name))))
    with signals.stop_on_signals(arguments.grace) as stop:
        run = fit(
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
            profile_at=arguments.profile_at,
            experiment=arguments.experiment,
            stop=stop,
            clock=clock,
            **arguments.functions,
        )
    if processes.is_first_process():
        print(text.run_summary(run, workdir, arguments.data_dir, arguments.experiment, command))
    assert run.result is not None
    accuracy = run.result.test_accuracy
    if arguments.min_accuracy is not None and accuracy < arguments.min_accuracy:
        raise BelowTarget(f"test accuracy {accuracy:.4f} is below --min-accuracy {arguments.min_accuracy}")


def main(argv: list[str]) -> int:
    clock = console.Clock(START)
    clock.seconds["import"] = clock.total()
    return exit_code(lambda: train(parse_arguments(argv), clock))
