"""Results of a sweep: finished trials in memory and in the sweep's folder."""

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from flaxmnist import fields
from flaxmnist.config import Config
from flaxmnist.console import logger
from flaxmnist.core import models
from flaxmnist.errors import UserError
from flaxmnist.store import folders
from flaxmnist.store.files import write_json
from flaxmnist.store.lock import Lock
from flaxmnist.sweeps import statistics

# Seconds between saves.
SAVE_SECONDS = 30.0

# Files and folders in a sweep's folder.
CONTENTS = {"sweep.json", "parts", "curves.npz", "result.json", "plots", "report.html", "lock", "unfinished.npz"}

# Entries of sweep.json that may differ when a sweep is resumed.
MAY_DIFFER = {"devices", "versions"}

# The columns of curves, besides the index of the trial ("member").
COLUMNS = {"step": np.int32, "validation": np.bool_, "loss": np.float32, "accuracy": np.float32}


@dataclass(frozen=True)
class Sweep:
    """A finished sweep."""

    result: dict[str, Any]  # content of result.json
    curves: dict[str, np.ndarray]  # columns "member", "step", "validation" (else training), "loss", "accuracy"

    @property
    def members(self) -> list[dict[str, Any]]:
        """The result of each trial, for pandas.DataFrame."""
        return self.result["members"]

    @property
    def groups(self) -> list[dict[str, Any]]:
        """Statistics of each setting: n, mean, std, ci95, min, max of the accuracy on the images named by "split"."""
        return self.result["groups"]


