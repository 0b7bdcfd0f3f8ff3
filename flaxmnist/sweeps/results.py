"""The files of a sweep as dataclasses: sweep.json and result.json."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flaxmnist.config import Config
from flaxmnist.store.provenance import DataInfo, DeviceInfo, StepInfo


@dataclass(frozen=True, kw_only=True)
class SweepInfo:
    """The content of sweep.json: everything that the results depend on."""

    experiments: tuple[Config, ...]
    data: tuple[DataInfo, ...]  # of each experiment
    seeds: tuple[int, ...]
    settings: tuple[dict[str, Any], ...]  # values of the swept fields, by dotted name
    share_order: bool
    exact: bool
    devices: DeviceInfo
    versions: dict[str, str]
    steps: dict[str, StepInfo] | None = None  # of experiments with a step of their own, by name; None: of none

    def experiment(self, name: str) -> tuple[Config, DataInfo]:
        return {config.name: (config, data) for config, data in zip(self.experiments, self.data, strict=True)}[name]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """An experiment and the values of the swept fields."""

    experiment: str
    fields: dict[str, Any]  # by dotted name

    @property
    def setting(self) -> dict[str, Any]:
        return {"experiment": self.experiment, "fields": self.fields}

    @property
    def title(self) -> str:
        return " ".join([self.experiment, *(f"{name}={value}" for name, value in self.fields.items())])


@dataclass(frozen=True, kw_only=True)
class TrialResult(Setting):
    """The result of a trial; the accuracies and the loss are None if it diverged."""

    seed: int
    test_accuracy: float | None
    validation_accuracy: float | None  # None also if there are no validation images
    test_loss: float | None
    params_sha256: str
    failed: str | None  # the reason, if it diverged
    test: dict[str, float] | None = None  # all metrics; None in old files
    validation: dict[str, float] | None = None
    # Not compared: equal trials may differ here. None in old files.
    train_seconds: float | None = field(default=None, compare=False)  # the mean, if trials are trained at once
    git_commit: str | None = field(default=None, compare=False)  # of the code


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Statistics of n values, None if n is too small."""

    n: int
    mean: float | None
    std: float | None  # of the sample
    ci95: tuple[float, float] | None  # 95 % confidence interval of the mean, by Student's t
    min: float | None
    max: float | None


@dataclass(frozen=True, kw_only=True)
class SettingSummary(Summary, Setting):
    """The accuracy of the trials of a setting on the images of ``split``."""

    split: str
    failed: int  # trials that diverged and do not count in n


@dataclass(frozen=True, kw_only=True)
class BestSetting(Setting):
    """The setting with the best validation accuracy."""

    test: Summary  # accuracy


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Statistics of n paired differences, None if n is too small."""

    n: int
    mean: float | None
    ci95: tuple[float, float] | None
    p_value: float | None  # of Student's paired t-test


@dataclass(frozen=True, kw_only=True)
class Comparison(Difference, Setting):
    """The difference in accuracy between a setting and the reference, at common seeds."""

    reference: str  # title of the setting
    loss: Difference | None = None  # the difference in loss; None in old files


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """The content of a sweep's result.json."""

    experiments: tuple[str, ...]
    seeds: tuple[int, ...]
    over: dict[str, Any]  # the values of each swept field
    members: tuple[TrialResult, ...]
    groups: tuple[SettingSummary, ...]
    best: BestSetting | None
    comparisons: tuple[Comparison, ...]
    replica_steps_per_second: float


@dataclass(frozen=True)
class Sweep:
    """A finished sweep."""

    result: SweepResult
    curves: dict[str, np.ndarray]  # columns "member", "step", "validation" (else training), "loss", "accuracy"

    @property
    def members(self) -> list[TrialResult]:
        """The result of each trial, for pandas.DataFrame."""
        return list(self.result.members)

    @property
    def groups(self) -> list[SettingSummary]:
        """Statistics of each setting, for pandas.DataFrame."""
        return list(self.result.groups)
