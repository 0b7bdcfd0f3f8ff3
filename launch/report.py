"""Draws a run, several runs side by side, or a sweep: python launch/report.py WORKDIR… [--out DIR] [--data-dir DIR]"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from flaxmnist import reports
from flaxmnist.errors import UserError, exit_code


@dataclass(frozen=True)
class Arguments:
    workdirs: tyro.conf.Positional[tuple[Path, ...]]  # the folder of a run or of a sweep, or those of runs to compare
    out: Path | None = None  # where to write; default: the run's or sweep's folder, or the one that several lie in
    data_dir: Path | None = None  # where data sets lie; default: $TFDS_DATA_DIR, then ~/tensorflow_datasets


def report(arguments: Arguments) -> None:
    """Writes the page and its pictures, and says where they are."""
    if not arguments.workdirs:
        raise UserError("give the folder of a run or of a sweep: python launch/report.py runs/a")
    page, pictures = reports.write(arguments.workdirs, arguments.out, arguments.data_dir)
    for path in (*pictures, page):
        print(path)


def main(argv: list[str]) -> int:
    return exit_code(lambda: report(tyro.cli(Arguments, args=argv, prog="launch/report.py", description=__doc__)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
