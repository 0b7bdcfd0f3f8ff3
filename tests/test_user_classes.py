"""Models, optimizers, schedules and losses of the user's: frozen dataclasses, trained, saved, swept and exported."""

import re
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import ROOT, assert_same, fit_on_one, small
from flax import nnx

import flaxmnist as fm
from flaxmnist import fields
from flaxmnist.config import SGD, Adam, BaseOptimizer, Config
from flaxmnist.data.sets import Split
from flaxmnist.errors import UserError
from flaxmnist.store import exports
from flaxmnist.store.load import evaluate_run, load_checkpoint
from flaxmnist.sweeps.plan import Experiment
from flaxmnist.sweeps.runner import run_sweep

RESNET = fm.load_experiment(ROOT / "experiments/resnet.py").model


class Transformer(nnx.Module):
    """A small vision transformer: patches of 7×7 pixels, one layer of attention, dropout."""

    def __init__(self, shape, classes, width, rate, rngs):
        self.patches = nnx.Conv(shape[2], width, (7, 7), strides=(7, 7), padding="VALID", rngs=rngs)
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (shape[0] // 7 * (shape[1] // 7), width)))
        self.norm, self.end = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, width, decode=False, dropout_rate=rate, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.logits = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, x):
        x = self.patches(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1]) + self.positions[...][None]
        x = x + self.dropout(self.attention(self.norm(x)))
        return self.logits(self.end(x).mean(1))


@dataclass(frozen=True)
class ViT:
    """A vision transformer."""

    width: int = 8
    rate: float = 0.1

    def make(self, shape, classes, rngs):
        return Transformer(shape, classes, self.width, self.rate, rngs)


class Normalised(nnx.Module):
    """Two dense layers with batch normalisation and dropout."""

    def __init__(self, inputs, classes, rngs):
        self.first, self.last = nnx.Linear(inputs, 8, rngs=rngs), nnx.Linear(8, classes, rngs=rngs)
        self.norm, self.dropout = fm.BatchNorm(8, rngs=rngs), nnx.Dropout(0.2, rngs=rngs)

    def __call__(self, x):
        x = self.norm(self.first(x.reshape(x.shape[0], -1)))
        return self.last(self.dropout(nnx.relu(x)))


@dataclass(frozen=True)
class Dense:
    """A small model with everything that a training step must carry."""

    def make(self, shape, classes, rngs):
        return Normalised(shape[0] * shape[1] * shape[2], classes, rngs)


class Scaled(nnx.Module):
    """A linear layer whose logits are multiplied by a number, or by an array that is no variable."""

    def __init__(self, shape, classes, factor, rngs):
        self.linear = nnx.Linear(shape[0] * shape[1], classes, rngs=rngs)
        self.factor, self.ones = factor, jnp.ones((1, classes))

    def __call__(self, x):
        return self.linear(x.reshape(x.shape[0], -1)) * self.factor * self.ones


@dataclass(frozen=True)
class Scale:
    """A model with a float field that may be traced, unless ``strict``."""

    factor: float = 1.0
    strict: bool = False

    def make(self, shape, classes, rngs):
        return Scaled(shape, classes, float(self.factor) if self.strict else self.factor, rngs)


@pytest.fixture(scope="session")
def colours(few):
    """The digits as 32×32 images of three channels, one of them empty."""

    def convert(split: Split) -> Split:
        images = np.pad(split.images, ((0, 0), (2, 2), (2, 2), (0, 2)))
        images[..., 1] = images[..., 0] // 2
        return Split(images, split.labels)

    return replace(few, **{name: convert(split) for name, split in few.splits().items()})


MODELS = {"dense": Dense(), "resnet": RESNET, "vit": ViT()}


# --- Configs --------------------------------------------------------------------------------------------------------


@dataclass
class NotFrozen:
    def make(self, shape, classes, rngs): ...


@dataclass(frozen=True)
class Unable:
    width: int = 3


@pytest.mark.parametrize("model", [NotFrozen(), Unable(), 3], ids=str)
def test_a_model_must_be_a_frozen_dataclass_with_make(model):
    with pytest.raises(UserError, match="model must be Softmax or MLP or CNN or a frozen dataclass with make, but is"):
        small(model)


def test_fields_of_a_model_are_checked():
    with pytest.raises(UserError, match=r"model\.width must be int, but is 'wide'"):
        small(ViT(width="wide"))  # pyright: ignore[reportArgumentType]


def test_reading_a_config_needs_its_classes():
    config = small(ViT(width=4))
    values = fields.to_json(config)
    assert values["model"] == {"kind": "test_user_classes.py:ViT", "width": 4, "rate": 0.1}
    assert fields.from_json(values, Config, fields.user_classes(config)) == config
    with pytest.raises(
        UserError, match=r"^model is test_user_classes.py:ViT: pass the file that defines it as --exper"
    ):
        fields.from_json(values, Config)


