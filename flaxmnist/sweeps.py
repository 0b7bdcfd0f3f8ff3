"""Many runs at once: seeds × settings, trained as few programs, with what they say together.

A setting is an experiment and the values of the fields that are swept. Where members are vectorised, settings that
differ only in the values of fields that change no shape share a program; one after another, each has its own, so that
a member is its single run to the bit.
"""

import itertools
import json
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from flaxmnist import evaluation, fields, folders, order, parallel, program, results
from flaxmnist.config import CNN, Config
from flaxmnist.data import Dataset, Split
from flaxmnist.errors import Stopped, UserError
from flaxmnist.logs import Progress, plain
from flaxmnist.parts import Kept, Sweep
from flaxmnist.state import Metrics, TrainState, row_before

# Fields whose values may differ between the members of one program.
TRACED = re.compile(
    r"optimizer\.(learning_rate|momentum|b1|b2|weight_decay)|model\.dropout|objective\.label_smoothing"
    r"|model\.(kernel|bias)_init\.\w+"
)

# Fields that say what is swept, and over which images.
FIXED = {"name", "seed", "data.name", "data.validation", "data.order_seed"}

# Seconds that a chunk takes at most, about.
CHUNK_SECONDS = 1.0

# Runs in one sweep.
MOST_MEMBERS = 100_000

# The share of a device's memory that members take.
MEMORY_SHARE = 0.5


@dataclass(frozen=True)
class Member:
    """One run of a sweep."""

    config: Config  # its length in steps
    data: Dataset
    fields: dict[str, Any]  # the swept ones, by their dotted names


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
    which = range(seeds) if isinstance(seeds, int) else list(seeds)
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
    names = [config.name for config, _ in experiments]
    if len(set(names)) < len(names):
        raise UserError(f"experiments of a sweep need names of their own, but these are {', '.join(names)}")
    mesh = parallel.make_mesh(devices)
    members = plan(experiments, seeds, settings, share_order)
    kept = Kept(workdir, described(experiments, seeds, settings, share_order, exact, mesh), resume, overwrite)
    total = sum(member.config.train.length for member in members)
    done = sum(members[number].config.train.length for number in kept.results)
    progress = Progress(total, done, members[0].config.train.batch_size)
    try:
        try:
            with parallel.memory_errors():
                for group in groups_of(members, share_order, exact):
                    group.train(members, mesh, kept, progress, stop or threading.Event())
        finally:
            kept.settle()
        return kept.finish(total)
    finally:
        progress.close()
        kept.lock.release()


# --- What is trained ------------------------------------------------------------------------------------------------


