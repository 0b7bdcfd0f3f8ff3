"""Statistics over several runs, with the distributions of SciPy. Runs that differ only in the seed count as samples."""

import json
from collections.abc import Sequence

import numpy as np

from flaxmnist.sweeps.results import (
    BestSetting,
    Comparison,
    Difference,
    SettingSummary,
    Summary,
    SweepInfo,
    SweepResult,
    TrialResult,
)
from flaxmnist.sweeps.settings import distinct


def summarise(values: Sequence[float] | np.ndarray) -> Summary:
    x = np.array(values, np.float64)
    mean, low, high = (float(x.mean()), float(x.min()), float(x.max())) if len(x) else (None, None, None)
    std, ci95 = (float(x.std(ddof=1)), confidence_interval(x)) if len(x) > 1 else (None, None)
    return Summary(n=len(x), mean=mean, std=std, ci95=ci95, min=low, max=high)


def confidence_interval(x: np.ndarray) -> tuple[float, float]:
    """Return the 95 % confidence interval of the mean of at least two values, by Student's t."""
    from scipy import stats

    half_width = stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x))
    return float(x.mean() - half_width), float(x.mean() + half_width)


def wilson(fraction: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Return the 95 % confidence interval of a ``fraction`` of ``count`` independent cases (Wilson 1927)."""
    centre = (fraction + z**2 / (2 * count)) / (1 + z**2 / count)
    half_width = z / (1 + z**2 / count) * np.sqrt(fraction * (1 - fraction) / count + z**2 / (4 * count**2))
    return centre - half_width, centre + half_width


def compare(reference: dict[int, float], other: dict[int, float]) -> Difference:
    """Return the statistics of ``other`` − ``reference`` at common seeds."""
    from scipy import stats

    seeds = sorted(reference.keys() & other.keys())
    x, y = (np.array([values[seed] for seed in seeds], np.float64) for values in (reference, other))
    summary, p_value = summarise(y - x), None
    # If all differences are equal up to rounding, their variance is 0 and the test is undefined.
    if len(seeds) > 1 and np.ptp(y - x) > 1e-9:
        p_value = float(stats.ttest_rel(y, x).pvalue)
    return Difference(n=summary.n, mean=summary.mean, ci95=summary.ci95, p_value=p_value)


def summarise_sweep(info: SweepInfo, trials: Sequence[TrialResult], steps_per_second: float) -> SweepResult:
    """Return the result of a sweep: each trial and setting, the best setting, and the comparisons of others with it.

    Settings are ranked by validation accuracy. If some trials have none, test accuracy is reported, no setting is
    best unless it is the only one, and the others are compared with the first.
    """
    finished = [trial for trial in trials if trial.failed is None]
    split = "test" if any(trial.validation_accuracy is None for trial in finished) else "validation"
    over = {name: distinct(fields[name] for fields in info.settings) for name in info.settings[0]}
    settings: dict[str, list[TrialResult]] = {}
    for trial in trials:
        settings.setdefault(json.dumps(trial.setting), []).append(trial)
    groups, accuracies, losses = [], [], []  # of each setting; the last two by seed
    for members in settings.values():
        trained = [trial for trial in members if trial.failed is None]
        accuracies.append({trial.seed: getattr(trial, f"{split}_accuracy") for trial in trained})
        scores = {trial.seed: getattr(trial, split) for trial in trained}
        losses.append({seed: score["loss"] for seed, score in scores.items() if score is not None})
        failed, summary = len(members) - len(trained), vars(summarise(list(accuracies[-1].values())))
        groups.append(SettingSummary(**members[0].setting, split=split, failed=failed, **summary))
    complete = [index for index, group in enumerate(groups) if group.failed == 0]
    best, reference = None, 0
    if complete and (split == "validation" or len(groups) == 1):
        reference = max(complete, key=lambda index: groups[index].mean or 0.0)
        members = list(settings.values())[reference]
        test = summarise([trial.test_accuracy for trial in members if trial.test_accuracy is not None])
        best = BestSetting(**groups[reference].setting, test=test)
    comparisons = [
        Comparison(
            **group.setting,
            **vars(compare(accuracies[reference], accuracies[index])),
            reference=groups[reference].title,
            loss=compare(losses[reference], losses[index]),
        )
        for index, group in enumerate(groups)
        if index != reference and accuracies[reference].keys() & accuracies[index].keys()
    ]
    return SweepResult(
        experiments=tuple(config.name for config in info.experiments),
        seeds=info.seeds,
        over=over,
        members=tuple(trials),
        groups=tuple(groups),
        best=best,
        comparisons=tuple(comparisons),
        replica_steps_per_second=steps_per_second,
    )
