"""The run folder: what lies in it, and whether a run may begin or go on there."""

import json
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from flaxmnist import fields
from flaxmnist.config import Config
from flaxmnist.data import Dataset
from flaxmnist.errors import UserError
from flaxmnist.logs import logger, write_json

CONTENTS = ("config.json", "metrics.jsonl", "checkpoints", "result.json", "tensorboard", "plots")

# What a resumed run may do otherwise than it began. The length of the run is among them.
MAY_DIFFER = {"name", "train.steps", "train.epochs", "train.keep", "train.report"} | {
    f"train.{event}_every" for event in ("log", "evaluate", "checkpoint")
}


def read_json(path: Path) -> dict[str, Any]:
    """The object in ``path``. Raises UserError, naming the file, where there is none."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path.parent} is no run folder: it has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return value


def describe(config: Config, data: Dataset) -> dict[str, Any]:
    """What ``config.json`` holds."""
    root = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    sizes = {name: 0 if split is None else len(split.labels) for name, split in data.splits().items()}
    return {
        "config": fields.to_json(config),
        "command": sys.argv,
        "git_commit": commit.stdout.strip() or None,
        "versions": versions(),
        "devices": {"count": jax.device_count(), "kind": jax.devices()[0].device_kind},
        "data": {"source": data.source, "shape": data.train.images.shape[1:3], "classes": data.classes} | sizes,
    }


def versions() -> dict[str, str]:
    """The versions a result depends on."""
    packages = ("flaxmnist", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {"python": sys.version.split()[0]} | {name: metadata.version(name) for name in packages}


def open_folder(
    folder: Path, config: Config, data: Dataset, resume: bool, overwrite: bool, allow_config_change: bool
) -> bool:
    """Makes ``folder`` ready for this run; returns whether the run has been finished there already.

    Raises UserError where something lies there and neither ``resume`` nor ``overwrite`` is given, or where a resumed
    run differs from the one it would go on from.
    """
    described = describe(config, data)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if overwrite:
            for path in (folder / name for name in CONTENTS):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        elif any(folder.iterdir()) and not resume:
            raise UserError(
                f"{folder} is not empty: give --resume to go on there, --overwrite to begin anew, or another --workdir"
            )
        elif (folder / "config.json").exists():
            before = read_json(folder / "config.json")
            compare(before, described, folder, allow_config_change)
            if (folder / "result.json").exists():
                if before["config"]["train"]["steps"] == config.train.steps:
                    return True
                check_longer(folder, read_json(folder / "result.json")["steps"], config)
                (folder / "result.json").unlink()
        write_json(folder / "config.json", described)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; give another --workdir") from None
    return False


def check_longer(folder: Path, done: int, config: Config) -> None:
    """Raises UserError where more steps are ``done`` in ``folder`` than ``config`` wants."""
    if done > config.train.length:
        raise UserError(f"{folder} has {done} steps already: train.steps must be at least that")


def compare(before: dict[str, Any], now: dict[str, Any], folder: Path, allow_config_change: bool) -> None:
    """Raises UserError, naming them, where fields differ that may not; ``allow_config_change`` makes it a warning."""
    old, new = fields.flatten(before.get("config", {})), fields.flatten(now["config"])
    old["data.source"], new["data.source"] = before.get("data", {}).get("source"), now["data"]["source"]
    changed = [name for name in sorted(old | new) if old.get(name) != new.get(name) and name not in MAY_DIFFER]
    if not changed:
        return
    differences = ", ".join(f"{name} ({old.get(name)} before, {new.get(name)} now)" for name in changed)
    if not allow_config_change:
        raise UserError(
            f"{folder} was begun with other values: {differences}; undo that, or give --allow-config-change"
        )
    logger.warning("going on with other values than %s was begun with: %s", folder, differences)
