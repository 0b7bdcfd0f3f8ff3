"""Measure speed."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from flaxmnist.commands import command
from flaxmnist.errors import UserError, exit_code
from flaxmnist.experiment import find_experiment
from flaxmnist.show import canvas
from flaxmnist.speed import benchmarks, scaling

SYSTEMS = ("softmax_beginners", "softmax_epochs", "mlp_scratch", "cnn_experts", "cnn_layers")


@dataclass(frozen=True)
class Arguments:
    names: tyro.conf.Positional[tuple[str, ...]] = ()  # names or files of experiments; default: the five tutorials
    json: Path | None = None  # write the results to this file, as a list of objects
    peer: Literal["torch"] | None = None  # compare with the same systems in PyTorch, which must be installed
    tracks: bool = False  # instead, only train, by default speedrun, speedrun_994, speedrun_995, tiny; needs --runs
    runs: int = 0  # train each experiment N times, with seeds 0, 1, …: seconds and test accuracies
    scaling: bool = False  # instead, measure speed and communication on 1, 2, 4, … devices
    plot: Path | None = None  # draw a bar chart to this file
    data_dir: Path | None = None  # folder of the data sets; default: $TFDS_DATA_DIR, then ~/tensorflow_datasets


def benchmark(arguments: Arguments) -> None:
    """Print a table, and write the requested files."""
    canvas.check_file(arguments.plot)
    if arguments.json is not None and (arguments.json.is_dir() or not arguments.json.parent.is_dir()):
        raise UserError(f"cannot write {arguments.json}: use a file in a folder that exists")
    if arguments.scaling and (arguments.peer or arguments.runs or arguments.plot):
        raise UserError("--scaling supports only --json: omit --peer, --runs and --plot")
    if arguments.runs < 0:
        raise UserError(f"--runs must be at least 0, but is {arguments.runs}")
    if arguments.tracks and (arguments.scaling or arguments.peer or arguments.plot or not arguments.runs):
        raise UserError(
            "--tracks needs --runs and supports only --json: pass --runs 30, omit --scaling, --peer, --plot"
        )
    names = arguments.names or (benchmarks.TRACKS if arguments.tracks else SYSTEMS)
    experiments = [find_experiment(name) for name in names]
    tables = []
    if arguments.tracks:
        results = [benchmarks.run_track(path, arguments.data_dir, arguments.runs) for path in experiments]
    elif arguments.scaling:
        results = [row for path in experiments for row in scaling.run(path, arguments.data_dir)]
        tables.append(scaling.report(results))
    else:
        results = [benchmarks.run(path, arguments.data_dir, arguments.peer, arguments.runs) for path in experiments]
        tables.append(benchmarks.report(results))
    if arguments.runs:
        tables.append(benchmarks.runs_report(results))
    print("\n\n".join(tables))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    if arguments.plot is not None:
        benchmarks.draw(results, arguments.plot)


def main(argv: list[str]) -> int:
    return exit_code(lambda: benchmark(tyro.cli(Arguments, args=argv, prog=command("benchmark"), description=__doc__)))
