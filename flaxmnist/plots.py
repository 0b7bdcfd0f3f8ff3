"""Pictures, each a function that returns a matplotlib figure."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flaxmnist.logs import logger
from flaxmnist.parts import Sweep
from flaxmnist.statistics import summarise

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figure(width: float = 7, height: float = 4.5):
    """An empty figure and its axes. Not by pyplot, so that nothing is shown, or left behind."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(width, height), layout="constrained")
    return drawn, drawn.add_subplot()


def name_of(experiment: str, fields: dict) -> str:
    """A setting in few words: the last part of each field's name, or the experiment's."""
    return ", ".join(f"{name.rpartition('.')[2]} {value}" for name, value in fields.items()) or experiment


def by_setting(sweep: Sweep) -> dict[str, list[int]]:
    """The members of each setting that did not fail, by the setting's name."""
    several = len(sweep.result["experiments"]) > 1
    settings: dict[str, list[int]] = {}
    for number, line in enumerate(sweep.members):
        words = name_of(line["experiment"], line["fields"])
        name = f"{line['experiment']}: {words}" if several and line["fields"] else words
        settings.setdefault(name, [])
        if line["failed"] is None:
            settings[name].append(number)
    return settings


def curves(sweep: Sweep) -> "Figure":
    """Accuracy against the step, mean and standard deviation over seeds: on validation images, else of training."""
    drawn, axes = figure()
    columns = sweep.curves
    # One evaluation is no curve.
    validated = len(np.unique(columns["step"][columns["validation"]])) > 1
    for name, members in by_setting(sweep).items():
        if not members:
            continue
        chosen = (columns["validation"] == validated) & np.isin(columns["member"], members)
        steps = np.unique(columns["step"][chosen])
        rows = [columns["accuracy"][chosen & (columns["step"] == step)] for step in steps]
        mean, std = (100 * np.array([summarise(row)[part] or 0 for row in rows]) for part in ("mean", "std"))
        (line,) = axes.plot(steps, mean, label=f"{name} (n = {len(members)})", marker="." if len(steps) < 30 else None)
        axes.fill_between(steps, mean - std, mean + std, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set_xlabel("step")
    axes.set_ylabel(f"{'validation' if validated else 'training'} accuracy (%), mean ± std")
    axes.legend(fontsize=8)
    return drawn


def against(sweep: Sweep, field: str) -> "Figure":
    """Accuracy of each member, and their means, against the values of a numeric ``field``."""
    drawn, axes = figure()
    split = sweep.groups[0]["split"]
    lines = [line for line in sweep.members if line["failed"] is None]
    for experiment in sweep.result["experiments"]:
        mine = [line for line in lines if line["experiment"] == experiment]
        x = np.array([line["fields"][field] for line in mine])
        y = 100 * np.array([line[f"{split}_accuracy"] for line in mine])
        values = np.unique(x)
        (line,) = axes.plot(values, [y[x == value].mean() for value in values], label=f"{experiment}, mean of seeds")
        axes.scatter(x, y, s=12, alpha=0.4, linewidth=0, color=line.get_color())
    positive = [value for value in sweep.result["over"][field] if value > 0]
    if len(positive) == len(sweep.result["over"][field]) and max(positive) / min(positive) >= 10:
        axes.set_xscale("log")
    if len(sweep.result["over"][field]) <= 10:
        axes.set_xticks(sweep.result["over"][field], [f"{value:g}" for value in sweep.result["over"][field]])
        axes.minorticks_off()
    axes.set_xlabel(field)
    axes.set_ylabel(f"{split} accuracy (%)")
    axes.legend(fontsize=8)
    return drawn


def distribution(sweep: Sweep) -> "Figure":
    """Accuracy of each seed, by setting: every run a point, a box from quartile to quartile."""
    settings = {name: members for name, members in by_setting(sweep).items() if members}
    drawn, axes = figure(height=1.5 + 0.35 * len(settings))
    split = sweep.groups[0]["split"]
    rows = [[100 * sweep.members[number][f"{split}_accuracy"] for number in members] for members in settings.values()]
    axes.boxplot(rows, orientation="horizontal", showfliers=False, widths=0.6)
    scatter = np.random.default_rng(0)
    for place, row in enumerate(rows, start=1):
        axes.scatter(row, place + scatter.uniform(-0.2, 0.2, len(row)), s=10, alpha=0.5, linewidth=0)
    axes.set_yticks(
        range(1, len(rows) + 1), [f"{name} (n = {len(row)})" for name, row in zip(settings, rows, strict=True)]
    )
    axes.invert_yaxis()
    axes.set_xlabel(f"{split} accuracy (%)")
    return drawn


def save_sweep(sweep: Sweep, folder: Path) -> None:
    """Draws all that applies to a sweep into ``folder``."""
    folder.mkdir(exist_ok=True)
    numeric = [
        field
        for field, values in sweep.result["over"].items()
        if len(values) > 1 and all(isinstance(value, int | float) for value in values)
    ]
    if all(line["failed"] is not None for line in sweep.members):
        logger.warning("all members failed: there is nothing to draw")
        return
    curves(sweep).savefig(folder / "curves.png", dpi=150)
    distribution(sweep).savefig(folder / "distribution.png", dpi=150)
    for field in numeric:
        against(sweep, field).savefig(folder / f"{field}.png", dpi=150)
