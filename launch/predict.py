"""Reads digits in image files: python launch/predict.py WORKDIR IMAGE|DIR… [--json] [--plot FILE.png]"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from flaxmnist import figures, inspection, plots, program, trained
from flaxmnist.errors import exit_code


@dataclass(frozen=True)
class Arguments:
    workdir: tyro.conf.Positional[Path]  # the run folder
    images: tyro.conf.Positional[tuple[Path, ...]]  # image files, or folders of them
    plot: Path | None = None  # draw what the model saw, and what it read, into this PNG file
    json: bool = False  # one JSON object a line: file, class, probabilities
    step: str = "latest"  # which checkpoint: latest, best (by validation accuracy), or a step


def predict(arguments: Arguments) -> None:
    """Prints each image as the model saw it, and the probabilities of the classes beside it."""
    program.keep_programs()
    readings = trained.read_files(arguments.workdir, arguments.images, arguments.step)
    if arguments.plot is not None:
        figures.save(plots.readings(readings), arguments.plot)
    for file, image, answer, probabilities in readings:
        if arguments.json:
            print(json.dumps({"file": str(file), "class": answer, "probabilities": probabilities.tolist()}))
        else:
            print(inspection.answer(str(file), image, probabilities), end="\n\n")


def main(argv: list[str]) -> int:
    return exit_code(lambda: predict(tyro.cli(Arguments, args=argv, prog="launch/predict.py", description=__doc__)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
