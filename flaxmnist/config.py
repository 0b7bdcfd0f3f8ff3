"""An experiment as frozen dataclasses, validated on construction.

An experiment file defines one ``config = Config(…)``. Models, optimizers, schedules and initial values are unions of
small dataclasses, so that every field is used. The run folder and the devices are not part of a config.
"""

import math
import re
import runpy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flaxmnist.errors import UserError
from flaxmnist.fields import check_types

# --- Initial values -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Constant:
    """The same value everywhere."""

    value: float = 0.0  # value


@dataclass(frozen=True)
class Normal:
    """Normal distribution with mean 0."""

    stddev: float = 1.0  # standard deviation


@dataclass(frozen=True)
class TruncatedNormal:
    """Normal distribution with mean 0, truncated at two standard deviations."""

    stddev: float = 0.1  # standard deviation before truncation


@dataclass(frozen=True)
class Uniform:
    """Uniform distribution on [low, high)."""

    low: float = 0.0  # lower bound
    high: float = 1.0  # upper bound


@dataclass(frozen=True)
class Glorot:
    """Uniform on ±scale·√(6 / (inputs + outputs)) (Glorot & Bengio 2010)."""

    scale: float = 1.0  # factor on the bound


@dataclass(frozen=True)
class LeCun:
    """Truncated normal with standard deviation scale·√(1 / inputs) after truncation (LeCun et al. 1998)."""

    scale: float = 1.0  # factor on the standard deviation


Initial = Constant | Normal | TruncatedNormal | Uniform | Glorot | LeCun

# --- Models ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Softmax:
    """Softmax regression: one dense layer from pixels to classes."""

    dropout: float = 0.0  # fraction of the pixels dropped in a training step, in [0, 1)
    kernel_init: Initial = Constant(0.0)  # initial weights
    bias_init: Initial = Constant(0.0)  # initial biases


@dataclass(frozen=True, kw_only=True)
class MLP:
    """Dense layers with ReLU between them."""

    hidden: tuple[int, ...] = (512,)  # units of each hidden layer, first to last
    dropout: float = 0.0  # fraction of each hidden layer's units dropped in a training step, in [0, 1)
    kernel_init: Initial = LeCun()  # initial weights
    bias_init: Initial = Constant(0.0)  # initial biases


@dataclass(frozen=True, kw_only=True)
class CNN:
    """Convolutions, each with 2×2 max-pooling and ReLU; then a dense layer with ReLU, dropout, and a dense layer."""

    features: tuple[int, ...] = (32, 64)  # channels of each convolution
    kernel: tuple[int, ...] = (5,)  # sides of the square kernels, in pixels: one for all, or one per convolution
    space_to_depth: int = 1  # side of the blocks of pixels that become channels before the first convolution; 1: none
    padding: Literal["SAME", "VALID"] = "SAME"  # SAME keeps the size (stride 1), VALID loses kernel − 1 pixels
    dense: int = 1024  # units of the hidden dense layer
    dropout: float = 0.0  # fraction of the hidden dense layer's units dropped in a training step, in [0, 1)
    kernel_init: Initial = LeCun()  # initial weights
    bias_init: Initial = Constant(0.0)  # initial biases


Model = Softmax | MLP | CNN

# --- Schedules: factors on the learning rate ------------------------------------------------------------------------


@dataclass(frozen=True)
class Flat:
    """Constant learning rate."""


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """Cosine decay from the full rate to ``end`` times the full rate, after a linear warm-up from zero."""

    warmup_steps: int = 0  # length of the warm-up, in updates
    end: float = 0.0  # final rate as a fraction of the full rate, in [0, 1]


@dataclass(frozen=True, kw_only=True)
class OneCycle:
    """Cosine increase from 1/start_divisor to the full rate, then decrease to 1/end_divisor (Smith & Topin 2017)."""

    peak: float = 0.3  # position of the full rate, as a fraction of the run, in (0, 1)
    start_divisor: float = 25.0  # full rate divided by the first rate
    end_divisor: float = 1e5  # full rate divided by the last rate