class Kept:
    """Finished trials in memory and, if there is a folder, in ``parts/*.npz``: results, curves, weights.

    The files are NumPy archives without pickled code. (An orbax checkpoint for each of a hundred small models would
    take longer than training them.)
    """

    def __init__(self, folder: Path | None, described: dict[str, Any], resume: bool, overwrite: bool):
        self.folder, self.described, self.saved_at = folder, described, time.monotonic()
        self.results: dict[int, dict[str, Any]] = {}  # by trial index
        self.curves: dict[int, dict[str, list[float]]] = {}
        self.unsaved_weights: dict[int, Any] = {}
        self.unwritten: dict[str, dict[str, np.ndarray]] = {}  # arrays by file name
        self.seconds = self.unsaved_seconds = 0.0  # of training
        self.lock = Lock()
        if folder is None:
            return
        try:
            self.prepare(folder, resume, overwrite)
        except OSError as error:
            raise folders.write_error(folder, error) from None
        for path in sorted(folder.glob("parts/*.npz")):
            try:
                with folders.damage_as_user_error(path):
                    self.load_part(read_part(path))
            except UserError as error:
                logger.warning("%s: its trials will be trained again", error)
                path.rename(path.with_suffix(".damaged"))
        if self.results:
            logger.info("resuming: %d trials are finished", len(self.results))

    def load_part(self, part: dict[str, Any]) -> None:
        for index, line in zip(part["numbers"], part["results"], strict=True):
            self.results[int(index)] = json.loads(str(line))
            rows = part["curves.member"] == index
            self.curves[int(index)] = {name: part[f"curves.{name}"][rows].tolist() for name in COLUMNS}
        self.seconds += float(part["seconds"])

    def prepare(self, folder: Path, resume: bool, overwrite: bool) -> None:
        """Create or empty ``folder``, or check that the sweep in it can be resumed. Raise UserError or OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        found = {path.name for path in folder.iterdir()}
        if found and not (resume or overwrite):
            raise UserError(
                f"{folder} is not empty: pass --resume to continue, --overwrite to start from scratch, or another "
                "--workdir"
            )
        if not {name.removesuffix(".tmp") for name in found} <= CONTENTS:
            raise UserError(f"{folder} is not the folder of a sweep: use another --workdir")
        self.lock.take(folder)
        if overwrite:
            for name in found - {"lock"}:
                shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
        elif "sweep.json" in found:
            before = folders.read_json(folder / "sweep.json")
            now = json.loads(json.dumps(self.described))
            changed = [name for name in now.keys() - MAY_DIFFER if before.get(name) != now[name]]
            if changed:
                raise UserError(
                    f"{folder} was started with different {', '.join(changed)}: use the same, or another --workdir"
                )
        (folder / "parts").mkdir(exist_ok=True)
        write_json(folder / "sweep.json", self.described)

    def add(self, index: int, line: dict[str, Any], curves: dict[str, list[Any]], weights: Any) -> None:
        """Add a finished trial: its entry in result.json, its curves by column, its weights as nested dicts."""
        self.results[index], self.curves[index] = line, curves
        self.unsaved_weights[index] = jax.device_get(weights)

    def add_seconds(self, seconds: float) -> None:
        """Add seconds of training; save the finished trials if the last save is SAVE_SECONDS ago."""
        self.seconds += seconds
        self.unsaved_seconds += seconds
        if time.monotonic() - self.saved_at > SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Save the unsaved trials, whose weights must have equal shapes. On failure, warn; the next call retries."""
        self.saved_at = time.monotonic()
        if self.folder is not None:
            if self.unsaved_weights:
                self.unwritten[f"parts/{next(iter(self.unsaved_weights)):05d}.npz"] = self.make_part()
            try:
                self.write(self.folder)
            except OSError as error:
                logger.warning("cannot save to %s (%s): retrying later", self.folder, error.strerror or error)
        self.unsaved_weights, self.unsaved_seconds = {}, 0.0

    def save_unfinished(self, indices: list[int], arrays: Callable[[], dict[str, np.ndarray]], now: bool) -> None:
        """Save the state of unfinished trials if ``now`` is True or the last save is SAVE_SECONDS ago."""
        if self.folder is not None and (now or time.monotonic() - self.saved_at > SAVE_SECONDS):
            self.unwritten["unfinished.npz"] = {"numbers": np.array(indices), **arrays()}
            self.save()

    def load_unfinished(self, indices: list[int]) -> dict[str, np.ndarray] | None:
        """Return the saved state of the unfinished trials ``indices``; None if there is none or it is damaged."""
        path = self.folder and self.folder / "unfinished.npz"
        if path is None or not path.exists():
            return None
        try:
            with folders.damage_as_user_error(path):
                arrays = read_part(path)
                if arrays["numbers"].tolist() != indices or "told" not in arrays:
                    return None
        except UserError as error:
            logger.warning("%s: its trials will be trained again", error)
            return None
        logger.info("resuming %d unfinished trials", len(indices))
        return arrays

    def make_part(self) -> dict[str, np.ndarray]:
        """Return the unsaved trials as the arrays of one file; weights are stacked along a first axis."""
        indices = list(self.unsaved_weights)
        part: dict[str, np.ndarray] = {
            "numbers": np.array(indices),
            "results": np.array([json.dumps(self.results[index]) for index in indices]),
            "seconds": np.array(self.unsaved_seconds),
        }
        part |= {f"curves.{name}": column for name, column in self.concatenate_curves(indices).items()}
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *self.unsaved_weights.values())
        for path, leaf in jax.tree_util.tree_leaves_with_path(stacked):
            part[f"weights.{jax.tree_util.keystr(path, simple=True, separator='.')}"] = leaf
        return part

    def write(self, folder: Path) -> None:
        """Write the unwritten files. Raise OSError."""
        self.lock.check()
        for name in list(self.unwritten):
            write_arrays(folder / name, self.unwritten[name])
            del self.unwritten[name]

    def flush(self) -> None:
        """Write everything to the folder; if that fails, write it elsewhere and raise UserError."""
        if self.folder is not None:
            folders.save_or_rescue(self.folder, partial(self.write, self.folder), self.rescue)

    def rescue(self, elsewhere: Path) -> str:
        """Write the unwritten files to ``elsewhere``; return instructions to resume. Raise OSError."""
        (elsewhere / "parts").mkdir()
        for name, arrays in self.unwritten.items():
            write_arrays(elsewhere / name, arrays)
        return f"unsaved results are in {elsewhere}: copy them to {self.folder} and use --resume"

    def concatenate_curves(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """Return the curves of all trials ``indices`` as columns."""
        lengths = [len(self.curves[index]["step"]) for index in indices]
        columns = {"member": np.repeat(indices, lengths)}
        for name, dtype in COLUMNS.items():
            columns[name] = np.array([x for index in indices for x in self.curves[index][name]], dtype)
        return columns

    def finish(self, steps: int) -> Sweep:
        """Return and write the results of all trials, which took ``steps`` steps in total."""
        lines = [self.results[index] for index in sorted(self.results)]
        settings = self.described["settings"]
        result = {
            "experiments": [config["name"] for config in self.described["experiments"]],
            "seeds": self.described["seeds"],
            "over": {name: list(dict.fromkeys(setting[name] for setting in settings)) for name in settings[0]},
            "members": lines,
            **statistics.summaries(lines),
            "replica_steps_per_second": steps / self.seconds,
        }
        curves = self.concatenate_curves(sorted(self.results))
        if len({line["params_sha256"] for line in lines}) < len(lines):
            logger.warning("some trials have identical final parameters: seed or swept fields have no effect on them")
        if self.folder is not None:
            try:
                (self.folder / "unfinished.npz").unlink(missing_ok=True)
                write_arrays(self.folder / "curves.npz", curves)
                write_json(self.folder / "result.json", result)
            except OSError as error:
                raise folders.write_error(self.folder, error) from None
        return Sweep(result, curves)


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write ``arrays`` to ``path`` atomically."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_part(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays in ``path``. Raise UserError if the file is damaged."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except Exception as error:  # NumPy and zipfile raise many types
        raise UserError(f"{path} is damaged ({error})") from None


def load_sweep(folder: Path) -> Sweep:
    """Load the finished sweep in ``folder``. Raise UserError if it is unfinished or damaged."""
    if not (folder / "result.json").exists():
        raise UserError(f"{folder} is not finished: continue the sweep with --resume")
    return Sweep(folders.read_json(folder / "result.json"), read_part(folder / "curves.npz"))


def load_trials(folder: Path) -> list[tuple[dict[str, Any], nnx.Module]]:
    """Load each finished trial of the sweep in ``folder``, in order: its entry in result.json and its model.

    Raise UserError if a part is damaged; resuming the sweep repairs it.
    """
    described = folders.read_json(folder / "sweep.json")
    experiments, trials = {}, {}
    for config, data in zip(described["experiments"], described["data"], strict=True):
        experiments[config["name"]] = fields.from_json(config, Config), data
    for part in map(read_part, sorted(folder.glob("parts/*.npz"))):
        for row, (index, text) in enumerate(zip(part["numbers"], part["results"], strict=True)):
            line = json.loads(str(text))
            config, data = experiments[line["experiment"]]
            for name, value in line["fields"].items():
                config = fields.replace(config, name, value, check=False)
            stacked = {name: array for name, array in part.items() if name.startswith("weights.")}
            weights = {name.removeprefix("weights."): array[row] for name, array in stacked.items()}
            model = models.with_weights(config.model, tuple(data["shape"]), data["classes"], weights)
            trials[int(index)] = line, model
    return [trials[index] for index in sorted(trials)]
