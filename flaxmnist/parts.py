"""What a sweep keeps: the finished members, in memory and in its folder."""

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

from flaxmnist import fields, folders, inspection, models, statistics
from flaxmnist.config import Config
from flaxmnist.errors import UserError
from flaxmnist.lock import Lock
from flaxmnist.logs import logger, write_json
from flaxmnist.statistics import title

# Seconds after which finished members are saved.
SAVE_SECONDS = 30.0

# What lies in the folder of a sweep.
CONTENTS = {"sweep.json", "parts", "curves.npz", "result.json", "plots", "report.html", "lock", "unfinished.npz"}

# What a resumed sweep may run on.
MAY_DIFFER = {"devices", "versions"}

# The columns of curves, beside the number of the member.
COLUMNS = {"step": np.int32, "validation": np.bool_, "loss": np.float32, "accuracy": np.float32}


@dataclass(frozen=True)
class Sweep:
    """A finished sweep."""

    result: dict[str, Any]  # what result.json holds
    curves: dict[str, np.ndarray]  # columns "member", "step", "validation" (or training), "loss", "accuracy"

    @property
    def members(self) -> list[dict[str, Any]]:
        """What became of each run, for pandas.DataFrame."""
        return self.result["members"]

    @property
    def groups(self) -> list[dict[str, Any]]:
        """Accuracy by setting, on the images that "split" names: n, mean, std, ci95, min, max."""
        return self.result["groups"]


