"""Evaluates a run: python launch/evaluate.py WORKDIR [--step latest|best|N] [--split test|validation|train]"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from flaxmnist import inspection, program, trained
from flaxmnist.errors import exit_code


@dataclass(frozen=True)
class Arguments:
    workdir: tyro.conf.Positional[Path]  # the run folder
    step: str = "latest"  # which checkpoint: latest, best (by validation accuracy), or a step
    split: Literal["test", "validation", "train"] = "test"  # which images
    data_dir: Path | None = None  # where data sets lie; default: $TFDS_DATA_DIR, then ~/tensorflow_datasets


def evaluate(arguments: Arguments) -> None:
    """Prints loss, accuracy and what became of each class."""
    program.keep_programs()
    seen = trained.evaluate_run(arguments.workdir, arguments.step, arguments.split, arguments.data_dir)
    print(inspection.class_report(seen))


def main(argv: list[str]) -> int:
    return exit_code(lambda: evaluate(tyro.cli(Arguments, args=argv, prog="launch/evaluate.py", description=__doc__)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
