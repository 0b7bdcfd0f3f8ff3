"""Statistics over several runs, with the distributions of SciPy. Runs that differ only in the seed count as samples."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np


def summarise(values: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """Return n, mean, std (of the sample), ci95 (of the mean, Student's t), min and max; None if n is too small."""
    x = np.array(values, np.float64)
    summary: dict[str, Any] = {"n": len(x), "mean": None, "std": None, "ci95": None, "min": None, "max": None}
    if len(x) > 0:
        summary |= {"mean": float(x.mean()), "min": float(x.min()), "max": float(x.max())}
    if len(x) > 1:
        summary |= {"std": float(x.std(ddof=1)), "ci95": confidence_interval(x)}
    return summary


def confidence_interval(x: np.ndarray) -> list[float]:
    """Return the 95 % confidence interval of the mean of at least two values, by Student's t."""
    from scipy import stats

    half_width = stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x))
    return [float(x.mean() - half_width), float(x.mean() + half_width)]


def wilson(fraction: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Return the 95 % confidence interval of a ``fraction`` of ``count`` independent cases (Wilson 1927)."""
    centre = (fraction + z**2 / (2 * count)) / (1 + z**2 / count)
    half_width = z / (1 + z**2 / count) * np.sqrt(fraction * (1 - fraction) / count + z**2 / (4 * count**2))
    return centre - half_width, centre + half_width


def compare(reference: dict[int, float], other: dict[int, float]) -> dict[str, Any]:
    """Return n, mean, ci95 and p-value (Student's paired t-test) of ``other`` − ``reference`` at common seeds."""
    from scipy import stats

    seeds = sorted(reference.keys() & other.keys())
    x, y = (np.array([values[seed] for seed in seeds], np.float64) for values in (reference, other))
    comparison: dict[str, Any] = summarise(y - x) | {"p_value": None}
    # If all differences are equal up to rounding, their variance is 0 and the test is undefined.
    if len(seeds) > 1 and np.ptp(y - x) > 1e-9:
        comparison["p_value"] = float(stats.ttest_rel(y, x).pvalue)
    return {name: comparison[name] for name in ("n", "mean", "ci95", "p_value")}


def summaries(trials: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the statistics of each setting of a sweep, the best setting, and the comparisons of the others with it.

    Settings are ranked by validation accuracy. If some trials have none, test accuracy is reported, no setting is
    best, and the others are compared with the first.
    """
    finished = [trial for trial in trials if trial["failed"] is None]
    split = "test" if any(trial["validation_accuracy"] is None for trial in finished) else "validation"
    settings: dict[str, list[dict[str, Any]]] = {}
    for trial in trials:
        settings.setdefault(json.dumps([trial["experiment"], trial["fields"]]), []).append(trial)
    groups, accuracies = [], []  # per setting; accuracies by seed
    for group in settings.values():
        by_seed = {trial["seed"]: trial[f"{split}_accuracy"] for trial in group if trial["failed"] is None}
        setting = {"experiment": group[0]["experiment"], "fields": group[0]["fields"], "split": split}
        groups.append(setting | {"failed": len(group) - len(by_seed)} | summarise(list(by_seed.values())))
        accuracies.append(by_seed)
    complete = [index for index, group in enumerate(groups) if group["failed"] == 0]
    best, reference = None, 0
    if complete and (split == "validation" or len(groups) == 1):
        reference = max(complete, key=lambda index: groups[index]["mean"])
        tests = [trial["test_accuracy"] for trial in list(settings.values())[reference]]
        best = {name: groups[reference][name] for name in ("experiment", "fields")} | {"test": summarise(tests)}
    comparisons = [
        {"experiment": group["experiment"], "fields": group["fields"], "reference": title(groups[reference])}
        | compare(accuracies[reference], accuracies[index])
        for index, group in enumerate(groups)
        if index != reference and accuracies[reference].keys() & accuracies[index].keys()
    ]
    return {"groups": groups, "best": best, "comparisons": comparisons}


def title(setting: dict[str, Any]) -> str:
    """Return the name of a setting: its experiment and the values of the swept fields."""
    return " ".join([setting["experiment"], *(f"{name}={value}" for name, value in setting["fields"].items())])