class Kept:
    """Finished members in memory and, where there is a folder, in ``parts/*.npz``: results, curves, weights.

    Columns of NumPy's own format, which hold no code. (A checkpoint of orbax for each of a hundred small models would
    take longer than training them.)
    """

    def __init__(self, folder: Path | None, described: dict[str, Any], resume: bool, overwrite: bool):
        self.folder, self.described, self.saved_at = folder, described, time.monotonic()
        self.results: dict[int, dict[str, Any]] = {}
        self.curves: dict[int, dict[str, list[float]]] = {}
        self.unsaved: dict[int, Any] = {}  # weights
        self.unwritten: list[dict[str, np.ndarray]] = []  # parts
        self.at_work: dict[str, np.ndarray] = {}  # what members at work can be gone on from
        self.seconds = self.unsaved_seconds = 0.0  # of training
        self.lock = Lock()
        if folder is None:
            return
        try:
            self.begin(folder, described, resume, overwrite)
        except OSError as error:
            raise folders.unwritable(folder, error) from None
        for path in sorted(folder.glob("parts/*.npz")):
            try:
                with folders.as_saved(path):
                    self.take(read_part(path))
            except UserError as error:
                logger.warning("%s: its members are trained again", error)
                path.rename(path.with_suffix(".damaged"))
        if self.results:
            logger.info("going on with %d members finished", len(self.results))

    def take(self, part: dict[str, Any]) -> None:
        """Counts the members of a part as finished."""
        for number, line in zip(part["numbers"], part["results"], strict=True):
            self.results[int(number)] = json.loads(str(line))
            mine = part["curves.member"] == number
            self.curves[int(number)] = {name: part[f"curves.{name}"][mine].tolist() for name in COLUMNS}
        self.seconds += float(part["seconds"])

    def begin(self, folder: Path, described: dict[str, Any], resume: bool, overwrite: bool) -> None:
        """Makes ``folder`` ready. Raises UserError where something else lies there."""
        folder.mkdir(parents=True, exist_ok=True)
        found = {path.name for path in folder.iterdir()}
        if found and not (resume or overwrite):
            raise UserError(
                f"{folder} is not empty: give --resume to go on there, --overwrite to begin anew, or another --workdir"
            )
        if not {name.removesuffix(".tmp") for name in found} <= CONTENTS:
            raise UserError(f"{folder} is not the folder of a sweep: give another --workdir")
        self.lock.take(folder)
        if overwrite:
            for name in found - {"lock"}:
                shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
        elif "sweep.json" in found:
            before = folders.read_json(folder / "sweep.json")
            told = json.loads(json.dumps(described))
            changed = [name for name in told.keys() - MAY_DIFFER if before.get(name) != told[name]]
            if changed:
                raise UserError(
                    f"{folder} was begun with other {', '.join(changed)}: give the same, or another --workdir"
                )
        (folder / "parts").mkdir(exist_ok=True)
        write_json(folder / "sweep.json", described)

    def add(self, number: int, line: dict[str, Any], curves: dict[str, list[Any]], weights: Any) -> None:
        """A finished member: its line in result.json, its curves by column, its weights as nested dicts."""
        self.results[number], self.curves[number] = line, curves
        self.unsaved[number] = jax.device_get(weights)

    def spend(self, seconds: float) -> None:
        """Counts seconds of training, and saves what was added if the last time is a while ago."""
        self.seconds += seconds
        self.unsaved_seconds += seconds
        if time.monotonic() - self.saved_at > SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Saves what is not saved yet, all of one shape. A failure is told, and the next time it is tried again."""
        self.saved_at = time.monotonic()
        if self.folder is not None:
            if self.unsaved:
                self.unwritten.append(self.part())
            try:
                self.write(self.folder)
            except OSError as error:
                logger.warning("cannot save to %s (%s): tried again later", self.folder, error.strerror or error)
        self.unsaved, self.unsaved_seconds = {}, 0.0

    def save_unfinished(self, numbers: list[int], arrays: Callable[[], dict[str, np.ndarray]], now: bool) -> None:
        """Saves what members that are at work can be gone on from, ``now`` or if the last time is a while ago."""
        if self.folder is not None and (now or time.monotonic() - self.saved_at > SAVE_SECONDS):
            self.at_work = {"numbers": np.array(numbers), **arrays()}
            self.save()

    def unfinished(self, numbers: list[int]) -> dict[str, np.ndarray] | None:
        """What was saved of the members ``numbers`` at work; None where there is nothing, or it is damaged."""
        path = self.folder and self.folder / "unfinished.npz"
        if path is None or not path.exists():
            return None
        try:
            with folders.as_saved(path):
                arrays = read_part(path)
                if arrays["numbers"].tolist() != numbers or "told" not in arrays:
                    return None
        except UserError as error:
            logger.warning("%s: its members are trained again", error)
            return None
        logger.info("going on with %d members that were at work", len(numbers))
        return arrays

    def part(self) -> dict[str, np.ndarray]:
        """What is not saved yet, as one part."""
        numbers = list(self.unsaved)
        part: dict[str, np.ndarray] = {
            "numbers": np.array(numbers),
            "results": np.array([json.dumps(self.results[number]) for number in numbers]),
            "seconds": np.array(self.unsaved_seconds),
        }
        part |= {f"curves.{name}": column for name, column in self.columns(numbers).items()}
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *self.unsaved.values())
        for path, leaf in jax.tree_util.tree_leaves_with_path(stacked):
            part[f"weights.{jax.tree_util.keystr(path, simple=True, separator='.')}"] = leaf
        return part

    def write(self, folder: Path) -> None:
        """Writes what is not written yet. Raises OSError."""
        self.lock.check()
        while self.unwritten:
            write_arrays(folder / f"parts/{self.unwritten[0]['numbers'][0]:05d}.npz", self.unwritten[0])
            del self.unwritten[0]
        if self.at_work:
            write_arrays(folder / "unfinished.npz", self.at_work)
            self.at_work = {}

    def settle(self) -> None:
        """Returns when everything is on the disk; else keeps it elsewhere, and raises UserError."""
        if self.folder is not None:
            folders.persist(self.folder, partial(self.write, self.folder), self.rescue)

    def rescue(self, elsewhere: Path) -> str:
        """Keeps in ``elsewhere`` what is not written yet; returns how to go on. Raises OSError."""
        (elsewhere / "parts").mkdir()
        for part in self.unwritten:
            write_arrays(elsewhere / f"parts/{part['numbers'][0]:05d}.npz", part)
        if self.at_work:
            write_arrays(elsewhere / "unfinished.npz", self.at_work)
        return f"what is not there is kept in {elsewhere}: copy it to {self.folder}, and --resume goes on"

    def columns(self, numbers: Sequence[int]) -> dict[str, np.ndarray]:
        """The curves of members, one under the other."""
        lengths = [len(self.curves[number]["step"]) for number in numbers]
        columns = {"member": np.repeat(numbers, lengths)}
        for name, kind in COLUMNS.items():
            columns[name] = np.array([x for number in numbers for x in self.curves[number][name]], kind)
        return columns

    def finish(self, steps: int) -> Sweep:
        """All results together, written once all members are finished, after so many ``steps`` of theirs."""
        lines = [self.results[number] for number in sorted(self.results)]
        settings = self.described["settings"]
        result = {
            "experiments": [config["name"] for config in self.described["experiments"]],
            "seeds": self.described["seeds"],
            "over": {name: list(dict.fromkeys(each[name] for each in settings)) for name in settings[0]},
            "members": lines,
            **statistics.summaries(lines),
            "replica_steps_per_second": steps / self.seconds,
        }
        curves = self.columns(sorted(self.results))
        if len({line["params_sha256"] for line in lines}) < len(lines):
            logger.warning("some members ended with the same parameters: nothing in them depends on what was varied")
        if self.folder is not None:
            try:
                (self.folder / "unfinished.npz").unlink(missing_ok=True)
                write_arrays(self.folder / "curves.npz", curves)
                write_json(self.folder / "result.json", result)
            except OSError as error:
                raise folders.unwritable(self.folder, error) from None
        return Sweep(result, curves)


def report(swept: Sweep) -> str:
    """The settings as a table, and what is to be said of the best."""
    rows: list[tuple[str, ...]] = [("setting", "n", "mean", "std", "95 % interval", "min", "max", "failed")]
    for group in swept.groups:
        numbers = [group["mean"], group["std"], *(group["ci95"] or (None, None)), group["min"], group["max"]]
        mean, std, low, high, least, most = ("" if x is None else f"{x:.4f}" for x in numbers)
        interval = f"{low} – {high}" if low else ""
        rows.append((title(group), str(group["n"]), mean, std, interval, least, most, str(group["failed"] or "")))
    told = [f"{swept.groups[0]['split']} accuracy by setting", "", inspection.table(rows), ""]
    for line in swept.members:
        if line["failed"] is not None:
            told.append(f"failed: {title(line)}, seed {line['seed']}: {line['failed']}")
    best = swept.result["best"]
    if best is not None:
        test = best["test"]
        spread = "" if test["std"] is None else f" ± {test['std']:.4f} (std)"
        told.append(f"best: {title(best)}: test accuracy {test['mean']:.4f}{spread}, n = {test['n']}")
    for other in swept.result["comparisons"]:
        if other["ci95"] is not None:
            low, high = other["ci95"]
            tested = "" if other["p_value"] is None else f", p = {other['p_value']:.2g}"
            told.append(
                f"{title(other)}: {other['mean']:+.4f} [{low:+.4f}, {high:+.4f}] beside {other['reference']}, "
                f"same seeds{tested}"
            )
    told.append(f"{swept.result['replica_steps_per_second']:,.0f} steps/s of all runs together")
    return "\n".join(told)


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes ``arrays`` to ``path`` at once."""
    beside = path.with_name(path.name + ".tmp")
    with beside.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def read_part(path: Path) -> dict[str, np.ndarray]:
    """A part of a sweep. Raises UserError where it is damaged."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except Exception as error:  # NumPy and zipfile raise all kinds
        raise UserError(f"{path} is damaged ({error})") from None


def load_sweep(folder: Path) -> Sweep:
    """The finished sweep in ``folder``. Raises UserError where it is not finished, or damaged."""
    if not (folder / "result.json").exists():
        raise UserError(f"{folder} is not finished: go on with the sweep, with --resume")
    return Sweep(folders.read_json(folder / "result.json"), read_part(folder / "curves.npz"))


def load_members(folder: Path) -> list[tuple[dict[str, Any], nnx.Module]]:
    """Each finished member of the sweep in ``folder``: its line in result.json and its model, in order.

    Raises UserError where a part is damaged, which --resume mends.
    """
    about = folders.read_json(folder / "sweep.json")
    shells, found = {}, {}
    for config, data in zip(about["experiments"], about["data"], strict=True):
        shells[config["name"]] = fields.from_json(config, Config), data
    for part in map(read_part, sorted(folder.glob("parts/*.npz"))):
        for place, (number, text) in enumerate(zip(part["numbers"], part["results"], strict=True)):
            line = json.loads(str(text))
            config, data = shells[line["experiment"]]
            for name, value in line["fields"].items():
                config = fields.put(config, name, value, check=False)
            stacked = {name: array for name, array in part.items() if name.startswith("weights.")}
            weights = {name.removeprefix("weights."): array[place] for name, array in stacked.items()}
            model = models.with_weights(config.model, tuple(data["shape"]), data["classes"], weights)
            found[int(number)] = line, model
    return [found[number] for number in sorted(found)]
