"""What an experiment gains from more devices, and what these tell each other.

Strong scaling shares one batch out among the devices; weak scaling gives each of them a whole one.
"""

import itertools
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np

from flaxmnist import inspection, order, parallel, program
from flaxmnist.benchmarks import Trainer, race
from flaxmnist.config import Config, load_experiment
from flaxmnist.data import Dataset, load_data

# An operation by which devices exchange arrays, in XLA's text: its result's types, its name.
COLLECTIVE = re.compile(r"= (.+?) (?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
ARRAY = re.compile(r"[a-z](\d+)\[([\d,]*)\]")


def exchanged_bytes(compiled: program.Program) -> int:
    """Bytes that come out of the exchanges between devices in one step."""
    text = compiled.compiled.as_text() or ""
    arrays = [each for types in COLLECTIVE.findall(text) for each in ARRAY.findall(types)]
    return sum(int(bits) // 8 * math.prod(int(side) for side in sides.split(",") if side) for bits, sides in arrays)


def resized(config: Config, batch_size: int) -> Config:
    """``config`` with another batch size."""
    return replace(config, train=replace(config.train, batch_size=batch_size))


def measure(config: Config, data: Dataset) -> list[dict[str, Any]]:
    """Speeds on 1, 2, 4, … devices by each backend, all raced in turns.

    The batch is that of ``config``, rounded to what divides by the most devices.
    """
    counts = [2**i for i in range(jax.device_count().bit_length())]
    config = order.resolve(config, len(data.train.labels))
    config = resized(config, max(1, round(config.train.batch_size / counts[-1])) * counts[-1])
    size, trainers, rows = config.train.batch_size, {}, []
    params = program.state_shapes(config, data).params
    for backend, count in itertools.product(get_args(program.Backend), counts):
        strong, weak = (
            Trainer(resized(config, batch), data, parallel.make_mesh(count), backend) for batch in (size, count * size)
        )
        trainers |= {f"strong {backend} {count}": strong.run, f"weak {backend} {count}": weak.run}
        rows.append(
            {
                "name": config.name,
                "backend": backend,
                "devices": count,
                "batch_size": size,
                "exchanged_bytes": exchanged_bytes(strong.compiled),
                "model_bytes": sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(params)),
            }
        )
    speeds = {name: np.array(each) for name, each in race(trainers).items()}
    for row in rows:
        backend, count = row["backend"], row["devices"]
        for kind, batches in (("strong", 1), ("weak", count)):
            images = speeds[f"{kind} {backend} {count}"] * batches * size
            one = speeds[f"{kind} {backend} 1"] * size
            row[kind] = {"images_per_second": float(np.median(images)), "ratio": float(np.median(images / one))}
    return rows


def run(experiment: Path, data_dir: Path | None) -> list[dict[str, Any]]:
    """``measure`` of an experiment file."""
    config = load_experiment(experiment)
    return measure(config, load_data(config.data, data_dir))


def report(rows: list[dict[str, Any]]) -> str:
    """The rows as a table; sizes in bytes."""
    cells: list[tuple[str, ...]] = [
        ("experiment", "backend", "devices", "strong images/s", "× one", "weak images/s", "× one", "exchanged", "model")
    ]
    for row in rows:
        speeds = (cell for kind in ("strong", "weak") for cell in (row[kind]["images_per_second"], row[kind]["ratio"]))
        sizes = (f"{row[name]:,}" for name in ("exchanged_bytes", "model_bytes"))
        strong, strong_ratio, weak, weak_ratio = speeds
        cells.append(
            (
                row["name"],
                row["backend"],
                str(row["devices"]),
                f"{strong:,.0f}",
                f"{strong_ratio:.2f}",
                f"{weak:,.0f}",
                f"{weak_ratio:.2f}",
                *sizes,
            )
        )
    return inspection.table(cells)
