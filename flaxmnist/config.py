"""An experiment as frozen dataclasses, validated on construction.

An experiment file defines one ``config = Config(…)``. Models, optimizers, schedules and initial values are small
dataclasses, so that every field is used; a model may be your own. The run folder and the devices are not part of it.
"""

import math
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

from flaxmnist.errors import UserError
from flaxmnist.fields import In, Kinds, check_fields

# Bounds of fields, which are checked when a config is made and shown by --help.
Count = Annotated[int, In(1, 2**31 - 1)]  # int32
Natural = Annotated[int, In(0, 2**31 - 1)]
Finite = Annotated[float, In(-math.inf, math.inf, "()")]
NonNegative = Annotated[float, In(0, math.inf, "[)")]
Positive = Annotated[float, In(0, math.inf, "()")]
Fraction = Annotated[float, In(0, 1)]
BelowOne = Annotated[float, In(0, 1, "[)")]
AboveZero = Annotated[float, In(0, 1, "(]")]
Side = Annotated[int, In(1, 28)]  # pixels
Sample = Annotated[int, In(1, 10_000)]  # images, in one batch

# --- Initial values -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Constant:
    """The same value everywhere."""

    value: Finite = 0.0  # value


@dataclass(frozen=True)
class Normal:
    """Normal distribution with mean 0."""

    stddev: NonNegative = 1.0  # standard deviation


@dataclass(frozen=True)
class TruncatedNormal:
    """Normal distribution with mean 0, truncated at two standard deviations."""

    stddev: NonNegative = 0.1  # standard deviation before truncation


@dataclass(frozen=True)
class Uniform:
    """Uniform distribution on [low, high)."""

    low: Finite = 0.0  # lower bound
    high: Finite = 1.0  # upper bound


@dataclass(frozen=True)
class Glorot:
    """Uniform on ±scale·√(6 / (inputs + outputs)) (Glorot & Bengio 2010)."""

    scale: NonNegative = 1.0  # factor on the bound


@dataclass(frozen=True)
class LeCun:
    """Truncated normal with standard deviation scale·√(1 / inputs) after truncation (LeCun et al. 1998)."""

    scale: NonNegative = 1.0  # factor on the standard deviation


Initial = Constant | Normal | TruncatedNormal | Uniform | Glorot | LeCun

# --- Models ---------------------------------------------------------------------------------------------------------


