"""The finished trials of a sweep, in memory and in its folder."""

import contextlib
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from flaxmnist import fields
from flaxmnist.console import logger
from flaxmnist.core import models
from flaxmnist.errors import UserError
from flaxmnist.store.claim import SWEEP, claim
from flaxmnist.store.files import damage_as_user_error, read_arrays, read_json, write_arrays, write_error, write_json
from flaxmnist.store.lock import Lock
from flaxmnist.store.rescue import save_or_rescue
from flaxmnist.sweeps.plan import Trial
from flaxmnist.sweeps.results import Sweep, SweepInfo, SweepResult, TrialResult
from flaxmnist.sweeps.statistics import summarise_sweep
from flaxmnist.sweeps.trials import Point, Trials

# Seconds between saves.
SAVE_SECONDS = 30.0

# The columns of curves, besides the index of the trial ("member"): the fields of a point.
COLUMNS = {"step": np.int32, "validation": np.bool_, "loss": np.float32, "accuracy": np.float32}

# Entries of sweep.json that may differ when a sweep is resumed.
MAY_DIFFER = {"devices", "versions"}


@contextlib.contextmanager
def open_sweep_folder(
    workdir: Path | None, info: SweepInfo, *, resume: bool, overwrite: bool
) -> "Iterator[SweepFolder]":
    """Claim ``workdir`` within the block, and load its finished trials. Raise UserError."""
    folder = SweepFolder(workdir, info)
    try:
        if workdir is not None:
            folder.load(workdir, resume, overwrite)
        yield folder
    finally:
        folder.lock.release()


class SweepFolder:
    """The finished trials of a sweep: in memory and, unless ``path`` is None, in ``parts/*.npz``.

    The files contain results, curves and weights, as NumPy archives without pickled code. (An orbax checkpoint for
    each of a hundred small models would take longer than training them.)
    """

    def __init__(self, path: Path | None, info: SweepInfo):
        self.path, self.info, self.lock, self.saved_at = path, info, Lock(), time.monotonic()
        self.results: dict[int, TrialResult] = {}  # by index of the trial
        self.curves: dict[int, list[Point]] = {}
        self.unsaved_weights: dict[int, dict[str, Any]] = {}  # by dotted name
        self.unwritten: dict[str, dict[str, np.ndarray]] = {}  # arrays by file name
        self.seconds = self.unsaved_seconds = 0.0  # of training

    def load(self, path: Path, resume: bool, overwrite: bool) -> None:
        """Claim ``path`` and load its finished trials. Raise UserError if they are those of another sweep."""
        if "sweep.json" in claim(path, self.lock, SWEEP, resume=resume, overwrite=overwrite):
            previous = read_json(path / "sweep.json", SweepInfo, fields.user_classes(self.info))
            old, new = fields.to_json(previous), fields.to_json(self.info)
            changed = ", ".join(name for name in new if name not in MAY_DIFFER and old[name] != new[name])
            if changed:
                raise UserError(f"{path} was started with different {changed}: use the same, or another --workdir")
        try:
            (path / "parts").mkdir(exist_ok=True)
            write_json(path / "sweep.json", self.info)
        except OSError as error:
            raise write_error(path, error) from None
        for file in sorted(path.glob("parts/*.npz")):
            try:
                self.load_part(file)
            except UserError as error:
                logger.warning("%s: its trials will be trained again", error)
                file.rename(file.with_suffix(".damaged"))
        if self.results:
            logger.info("resuming: finished trials: %d", len(self.results))

    def load_part(self, file: Path) -> None:
        with damage_as_user_error(file):
            part = read_arrays(file)
            results, curves, seconds = read_results(part), {}, float(part["seconds"])
            for index in results:
                rows = part["curves.member"] == index
                curves[index] = list(map(Point, *(part[f"curves.{name}"][rows].tolist() for name in COLUMNS)))
        self.results |= results
        self.curves |= curves
        self.seconds += seconds

    def has(self, trials: Sequence[Trial]) -> bool:
        """Return True if all ``trials`` are finished."""
        return all(trial.index in self.results for trial in trials)

    def add(self, trained: Trials) -> None:
        """Add trials that are trained to the end."""
        for row, index in enumerate(trained.indices):
            self.results[index], self.curves[index] = trained.result(row), trained.curves[row]
            if self.path is not None:
                self.unsaved_weights[index] = jax.device_get(trained.weights(row))
        self.seconds += trained.seconds
        self.unsaved_seconds += trained.seconds
        if self.is_save_due():
            self.save()

    def is_save_due(self) -> bool:
        """Return True if there is a folder and the last save is SAVE_SECONDS ago."""
        return self.path is not None and time.monotonic() - self.saved_at > SAVE_SECONDS

    def save(self) -> None:
        """Save the unsaved trials, whose weights must have equal shapes. On failure, warn; the next call retries."""
        self.saved_at = time.monotonic()
        try:
            self.write()
        except OSError as error:
            logger.warning("cannot save to %s (%s): retrying later", self.path, error.strerror or error)

    def save_unfinished(self, training: Trials) -> None:
        """Save the state of trials that are not finished, and all that are."""
        self.unwritten["unfinished.npz"] = training.to_arrays()
        self.save()

    def restore_unfinished(self, training: Trials) -> None:
        """Restore the saved state of the same trials, if there is an intact one."""
        file = self.path and self.path / "unfinished.npz"
        if file and file.exists():
            try:
                with damage_as_user_error(file):
                    training.restore(read_arrays(file))
            except UserError as error:
                logger.warning("%s: its trials will be trained again", error)

    def flush(self) -> None:
        """Write everything to the folder; if that fails, write it elsewhere and raise UserError."""
        if self.path is not None:
            save_or_rescue(self.path, self.write, self.rescue)

    def finish(self, steps: int) -> Sweep:
        """Return and write the results of all trials, which took ``steps`` steps in total. Raise UserError."""
        sweep = self.summary(steps)
        # The loss as well, because averaged weights may differ although the parameters do not.
        outcomes = [(trial.params_sha256, trial.test_loss) for trial in self.results.values() if trial.failed is None]
        if len(set(outcomes)) < len(outcomes):
            logger.warning("some trials have identical final parameters: seed or swept fields have no effect on them")
        if self.path is not None:
            try:
                (self.path / "unfinished.npz").unlink(missing_ok=True)
                write_arrays(self.path / "curves.npz", sweep.curves)
                write_json(self.path / "result.json", sweep.result)
            except OSError as error:
                raise write_error(self.path, error) from None
        return sweep

    def summary(self, steps: int) -> Sweep:
        """Return the results of the trials that are finished, which took ``steps`` steps in total."""
        indices = sorted(self.results)
        trials, rate = [self.results[index] for index in indices], steps / self.seconds if indices else 0.0
        return Sweep(summarise_sweep(self.info, trials, rate), concatenate(self.curves, indices))

    # --- Writing ----------------------------------------------------------------------------------------------------

    def make_part(self) -> dict[str, np.ndarray]:
        """Return the unsaved trials as the arrays of one file; weights are stacked along a first axis."""
        indices = list(self.unsaved_weights)
        part: dict[str, np.ndarray] = {
            "numbers": np.array(indices),
            "results": np.array([json.dumps(fields.to_json(self.results[index])) for index in indices]),
            "seconds": np.array(self.unsaved_seconds),
        }
        part |= {f"curves.{name}": column for name, column in concatenate(self.curves, indices).items()}
        for name in self.unsaved_weights[indices[0]]:
            part[f"weights.{name}"] = np.stack([weights[name] for weights in self.unsaved_weights.values()])
        return part

    def write(self) -> None:
        """Write everything that is not written yet. Raise OSError on failure."""
        if self.path is None:
            return
        if self.unsaved_weights:
            self.unwritten[f"parts/{next(iter(self.unsaved_weights)):05d}.npz"] = self.make_part()
            self.unsaved_weights, self.unsaved_seconds = {}, 0.0
        self.lock.check()
        for name in list(self.unwritten):
            write_arrays(self.path / name, self.unwritten[name])
            del self.unwritten[name]

    def rescue(self, elsewhere: Path) -> str:
        """Write the unwritten files to ``elsewhere``; return instructions to resume. Raise OSError on failure."""
        (elsewhere / "parts").mkdir()
        for name, arrays in self.unwritten.items():
            write_arrays(elsewhere / name, arrays)
        return f"unsaved results are in {elsewhere}: copy them to {self.path} and use --resume"


