"""Batch normalisation: padding, devices, and the statistics that evaluations use."""

from dataclasses import dataclass, replace

import jax
import numpy as np
import pytest
from conftest import assert_same, fit_on_one, small
from flax import nnx
from jax import numpy as jnp

import flaxmnist as fm
from flaxmnist.config import Adam, Data
from flaxmnist.data.sets import Split
from flaxmnist.errors import UserError
from flaxmnist.store import exports
from flaxmnist.store.load import evaluate_run, load_checkpoint


class Normalised(nnx.Module):
    """Two dense layers, each with batch normalisation, and dropout between them."""

    def __init__(self, inputs: int, classes: int, rngs: nnx.Rngs):
        self.first, self.last = nnx.Linear(inputs, 8, rngs=rngs), nnx.Linear(8, classes, rngs=rngs)
        self.inner, self.outer = fm.BatchNorm(8, rngs=rngs), fm.BatchNorm(classes, rngs=rngs)
        self.dropout = fm.Dropout(0.2)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.inner(self.first(x.reshape(x.shape[0], -1))))
        return self.outer(self.last(self.dropout(x)))


@dataclass(frozen=True)
class Model:
    """A small model with batch normalisation."""

    def make(self, shape, classes, rngs):
        return Normalised(shape[0] * shape[1] * shape[2], classes, rngs)


def normalised(**train):
    """Return an experiment with batch normalisation whose evaluations use averaged weights."""
    return small(Model(), optimizer=Adam(learning_rate=1e-2), ema_decay=0.9, **train)


def test_padding_does_not_count(normal):
    x, norm = normal(5, 4, 4, 3), fm.BatchNorm(3, momentum=0.0, rngs=nnx.Rngs(0))
    norm.weights = jnp.array([1.0, 1, 1, 0, 0])
    normalised = norm(x)
    reference = nnx.BatchNorm(3, momentum=0.0, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(normalised[:3], reference(x[:3]), atol=1e-5)
    np.testing.assert_allclose(norm.mean[...], reference.mean[...], atol=1e-6)
    np.testing.assert_allclose(norm.var[...], reference.var[...], atol=1e-5)
    norm.eval()
    reference.eval()
    np.testing.assert_allclose(norm(x), reference(x), atol=1e-5)


@dataclass(frozen=True)
class Plain:
    """A linear model with Flax's own batch normalisation."""

    def make(self, shape, classes, rngs):
        conv, norm = nnx.Conv(shape[2], 2, (3, 3), rngs=rngs), nnx.BatchNorm(2, momentum=0.5, rngs=rngs)
        return nnx.Sequential(conv, norm, lambda x: x.mean((1, 2)), nnx.Linear(2, classes, rngs=rngs))


def test_flax_batch_norm_is_refused_if_it_would_count_padding(few):
    with pytest.raises(UserError, match=r"nnx\.BatchNorm would count the padding of incomplete batches: use flaxmnist"):
        fit_on_one(small(Plain()), few)
    drop = Data(name="digits", last_batch="drop")
    one, two = (fm.fit(small(Plain(), data=drop), few, devices=devices) for devices in (1, 2))
    assert one.result.test_loss == pytest.approx(two.result.test_loss, rel=1e-4)


# --- train.statistics_images ----------------------------------------------------------------------------------------


def test_evaluations_use_the_statistics_of_training_images_with_the_averaged_weights(few):
    run = fit_on_one(normalised(statistics_images=50), few)
    model = run.model
    indices = np.linspace(0, 69, 50).round().astype(int)
    x = few.train.images[indices].reshape(50, -1) / np.float32(255)
    for layer, norm in ((model.first, model.inner), (model.last, model.outer)):
        x = layer(x)
        np.testing.assert_allclose(norm.mean[...], x.mean(0), atol=1e-5)
        np.testing.assert_allclose(norm.var[...], x.var(0), atol=1e-5)
        x = nnx.relu(norm(x))
    running = fit_on_one(normalised(), few)
    assert_same(running.state.params, run.state.params)  # training does not depend on it
    assert running.result.test_loss != run.result.test_loss


@pytest.mark.slow
def test_checkpoints_and_exports_have_these_statistics(few, fit_until, tmp_path):
    config = normalised(statistics_images=50, evaluate_every=4, checkpoint_every=6)
    full = fit_on_one(config, few, tmp_path / "full")
    fit_until(9, config, few, tmp_path / "stopped")
    short = fit_on_one(replace(config, train=replace(config.train, steps=9)), few)
    assert evaluate_run(tmp_path / "stopped", config=config, data=few).loss == short.result.test_loss
    assert_same(fit_on_one(config, few, tmp_path / "stopped", resume=True).state, full.state)
    assert evaluate_run(tmp_path / "full", config=config, data=few).loss == full.result.test_loss
    expected = evaluate_run(tmp_path / "full", config=config).loss  # of all digits
    exports.write(load_checkpoint(tmp_path / "full", config=config), tmp_path / "export")
    for name in ("model.safetensors", "model.stablehlo"):
        loss = exports.evaluate(tmp_path / "export" / name, config=config).loss
        assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "options"),
    [(2, {"backend": "jit"}), (2, {"backend": "pmap"}), (4, {"model_parallel": 2})],
    ids=["jit", "pmap", "model parallel"],
)
def test_several_devices_have_these_statistics(devices, options, few):
    config = normalised(statistics_images=50, evaluate_every=6)
    one = fit_on_one(config, few)
    other = fm.fit(config, few, devices=devices, **options)
    assert [record.get("loss") for record in other.history] == pytest.approx(
        [record.get("loss") for record in one.history], rel=1e-4
    )


