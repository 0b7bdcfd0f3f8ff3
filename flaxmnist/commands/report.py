"""Draw a run, several runs side by side, or a sweep."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from flaxmnist.commands import command, load_classes
from flaxmnist.errors import UserError, exit_code
from flaxmnist.show import reports


@dataclass(frozen=True)
class Arguments:
    workdirs: tyro.conf.Positional[tuple[Path, ...]]  # folder of a run or sweep, or folders of runs to compare
    out: Path | None = None  # output folder; default: that of the run or sweep, or the common parent of several
    data_dir: Path | None = None  # folder of the data sets; default: $TFDS_DATA_DIR, then ~/tensorflow_datasets
    experiment: Path | None = None  # experiment file, if its model is not built in


def report(arguments: Arguments) -> None:
    """Write the page and its figures, and print their paths."""
    if not arguments.workdirs:
        raise UserError(f"no folder: pass that of a run or sweep, as in {command('report')} runs/a")
    config = load_classes(arguments.experiment)
    page, figures = reports.write(arguments.workdirs, arguments.out, arguments.data_dir, config)
    for path in (*figures, page):
        print(path)


def main(argv: list[str]) -> int:
    return exit_code(lambda: report(tyro.cli(Arguments, args=argv, prog=command("report"), description=__doc__)))