def concatenate(curves: dict[int, list[Point]], indices: Sequence[int]) -> dict[str, np.ndarray]:
    """Return the curves of the trials ``indices`` as columns."""
    columns = {"member": np.repeat(indices, [len(curves[index]) for index in indices])}
    points = [point for index in indices for point in curves[index]]
    for name, dtype in COLUMNS.items():
        columns[name] = np.array([getattr(point, name) for point in points], dtype)
    return columns


def read_results(part: dict[str, np.ndarray]) -> dict[int, TrialResult]:
    """Return the results of the trials in a file of ``parts``, by index."""
    lines = zip(part["numbers"], part["results"], strict=True)
    return {int(index): fields.from_json(json.loads(str(line)), TrialResult) for index, line in lines}


def load_sweep(folder: Path) -> Sweep:
    """Load the finished sweep in ``folder``. Raise UserError if there is none, or if it is unfinished or damaged."""
    if not (folder / "sweep.json").exists():
        raise UserError(f"there is no sweep in {folder}: train one with launch/sweep.py, or pass another folder")
    if not (folder / "result.json").exists():
        raise UserError(f"{folder} is not finished: continue the sweep with --resume")
    return Sweep(read_json(folder / "result.json", SweepResult), read_arrays(folder / "curves.npz"))


def load_finished_trials(path: Path, classes: Iterable[type] = ()) -> Sweep:
    """Load what is finished of the sweep in ``path``. ``classes`` are the user's in it. Raise UserError if damaged."""
    folder = SweepFolder(path, read_json(path / "sweep.json", SweepInfo, classes))
    for file in sorted(path.glob("parts/*.npz")):
        folder.load_part(file)
    return folder.summary(sum(points[-1].step for points in folder.curves.values()))


def load_trials(folder: Path, classes: Iterable[type] = ()) -> list[tuple[TrialResult, nnx.Module]]:
    """Load each finished trial of the sweep in ``folder`` with its model, in order. ``classes`` are the user's in it.

    Raise UserError if a part is damaged; resuming the sweep repairs it.
    """
    info, trials = read_json(folder / "sweep.json", SweepInfo, classes), {}
    for file in sorted(folder.glob("parts/*.npz")):
        with damage_as_user_error(file):
            part = read_arrays(file)
            stacked = {name.removeprefix("weights."): x for name, x in part.items() if name.startswith("weights.")}
            for row, (index, result) in enumerate(read_results(part).items()):
                config, data = info.experiment(result.experiment)
                for name, value in result.fields.items():
                    config = fields.replace(config, name, value, check=False)
                weights = {name: array[row] for name, array in stacked.items()}
                trials[index] = result, models.with_weights(config, data.shape, data.classes, weights)
    return [trials[index] for index in sorted(trials)]
