"""Many runs at once: seeds × settings, trained as few programs, with what they say together.

A setting is an experiment and the values of the fields that are swept. Where members are vectorised, settings that
differ only in the values of fields that change no shape share a program; one after another, each has its own, so that
a member is its single run to the bit.
"""

import itertools
import json
import os
import re
import shutil
import threading
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from flaxmnist import evaluation, fields, folders, inspection, order, parallel, program, results, statistics, steps
from flaxmnist.config import CNN, Config
from flaxmnist.data import Dataset, Split
from flaxmnist.errors import Stopped, UserError
from flaxmnist.logs import Progress, logger, write_json
from flaxmnist.state import Totals, TrainState

# Fields whose values may differ between the members of one program.
TRACED = re.compile(
    r"optimizer\.(learning_rate|momentum|b1|b2|weight_decay)|model\.dropout|objective\.label_smoothing"
    r"|model\.(kernel|bias)_init\.\w+"
)

# Fields that say what is swept, and over which images.
FIXED = {"name", "seed", "data.name", "data.validation", "data.order_seed"}

# Seconds that a chunk takes at most, about, and after which finished members are kept.
CHUNK_SECONDS, KEEP_SECONDS = 1.0, 30.0

# The share of a device's memory that members take.
MEMORY_SHARE = 0.5


@dataclass(frozen=True)
class Member:
    """One run of a sweep."""

    config: Config  # its length in steps
    data: Dataset
    fields: dict[str, Any]  # the swept ones, by their dotted names


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
        """Test accuracy by setting: n, mean, std, ci95, min, max."""
        return self.result["groups"]


def sweep(
    config: Config,
    data: Dataset,
    *,
    seeds: int | Sequence[int] = 8,
    over: Mapping[str, Sequence[Any]] | None = None,
    share_order: bool = False,
    exact: bool = False,
    devices: int | None = None,
) -> Sweep:
    """Trains ``config`` with each seed and each combination of the values in ``over``, {dotted field: values}.

    ``seeds`` is how many, from 0 on, or which. With ``share_order`` all runs see the batches of the first seed, which
    is what makes small models fast. With ``exact`` each run is to the bit what ``fit`` would give. Raises UserError.
    """
    which = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    combined = [dict(zip(over or {}, values, strict=True)) for values in itertools.product(*(over or {}).values())]
    return run([(config, data)], which, combined, share_order=share_order, exact=exact, devices=devices)


def run(
    experiments: Sequence[tuple[Config, Dataset]],
    seeds: Sequence[int],
    settings: Sequence[dict[str, Any]],
    *,
    share_order: bool = False,
    exact: bool = False,
    devices: int | None = None,
    workdir: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    stop: threading.Event | None = None,
) -> Sweep:
    """``sweep`` of several experiments over given ``settings``, kept in ``workdir`` where there is one."""
    mesh = parallel.make_mesh(devices)
    members = plan(experiments, seeds, settings, share_order)
    kept = Kept(workdir, described(experiments, seeds, settings, share_order, exact, mesh), resume, overwrite)
    total = sum(member.config.train.length for member in members)
    done = sum(members[number].config.train.length for number in kept.results)
    progress = Progress(total, done, members[0].config.train.batch_size)
    try:
        for group in groups_of(members, share_order, exact):
            try:
                group.train(members, mesh, kept, progress, stop or threading.Event())
            finally:
                kept.save()
    finally:
        progress.close()
    return kept.finish(members)


# --- What is trained ------------------------------------------------------------------------------------------------


def plan(
    experiments: Sequence[tuple[Config, Dataset]],
    seeds: Sequence[int],
    settings: Sequence[dict[str, Any]],
    share_order: bool,
) -> list[Member]:
    """The members in order: by experiment, setting and seed. Raises UserError for a config that makes no sense."""
    members = []
    for (config, data), setting, seed in itertools.product(experiments, settings, seeds):
        if config.train.patience is not None or config.train.stop_accuracy is not None:
            raise UserError("members of a sweep do not stop early: set train.patience and train.stop_accuracy to None")
        for name, value in setting.items():
            if name in FIXED:
                raise UserError(f"{name} cannot be swept: it is given by the experiment and --seeds")
            before = fields.get(config, name)
            value = (value,) if isinstance(before, tuple) and not isinstance(value, tuple) else value
            config = fields.put(config, name, value, check=False)
        if share_order:
            config = fields.put(config, "data.order_seed", seeds[0], check=False)
        # Checked once all is in its place: some fields make sense together alone.
        config = order.resolve(replace(config, seed=seed), len(data.train.labels))
        members.append(Member(config, data, dict(setting)))
    if not members:
        raise UserError("there is nothing to train: give at least one seed and one value of each field")
    return members


