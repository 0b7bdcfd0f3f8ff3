"""Plots of training and of sweeps: each function returns a matplotlib figure."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from flaxmnist.errors import UserError
from flaxmnist.show.canvas import (
    COLOURS,
    MARKERS,
    SEQUENTIAL_CMAP,
    add_legend,
    figure,
    plot,
    shorten,
)
from flaxmnist.store.load import Recorded
from flaxmnist.sweeps.results import Sweep
from flaxmnist.sweeps.statistics import summarise, wilson

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Values of a training record that other plots show.
NOT_EXTRA = {"step", "epoch", "split", "loss", "accuracy"}

# --- Runs -----------------------------------------------------------------------------------------------------------


def history_columns(run: Recorded, split: str, *names: str) -> list[np.ndarray]:
    """Return one array per name, with the values in the run's records of ``split``."""
    records = [record for record in run.history if record["split"] == split]
    return [np.array([record[name] for record in records], float) for name in names]


def batch_costs(run: Recorded) -> "Figure":
    """Draw the cost of every recorded batch against its position in the epoch, one curve per epoch.

    Raise UserError if fewer than two batches were recorded.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    step, cost = history_columns(run, "train", "step", "loss")
    if len(step) < 2:
        raise UserError("fewer than two batches were recorded: use a smaller train.log_every")
    label = f"batch within the epoch ({run.config.train.batch_size} images per batch)"
    fig, axes = plot(xlabel=label, ylabel="cost (nats per image)")
    epoch, batch = np.divmod(step, run.epoch_length)
    epochs, sizes = np.unique(epoch, return_counts=True)
    count = len(epochs)
    colours = colormaps[SEQUENTIAL_CMAP](np.linspace(0.15, 1, count)) if count > 1 else [COLOURS[0]]
    marker = "." if max(sizes) < 30 else None
    for number, colour in zip(epochs, colours, strict=True):
        style = {"label": f"epoch {int(number) + 1}", "color": colour, "linewidth": 0.8, "marker": marker}
        axes.plot(batch[epoch == number], cost[epoch == number], "-", **style)
    if count > 1:
        bounds = BoundaryNorm([*(epochs + 0.5), epochs[-1] + 1.5], count)
        bar = fig.colorbar(ScalarMappable(bounds, ListedColormap(colours)), ax=axes, label="epoch")
        ticks = np.unique(np.linspace(0, count - 1, min(count, 8)).astype(int))
        bar.set_ticks([float(epoch) + 1 for epoch in epochs[ticks]])
        bar.minorticks_off()
    if cost.min() > 0 and cost.max() / cost.min() > 10:
        axes.set_yscale("log")
    return fig


def history(runs: Recorded | Mapping[str, Recorded]) -> "Figure":
    """Draw training and validation cost and accuracy against the epoch, of one run or of several by name."""
    runs_by_name = runs if isinstance(runs, Mapping) else {"": runs}
    fig = figure(7, 6.5)
    top, bottom = fig.subplots(2, sharex=True)
    for number, (name, run) in enumerate(runs_by_name.items()):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number // len(COLOURS) % len(MARKERS)]
        validation = history_columns(run, "validation", "step", "loss", "accuracy")
        for split, (step, loss, accuracy), linestyle, line_colour, fill in (
            ("training", training_curve(run), "-", colour, colour),
            ("validation", validation, "--", colour if name else COLOURS[1], "white"),
        ):
            label = f"{shorten(name)}, {split}" if name else split
            style = {"label": label, "linestyle": linestyle, "color": line_colour, "marker": marker, "markersize": 4}
            style |= {"markerfacecolor": fill, "markevery": max(1, len(step) // 20)}
            if len(step):
                top.plot(step / run.epoch_length, loss, **style)
                bottom.plot(step / run.epoch_length, 100 * accuracy, **style)
    for axes, label in ((top, "cost (nats per image)"), (bottom, "accuracy (%)")):
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    bottom.set_xlabel("epoch")
    bottom.locator_params("x", integer=True, min_n_ticks=4)  # fractions only if there are few epochs
    fig.legend(*top.get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=8)
    return fig


def training_curve(run: Recorded) -> list[np.ndarray]:
    """Return step, cost and accuracy: means over epochs or, if there are fewer than three, over 1/50 of the run."""
    columns = history_columns(run, "epoch", "step", "loss", "accuracy")
    if len(columns[0]) >= 3:
        return columns
    columns = history_columns(run, "train", "step", "loss", "accuracy")
    return [np.array([chunk.mean() for chunk in np.array_split(column, 50) if len(chunk)]) for column in columns]


def step_metrics(run: Recorded) -> "Figure":
    """Draw all other metrics of the recorded steps against the step, such as gradient norm and learning rate.

    Metrics with the same prefix, as in "norm/first" and "norm/last", share axes. Raise UserError if there are none.
    """
    records = [record for record in run.history if record["split"] == "train"]
    names = dict.fromkeys(name for record in records for name in record if name not in NOT_EXTRA)
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.partition("/")[0], []).append(name)
    if not groups:
        raise UserError("no metrics of steps were recorded: use a smaller train.log_every")
    fig = figure(7, 0.6 + 1.7 * len(groups))
    rows = fig.subplots(len(groups), sharex=True, squeeze=False)[:, 0]
    for axes, (group, members) in zip(rows, groups.items(), strict=True):
        for name in members:
            points = [(record["step"], record[name]) for record in records if name in record]
            marker = "." if len(points) < 30 else None
            axes.plot(*zip(*points, strict=True), label=name.partition("/")[2] or "all", linewidth=0.8, marker=marker)
        axes.set_ylabel(group.replace("_", " "))
        axes.grid(alpha=0.3)
        if len(members) > 1:
            axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    rows[-1].set_xlabel("step")
    return fig


def accuracies(runs: Mapping[str, Recorded]) -> "Figure":
    """Draw the test accuracy of each finished run, with the 95 % interval for its number of images (Wilson 1927)."""
    finished = {name: run.result for name, run in runs.items() if run.result}
    fig, axes = plot(7, 1.2 + 0.35 * len(finished), xlabel="test accuracy (%), 95 % interval", ylabel="run")
    for y, result in enumerate(finished.values()):
        low, high = wilson(result.test_accuracy, result.test_count)
        axes.hlines(y, 100 * low, 100 * high, color=COLOURS[0])
        axes.plot(100 * result.test_accuracy, y, "o", color=COLOURS[0])
    axes.set_yticks(range(len(finished)), list(map(shorten, finished)))
    axes.set_ylim(len(finished) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    return fig


# --- Sweeps ---------------------------------------------------------------------------------------------------------


def trials_by_setting(sweep: Sweep) -> dict[str, list[int]]:
    """Return the indices of the trials that did not fail, by setting; a setting is named by the fields that vary."""
    several = len(sweep.result.experiments) > 1
    varied = [field for field, values in sweep.result.over.items() if len(values) > 1]
    settings: dict[str, list[int]] = {}
    for index, trial in enumerate(sweep.members):
        if trial.failed is None:
            words = ", ".join(f"{field.rpartition('.')[2]} {trial.fields[field]}" for field in varied)
            name = f"{trial.experiment}: {words}" if several and words else words or trial.experiment
            settings.setdefault(name, []).append(index)
    return settings


def curves(sweep: Sweep) -> "Figure":
    """Draw accuracy against the step, as mean and standard deviation over seeds, one curve per setting.

    It is the validation accuracy, or the training accuracy if there was no more than one evaluation.
    """
    columns = sweep.curves
    validated = len(np.unique(columns["step"][columns["validation"]])) > 1
    split = "validation" if validated else "training"
    fig, axes = plot(xlabel="step", ylabel=f"{split} accuracy (%), mean ± std")
    for name, trials in trials_by_setting(sweep).items():
        chosen = (columns["validation"] == validated) & np.isin(columns["member"], trials)
        steps = np.unique(columns["step"][chosen])
        summaries = [summarise(columns["accuracy"][chosen & (columns["step"] == step)]) for step in steps]
        mean, std = (100 * np.array([getattr(summary, key) or 0 for summary in summaries]) for key in ("mean", "std"))
        label, marker = f"{shorten(name, 60)} (n = {len(trials)})", "." if len(steps) < 30 else None
        (line,) = axes.plot(steps, mean, label=label, marker=marker)
        axes.fill_between(steps, mean - std, mean + std, color=line.get_color(), alpha=0.2, linewidth=0)
    add_legend(fig, axes)
    return fig


def against(sweep: Sweep, field: str) -> "Figure":
    """Draw the accuracy of each trial against the value of a numeric ``field``, with means over repeated values.

    Raise UserError if ``field`` was not swept.
    """
    over, split = sweep.result.over, sweep.groups[0].split
    if field not in over:
        raise UserError(f"{field} was not swept: use one of {', '.join(over)}")
    fig, axes = plot(xlabel=field, ylabel=f"{split} accuracy (%), one point per run")
    for experiment in sweep.result.experiments:
        trials = [trial for trial in sweep.members if trial.experiment == experiment and trial.failed is None]
        x = np.array([trial.fields[field] for trial in trials])
        y = 100 * np.array([getattr(trial, f"{split}_accuracy") for trial in trials])
        values, counts = np.unique(x, return_counts=True)
        repeated = len(counts) > 0 and min(counts) > 1
        means = [y[x == value].mean() if repeated else np.nan for value in values]
        (line,) = axes.plot(values, means, label=shorten(experiment))
        axes.scatter(x, y, s=20, alpha=0.5 if repeated else 1, linewidth=0, color=line.get_color())
    magnitudes = np.unique(np.abs(over[field]))
    magnitudes = magnitudes[magnitudes > 0]
    if len(magnitudes) and magnitudes[-1] / magnitudes[0] >= 10:
        axes.set_xscale("symlog", linthresh=magnitudes[0])
    if len(over[field]) <= 10:
        axes.set_xticks(over[field], [f"{value:g}" for value in over[field]])
        axes.minorticks_off()
    add_legend(fig, axes)
    return fig


def distribution(sweep: Sweep) -> "Figure":
    """Draw the accuracy of each seed by setting: one point per run, and a box from quartile to quartile."""
    settings, split, trials = trials_by_setting(sweep), sweep.groups[0].split, sweep.members
    fig, axes = plot(height=1.5 + 0.35 * len(settings), xlabel=f"{split} accuracy (%), one point per run")
    rows = [[100 * getattr(trials[index], f"{split}_accuracy") for index in indices] for indices in settings.values()]
    axes.boxplot(rows, orientation="horizontal", showfliers=False, widths=0.6, medianprops={"color": "black"})
    jitter = np.random.default_rng(0)
    for y, row in enumerate(rows, start=1):
        axes.scatter(row, y + jitter.uniform(-0.2, 0.2, len(row)), s=20, alpha=0.7, linewidth=0)
    labels = [f"{shorten(name, 60)} (n = {len(row)})" for name, row in zip(settings, rows, strict=True)]
    axes.set_yticks(range(1, len(rows) + 1), labels)
    axes.invert_yaxis()
    return fig
