"""All plots: ``fm.plots``."""

from flaxmnist.show.charts import accuracies, against, batch_costs, curves, distribution, history, step_metrics
from flaxmnist.show.images import (
    calibration,
    confusion,
    digit,
    examples,
    feature_maps,
    mistakes,
    predictions,
    values,
    weights,
)

__all__ = [
    "accuracies",
    "against",
    "batch_costs",
    "calibration",
    "confusion",
    "curves",
    "digit",
    "distribution",
    "examples",
    "feature_maps",
    "history",
    "mistakes",
    "predictions",
    "step_metrics",
    "values",
    "weights",
]
