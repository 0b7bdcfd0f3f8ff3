"""The public names of the package, which ``import flaxmnist as fm`` imports when the first one is used."""

from flaxmnist.config import Config
from flaxmnist.core.layers import BatchNorm, Dropout, max_pool, space_to_depth
from flaxmnist.core.models import CNN, MLP, Softmax, make_model
from flaxmnist.core.state import Batch, Gradient, Metrics, TrainState
from flaxmnist.core.steps import (
    augmented_images,
    create_state,
    forward,
    gradient,
    sum_over_devices,
    take_batch,
    train_step,
    train_steps,
    update,
)
from flaxmnist.data.order import batch_indices, resolve_length
from flaxmnist.data.sets import Dataset, Split, load_data
from flaxmnist.devices.evaluation import Evaluation, evaluate, predict, predict_logits
from flaxmnist.experiment import load_experiment
from flaxmnist.fields import replace
from flaxmnist.runs import fit
from flaxmnist.show import plots
from flaxmnist.show.reports import write as write_report
from flaxmnist.store.load import Run, evaluate_run, load_run
from flaxmnist.sweeps.ensembles import load_members
from flaxmnist.sweeps.results import Sweep
from flaxmnist.sweeps.runner import sweep

__all__ = [
    "CNN",
    "MLP",
    "Batch",
    "BatchNorm",
    "Config",
    "Dataset",
    "Dropout",
    "Evaluation",
    "Gradient",
    "Metrics",
    "Run",
    "Softmax",
    "Split",
    "Sweep",
    "TrainState",
    "augmented_images",
    "batch_indices",
    "create_state",
    "evaluate",
    "evaluate_run",
    "fit",
    "forward",
    "gradient",
    "load_data",
    "load_experiment",
    "load_members",
    "load_run",
    "make_model",
    "max_pool",
    "plots",
    "predict",
    "predict_logits",
    "replace",
    "resolve_length",
    "space_to_depth",
    "sum_over_devices",
    "sweep",
    "take_batch",
    "train_step",
    "train_steps",
    "update",
    "write_report",
]
