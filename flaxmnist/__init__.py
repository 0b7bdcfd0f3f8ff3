"""MNIST in JAX and Flax: experiments to run from the command line, and a library to import."""

from flaxmnist.config import Config, load_experiment
from flaxmnist.core.models import CNN, MLP, Softmax, make_model
from flaxmnist.core.state import Batch, TrainState
from flaxmnist.core.steps import create_state, train_step, train_steps
from flaxmnist.data.sets import Dataset, Split, load_data
from flaxmnist.devices.evaluation import Evaluation, evaluate, predict
from flaxmnist.runs import fit
from flaxmnist.show import plots as plots
from flaxmnist.store.results import Run, load_run
from flaxmnist.sweeps.parts import Sweep
from flaxmnist.sweeps.sweeps import sweep

__version__ = "0.1.0"

__all__ = [
    "CNN",
    "MLP",
    "Batch",
    "Config",
    "Dataset",
    "Evaluation",
    "Run",
    "Softmax",
    "Split",
    "Sweep",
    "TrainState",
    "create_state",
    "evaluate",
    "fit",
    "load_data",
    "load_experiment",
    "load_run",
    "make_model",
    "predict",
    "sweep",
    "train_step",
    "train_steps",
]
