"""What several runs say together. SciPy's distributions, and nothing assumed but that seeds are alike."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np


def summarise(values: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """n, mean, std (of the sample), ci95 (of the mean, by Student's t), min and max; None where n is too small."""
    x = np.array(values, np.float64)
    summary: dict[str, Any] = {"n": len(x), "mean": None, "std": None, "ci95": None, "min": None, "max": None}
    if len(x) > 0:
        summary |= {"mean": float(x.mean()), "min": float(x.min()), "max": float(x.max())}
    if len(x) > 1:
        summary |= {"std": float(x.std(ddof=1)), "ci95": interval(x)}
    return summary


def interval(x: np.ndarray) -> list[float]:
    """The 95 % confidence interval of the mean of at least two values, by Student's t."""
    from scipy import stats

    half = stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x))
    return [float(x.mean() - half), float(x.mean() + half)]


def wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a ``share`` seen in ``count`` independent cases (Wilson 1927)."""
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return middle - half, middle + half


def compare(ours: dict[int, float], theirs: dict[int, float]) -> dict[str, Any]:
    """Theirs less ours, paired by common seeds: n, mean, ci95 and the p-value of Student's paired t-test."""
    from scipy import stats

    seeds = sorted(ours.keys() & theirs.keys())
    one, other = (np.array([values[seed] for seed in seeds], np.float64) for values in (ours, theirs))
    comparison: dict[str, Any] = summarise(other - one) | {"p_value": None}
    # Where every pair differs by the same, but for rounding, there is nothing to test.
    if len(seeds) > 1 and np.ptp(other - one) > 1e-9:
        comparison["p_value"] = float(stats.ttest_rel(other, one).pvalue)
    return {name: comparison[name] for name in ("n", "mean", "ci95", "p_value")}


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
        groups.append(about | {"failed": len(mine) - len(good)} | summarise(list(good.values())))
        accuracies.append(good)
    whole = [number for number, group in enumerate(groups) if group["failed"] == 0]
    best, first = None, 0
    if whole and (split == "validation" or len(groups) == 1):
        first = max(whole, key=lambda number: groups[number]["mean"])
        tests = [line["test_accuracy"] for line in list(settings.values())[first]]
        best = {name: groups[first][name] for name in ("experiment", "fields")} | {"test": summarise(tests)}
    comparisons = [
        {"experiment": group["experiment"], "fields": group["fields"], "reference": title(groups[first])}
        | compare(accuracies[first], theirs)
        for number, (group, theirs) in enumerate(zip(groups, accuracies, strict=True))
        if number != first and accuracies[first].keys() & theirs.keys()
    ]
    return {"groups": groups, "best": best, "comparisons": comparisons}


def title(line: dict[str, Any]) -> str:
    """A setting by name."""
    return " ".join([line["experiment"], *(f"{name}={value}" for name, value in line["fields"].items())])
