"""Reads digits in image files: python launch/predict.py WORKDIR IMAGE|DIR… [--json]"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from flaxmnist import program, trained
from flaxmnist.errors import exit_code


@dataclass(frozen=True)
class Arguments:
    workdir: tyro.conf.Positional[Path]  # the run folder
    images: tyro.conf.Positional[tuple[Path, ...]]  # image files, or folders of them
    json: bool = False  # one JSON object a line: file, class, probabilities
    step: str = "latest"  # which checkpoint: latest, best (by validation accuracy), or a step


def predict(arguments: Arguments) -> None:
    """Prints the class of each image and the probabilities of all classes."""
    program.keep_programs()
    for file, answer, probabilities in trained.predict_files(arguments.workdir, arguments.images, arguments.step):
        if arguments.json:
            print(json.dumps({"file": str(file), "class": answer, "probabilities": probabilities}))
        else:
            print(f"{file}: {answer}  ({' '.join(f'{p:.4f}' for p in probabilities)})")


def main(argv: list[str]) -> int:
    return exit_code(lambda: predict(tyro.cli(Arguments, args=argv, prog="launch/predict.py", description=__doc__)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
