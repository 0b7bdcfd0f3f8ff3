"""Measures speed: python launch/benchmark.py [NAME…] [--json FILE] [--peer torch] [--runs N] [--plot FILE.png] …"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from flaxmnist import benchmarks, scaling
from flaxmnist.errors import UserError, exit_code

SYSTEMS = ("softmax_beginners", "softmax_epochs", "mlp_scratch", "cnn_experts", "cnn_layers")


@dataclass(frozen=True)
class Arguments:
    names: tyro.conf.Positional[tuple[str, ...]] = SYSTEMS  # experiments, by the names of their files
    json: Path | None = None  # write the figures to this file, as a list of objects
    peer: Literal["torch"] | None = None  # race against the same systems in PyTorch, which must be installed
    runs: int = 0  # train each experiment whole so many times, seeds 0, 1, …: seconds, and test accuracies
    scaling: bool = False  # instead: speeds on 1, 2, 4, … devices, and what these exchange
    plot: Path | None = None  # draw a bar chart into this file
    data_dir: Path | None = None  # where data sets lie; default: $TFDS_DATA_DIR, then ~/tensorflow_datasets


def benchmark(arguments: Arguments) -> None:
    """Prints a table, and writes what was asked for."""
    for path in (arguments.json, arguments.plot):
        if path is not None and not path.parent.is_dir():
            raise UserError(f"cannot write {path}: there is no folder {path.parent}")
    if arguments.scaling and (arguments.peer or arguments.runs or arguments.plot):
        raise UserError("--scaling goes with --json alone: leave out --peer, --runs and --plot")
    if arguments.runs < 0:
        raise UserError(f"--runs is a number from 0 on, but is {arguments.runs}")
    experiments = [Path(__file__).parent.parent / f"experiments/{name}.py" for name in arguments.names]
    if arguments.scaling:
        results = [row for path in experiments for row in scaling.run(path, arguments.data_dir)]
        print(scaling.report(results))
    else:
        results = [benchmarks.run(path, arguments.data_dir, arguments.peer, arguments.runs) for path in experiments]
        print(benchmarks.report(results))
    if arguments.runs:
        print(f"\n{benchmarks.runs_report(results)}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    if arguments.plot is not None:
        benchmarks.draw(results, arguments.plot)


def main(argv: list[str]) -> int:
    return exit_code(lambda: benchmark(tyro.cli(Arguments, args=argv, prog="launch/benchmark.py", description=__doc__)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
