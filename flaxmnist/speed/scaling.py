"""Scaling of an experiment over devices: speed, and the bytes that devices exchange.

Strong scaling splits one batch among the devices; weak scaling gives each device a full batch.
"""

import math
import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, get_args

import jax

from flaxmnist.config import Config
from flaxmnist.data.sets import Dataset
from flaxmnist.devices import parallel, program
from flaxmnist.speed import benchmarks

# In XLA's text: the result types of a collective operation, and the bits and shape of an array type.
COLLECTIVE = re.compile(r"= (.+?) (?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
ARRAY = re.compile(r"[a-z](\d+)\[([\d,]*)\]")


def exchanged_bytes(compiled: program.Program | program.TrialProgram) -> int:
    """Return the bytes that the collective operations of one step produce."""
    text = compiled.compiled.as_text() or ""
    arrays = (array for types in COLLECTIVE.findall(text) for array in ARRAY.findall(types))
    return sum(int(bits) // 8 * math.prod(int(side) for side in shape.split(",") if side) for bits, shape in arrays)


def measure(config: Config, data: Dataset) -> list[dict[str, Any]]:
    """Return a row per backend and number of devices (1, 2, 4, …). The batch size is rounded to divide by them all."""
    counts, trainers, rows = [2**i for i in range(jax.device_count().bit_length())], {}, []
    size = max(1, round(config.train.batch_size / counts[-1])) * counts[-1]
    for backend, count in product(get_args(program.Backend), counts):
        for kind, batch_size in (("strong", size), ("weak", count * size)):
            resized = replace(config, train=replace(config.train, batch_size=batch_size))
            trainers[kind, backend, count] = benchmarks.Trainer(resized, data, parallel.make_mesh(count), backend)
    speeds = benchmarks.compare_speeds({key: trainer.run for key, trainer in trainers.items()})
    for backend, count in product(get_args(program.Backend), counts):
        strong = trainers["strong", backend, count]
        row = {"name": config.name, "backend": backend, "devices": count, "batch_size": size}
        row["exchanged_bytes"] = exchanged_bytes(strong.compiled)
        row["model_bytes"] = sum(leaf.nbytes for leaf in jax.tree.leaves(strong.state.params))
        for kind, batch_size in (("strong", size), ("weak", count * size)):
            images, one_device = batch_size * speeds[kind, backend, count], size * speeds[kind, backend, 1]
            ratio = benchmarks.median(images / one_device)
            row[kind] = {"images_per_second": benchmarks.median(images), "ratio": ratio}
        rows.append(row)
    return rows


def run(experiment: Path, data_dir: Path | None) -> list[dict[str, Any]]:
    return measure(*benchmarks.load(experiment, data_dir))


def report(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table, with sizes in bytes."""
    header = "experiment, backend, devices, strong images/s, × one, weak images/s, × one, exchanged, model"
    cells = "{name} {backend} {devices} {strong[images_per_second]:,.0f} {strong[ratio]:.2f} "
    cells += "{weak[images_per_second]:,.0f} {weak[ratio]:.2f} {exchanged_bytes:,} {model_bytes:,}"
    return benchmarks.format_results(header, cells, rows)