def trains_alone(config: Config, share_order: bool) -> bool:
    """Whether members are trained faster one after another than vectorised.

    On CPU, CNNs are, and all where each has batches of its own. Steps a second of all members, as multiples of the
    single run's (two cores of a Xeon with AVX-512, JAX 0.10.2): `quickstart` × 8 one after another 1.0, vectorised
    0.22, for XLA makes one slow grouped convolution of them, and 0.49 or 0.31 with convolutions as products of shifted
    images or of patches; `cnn_experts` × 4 1.0 and 0.25. `softmax_beginners` × 128 with shared batches 4.2, vectorised;
    × 32 with its own 1.0 one after another, 1.2 vectorised, which is not to the bit. GPUs and TPUs have not been
    measured: there all are vectorised.
    """
    return jax.default_backend() == "cpu" and (isinstance(config.model, CNN) or not share_order)


@dataclass(frozen=True)
class Group:
    """Members that one program trains."""

    numbers: list[int]  # of the members
    names: tuple[str, ...]  # fields whose values differ between them
    alone: bool  # whether they are trained one after another
    share_order: bool

    def train(self, members: list[Member], mesh: Mesh, kept: "Kept", progress: Progress, stop: threading.Event) -> None:
        """Trains those that are not kept yet."""
        first = members[self.numbers[0]]
        train = program.place(first.data.train, mesh)
        compiled = self.compile(first, train, mesh)
        for start in range(0, len(self.numbers), compiled.size):
            numbers = self.numbers[start : start + compiled.size]
            if not set(numbers) <= kept.results.keys():
                block = Block(compiled, [members[number] for number in numbers], self.names)
                block.train(progress, stop)
                kept.add(numbers, block)

    def compile(self, first: Member, train: Split, mesh: Mesh) -> program.Members:
        """The program for as many members at once as the memory of a device holds."""
        each = 1 if self.alone else -(-len(self.numbers) // mesh.size)
        while True:
            compiled = program.Members(first.config, self.names, first.data, train, mesh, each, self.share_order)
            if each == 1 or compiled.bytes <= MEMORY_SHARE * memory(mesh):
                return compiled
            each = -(-each // 2)


def groups_of(members: list[Member], share_order: bool, exact: bool) -> list[Group]:
    """The members by the program that trains them."""
    groups: dict[str, Group] = {}
    for number, member in enumerate(members):
        alone = exact or trains_alone(member.config, share_order)
        names = () if alone else tuple(name for name in member.fields if TRACED.fullmatch(name))
        static = fields.flatten(fields.to_json(member.config))
        for name in ("seed", "data.order_seed", *names):
            del static[name]
        group = groups.setdefault(json.dumps(static), Group([], names, alone, share_order))
        group.numbers.append(number)
    return list(groups.values())


def memory(mesh: Mesh) -> float:
    """Bytes of a device of ``mesh``, or its part of the machine's. Not what is free, so that it is the same again."""
    counted = jax.local_devices()[0].memory_stats() or {}
    return counted.get("bytes_limit", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / mesh.size)


class Block:
    """Members that are trained at once, from the first step to the last."""

    def __init__(self, compiled: program.Members, members: list[Member], names: tuple[str, ...]):
        self.compiled, self.members = compiled, members
        # Places that are left over are filled with the last member.
        filled = [members[min(place, len(members) - 1)] for place in range(compiled.size)]
        self.configs = [member.config for member in filled]
        self.seeds = np.array([config.seed for config in self.configs], np.int32)
        self.values = np.array([[member.fields[name] for name in names] for member in filled], np.float32)
        self.values = self.values.reshape(compiled.size, len(names))
        self.state = compiled.create(self.seeds, self.values)
        self.curves: list[dict[str, list[Any]]] = [
            {"step": [], "validation": [], "loss": [], "accuracy": []} for _ in members
        ]
        self.failed: list[str | None] = [None] * len(members)
        self.seconds = 0.0  # of training

    def train(self, progress: Progress, stop: threading.Event) -> None:
        """Trains to the end. Raises Stopped after the chunk in which ``stop`` is set."""
        train, step, rate = self.configs[0].train, 0, 10.0
        while step < train.length:
            every = train.evaluate_every or train.length
            due = min(train.length, step - step % every + every)
            count = min(due - step, self.compiled.capacity, max(1, int(rate * CHUNK_SECONDS)))
            began = time.perf_counter()
            self.state, metrics = self.compiled(self.seeds, self.values, self.state, self.configs, step, count)
            self.report(step, count, jax.device_get(metrics.batch))
            seconds = time.perf_counter() - began
            self.seconds, step, rate = self.seconds + seconds, step + count, count / seconds
            progress.show(progress.step + count * len(self.members))
            if step == due:
                self.validate(step)
            if stop.is_set():
                raise Stopped("stopped; --resume goes on with the members that are not finished")

    def report(self, start: int, count: int, batch: Totals) -> None:
        """Takes down the losses of ``count`` steps from ``start`` on, and who diverged."""
        every = self.configs[0].train.log_every
        for place in range(len(self.members)):
            loss, correct, images = (np.asarray(part)[place, :count] for part in batch)
            for i in np.flatnonzero(~np.isfinite(loss))[:1]:
                self.fail(place, f"the loss at step {start + i} is {loss[i]}")
            for i in range(-start % every, count, every):
                self.note(place, start + i, False, loss[i] / images[i], correct[i] / images[i])

    def note(self, place: int, step: int, validation: bool, loss: float, accuracy: float) -> None:
        for name, value in (("step", step), ("validation", validation), ("loss", loss), ("accuracy", accuracy)):
            self.curves[place][name].append(value)

    def fail(self, place: int, reason: str) -> None:
        self.failed[place] = self.failed[place] or reason

    def validate(self, step: int) -> None:
        """Evaluates on the validation images, where there are such."""
        images = self.members[0].data.validation
        if images is not None:
            for place in range(len(self.members)):
                seen = evaluation.evaluate(self.member(place).model, *images)
                if not np.isfinite(seen.loss):
                    self.fail(place, f"the validation loss after step {step} is {seen.loss}")
                self.note(place, step, True, seen.loss, seen.accuracy)

    def member(self, place: int) -> TrainState:
        """The state of one member."""
        return jax.tree.map(lambda x: x[place], self.state)

    def finish(self, place: int) -> dict[str, Any]:
        """One member's line in result.json."""
        member, state, failed = self.members[place], self.member(place), self.failed[place]
        test = evaluation.evaluate(state.model, *member.data.test)
        if not np.isfinite(test.loss):
            failed = failed or f"the test loss is {test.loss}"
        curves = self.curves[place]
        validated = list(itertools.compress(curves["accuracy"], curves["validation"]))
        return {
            "experiment": member.config.name,
            "seed": member.config.seed,
            "fields": member.fields,
            "test_accuracy": None if failed else test.accuracy,
            "validation_accuracy": validated[-1] if validated and not failed else None,
            "test_loss": None if failed else test.loss,
            "params_sha256": results.params_sha256(state.params),
            "failed": failed,
        }


# --- What is kept ---------------------------------------------------------------------------------------------------


def described(
    experiments: Sequence[tuple[Config, Dataset]],
    seeds: Sequence[int],
    settings: Sequence[dict[str, Any]],
    share_order: bool,
    exact: bool,
    mesh: Mesh,
) -> dict[str, Any]:
    """What ``sweep.json`` holds: all that the results depend on."""
    return {
        "experiments": [fields.to_json(config) for config, _ in experiments],
        "data": [folders.describe_data(data) for _, data in experiments],
        "seeds": list(seeds),
        "settings": list(settings),
        "share_order": share_order,
        "exact": exact,
        "devices": folders.describe_devices(mesh, "jit"),
        "versions": folders.versions(),
    }


CONTENTS = {"sweep.json", "parts", "curves.npz", "result.json", "plots"}

# What a resumed sweep may run on.
MAY_DIFFER = {"devices", "versions"}

# The columns of curves, beside the number of the member.
COLUMNS = {"step": np.int32, "validation": np.bool_, "loss": np.float32, "accuracy": np.float32}


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
        self.seconds = self.unsaved_seconds = 0.0  # of training
        if folder is None:
            return
        try:
            self.begin(folder, described, resume, overwrite)
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror}; give another --workdir") from None
        for part in read_parts(folder):
            for number, line in zip(part["numbers"], part["results"], strict=True):
                self.results[int(number)] = json.loads(str(line))
                mine = part["curves.member"] == number
                self.curves[int(number)] = {name: part[f"curves.{name}"][mine].tolist() for name in COLUMNS}
            self.seconds += float(part["seconds"])
        if self.results:
            logger.info("going on with %d members finished", len(self.results))

    def begin(self, folder: Path, described: dict[str, Any], resume: bool, overwrite: bool) -> None:
        """Makes ``folder`` ready. Raises UserError where something else lies there."""
        folder.mkdir(parents=True, exist_ok=True)
        found = {path.name for path in folder.iterdir()}
        if found and not (resume or overwrite):
            raise UserError(
                f"{folder} is not empty: give --resume to go on there, --overwrite to begin anew, or another --workdir"
            )
        if found and not (found <= CONTENTS and "sweep.json" in found):
            raise UserError(f"{folder} is not the folder of a sweep: give another --workdir")
        if overwrite:
            for name in found:
                shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
        elif found:
            before = folders.read_json(folder / "sweep.json")
            told = json.loads(json.dumps(described))
            changed = [name for name in told.keys() - MAY_DIFFER if before.get(name) != told[name]]
            if changed:
                raise UserError(
                    f"{folder} was begun with other {', '.join(changed)}: give the same, or another --workdir"
                )
        (folder / "parts").mkdir(exist_ok=True)
        write_json(folder / "sweep.json", described)

    def add(self, numbers: list[int], block: "Block") -> None:
        """The members of a finished block; they are saved if the last time is a while ago."""
        for place, number in enumerate(numbers):
            self.results[number], self.curves[number] = block.finish(place), block.curves[place]
            self.unsaved[number] = jax.device_get(block.member(place).weights)
        self.seconds += block.seconds
        self.unsaved_seconds += block.seconds
        if time.monotonic() - self.saved_at > KEEP_SECONDS:
            self.save()

    def save(self) -> None:
        """Writes what is not written yet, all of one shape, as one part."""
        self.saved_at = time.monotonic()
        numbers = list(self.unsaved)
        if numbers and self.folder is not None:
            part: dict[str, np.ndarray] = {
                "numbers": np.array(numbers),
                "results": np.array([json.dumps(self.results[number]) for number in numbers]),
                "seconds": np.array(self.unsaved_seconds),
            }
            part |= {f"curves.{name}": column for name, column in self.columns(numbers).items()}
            stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *self.unsaved.values())
            for path, leaf in jax.tree_util.tree_leaves_with_path(stacked):
                part[f"weights.{jax.tree_util.keystr(path, simple=True, separator='.')}"] = leaf
            write_arrays(self.folder / f"parts/{numbers[0]:05d}.npz", part)
        self.unsaved, self.unsaved_seconds = {}, 0.0

    def columns(self, numbers: Sequence[int]) -> dict[str, np.ndarray]:
        """The curves of members, one under the other."""
        lengths = [len(self.curves[number]["step"]) for number in numbers]
        columns = {"member": np.repeat(numbers, lengths)}
        for name, kind in COLUMNS.items():
            columns[name] = np.array([x for number in numbers for x in self.curves[number][name]], kind)
        return columns

    def finish(self, members: Sequence[Member]) -> Sweep:
        """All results together, written once all members are finished."""
        lines = [self.results[number] for number in range(len(members))]
        steps = sum(member.config.train.length for member in members)
        settings = self.described["settings"]
        result = {
            "experiments": [config["name"] for config in self.described["experiments"]],
            "seeds": self.described["seeds"],
            "over": {name: list(dict.fromkeys(each[name] for each in settings)) for name in settings[0]},
            "members": lines,
            **summaries(lines),
            "replica_steps_per_second": steps / self.seconds,
        }
        curves = self.columns(range(len(members)))
        if len({line["params_sha256"] for line in lines}) < len(lines):
            logger.warning("some members ended with the same parameters: nothing in them depends on what was varied")
        if self.folder is not None:
            write_arrays(self.folder / "curves.npz", curves)
            write_json(self.folder / "result.json", result)
        return Sweep(result, curves)