EXPERIMENT = """
from __future__ import annotations
from dataclasses import dataclass
from flaxmnist.config import *

@dataclass(frozen=True)
class Mine:
    width: int = {width}
    def make(self, shape, classes, rngs): ...

config = Config(name="mine", model=Mine(), optimizer=SGD(), train=Train(steps=1))
"""


def test_an_experiment_file_is_loaded_once_unless_it_changes(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(EXPERIMENT.format(width=1))
    first, again = fm.load_experiment(file), fm.load_experiment(file)
    assert first == again and type(first.model) is type(again.model)
    file.write_text(EXPERIMENT.format(width=2))
    assert fm.load_experiment(file).model.width == 2  # pyright: ignore[reportAttributeAccessIssue]


# --- Training -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_resumed_run_is_bitwise_identical_and_its_export_too(name, few, fit_until, tmp_path):
    config = small(
        MODELS[name], optimizer=Adam(learning_rate=1e-2), evaluate_every=1, checkpoint_every=5, ema_decay=0.9, steps=12
    )
    full = fit_on_one(config, few, tmp_path / "full")
    fit_until(7, config, few, tmp_path / "stopped")
    resumed = fit_on_one(config, few, tmp_path / "stopped", resume=True)
    assert_same(full.state, resumed.state)
    assert (tmp_path / "full/metrics.jsonl").read_bytes() == (tmp_path / "stopped/metrics.jsonl").read_bytes()
    assert_same(fit_on_one(config, few, tmp_path / "full", resume=True).state, full.state)  # it is finished
    loaded = fm.load_run(tmp_path / "full", config=config)
    assert_same(loaded.state, full.state)
    with pytest.raises(UserError, match="pass the file that defines it as --experiment"):
        fm.load_run(tmp_path / "full")
    exports.write(load_checkpoint(tmp_path / "full", config=config), tmp_path / "export")
    test = evaluate_run(tmp_path / "full", config=config).loss
    assert exports.evaluate(tmp_path / "export/model.stablehlo").loss == pytest.approx(test, rel=1e-5)
    assert exports.evaluate(tmp_path / "export/model.safetensors", config=config).loss == pytest.approx(test, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_images_may_have_colours(name, colours):
    run = fit_on_one(small(MODELS[name], optimizer=Adam(learning_rate=1e-2), steps=40), colours)
    losses = [record["loss"] for record in run.history if record["split"] == "train"]
    assert np.mean(losses[-5:]) < 0.8 * losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_sweep_trains_the_runs_of_its_seeds(name, few):
    config = small(MODELS[name], optimizer=Adam(learning_rate=1e-2), steps=8)
    sweep = fm.sweep(config, few, seeds=2, exact=True, devices=1)
    runs = [fit_on_one(replace(config, seed=seed), few) for seed in range(2)]
    assert [trial.params_sha256 for trial in sweep.members] == [run.result.params_sha256 for run in runs]
    assert [trial.test_loss for trial in sweep.members] == [run.result.test_loss for run in runs]


@pytest.mark.slow
def test_losses_with_batch_normalisation_do_not_depend_on_devices(digits):
    """An epoch of 26 batches, of which the last is short, on shards that are not equal.

    The learning rate is low: otherwise, training amplifies the errors of rounding, from 1e-7 to 1e-3.
    """
    config = fm.load_experiment(ROOT / "experiments/resnet.py")
    config = fm.replace(config, "optimizer.learning_rate", 5e-4)
    config = replace(config, train=replace(config.train, epochs=1, log_every=1, evaluate_every=None))
    losses = {}
    for devices in (1, 2, 8):
        history = fm.fit(config, digits, devices=devices).history
        losses[devices] = [record["loss"] for record in history if record["split"] == "train"]
    assert len(losses[1]) == 26
    np.testing.assert_allclose(losses[2], losses[1], rtol=1e-5)
    np.testing.assert_allclose(losses[8], losses[1], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
def test_float_fields_are_traced_if_possible(strict, few, monkeypatch, caplog):
    """Otherwise each value gets its own program. The module also has an array that is no variable."""
    monkeypatch.setattr("flaxmnist.sweeps.plan.runs_sequentially", lambda *_: False)
    caplog.set_level("INFO", logger="flaxmnist")
    config = small(Scale(strict=strict), steps=8)
    sweep = fm.sweep(config, few, seeds=1, over={"model.factor": [0.5, 2.0]}, devices=1)
    assert ("model.factor cannot be traced" in caplog.text) == strict
    for factor, trial in zip((0.5, 2.0), sweep.members, strict=True):
        run = fit_on_one(replace(config, model=replace(config.model, factor=factor)), few)
        assert trial.test_loss == pytest.approx(run.result.test_loss, rel=1e-5)


# --- Optimizers, schedules, losses ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Halving:
    """A schedule that halves the rate at the middle of the run."""

    def make(self, rate, updates):
        return lambda step: jnp.where(step < updates // 2, rate, rate / 2)


@dataclass(frozen=True)
class SignDescent:
    """Gradient descent by the signs of the gradient."""

    rate: float = 0.01

    def make(self, updates):
        return optax.sign_sgd(Halving().make(self.rate, updates))


@dataclass(frozen=True)
class Hinge:
    """Multi-class hinge loss."""

    margin: float = 1.0

    def losses(self, logits, labels):
        wrong = jnp.where(jax.nn.one_hot(labels, logits.shape[1]) > 0, -jnp.inf, logits).max(1)
        return jax.nn.relu(self.margin + wrong - jnp.take_along_axis(logits, labels[:, None], 1)[:, 0])


@dataclass(frozen=True, kw_only=True)
class Signs(BaseOptimizer):
    """The same, with the fields of all optimizers."""

    def make(self, updates):
        return optax.sign_sgd(self.schedule.make(self.learning_rate, updates))


def test_an_optimizer_may_inherit_the_usual_fields(few):
    run = fit_on_one(small(optimizer=Signs(learning_rate=0.01, schedule=Halving()), steps=4), few)
    expected = fit_on_one(small(optimizer=SignDescent(), steps=4), few)
    assert_same(run.state.params, expected.state.params)
    rates = [record["learning_rate"] for record in run.history if record["split"] == "train"]
    assert rates == pytest.approx([0.01, 0.01, 0.005, 0.005])


def test_optimizer_schedule_and_loss_may_be_your_own(few, tmp_path):
    config = replace(small(optimizer=SignDescent(), steps=20), objective=Hinge())
    run = fit_on_one(config, few, tmp_path)
    first, *_, last = [record for record in run.history if record["split"] == "train"]
    assert first["objective"] == pytest.approx(1.0) and last["objective"] < 0.7
    assert first["loss"] == pytest.approx(np.log(10))  # the cross-entropy, as in evaluations
    assert fm.load_run(tmp_path, config=config).config == config
    sweep = fm.sweep(config, few, seeds=1, over={"optimizer.rate": [0.01, 0.02]}, share_order=True, devices=1)
    assert sweep.members[0].test_loss == pytest.approx(run.result.test_loss, rel=1e-4)
    assert_same(fit_on_one(small(optimizer=SGD(schedule=Halving())), few).state.step, jnp.int32(20))


@dataclass(frozen=True)
class Column:
    """A loss of the wrong shape."""

    def losses(self, logits, labels):
        return logits[:, :1]


def test_a_loss_of_the_wrong_shape_is_an_error(few, tmp_path):
    with pytest.raises(UserError, match=r"one loss for each of 16 images, but returns the shape \[16, 1\]"):
        fit_on_one(replace(small(), objective=Column()), few, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- Mistakes -------------------------------------------------------------------------------------------------------


class Growing(nnx.Module):
    def __init__(self, classes, rngs):
        self.linear = nnx.Linear(1, classes, rngs=rngs)

    def __call__(self, x):
        self.seen = nnx.Variable(x.mean())
        return self.linear(x.mean((1, 2)))


@dataclass(frozen=True)
class Wrong:
    """A model with a mistake."""

    mistake: str

    def make(self, shape, classes, rngs):
        match self.mistake:
            case "shape":
                return nnx.Linear(1, classes, rngs=rngs)  # of each pixel
            case "classes":
                return nnx.Sequential(lambda x: x.mean((1, 2)), nnx.Linear(1, classes + 1, rngs=rngs))
            case "state":
                return Growing(classes, rngs)
            case "function":
                return jnp.sum


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("shape", r"must return logits \[2, classes\] for 2 images, but returns \[2, 28, 28, 10\]"),
        ("classes", "must return 10 logits for each image, but returns 11"),
        ("state", "a call of the model changes the names or shapes of its variables"),
        ("function", r"Wrong\.make must return an nnx\.Module, but returned"),
    ],
)
def test_mistakes_are_errors_before_anything_is_written(mistake, message, few, tmp_path):
    with pytest.raises(UserError, match=message):
        fit_on_one(small(Wrong(mistake)), few, tmp_path / "run")
    with pytest.raises(UserError, match=message):
        run_sweep([Experiment(small(Wrong(mistake)), few)], [0], [{}], devices=1, workdir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Counting(nnx.Module):
    """A model that needs to know the number of images."""

    def __init__(self, classes, rngs):
        self.linear = nnx.Linear(784, classes, rngs=rngs)

    def __call__(self, x):
        return self.linear(x.reshape(len(x), -1))


@dataclass(frozen=True)
class Counted:
    def make(self, shape, classes, rngs):
        return Counting(classes, rngs)


def test_a_model_that_cannot_be_exported_is_reported(few, tmp_path, caplog):
    fit_on_one(small(Counted(), steps=1), few, tmp_path)
    exports.write(load_checkpoint(tmp_path, config=small(Counted())), tmp_path / "export")
    assert re.search(r"no model\.stablehlo: the model cannot be traced .* use images\.shape\[0\]", caplog.text)
