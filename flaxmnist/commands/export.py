"""Export a run as safetensors, StableHLO and ONNX."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from flaxmnist import console
from flaxmnist.commands import command, load_classes
from flaxmnist.errors import exit_code
from flaxmnist.store import exports
from flaxmnist.store.load import load_checkpoint


@dataclass(frozen=True)
class Arguments:
    workdir: tyro.conf.Positional[Path]  # run folder
    step: str = "latest"  # checkpoint: latest, best (by train.monitor), or a step
    out: Path | None = None  # output folder, replaces an earlier export; default: WORKDIR/export
    experiment: Path | None = None  # experiment file, if its model is not built in


def export(arguments: Arguments) -> None:
    """Export, and print each file, its size and the next commands."""
    console.show_messages("info")
    folder = arguments.workdir / "export" if arguments.out is None else arguments.out
    config = load_classes(arguments.experiment)
    for file in exports.write(load_checkpoint(arguments.workdir, arguments.step, config), folder):
        print(f"{file}  {file.stat().st_size:,} bytes")
    print(f"next: {command('evaluate')} {folder / 'model.stablehlo'}")
    print(f"      python {folder / 'load.py'} IMAGES.npy")


def main(argv: list[str]) -> int:
    return exit_code(lambda: export(tyro.cli(Arguments, args=argv, prog=command("export"), description=__doc__)))