def plan(
    experiments: Sequence[tuple[Config, Dataset]],
    seeds: Sequence[int],
    settings: Sequence[dict[str, Any]],
    share_order: bool,
) -> list[Member]:
    """The members in order: by experiment, setting and seed. Raises UserError for a config that makes no sense."""
    if len(experiments) * len(settings) * len(seeds) > MOST_MEMBERS:
        raise UserError(f"a sweep has at most {MOST_MEMBERS:,} members: give fewer seeds, values or experiments")
    members = []
    for (config, data), setting, seed in itertools.product(experiments, settings, seeds):
        if config.train.patience is not None or config.train.stop_accuracy is not None:
            raise UserError("members of a sweep do not stop early: set train.patience and train.stop_accuracy to None")
        for name, value in setting.items():
            if name in FIXED:
                raise UserError(f"{name} cannot be swept: it is given by the experiment and --seeds")
            fields.get(config, name)  # raises where there is no such field
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

    def train(self, members: list[Member], mesh: Mesh, kept: Kept, progress: Progress, stop: threading.Event) -> None:
        """Trains those that are not kept yet."""
        if set(self.numbers) <= kept.results.keys():
            return
        first = members[self.numbers[0]]
        train = program.place(first.data.train, mesh)
        compiled = self.compile(first, train, mesh)
        try:
            for start in range(0, len(self.numbers), compiled.size):
                numbers = self.numbers[start : start + compiled.size]
                if not set(numbers) <= kept.results.keys():
                    block = Block(compiled, [members[number] for number in numbers], self.names)
                    block.go_on(kept.unfinished(numbers))
                    block.train(progress, stop, partial(kept.save_unfinished, numbers))
                    for place, number in enumerate(numbers):
                        kept.add(number, block.finish(place), block.curves[place], block.member(place).weights)
                    kept.spend(block.seconds)
        finally:
            kept.save()

    def compile(self, first: Member, train: Split, mesh: Mesh) -> program.Members:
        """The program for as many members at once as the memory of a device holds."""
        each = 1 if self.alone else -(-len(self.numbers) // mesh.size)
        while True:
            compiled = program.Members(first.config, self.names, first.data, train, mesh, each, self.share_order)
            if each == 1 or compiled.bytes <= MEMORY_SHARE * parallel.memory(mesh):
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
        self.skipped: list[list[int]] = [[] for _ in members]  # steps whose loss or gradient was not finite
        self.step, self.seconds = 0, 0.0  # of training

    def train(
        self,
        progress: Progress,
        stop: threading.Event,
        save: Callable[[Callable[[], dict[str, np.ndarray]], bool], None],
    ) -> None:
        """Trains to the end. Raises Stopped after the chunk in which ``stop`` is set.

        ``save`` is told after every chunk what can be gone on from, and whether now is the last time.
        """
        train, rate = self.configs[0].train, 10.0
        progress.show(progress.step + self.step * len(self.members))
        while self.step < train.length:
            every = train.evaluate_every or train.length
            due = min(train.length, self.step - self.step % every + every)
            count = min(due - self.step, self.compiled.capacity, max(1, int(rate * CHUNK_SECONDS)))
            began = time.perf_counter()
            self.state, metrics = self.compiled(self.seeds, self.values, self.state, self.configs, self.step, count)
            self.report(self.step, count, jax.device_get(metrics))
            seconds = time.perf_counter() - began
            self.seconds, self.step, rate = self.seconds + seconds, self.step + count, count / seconds
            progress.show(progress.step + count * len(self.members))
            if self.step == due:
                self.validate(self.step)
            save(self.arrays, stop.is_set())
            if stop.is_set():
                raise Stopped("stopped; --resume goes on")

    def arrays(self) -> dict[str, np.ndarray]:
        """What it takes to go on from here."""
        told = {"step": self.step, "seconds": self.seconds, "failed": self.failed, "skipped": self.skipped}
        curves = [{name: [plain(x) for x in column] for name, column in each.items()} for each in self.curves]
        leaves = {f"leaf.{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(self.state))}
        return {"told": np.array(json.dumps(told | {"curves": curves})), **leaves}

    def go_on(self, arrays: dict[str, np.ndarray] | None) -> None:
        """Goes on from what ``arrays`` gave, if it fits: on other devices, other members may be trained at once."""
        leaves, tree = jax.tree.flatten(self.state)
        if arrays is None or any(
            f"leaf.{i}" not in arrays or arrays[f"leaf.{i}"].shape != leaf.shape for i, leaf in enumerate(leaves)
        ):
            return
        placed = [jax.device_put(arrays[f"leaf.{i}"], leaf.sharding) for i, leaf in enumerate(leaves)]
        self.state = jax.tree.unflatten(tree, placed)
        told = json.loads(str(arrays["told"]))
        self.step, self.seconds, self.curves = told["step"], told["seconds"], told["curves"]
        self.failed, self.skipped = told["failed"], told["skipped"]

    def report(self, start: int, count: int, metrics: Metrics) -> None:
        """Takes down the losses of ``count`` steps from ``start`` on, and who diverged."""
        train = self.configs[0].train
        for place, skipped in enumerate(self.skipped):
            mine: Metrics = jax.tree.map(lambda values, place=place: np.asarray(values)[place], metrics)
            for step, reason in mine.nonfinite(start, count).items():
                if self.failed[place] is None and row_before(step, skipped) >= train.skip_nonfinite:
                    self.fail(place, reason)
                elif self.failed[place] is None:
                    skipped.append(step)
            loss, correct, images = mine.batch
            for i in range(-start % train.log_every, count, train.log_every):
                self.note(place, start + i, False, loss[i] / images[i], correct[i] / images[i])

    def note(self, place: int, step: int, validation: bool, loss: Any, accuracy: Any) -> None:
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