@pytest.mark.slow
def test_sweeps_have_these_statistics(few, monkeypatch):
    config = normalised(statistics_images=50, evaluate_every=6)
    runs = [fit_on_one(replace(config, seed=seed), few) for seed in range(2)]
    exact = fm.sweep(config, few, seeds=2, exact=True, devices=1)
    assert [trial.test_loss for trial in exact.members] == [run.result.test_loss for run in runs]
    monkeypatch.setattr("flaxmnist.sweeps.plan.runs_sequentially", lambda *_: False)
    for devices in (1, 2):
        sweep = fm.sweep(config, few, seeds=2, devices=devices)
        assert [trial.test_loss for trial in sweep.members] == pytest.approx([run.result.test_loss for run in runs])


class Counter(Normalised):
    """The same, which counts its calls."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.calls = nnx.Variable(jnp.zeros(()))

    def __call__(self, x):
        self.calls[...] += 1
        return super().__call__(x)


@dataclass(frozen=True)
class Counted:
    def make(self, shape, classes, rngs):
        return Counter(shape[0] * shape[1] * shape[2], classes, rngs)


@pytest.mark.slow
def test_training_does_not_depend_on_evaluations(few, fit_until, tmp_path):
    """Statistics for evaluation are no input of training, even if the model counts its calls."""
    config = replace(normalised(statistics_images=50, evaluate_every=4), model=Counted())
    full = fit_on_one(config, few)
    fit_until(9, config, few, tmp_path)
    assert_same(fit_on_one(config, few, tmp_path, resume=True).state, full.state)
    assert_same(fit_on_one(replace(config, train=replace(config.train, evaluate_every=None)), few).state, full.state)


def test_images_sorted_by_class_are_taken_from_all_classes(few):
    order = np.argsort(few.train.labels, kind="stable")
    data = replace(few, train=Split(*(array[order] for array in few.train)))
    model = fit_on_one(normalised(statistics_images=7), data).model
    x = data.train.images[[0, 12, 23, 34, 46, 58, 69]].reshape(7, -1) / np.float32(255)
    np.testing.assert_allclose(model.inner.mean[...], model.first(x).mean(0), atol=1e-5)


def test_a_model_without_batch_normalisation_has_no_statistics(few, tmp_path):
    with pytest.raises(UserError, match=r"^train\.statistics_images needs a model with batch normalisation: leave it"):
        fit_on_one(small(statistics_images=50), few, tmp_path / "run")
    assert not (tmp_path / "run").exists()
