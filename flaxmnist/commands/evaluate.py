"""Evaluate a run, a sweep or an export."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from flaxmnist.commands import command, load_classes
from flaxmnist.devices import program
from flaxmnist.errors import UserError, exit_code
from flaxmnist.show import canvas, plots, text
from flaxmnist.store import exports
from flaxmnist.store.load import evaluate_run
from flaxmnist.sweeps import ensembles


@dataclass(frozen=True)
class Arguments:
    workdir: tyro.conf.Positional[Path]  # folder of a run or sweep, or an exported file
    step: str = "latest"  # checkpoint: latest, best (by train.monitor), or a step
    split: Literal["test", "validation", "train"] = "test"  # images to evaluate on
    ensemble: int | Literal["all"] | None = None  # for a sweep: trials of its best setting to ensemble; no value: all
    shifts: int = 0  # average over shifts of each image by up to N pixels along each axis; 0: none
    plot: Path | None = None  # draw the worst mistakes to this PNG file
    data_dir: Path | None = None  # folder of the data sets; default: $TFDS_DATA_DIR, then ~/tensorflow_datasets
    experiment: Path | None = None  # experiment file, if its model is not built in


def evaluate(arguments: Arguments) -> None:
    """Print loss, accuracy and results per class; for a sweep, the trials and their ensemble."""
    canvas.check_file(arguments.plot)
    program.use_compilation_cache()
    config = load_classes(arguments.experiment)
    is_sweep = os.path.exists(arguments.workdir / "sweep.json")
    if is_sweep != (arguments.ensemble is not None):
        raise UserError(
            f"{arguments.workdir} is {'' if is_sweep else 'not '}the folder of a sweep: "
            f"{'pass' if is_sweep else 'omit'} --ensemble"
        )
    options = {"split": arguments.split, "data_dir": arguments.data_dir, "config": config, "shifts": arguments.shifts}
    if arguments.step != "latest" and (is_sweep or arguments.workdir.suffix in exports.EXTRAS):
        raise UserError(f"{arguments.workdir} holds only one step: omit --step")
    if is_sweep:
        size = None if arguments.ensemble == "all" else arguments.ensemble
        ensemble = ensembles.evaluate_ensemble(arguments.workdir, size, **options)
        evaluation, report = ensemble.together, text.ensemble_report(ensemble)
    elif arguments.workdir.suffix in exports.EXTRAS:
        evaluation = exports.evaluate(arguments.workdir, **options)
        report = text.class_report(evaluation)
    elif arguments.workdir.is_file():
        raise UserError(f"{arguments.workdir} is not a model: pass a folder or model{', model'.join(exports.EXTRAS)}")
    else:
        evaluation = evaluate_run(arguments.workdir, arguments.step, **options)
        report = text.class_report(evaluation)
    print(report)
    if arguments.plot is not None:
        names, probabilities = evaluation.class_names, evaluation.probabilities
        canvas.save(plots.mistakes(evaluation.images, evaluation.labels, probabilities, names=names), arguments.plot)


def parse_arguments(argv: list[str]) -> Arguments:
    """Parse the arguments; ``--ensemble`` without a number means all."""
    argv = [
        f"{word}=all" if word == "--ensemble" and not (following.isdecimal() or following == "all") else word
        for word, following in zip(argv, [*argv[1:], ""], strict=False)
    ]
    return tyro.cli(Arguments, args=argv, prog=command("evaluate"), description=__doc__)


def main(argv: list[str]) -> int:
    return exit_code(lambda: evaluate(parse_arguments(argv)))
