"""Export a run as safetensors, StableHLO and ONNX, and write a page to draw digits on."""

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

import tyro

from flaxmnist import console
from flaxmnist.commands import command, load_classes
from flaxmnist.errors import UserError, exit_code
from flaxmnist.show import draw
from flaxmnist.store import exports
from flaxmnist.store.load import load_checkpoint


@dataclass(frozen=True)
class Arguments:
    workdir: tyro.conf.Positional[Path]  # run folder, or that of a sweep, which gets a page for its committee
    step: str = "latest"  # checkpoint: latest, best (by train.monitor), or a step
    out: Path | None = None  # output folder, replaces an earlier export; default: WORKDIR/export
    large: bool = False  # write the page even if it has more than 8 MB
    experiment: Path | None = None  # experiment file, if its model is not built in


def export(arguments: Arguments) -> None:
    """Export, and print each file, its size and the next commands."""
    console.show_messages("info")
    workdir, step, config = arguments.workdir, arguments.step, load_classes(arguments.experiment)
    folder = workdir / "export" if arguments.out is None else arguments.out
    is_sweep = os.path.exists(workdir / "sweep.json")
    if is_sweep and step != "latest":
        raise UserError(f"{workdir} is a sweep, whose trials hold only one step: omit --step")
    files = [] if is_sweep else exports.write(load_checkpoint(workdir, step, config), folder)
    try:
        files.append(draw.write(workdir, folder, step, config, large=arguments.large))
    except UserError as error:
        if not files:
            raise
        (folder / "draw.html").unlink(missing_ok=True)
        console.logger.warning("no draw.html: %s", error)
    for file in files:
        print(f"{file}  {file.stat().st_size:,} bytes")
    if folder / "load.py" in files:
        program, loader = (shlex.quote(str(folder / name)) for name in ("model.stablehlo", "load.py"))
        print(f"next: {command('evaluate')} {program}")
        print(f"      python {loader} IMAGES.npy")


def main(argv: list[str]) -> int:
    return exit_code(lambda: export(tyro.cli(Arguments, args=argv, prog=command("export"), description=__doc__)))