def summaries(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The settings of a sweep, the best of them, and the others' differences from it.

    Settings are told apart by validation accuracy. Where some have no validation images, they are told apart by test
    accuracy, none is chosen, and the differences are those from the first.
    """
    finished = [line for line in lines if line["failed"] is None]
    split = "test" if any(line["validation_accuracy"] is None for line in finished) else "validation"
    settings: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        settings.setdefault(json.dumps([line["experiment"], line["fields"]]), []).append(line)
    groups, accuracies = [], []
    for mine in settings.values():
        good = {line["seed"]: line[f"{split}_accuracy"] for line in mine if line["failed"] is None}
        about = {"experiment": mine[0]["experiment"], "fields": mine[0]["fields"], "split": split}
        groups.append(about | {"failed": len(mine) - len(good)} | statistics.summarise(list(good.values())))
        accuracies.append(good)
    whole = [number for number, group in enumerate(groups) if group["failed"] == 0]
    best, first = None, 0
    if whole and (split == "validation" or len(groups) == 1):
        first = max(whole, key=lambda number: groups[number]["mean"])
        tests = [line["test_accuracy"] for line in list(settings.values())[first]]
        best = {name: groups[first][name] for name in ("experiment", "fields")} | {"test": statistics.summarise(tests)}
    comparisons = [
        {"experiment": group["experiment"], "fields": group["fields"], "reference": title(groups[first])}
        | statistics.compare(accuracies[first], theirs)
        for number, (group, theirs) in enumerate(zip(groups, accuracies, strict=True))
        if number != first and accuracies[first].keys() & theirs.keys()
    ]
    return {"groups": groups, "best": best, "comparisons": comparisons}


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


def title(line: dict[str, Any]) -> str:
    """A setting by name."""
    return " ".join([line["experiment"], *(f"{name}={value}" for name, value in line["fields"].items())])


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes ``arrays`` to ``path`` at once."""
    beside = path.with_name(path.name + ".tmp")
    with beside.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def read_parts(folder: Path) -> Iterator[dict[str, np.ndarray]]:
    """The parts of a sweep in ``folder``. Raises UserError where one is damaged."""
    for path in sorted(folder.glob("parts/*.npz")):
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                yield dict(arrays)
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is damaged ({error}): remove it, and --resume trains its members again") from None


def load_members(folder: Path) -> list[tuple[dict[str, Any], nnx.Module]]:
    """Each finished member of the sweep in ``folder``: its line in result.json and its model, in order."""
    about = folders.read_json(folder / "sweep.json")
    shells, found = {}, {}
    for config, data in zip(about["experiments"], about["data"], strict=True):
        shells[config["name"]] = fields.from_json(config, Config), data
    for part in read_parts(folder):
        for place, (number, text) in enumerate(zip(part["numbers"], part["results"], strict=True)):
            line = json.loads(str(text))
            config, data = shells[line["experiment"]]
            for name, value in line["fields"].items():
                config = fields.put(config, name, tuple(value) if isinstance(value, list) else value)
            # How long it was trained is no part of a model.
            config = fields.put(config, "train", replace(config.train, steps=1, epochs=None))
            create = partial(steps.create_state, config, tuple(data["shape"]), data["classes"])
            state = jax.eval_shape(create)
            leaves, tree = jax.tree_util.tree_flatten_with_path(state.params)
            names = (jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves)
            weights = jax.tree.unflatten(tree, [part[f"weights.{name}"][place] for name in names])
            found[int(number)] = line, nnx.merge(state.graphdef, jax.tree.map(jax.numpy.asarray, weights))
    return [found[number] for number in sorted(found)]
