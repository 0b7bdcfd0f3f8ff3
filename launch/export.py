"""Export a run as safetensors and StableHLO: python launch/export.py WORKDIR [--step latest|best|N] [--out DIR]"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from flaxmnist.errors import exit_code
from flaxmnist.store import exports, trained


@dataclass(frozen=True)
class Arguments:
    workdir: tyro.conf.Positional[Path]  # run folder
    step: str = "latest"  # checkpoint: latest, best (by validation accuracy), or a step
    out: Path | None = None  # output folder, replaces an earlier export; default: WORKDIR/export


def export(arguments: Arguments) -> None:
    """Export, and print each file, its size and the next commands."""
    folder = arguments.workdir / "export" if arguments.out is None else arguments.out
    for file in exports.write(trained.load_checkpoint(arguments.workdir, arguments.step), folder):
        print(f"{file}  {file.stat().st_size:,} bytes")
    print(f"next: python launch/evaluate.py {folder / 'model.stablehlo'}")
    print(f"      python {folder / 'load.py'} IMAGES.npy")


def main(argv: list[str]) -> int:
    return exit_code(lambda: export(tyro.cli(Arguments, args=argv, prog="launch/export.py", description=__doc__)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