@runtime_checkable
class Model(Protocol):
    """A frozen dataclass that makes a Flax module. Yours may be defined in an experiment file or in a notebook."""

    def make(self, shape: tuple[int, ...], classes: int, rngs: Any) -> Any:
        """Return an ``nnx.Module`` for images of ``shape`` (height, width, channels), with weights drawn from ``rngs``.

        It is called as ``module(images)``, with float images [batch, height, width, channels] in [0, 1], and returns
        logits [batch, classes]. In a sweep, float fields may be traced; in an export, ``images.shape[0]`` is symbolic.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class SoftmaxConfig:
    """Softmax regression: one dense layer from pixels to classes."""

    dropout: BelowOne = 0.0  # fraction of the pixels dropped in a training step
    kernel_init: Initial = Constant(0.0)  # initial weights
    bias_init: Initial = Constant(0.0)  # initial biases

    def make(self, shape: tuple[int, ...], classes: int, rngs: Any) -> Any:
        from flaxmnist.core import models

        return models.Softmax(shape=shape, classes=classes, rngs=rngs, **models.arguments(self))


@dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """Dense layers with ReLU between them."""

    hidden: tuple[Annotated[int, In(1, 2**20)], ...] = (512,)  # units of each hidden layer, first to last
    dropout: BelowOne = 0.0  # fraction of each hidden layer's units dropped in a training step
    kernel_init: Initial = LeCun()  # initial weights
    bias_init: Initial = Constant(0.0)  # initial biases

    def make(self, shape: tuple[int, ...], classes: int, rngs: Any) -> Any:
        from flaxmnist.core import models

        return models.MLP(shape=shape, classes=classes, rngs=rngs, **models.arguments(self))


@dataclass(frozen=True, kw_only=True)
class CNNConfig:
    """Convolutions, each with 2×2 max-pooling and ReLU; then a dense layer with ReLU, dropout, and a dense layer."""

    features: tuple[Annotated[int, In(1, 2**16)], ...] = (32, 64)  # channels of each convolution
    kernel: tuple[Side, ...] = (5,)  # sides of the square kernels, in pixels: one for all, or one per convolution
    space_to_depth: Side = 1  # side of the blocks of pixels that become channels before the first convolution; 1: none
    padding: Literal["SAME", "VALID"] = "SAME"  # SAME keeps the size (stride 1), VALID loses kernel − 1 pixels
    dense: Annotated[int, In(1, 2**20)] = 1024  # units of the hidden dense layer
    dropout: BelowOne = 0.0  # fraction of the hidden dense layer's units dropped in a training step
    kernel_init: Initial = LeCun()  # initial weights
    bias_init: Initial = Constant(0.0)  # initial biases

    def make(self, shape: tuple[int, ...], classes: int, rngs: Any) -> Any:
        from flaxmnist.core import models

        return models.CNN(shape=shape, classes=classes, rngs=rngs, **models.arguments(self))


MODELS = SoftmaxConfig, MLPConfig, CNNConfig

# --- Schedules: factors on the learning rate ------------------------------------------------------------------------


@runtime_checkable
class Schedule(Protocol):
    """A frozen dataclass that makes a schedule, built in or your own."""

    def make(self, rate: float, updates: int) -> Any:
        """Return an ``optax.Schedule`` with the full learning rate ``rate``, for a run of ``updates`` updates."""
        ...


class BuiltInSchedule:
    """The method that all schedules in this file share."""

    def make(self, rate: float, updates: int) -> Any:
        from flaxmnist.core import optim

        return optim.make_schedule(self, rate, updates)


@dataclass(frozen=True)
class Flat(BuiltInSchedule):
    """Constant learning rate."""


@dataclass(frozen=True, kw_only=True)
class Cosine(BuiltInSchedule):
    """Cosine decay from the full rate to ``end`` times the full rate, after a linear warm-up from zero."""

    warmup_steps: Natural = 0  # length of the warm-up, in updates
    end: Fraction = 0.0  # final rate as a fraction of the full rate


@dataclass(frozen=True, kw_only=True)
class OneCycle(BuiltInSchedule):
    """Cosine increase from 1/start_divisor to the full rate, then decrease to 1/end_divisor (Smith & Topin 2017)."""

    peak: Annotated[float, In(0, 1, "()")] = 0.3  # position of the full rate, as a fraction of the run
    start_divisor: Annotated[float, In(1)] = 25.0  # full rate divided by the first rate
    end_divisor: Annotated[float, In(1)] = 1e5  # full rate divided by the last rate


@dataclass(frozen=True, kw_only=True)
class Exponential(BuiltInSchedule):
    """Continuous exponential decay by a factor of ``decay`` per ``every`` updates."""

    decay: AboveZero = 0.95  # factor
    every: Count = 1000  # updates per factor


@dataclass(frozen=True, kw_only=True)
class WarmupStableDecay(BuiltInSchedule):
    """Linear increase from zero, the full rate, then linear decrease to ``end`` of it (Hu et al. 2024, MiniCPM)."""

    warmup: BelowOne = 0.1  # length of the increase, as a fraction of the run
    decay: Fraction = 0.2  # length of the decrease, as a fraction of the run
    end: Fraction = 0.0  # final rate as a fraction of the full rate


SCHEDULES = Flat, Cosine, OneCycle, Exponential, WarmupStableDecay

# --- Optimizers -----------------------------------------------------------------------------------------------------
# Each has a case in core.optim.make_optimizer. The fields that a sweep may trace are in sweeps.plan.TRACED.


@dataclass(frozen=True, kw_only=True)
class BaseOptimizer:
    """The fields that all optimizers have."""

    learning_rate: Positive  # step size; the full rate of the schedule
    schedule: Annotated[Schedule, Kinds(SCHEDULES, Schedule.make)] = Flat()  # learning rate over the run
    clip_norm: Positive | None = None  # maximum global norm of the gradient; None: no clipping
    accumulate: Count = 1  # batches per update, gradients averaged equally; an incomplete last group is dropped


@dataclass(frozen=True, kw_only=True)
class SGD(BaseOptimizer):
    """Stochastic gradient descent."""

    learning_rate: Positive = 0.1  # step size; the full rate of the schedule
    momentum: BelowOne = 0.0  # fraction of the previous update to add
    nesterov: bool = False  # Nesterov's momentum (needs momentum above 0)


@dataclass(frozen=True, kw_only=True)
class Adam(BaseOptimizer):
    """Adam (Kingma & Ba 2015); with weight decay, AdamW (Loshchilov & Hutter 2019)."""

    learning_rate: Positive = 1e-3  # step size; the full rate of the schedule
    b1: BelowOne = 0.9  # decay of the moving average of the gradients
    b2: BelowOne = 0.999  # decay of the moving average of their squares
    eps: Positive = 1e-8  # added to the root of the average square
    weight_decay: NonNegative = 0.0  # decoupled: an update subtracts learning rate × weight_decay × weight
    decay_vectors: bool = True  # apply weight decay to biases and scales, too


@dataclass(frozen=True, kw_only=True)
class Lion(BaseOptimizer):
    """Lion: the sign of a moving average of the gradients (Chen et al. 2023)."""

    learning_rate: Positive = 1e-4  # step size; the full rate of the schedule
    b1: BelowOne = 0.9  # weight of the moving average in an update
    b2: BelowOne = 0.99  # decay of the moving average of the gradients
    weight_decay: NonNegative = 0.0  # decoupled: an update subtracts learning rate × weight_decay × weight
    decay_vectors: bool = True  # apply weight decay to biases and scales, too


@dataclass(frozen=True, kw_only=True)
class Muon(BaseOptimizer):
    """Orthogonalised momentum (Jordan et al. 2024) for kernels of known layers; Nadam (Dozat 2016) for the rest."""

    learning_rate: Positive = 0.02  # step size; the full rate of the schedule
    momentum: BelowOne = 0.95  # decay of the moving average of the gradients
    newton_schulz_steps: Annotated[int, In(1, 20)] = 5  # iterations that orthogonalise the average


OPTIMIZERS = SGD, Adam, Lion, Muon


@runtime_checkable
class Optimizer(Protocol):
    """A frozen dataclass of your own that makes an optimizer."""

    def make(self, updates: int) -> Any:
        """Return an ``optax.GradientTransformation`` for a run of ``updates`` updates.

        A field ``accumulate``, if there is one, is the number of batches per update. In a sweep, float fields may be
        traced.
        """
        ...


# --- The rest of an experiment --------------------------------------------------------------------------------------


@runtime_checkable
class Loss(Protocol):
    """A frozen dataclass with the loss that training minimises, built in or your own."""

    def losses(self, logits: Any, labels: Any) -> Any:
        """Return the loss of each image, [batch], from its logits [batch, classes] and label [batch]."""
        ...


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Cross-entropy."""

    form: Literal["logits", "probabilities"] = "logits"  # numerically stable, or −Σ y·log(softmax) as written
    labels: Literal["integer", "one_hot"] = "integer"  # labels index the logits, or are multiplied with them
    label_smoothing: Fraction = 0.0  # fraction of the target spread evenly over the classes (one_hot only)

    def losses(self, logits: Any, labels: Any) -> Any:
        from flaxmnist.core import objective

        return objective.cross_entropy(self, logits, labels)


