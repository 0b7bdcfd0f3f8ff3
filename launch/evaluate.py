"""Evaluates a run, a sweep or an export: python launch/evaluate.py WORKDIR|FILE [--step latest|best|N] [--split …]"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from flaxmnist import ensembles, exports, inspection, program, trained
from flaxmnist.errors import UserError, exit_code


@dataclass(frozen=True)
class Arguments:
    workdir: tyro.conf.Positional[Path]  # the folder of a run or of a sweep, or a file of launch/export.py
    step: str = "latest"  # which checkpoint: latest, best (by validation accuracy), or a step
    split: Literal["test", "validation", "train"] = "test"  # which images
    ensemble: int | Literal["all"] | None = None  # of a sweep: so many members of its best setting together; alone: all
    data_dir: Path | None = None  # where data sets lie; default: $TFDS_DATA_DIR, then ~/tensorflow_datasets


def evaluate(arguments: Arguments) -> None:
    """Prints loss, accuracy and what became of each class; of a sweep, members and ensemble."""
    program.keep_programs()
    swept = os.path.exists(arguments.workdir / "sweep.json")
    if swept != (arguments.ensemble is not None):
        raise UserError(
            f"{arguments.workdir} is {'' if swept else 'not '}the folder of a sweep: "
            f"{'give' if swept else 'leave out'} --ensemble"
        )
    if swept:
        size = None if arguments.ensemble == "all" else arguments.ensemble
        print(ensembles.report(ensembles.evaluate(arguments.workdir, size, arguments.split, arguments.data_dir)))
    elif arguments.workdir.suffix in exports.SUFFIXES:
        if arguments.step != "latest":
            raise UserError(f"{arguments.workdir} holds one step: leave out --step, which launch/export.py takes")
        print(inspection.class_report(exports.evaluate(arguments.workdir, arguments.split, arguments.data_dir)))
    else:
        seen = trained.evaluate_run(arguments.workdir, arguments.step, arguments.split, arguments.data_dir)
        print(inspection.class_report(seen))


def read(argv: list[str]) -> Arguments:
    """The arguments; ``--ensemble`` alone means all."""
    following = [*argv[1:], "--"]
    argv = (
        [
            f"{word}=all" if word == "--ensemble" and not after.isdecimal() else word
            for word, after in zip(argv, following, strict=True)
        ]
        if argv
        else []
    )
    return tyro.cli(Arguments, args=argv, prog="launch/evaluate.py", description=__doc__)


def main(argv: list[str]) -> int:
    return exit_code(lambda: evaluate(read(argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