@dataclass(frozen=True, kw_only=True)
class Exponential:
    """Continuous exponential decay by a factor of ``decay`` per ``every`` updates."""

    decay: float = 0.95  # factor, in (0, 1]
    every: int = 1000  # updates per factor


Schedule = Flat | Cosine | OneCycle | Exponential

# --- Optimizers -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SGD:
    """Stochastic gradient descent."""

    learning_rate: float = 0.1  # step size; the full rate of the schedule
    momentum: float = 0.0  # fraction of the previous update to add, in [0, 1)
    nesterov: bool = False  # Nesterov's momentum (needs momentum above 0)
    schedule: Schedule = Flat()  # learning rate over the run
    clip_norm: float | None = None  # maximum global norm of the gradient; None: no clipping
    accumulate: int = 1  # batches per update, gradients averaged with equal weight; an incomplete last group is dropped


@dataclass(frozen=True, kw_only=True)
class Adam:
    """Adam (Kingma & Ba 2015); with weight decay, AdamW (Loshchilov & Hutter 2019)."""

    learning_rate: float = 1e-3  # step size; the full rate of the schedule
    b1: float = 0.9  # decay of the moving average of the gradients, in [0, 1)
    b2: float = 0.999  # decay of the moving average of their squares, in [0, 1)
    eps: float = 1e-8  # added to the root of the average square
    weight_decay: float = 0.0  # decoupled: an update subtracts learning rate × weight_decay × weight
    schedule: Schedule = Flat()  # learning rate over the run
    clip_norm: float | None = None  # maximum global norm of the gradient; None: no clipping
    accumulate: int = 1  # batches per update, gradients averaged with equal weight; an incomplete last group is dropped


@dataclass(frozen=True, kw_only=True)
class Muon:
    """Orthogonalised momentum (Jordan et al. 2024) for matrices and kernels; Nadam (Dozat 2016) for biases."""

    learning_rate: float = 0.02  # step size; the full rate of the schedule
    momentum: float = 0.95  # decay of the moving average of the gradients, in [0, 1)
    newton_schulz_steps: int = 5  # iterations that orthogonalise the average
    schedule: Schedule = Flat()  # learning rate over the run
    clip_norm: float | None = None  # maximum global norm of the gradient; None: no clipping
    accumulate: int = 1  # batches per update, gradients averaged with equal weight; an incomplete last group is dropped


Optimizer = SGD | Adam | Muon

