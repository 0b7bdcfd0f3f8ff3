"""Draw a run, several runs side by side, or a sweep."""

import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from flaxmnist import console
from flaxmnist.commands import command, load_classes
from flaxmnist.errors import UserError, exit_code
from flaxmnist.show import reports


@dataclass(frozen=True)
class Arguments:
    workdirs: tyro.conf.Positional[tuple[Path, ...]]  # folder of a run or sweep, or folders of runs to compare
    out: Path | None = None  # output folder; default: that of the run or sweep, or the common parent of several
    watch: float | None = None  # seconds after which to write it again, until there is a result; it reloads itself
    data_dir: Path | None = None  # folder of the data sets; default: $TFDS_DATA_DIR, then ~/tensorflow_datasets
    experiment: Path | None = None  # experiment file, if its model is not built in


def report(arguments: Arguments) -> None:
    """Write the page and its figures, and print their paths; do so again while the runs train, if asked to."""
    console.show_messages("info")
    if arguments.watch is not None and not 1 <= arguments.watch <= 3600:
        raise UserError(f"--watch must be in [1, 3600] seconds, but is {arguments.watch}")
    options = arguments.workdirs, arguments.out, arguments.data_dir, load_classes(arguments.experiment)
    paths = []
    while arguments.watch is not None and not all((folder / "result.json").exists() for folder in arguments.workdirs):
        try:
            page, figures = reports.write(*options, reload=arguments.watch)
        except UserError as error:
            if not paths:
                raise
            console.logger.warning("%s", error)  # perhaps it was read while it was written
        else:
            print_new(paths, [*figures, page])
        time.sleep(arguments.watch)
    page, figures = reports.write(*options)
    print_new(paths, [*figures, page])


def print_new(printed: list[Path], paths: list[Path]) -> None:
    """Print the ``paths`` that are not ``printed`` yet, and add them."""
    for path in paths:
        if path not in printed:
            print(path, flush=True)
            printed.append(path)


def main(argv: list[str]) -> int:
    return exit_code(lambda: report(tyro.cli(Arguments, args=argv, prog=command("report"), description=__doc__)))
