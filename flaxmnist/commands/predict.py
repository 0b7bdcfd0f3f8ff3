"""Classify digits in image files."""

import json
from dataclasses import dataclass
from pathlib import Path

import tyro

from flaxmnist.commands import command, load_classes
from flaxmnist.devices import program
from flaxmnist.errors import exit_code
from flaxmnist.show import canvas, plots, text
from flaxmnist.store.load import predict_files


@dataclass(frozen=True)
class Arguments:
    workdir: tyro.conf.Positional[Path]  # run folder
    images: tyro.conf.Positional[tuple[Path, ...]]  # image files, or folders of image files
    plot: Path | None = None  # draw the model's inputs and predictions to this PNG file
    json: bool = False  # print one JSON object per line: file, class, probabilities
    step: str = "latest"  # checkpoint: latest, best (by train.monitor), or a step
    shifts: int = 0  # average over shifts of each image by up to N pixels along each axis; 0: none
    experiment: Path | None = None  # experiment file, if its model is not built in


def predict(arguments: Arguments) -> None:
    """Print each image as the model sees it, and the class probabilities."""
    canvas.check_file(arguments.plot)
    program.use_compilation_cache()
    config = load_classes(arguments.experiment)
    predictions = predict_files(arguments.workdir, arguments.images, arguments.step, config, arguments.shifts)
    if arguments.plot is not None:
        canvas.save(plots.predictions(predictions), arguments.plot)
    for file, image, predicted, probabilities, names in predictions:
        if arguments.json:
            values = {"file": str(file), "class": predicted, "name": names[predicted]}
            print(json.dumps(values | {"probabilities": probabilities.tolist()}))
        else:
            print(text.show_prediction(str(file), image, probabilities, names), end="\n\n")


def main(argv: list[str]) -> int:
    return exit_code(lambda: predict(tyro.cli(Arguments, args=argv, prog=command("predict"), description=__doc__)))