# --- The rest of an experiment --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The loss: mean cross-entropy of a batch."""

    form: Literal["logits", "probabilities"] = "logits"  # numerically stable, or −Σ y·log(softmax) as written
    labels: Literal["integer", "one_hot"] = "integer"  # labels index the logits, or are multiplied with them
    label_smoothing: float = 0.0  # fraction of the target spread evenly over the classes, in [0, 1] (one_hot only)


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Random transformations of the training images, different for every image and step; all 0: none."""

    shift: float = 0.0  # maximum shift along each axis, in pixels
    rotate: float = 0.0  # maximum rotation, in degrees
    scale: float = 0.0  # maximum change of size, as a fraction, in [0, 1)
    elastic: float = 0.0  # root mean square of a smooth random displacement, in pixels (Simard et al. 2003)


@dataclass(frozen=True, kw_only=True)
class Data:
    """The data set and the order of its images."""

    name: Literal["mnist", "fashion_mnist", "kmnist", "digits", "idx"] = "mnist"  # idx: IDX files in --data-dir
    validation: int | None = None  # first images of the training file held out; None: 5,000, at most an eighth
    order: Literal["shuffled", "file"] = "shuffled"  # shuffled again each epoch, or as in the file
    order_seed: int | None = None  # seed of the shuffling; None: the run's seed
    last_batch: Literal["keep", "drop"] = "keep"  # keep or drop the last batch of an epoch if it is short
    augment: Augment = Augment()  # random transformations of the training images


@dataclass(frozen=True, kw_only=True)
class Train:
    """The length of training, and what happens during it."""

    batch_size: int = 100  # images per step
    steps: int | None = None  # length in steps (set this or epochs)
    epochs: int | None = None  # length in passes over the training images (set this or steps)
    log_every: int = 100  # steps between training records
    evaluate_every: int | None = None  # steps between evaluations on the validation images; None: only at the end
    checkpoint_every: int | None = None  # steps between checkpoints; None: only at the end
    keep: int = 2  # number of latest checkpoints to keep, besides the best by validation accuracy
    report: Literal["loss", "epoch_cost", "batch_loss", "batch_accuracy", "probabilities"] = "loss"  # console lines
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # dtype inside a training step; weights stay float32
    ema_decay: float | None = None  # decay per step of the average of the weights used for evaluation; None: no average
    stop_accuracy: float | None = None  # stop at this validation accuracy, a fraction; None: never
    skip_nonfinite: int = 0  # consecutive steps with non-finite loss or gradient to skip before the run fails
    patience: int | None = None  # stop after this many evaluations without improvement; None: never

    @property
    def length(self) -> int:
        """The length in steps. Raise UserError if it is given in epochs, which only the data can convert to steps."""
        if self.steps is None:
            raise UserError(f"train.steps is None: convert {self.epochs} epochs to steps with order.resolve_length")
        return self.steps


@dataclass(frozen=True, kw_only=True)
class Config:
    """One experiment. An invalid value raises a UserError that names its field."""

    name: str  # name of the experiment, and prefix of its run folders
    seed: int = 0  # seed of initial values, dropout, augmentation and (unless data.order_seed is set) order
    model: Model
    optimizer: Optimizer
    objective: Objective = Objective()
    data: Data = Data()
    train: Train

    def __post_init__(self):
        check_types(type(self), self)
        for valid, message in rules(self):
            if not valid:
                raise UserError(message)


def rules(config: Config) -> Iterator[tuple[bool, str]]:
    """Yield each rule on the values of ``config``: if it is satisfied, and the message if not."""
    train, data, optimizer, model = config.train, config.data, config.optimizer, config.model
    largest = 2**31 - 1  # of int32

    def bounds(owner: str, instance, low: float, high: float, *names: str, open_low=False, open_high=False):
        for name in names:
            value = getattr(instance, name)
            if value is None:
                continue
            valid = (low < value if open_low else low <= value) and (value < high if open_high else value <= high)
            interval = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
            yield valid, f"{owner}{name} must lie in {interval}, but is {value}"

    valid = re.fullmatch(r"\w[\w.+-]{0,99}", config.name) is not None
    yield valid, f"name must be a word of at most 100 letters, digits and _.+-, but is {config.name!r}"
    yield from bounds("", config, 0, largest, "seed")
    yield from bounds("data.", data, 0, largest, "validation", "order_seed")
    yield from bounds("data.augment.", data.augment, 0, 14, "shift", "elastic")
    yield from bounds("data.augment.", data.augment, 0, 180, "rotate")
    yield from bounds("data.augment.", data.augment, 0, 1, "scale", open_high=True)
    counts = ("batch_size", "steps", "epochs", "log_every", "evaluate_every", "checkpoint_every", "keep", "patience")
    yield from bounds("train.", train, 1, largest, *counts)
    yield from bounds("train.", train, 0, largest, "skip_nonfinite")
    yield from bounds("train.", train, 0, 1, "ema_decay", open_high=True)
    yield from bounds("train.", train, 0, 1, "stop_accuracy", open_low=True)
    yield (
        (train.steps is None) != (train.epochs is None),
        f"exactly one of train.steps and train.epochs must be set, but they are {train.steps} and {train.epochs}: "
        "set one and leave the other None (on the command line: --train.epochs None)",
    )
    early = train.stop_accuracy is not None or train.patience is not None
    need = "train.stop_accuracy and train.patience need"
    yield not early or train.evaluate_every is not None, f"{need} evaluations during training: set train.evaluate_every"
    yield not early or data.validation != 0, f"{need} validation images: data.validation must not be 0"
    yield from bounds("model.", model, 0, 1, "dropout", open_high=True)
    if isinstance(model, MLP):
        yield (
            len(model.hidden) <= 100 and all(1 <= units <= 2**20 for units in model.hidden),
            "model.hidden must be at most 100 layers of at least 1 unit each",
        )
    if isinstance(model, CNN):
        yield from bounds("model.", model, 1, 2**20, "dense")
        yield from bounds("model.", model, 1, 28, "space_to_depth")
        yield (
            len(model.kernel) in (1, len(model.features)) and all(1 <= side <= 28 for side in model.kernel),
            "model.kernel must be sides in [1, 28]: one for all convolutions, or as many as model.features",
        )
        yield (
            len(model.features) > 0 and all(1 <= channels <= 2**16 for channels in model.features),
            "model.features must be at least one convolution of at least one channel",
        )
    for name in ("kernel_init", "bias_init"):
        initial = getattr(model, name)
        for parameter, value in vars(initial).items():
            yield math.isfinite(value), f"model.{name}.{parameter} must be finite, but is {value}"
            yield parameter in ("value", "low", "high") or value >= 0, f"model.{name}.{parameter} must not be negative"
        yield not isinstance(initial, Uniform) or initial.low < initial.high, f"model.{name}: low must be below high"
    yield (
        not isinstance(model.bias_init, Glorot | LeCun),
        "model.bias_init cannot be Glorot or LeCun, which need a matrix: use Constant, Normal or Uniform",
    )
    yield from bounds("optimizer.", optimizer, 0, math.inf, "learning_rate", open_low=True, open_high=True)
    yield from bounds("optimizer.", optimizer, 0, math.inf, "clip_norm", open_low=True, open_high=True)
    yield from bounds("optimizer.", optimizer, 1, largest if train.steps is None else train.steps, "accumulate")
    if isinstance(optimizer, SGD):
        yield from bounds("optimizer.", optimizer, 0, 1, "momentum", open_high=True)
        yield not optimizer.nesterov or optimizer.momentum > 0, "optimizer.nesterov needs optimizer.momentum above 0"
    if isinstance(optimizer, Adam):
        yield from bounds("optimizer.", optimizer, 0, 1, "b1", "b2", open_high=True)
        yield from bounds("optimizer.", optimizer, 0, math.inf, "eps", open_low=True, open_high=True)
        yield from bounds("optimizer.", optimizer, 0, math.inf, "weight_decay", open_high=True)
    if isinstance(optimizer, Muon):
        yield from bounds("optimizer.", optimizer, 0, 1, "momentum", open_high=True)
        yield from bounds("optimizer.", optimizer, 1, 20, "newton_schulz_steps")
    match schedule := optimizer.schedule:
        case Cosine():
            yield from bounds("optimizer.schedule.", schedule, 0, largest, "warmup_steps")
            yield from bounds("optimizer.schedule.", schedule, 0, 1, "end")
        case OneCycle():
            yield from bounds("optimizer.schedule.", schedule, 0, 1, "peak", open_low=True, open_high=True)
            yield from bounds("optimizer.schedule.", schedule, 1, math.inf, "start_divisor", "end_divisor")
        case Exponential():
            yield from bounds("optimizer.schedule.", schedule, 0, 1, "decay", open_low=True)
            yield from bounds("optimizer.schedule.", schedule, 1, largest, "every")
    objective = config.objective
    one_hot = objective.labels == "one_hot"
    yield from bounds("objective.", objective, 0, 1, "label_smoothing")
    yield objective.label_smoothing == 0 or one_hot, "objective.label_smoothing needs objective.labels one_hot"
    yield objective.form == "logits" or one_hot, "objective.form probabilities needs objective.labels one_hot"


# --- Experiment files -----------------------------------------------------------------------------------------------


def load_experiment(path: str | Path) -> Config:
    """Run the experiment file ``path``, which is Python code, and return its config.

    Raise UserError if the file is missing, fails, or defines no ``config``.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no experiment file {path}: pass the path of a .py file, such as experiments/quickstart.py")
    try:
        config = runpy.run_path(str(path)).get("config")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (Exception, SystemExit) as error:
        raise UserError(f"{path} does not run: {type(error).__name__}: {' '.join(str(error).split())}") from error
    if not isinstance(config, Config):
        raise UserError(f"{path} defines no config: it must assign a flaxmnist.config.Config to `config`")
    return config
