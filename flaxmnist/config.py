"""What an experiment is: frozen dataclasses, checked when made.

An experiment file holds one ``config = Config(…)``. Models, optimizers, schedules and initial values are unions of
small dataclasses, so that every field has a reader. Where a run is kept and what it runs on are no part of it.
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
    """Every value the same."""

    value: float = 0.0  # the value


@dataclass(frozen=True)
class Normal:
    """Normal with mean 0."""

    stddev: float = 1.0  # standard deviation


@dataclass(frozen=True)
class TruncatedNormal:
    """Normal with mean 0 before it is cut; what lies beyond two standard deviations is drawn again."""

    stddev: float = 0.1  # standard deviation before the cut


@dataclass(frozen=True)
class Uniform:
    """Uniform on [low, high)."""

    low: float = 0.0  # least value
    high: float = 1.0  # upper bound


@dataclass(frozen=True)
class Glorot:
    """Uniform on ±scale·√(6 / (inputs + outputs)) (Glorot & Bengio 2010)."""

    scale: float = 1.0  # factor on the bound


@dataclass(frozen=True)
class LeCun:
    """Truncated normal with standard deviation scale·√(1 / inputs) after the cut (LeCun et al. 1998)."""

    scale: float = 1.0  # factor on the standard deviation


Initial = Constant | Normal | TruncatedNormal | Uniform | Glorot | LeCun

# --- Models ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Softmax:
    """Softmax regression: one dense layer from pixels to classes."""

    dropout: float = 0.0  # share of the pixels left out in a training step, in [0, 1)
    kernel_init: Initial = Constant(0.0)  # initial weights
    bias_init: Initial = Constant(0.0)  # initial biases


@dataclass(frozen=True, kw_only=True)
class MLP:
    """Dense layers with ReLU between them."""

    hidden: tuple[int, ...] = (512,)  # units of each hidden layer, from the pixels on
    dropout: float = 0.0  # share of each hidden layer's units left out in a training step, in [0, 1)
    kernel_init: Initial = LeCun()  # initial weights
    bias_init: Initial = Constant(0.0)  # initial biases


@dataclass(frozen=True, kw_only=True)
class CNN:
    """Convolutions, each with a 2×2 max-pool and ReLU; then a dense layer with ReLU, dropout, and a dense layer."""

    features: tuple[int, ...] = (32, 64)  # channels of each convolution
    kernel: tuple[int, ...] = (5,)  # sides of the square kernels, in pixels: one for all, or one for each convolution
    space_to_depth: int = 1  # side of the blocks of pixels that become the channels of one pixel, before everything
    padding: Literal["SAME", "VALID"] = "SAME"  # SAME keeps the size (stride 1), VALID loses kernel − 1 pixels
    dense: int = 1024  # units of the dense layer
    dropout: float = 0.0  # share of the dense layer's units left out in a training step, in [0, 1)
    kernel_init: Initial = LeCun()  # initial weights
    bias_init: Initial = Constant(0.0)  # initial biases


Model = Softmax | MLP | CNN

# --- Schedules: the factor on the learning rate ---------------------------------------------------------------------


@dataclass(frozen=True)
class Flat:
    """The same learning rate throughout."""


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """From the full rate down to ``end`` of it along half a cosine, after a linear warm-up from zero."""

    warmup_steps: int = 0  # updates of the warm-up
    end: float = 0.0  # last rate as a fraction of the full one, in [0, 1]


@dataclass(frozen=True, kw_only=True)
class OneCycle:
    """Up from 1/start_divisor to the full rate, then down to 1/end_divisor, along cosines (Smith & Topin 2017)."""

    peak: float = 0.3  # where the peak lies, as a fraction of the run, in (0, 1)
    start_divisor: float = 25.0  # the full rate divided by the first one
    end_divisor: float = 1e5  # the full rate divided by the last one


@dataclass(frozen=True, kw_only=True)
class Exponential:
    """Multiplied by ``decay`` every ``every`` updates, smoothly between them."""

    decay: float = 0.95  # factor, in (0, 1]
    every: int = 1000  # updates


Schedule = Flat | Cosine | OneCycle | Exponential

# --- Optimizers -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SGD:
    """Stochastic gradient descent."""

    learning_rate: float = 0.1  # step size; the schedule's full rate
    momentum: float = 0.0  # share of the last update kept, in [0, 1); 0 keeps no trace of it
    nesterov: bool = False  # look ahead along the momentum (needs momentum)
    schedule: Schedule = Flat()  # the learning rate over the run
    clip_norm: float | None = None  # largest global norm of the gradient; None does not clip
    accumulate: int = 1  # batches whose gradients are averaged, each alike, for one update; a rest is left out


@dataclass(frozen=True, kw_only=True)
class Adam:
    """Adam (Kingma & Ba 2015); with weight decay, AdamW (Loshchilov & Hutter 2019)."""

    learning_rate: float = 1e-3  # step size; the schedule's full rate
    b1: float = 0.9  # decay of the mean of the gradients, in [0, 1)
    b2: float = 0.999  # decay of the mean of their squares, in [0, 1)
    eps: float = 1e-8  # added to the root of the second
    weight_decay: float = 0.0  # decoupled: times the learning rate, of each weight at each update
    schedule: Schedule = Flat()  # the learning rate over the run
    clip_norm: float | None = None  # largest global norm of the gradient; None does not clip
    accumulate: int = 1  # batches whose gradients are averaged, each alike, for one update; a rest is left out


@dataclass(frozen=True, kw_only=True)
class Muon:
    """Momentum made orthogonal (Jordan et al. 2024) for matrices and kernels; Nadam (Dozat 2016) for biases."""

    learning_rate: float = 0.02  # step size; the schedule's full rate
    momentum: float = 0.95  # decay of the mean of the gradients, in [0, 1)
    newton_schulz_steps: int = 5  # iterations that make the mean orthogonal
    schedule: Schedule = Flat()  # the learning rate over the run
    clip_norm: float | None = None  # largest global norm of the gradient; None does not clip
    accumulate: int = 1  # batches whose gradients are averaged, each alike, for one update; a rest is left out


Optimizer = SGD | Adam | Muon

# --- The rest of an experiment --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is minimised: the mean cross-entropy of a batch."""

    form: Literal["logits", "probabilities"] = "logits"  # stable from logits, or −Σ y·log(softmax) as it is written
    labels: Literal["integer", "one_hot"] = "integer"  # how a label meets the logits: by index, or by a product
    label_smoothing: float = 0.0  # share of the target spread evenly over the classes, in [0, 1] (one_hot only)


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Random changes of the training images, drawn anew for every image of every step; all 0 changes nothing."""

    shift: float = 0.0  # largest shift along each axis, in pixels
    rotate: float = 0.0  # largest rotation, in degrees
    scale: float = 0.0  # largest change of size, as a fraction, in [0, 1)
    elastic: float = 0.0  # root mean square of a smooth random displacement, in pixels (Simard et al. 2003)


@dataclass(frozen=True, kw_only=True)
class Data:
    """The images and the order they come in."""

    name: Literal["mnist", "fashion_mnist", "kmnist", "digits", "idx"] = "mnist"  # idx: IDX files in --data-dir
    validation: int | None = None  # first images of the training file held out; None: 5,000, at most an eighth
    order: Literal["shuffled", "file"] = "shuffled"  # shuffled anew each epoch, or as the file has them
    order_seed: int | None = None  # seed of the shuffling; None: the run's seed
    last_batch: Literal["keep", "drop"] = "keep"  # what becomes of an epoch's last batch where it is short
    augment: Augment = Augment()  # random changes of the training images


@dataclass(frozen=True, kw_only=True)
class Train:
    """How long, and what happens on the way."""

    batch_size: int = 100  # images a step
    steps: int | None = None  # length in steps (give this or epochs)
    epochs: int | None = None  # length in passes over the training images (give this or steps)
    log_every: int = 100  # steps between training records
    evaluate_every: int | None = None  # steps between evaluations on the validation images; None: at the end only
    checkpoint_every: int | None = None  # steps between checkpoints; None: at the end only
    keep: int = 2  # newest checkpoints kept, beside the best by validation accuracy
    report: Literal["loss", "epoch_cost", "batch_loss", "batch_accuracy", "probabilities"] = "loss"  # console lines
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # of a training step; weights stay float32 beside it
    ema_decay: float | None = None  # decay a step of an average of the weights that evaluation uses; None: none
    stop_accuracy: float | None = None  # stop at this validation accuracy, a fraction; None: never
    skip_nonfinite: int = 0  # steps in a row left out where loss or gradient is not finite, before the run ends
    patience: int | None = None  # stop after this many evaluations without a better one; None: never

    @property
    def length(self) -> int:
        """The length in steps. Raises UserError where it is in epochs, which only the data can turn into steps."""
        if self.steps is None:
            raise UserError(f"train.steps is None: {self.epochs} epochs become steps by fit, or order.resolve")
        return self.steps


@dataclass(frozen=True, kw_only=True)
class Config:
    """One experiment. Raises UserError, naming the field, for a value that makes no sense."""

    name: str  # the experiment's name, and the beginning of its run folders'
    seed: int = 0  # seed of initial values, dropout, augmentation and (unless data.order_seed is set) order
    model: Model
    optimizer: Optimizer
    objective: Objective = Objective()
    data: Data = Data()
    train: Train

    def __post_init__(self):
        check_types(type(self), self)
        for holds, message in rules(self):
            if not holds:
                raise UserError(message)


def rules(config: Config) -> Iterator[tuple[bool, str]]:
    """Each rule on values: whether ``config`` keeps it, and what to say where it does not."""
    train, data, optimizer, model = config.train, config.data, config.optimizer, config.model

    def bounds(owner: str, instance, low: float, high: float, *names: str, open_low=False, open_high=False):
        for name in names:
            value = getattr(instance, name)
            if value is None:
                continue
            holds = (low < value if open_low else low <= value) and (value < high if open_high else value <= high)
            interval = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
            yield holds, f"{owner}{name} must lie in {interval}, but is {value}"

    whole = 2**31 - 1
    named = re.fullmatch(r"\w[\w.+-]{0,99}", config.name) is not None
    yield named, f"name must be a word of at most 100 letters, digits and _.+-, but is {config.name!r}"
    yield from bounds("", config, 0, whole, "seed")
    yield from bounds("data.", data, 0, whole, "validation", "order_seed")
    yield from bounds("data.augment.", data.augment, 0, 14, "shift", "elastic")
    yield from bounds("data.augment.", data.augment, 0, 180, "rotate")
    yield from bounds("data.augment.", data.augment, 0, 1, "scale", open_high=True)
    counts = ("batch_size", "steps", "epochs", "log_every", "evaluate_every", "checkpoint_every", "keep", "patience")
    yield from bounds("train.", train, 1, whole, *counts)
    yield from bounds("train.", train, 0, whole, "skip_nonfinite")
    yield from bounds("train.", train, 0, 1, "ema_decay", open_high=True)
    yield from bounds("train.", train, 0, 1, "stop_accuracy", open_low=True)
    yield (
        (train.steps is None) != (train.epochs is None),
        (
            f"the length is given twice or not at all: train.steps is {train.steps}, train.epochs {train.epochs}; "
            "set one and leave the other None (on the command line: --train.epochs None)"
        ),
    )
    early = train.stop_accuracy is not None or train.patience is not None
    yield (
        not early or train.evaluate_every is not None,
        ("train.stop_accuracy and train.patience look at evaluations: set train.evaluate_every"),
    )
    yield (
        not early or data.validation != 0,
        ("train.stop_accuracy and train.patience look at validation images: data.validation must not be 0"),
    )
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
            len(model.features) > 0 and all(1 <= n <= 2**16 for n in model.features),
            ("model.features must be at least one convolution of at least one channel"),
        )
    for name in ("kernel_init", "bias_init"):
        initial = getattr(model, name)
        for parameter, value in vars(initial).items():
            yield math.isfinite(value), f"model.{name}.{parameter} must be finite, but is {value}"
            yield parameter in ("value", "low", "high") or value >= 0, f"model.{name}.{parameter} must not be negative"
        yield not isinstance(initial, Uniform) or initial.low < initial.high, f"model.{name}: low must be under high"
    yield (
        not isinstance(model.bias_init, Glorot | LeCun),
        ("model.bias_init cannot be Glorot or LeCun, which need a matrix: use Constant, Normal or Uniform"),
    )
    yield from bounds("optimizer.", optimizer, 0, math.inf, "learning_rate", open_low=True, open_high=True)
    yield from bounds("optimizer.", optimizer, 0, math.inf, "clip_norm", open_low=True, open_high=True)
    yield from bounds("optimizer.", optimizer, 1, whole if train.steps is None else train.steps, "accumulate")
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
            yield from bounds("optimizer.schedule.", schedule, 0, whole, "warmup_steps")
            yield from bounds("optimizer.schedule.", schedule, 0, 1, "end")
        case OneCycle():
            yield from bounds("optimizer.schedule.", schedule, 0, 1, "peak", open_low=True, open_high=True)
            yield from bounds("optimizer.schedule.", schedule, 1, math.inf, "start_divisor", "end_divisor")
        case Exponential():
            yield from bounds("optimizer.schedule.", schedule, 0, 1, "decay", open_low=True)
            yield from bounds("optimizer.schedule.", schedule, 1, whole, "every")
    objective = config.objective
    yield from bounds("objective.", objective, 0, 1, "label_smoothing")
    yield (
        objective.label_smoothing == 0 or objective.labels == "one_hot",
        ("objective.label_smoothing needs objective.labels one_hot"),
    )
    yield (
        objective.form == "logits" or objective.labels == "one_hot",
        ("objective.form probabilities is a product with the labels: it needs objective.labels one_hot"),
    )


# --- Experiment files -----------------------------------------------------------------------------------------------


def load_experiment(path: str | Path) -> Config:
    """The config of the experiment file ``path``, which is Python code and is run.

    Raises UserError where the file is missing, does not run, or defines no ``config``.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no experiment file {path}: give the path of a .py file, such as experiments/quickstart.py")
    try:
        config = runpy.run_path(str(path)).get("config")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (Exception, SystemExit) as error:
        raise UserError(f"{path} does not run: {type(error).__name__}: {' '.join(str(error).split())}") from error
    if not isinstance(config, Config):
        raise UserError(f"{path} defines no config: it must hold one `config = Config(…)` of flaxmnist.config")
    return config
