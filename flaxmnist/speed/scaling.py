"""Scaling of an experiment over devices: speed, and the bytes that devices exchange.

Strong scaling splits one batch among the devices; weak scaling gives each device a full batch.
"""

import math
import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import get_args

import jax

from flaxmnist.devices import parallel, program
from flaxmnist.speed import benchmarks
from flaxmnist.sweeps.plan import Experiment

# In XLA's text: the result types of a collective operation, and the bits and shape of an array type.
COLLECTIVE = re.compile(r"= (.+?) (?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
ARRAY = re.compile(r"[a-z](\d+)\[([\d,]*)\]")

KINDS = ("strong", "weak")


def exchanged_bytes(compiled: program.Program | program.TrialProgram) -> int:
    """Return the bytes that the collective operations of one step produce."""
    text = compiled.compiled.as_text() or ""
    arrays = (array for types in COLLECTIVE.findall(text) for array in ARRAY.findall(types))
    return sum(int(bits) // 8 * math.prod(int(side) for side in shape.split(",") if side) for bits, shape in arrays)


def measure(experiment: Experiment) -> list[benchmarks.Row]:
    """Return a row per backend and number of devices (1, 2, 4, …). The batch size is rounded to divide by them all."""
    config = experiment.config
    counts, trainers = [2**i for i in range(jax.device_count().bit_length())], {}
    size = max(1, round(config.train.batch_size / counts[-1])) * counts[-1]
    cases = list(product(get_args(program.Backend), counts))
    sizes = {(kind, *case): size * (case[1] if kind == "weak" else 1) for case in cases for kind in KINDS}
    for (kind, backend, count), batch_size in sizes.items():
        resized = replace(config, train=replace(config.train, batch_size=batch_size))
        mesh = parallel.make_mesh(count)
        trainers[kind, backend, count] = benchmarks.Trainer(experiment._replace(config=resized), mesh, backend)
    speeds = benchmarks.compare_speeds({key: trainer.run for key, trainer in trainers.items()})
    images, rows = {key: sizes[key] * speed for key, speed in speeds.items()}, []
    for backend, count in cases:
        trainer = trainers["strong", backend, count]
        row = {"name": config.name, "backend": backend, "devices": count, "batch_size": size}
        row["exchanged_bytes"] = exchanged_bytes(trainer.compiled)
        row["model_bytes"] = sum(leaf.nbytes for leaf in jax.tree.leaves(trainer.state.params))
        for kind in KINDS:
            speed, one_device = images[kind, backend, count], images[kind, backend, 1]
            row[kind] = {"images_per_second": benchmarks.median(speed), "ratio": benchmarks.median(speed / one_device)}
        rows.append(row)
    return rows


def run(file: Path, data_dir: Path | None) -> list[benchmarks.Row]:
    return measure(benchmarks.load(file, data_dir))


def report(rows: list[benchmarks.Row]) -> str:
    """Return the rows as a table, with sizes in bytes."""
    header = "experiment, backend, devices, strong images/s, × one, weak images/s, × one, exchanged, model"
    cells = "{name} {backend} {devices} {strong[images_per_second]:,.0f} {strong[ratio]:.2f} "
    cells += "{weak[images_per_second]:,.0f} {weak[ratio]:.2f} {exchanged_bytes:,} {model_bytes:,}"
    return benchmarks.format_results(header, cells, rows)