@dataclass(frozen=True, kw_only=True)
class FocalLoss:
    """Focal loss: cross-entropy times (1 − p)^gamma, with the probability p of the label (Lin et al. 2017)."""

    gamma: NonNegative = 2.0  # weight of hard images; 0: cross-entropy

    def losses(self, logits: Any, labels: Any) -> Any:
        from flaxmnist.core import objective

        return objective.focal(logits, labels, self.gamma)


OBJECTIVES = Objective, FocalLoss


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Random transformations of the training images, another one in each step; all 0: none."""

    batch_shift: Annotated[int, In(0, 14)] = 0  # maximum shift of a whole batch along each axis, in whole pixels: fast
    shift: Annotated[float, In(0, 14)] = 0.0  # maximum shift of each image along each axis, in pixels
    rotate: Annotated[float, In(0, 180)] = 0.0  # maximum rotation, in degrees
    scale: BelowOne = 0.0  # maximum change of size, as a fraction
    elastic: Annotated[float, In(0, 14)] = 0.0  # RMS of a smooth random displacement, in pixels (Simard et al. 2003)


DataName = Literal[
    "mnist", "fashion_mnist", "kmnist", "emnist/balanced", "emnist/byclass", "emnist/bymerge", "emnist/digits",
    "emnist/letters", "emnist/mnist", "digits", "idx", "npz", "arrays",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Data:
    """The data set and the order of its images."""

    name: DataName = "mnist"  # idx, npz: files in --data-dir; arrays: in memory, for fit
    validation: Natural | None = None  # first images of the training file held out; None: 5,000, or an eighth if less
    order: Literal["shuffled", "file"] = "shuffled"  # shuffled again each epoch, or as in the file
    order_seed: Natural | None = None  # seed of the shuffling; None: the run's seed
    last_batch: Literal["keep", "drop"] = "keep"  # keep or drop the last batch of an epoch if it is short
    augment: Augment = Augment()  # random transformations of the training images


@dataclass(frozen=True, kw_only=True)
class Train:
    """The length of training, and what happens during it."""

    batch_size: Count = 100  # images per step
    steps: Count | None = None  # length in steps (set this or epochs)
    epochs: Count | None = None  # length in passes over the training images (set this or steps)
    log_every: Count = 100  # steps between training records
    evaluate_every: Count | None = None  # steps between evaluations on the validation images; None: only at the end
    checkpoint_every: Count | None = None  # steps between checkpoints; None: one every minute, and at the end
    keep: Count = 2  # number of latest checkpoints to keep, besides the best
    report: Literal["loss", "epoch_cost", "batch_loss", "batch_accuracy", "probabilities"] = "loss"  # console lines
    start_from: str | None = None  # run folder whose weights to start from; None: the model's initial values
    frozen: tuple[str, ...] = ()  # names of parameters or layers that are not trained, such as "convs" or "convs.0"
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # dtype inside a training step; weights stay float32
    convolution: Literal["auto", "direct", "winograd"] = "auto"  # algorithm; auto: the fastest, see core/convolution.py
    ema_decay: BelowOne | None = None  # decay per step of the average of the weights for evaluation; None: no average
    statistics_images: Sample | None = None  # evaluate with batch statistics of N training images; None: running means
    monitor: str = "accuracy"  # validation metric of the best checkpoint and of patience, see core/metrics.py
    stop_accuracy: AboveZero | None = None  # stop at this validation accuracy, a fraction; None: never
    skip_nonfinite: Natural = 0  # consecutive steps with non-finite loss or gradient to skip before the run fails
    patience: Count | None = None  # stop after this many evaluations without improvement; None: never

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
    seed: Natural = 0  # seed of initial values, dropout, augmentation and (unless data.order_seed is set) order
    model: Annotated[Model, Kinds(MODELS, Model.make)]
    optimizer: Annotated[BaseOptimizer | Optimizer, Kinds(OPTIMIZERS, Optimizer.make)]
    objective: Annotated[Loss, Kinds(OBJECTIVES, Loss.losses, default=True)] = Objective()
    data: Data = Data()
    train: Train

    def __post_init__(self):
        check_fields(self)
        check_rules(self)


def check_rules(config: Config) -> None:
    """Raise UserError if ``config`` breaks a rule that the bounds of a single field cannot express."""
    train, data, objective = config.train, config.data, config.objective
    model, optimizer = config.model, config.optimizer
    if not re.fullmatch(r"\w[\w.+-]{0,99}", config.name):
        raise UserError(f"name must be a word of at most 100 letters, digits and _.+-, but is {config.name!r}")
    if (train.steps is None) == (train.epochs is None):
        raise UserError(
            f"exactly one of train.steps and train.epochs must be set, but they are {train.steps} and {train.epochs}: "
            "set one and leave the other None (on the command line: --train.epochs None)"
        )
    if train.stop_accuracy is not None or train.patience is not None:
        need = "train.stop_accuracy and train.patience need"
        if train.evaluate_every is None:
            raise UserError(f"{need} evaluations during training: set train.evaluate_every")
        if data.validation == 0:
            raise UserError(f"{need} validation images: data.validation must not be 0")
    if isinstance(model, MLPConfig) and len(model.hidden) > 100:
        raise UserError(f"model.hidden must have at most 100 layers, but has {len(model.hidden)}")
    if isinstance(model, CNNConfig) and not model.features:
        raise UserError("model.features must have at least one convolution")
    if isinstance(model, CNNConfig) and len(model.kernel) not in (1, len(model.features)):
        raise UserError("model.kernel must be one side for all convolutions, or as many sides as model.features")
    for name in ("kernel_init", "bias_init"):
        initial = getattr(model, name, None)
        if isinstance(initial, Uniform) and initial.low >= initial.high:
            raise UserError(f"model.{name}: low must be below high")
    if isinstance(model, MODELS) and isinstance(model.bias_init, Glorot | LeCun):
        raise UserError(
            "model.bias_init cannot be Glorot or LeCun, which need a matrix: use Constant, Normal or Uniform"
        )
    accumulate = getattr(optimizer, "accumulate", 1)
    if train.steps is not None and accumulate > train.steps:
        raise UserError(f"optimizer.accumulate must be at most train.steps, {train.steps}, but is {accumulate}")
    if isinstance(optimizer, SGD) and optimizer.nesterov and optimizer.momentum == 0:
        raise UserError("optimizer.nesterov needs optimizer.momentum above 0")
    if isinstance(objective, Objective) and objective.labels == "integer":
        if objective.label_smoothing > 0:
            raise UserError("objective.label_smoothing needs objective.labels one_hot")
        if objective.form == "probabilities":
            raise UserError("objective.form probabilities needs objective.labels one_hot")
