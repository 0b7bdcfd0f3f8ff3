"""Runs on one and on several devices, with jit and pmap, have the same parameters and files."""

import functools
import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from conftest import MODELS, ROOT, assert_same, slow, small, user_error

import flaxmnist as fm
from flaxmnist import runs
from flaxmnist.config import SGD, Adam, Augment, Config, Data, MLPConfig, SoftmaxConfig
from flaxmnist.core import steps
from flaxmnist.data.sets import Split
from flaxmnist.devices import parallel, program
from flaxmnist.errors import UserError
from flaxmnist.speed import benchmarks, scaling
from flaxmnist.sweeps.plan import Experiment


def one_epoch(model: str, dropout: float = 0.0, **data) -> Config:
    """Return a config for one epoch of the digits: 1,257 images, the last batch of 41 padded to 64."""
    layers = MODELS[model] if dropout == 0 else replace(MODELS[model], dropout=dropout)
    optimizer = SGD(learning_rate=0.1, momentum=0.9)
    return small(layers, optimizer=optimizer, steps=20, batch_size=64, data=Data(name="digits", **data))


@pytest.fixture(scope="module")
def fit_on_one_device(digits):
    """A cached function that trains a config on one device."""
    return functools.cache(lambda config: fm.fit(config, digits, devices=1))


def assert_close(run, expected, atol) -> None:
    """Assert that the parameters of two runs differ by rounding only."""
    for a, b in zip(jax.tree.leaves(run.state.params), jax.tree.leaves(expected.state.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("model", ["softmax", slow("mlp"), slow("cnn")])
@pytest.mark.parametrize(
    ("backend", "devices"), [slow("jit", 2), slow("jit", 4), ("jit", 8), ("pmap", 4), slow("pmap", 8)]
)
def test_parameters_do_not_depend_on_devices(model, backend, devices, digits, fit_on_one_device):
    run = fm.fit(one_epoch(model), digits, backend=backend, devices=devices)
    assert (run.result.backend, run.result.devices) == (backend, devices)
    assert_close(run, fit_on_one_device(one_epoch(model)), 1e-5)


@pytest.mark.parametrize(("backend", "devices"), [("jit", 4), slow("jit", 8), slow("pmap", 8)])
def test_dropout_and_augmentation_do_not_depend_on_devices(backend, devices, digits, fit_on_one_device):
    config = one_epoch("mlp", 0.5, augment=Augment(batch_shift=1, shift=2.0, rotate=10.0))
    assert_close(fm.fit(config, digits, backend=backend, devices=devices), fit_on_one_device(config), 1e-5)


def test_a_model_must_fit_into_the_memory_of_its_devices(few, monkeypatch):
    """Split over eight devices, this state takes an eighth of its 3.3 MB on each, and little more."""
    monkeypatch.setattr(parallel, "machine_memory", lambda: 8 * 500_000)
    config = small(MLPConfig(hidden=(1024,)), steps=1)
    with user_error("the state of this model takes", "use a smaller model"):
        fm.fit(config, few, devices=8)
    runs.check(config, few, steps.train_step, None, parallel.make_mesh(8, model_parallel=8), "jit")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["jit", "pmap"])
def test_devices_with_only_padding(backend, digits):
    """Eight devices have 16 of 128 rows each; of a last batch of 96 images, the last two have only padding."""
    config = fm.load_experiment(ROOT / "experiments/mlp_scratch.py")
    config = replace(config, model=replace(config.model, hidden=(64,)), train=replace(config.train, epochs=3))
    train = Split(*(array[: 128 + 96] for array in digits.train))
    on_one, on_four, on_eight = (
        fm.fit(config, replace(digits, train=train), backend=backend, devices=devices) for devices in (1, 4, 8)
    )
    assert on_one.result.steps == 6
    for run in (on_four, on_eight):
        assert_close(run, on_one, 1e-5)


@pytest.mark.slow
def test_losses_stay_close_over_300_steps(digits):
    config = small("cnn", optimizer=Adam(learning_rate=1e-3), steps=300, batch_size=64)
    runs = [fm.fit(config, digits, backend=backend, devices=n) for backend, n in (("jit", 1), ("jit", 8), ("pmap", 8))]
    expected, *others = ([r["loss"] for r in run.history if r["split"] == "train"] for run in runs)
    for losses in others:
        np.testing.assert_allclose(losses, expected, rtol=0.02)


@pytest.mark.parametrize(("before", "after"), [slow(8, 1), slow(1, 8)])
def test_a_run_resumes_on_another_number_of_devices(before, after, few, tmp_path):
    config = small("mlp", evaluate_every=5, checkpoint_every=5)
    expected = fm.fit(config, few, devices=1)
    fm.fit(replace(config, train=replace(config.train, steps=10)), few, tmp_path, devices=before)
    resumed = fm.fit(config, few, tmp_path, resume=True, devices=after)
    assert [(r["step"], r["split"]) for r in resumed.history if r["step"] > 10] == [
        (r["step"], r["split"]) for r in expected.history if r["step"] > 10
    ]
    losses = [[r["loss"] for r in run.history if r["split"] == "train"] for run in (expected, resumed)]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    assert_close(resumed, expected, 1e-5)
    assert json.loads((tmp_path / "config.json").read_text())["devices"]["count"] == after


# --- Sharded parameters ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("devices", "model_parallel"), [(2, 2), slow(8, 4)])
@pytest.mark.parametrize("model", ["mlp", slow("cnn")])
def test_sharded_and_replicated_parameters_train_the_same(
    model, devices, model_parallel, digits, fit_on_one_device, tmp_path
):
    run = fm.fit(one_epoch(model), digits, tmp_path, devices=devices, model_parallel=model_parallel)
    assert_close(run, fit_on_one_device(one_epoch(model)), 1e-4)
    assert run.result.params_sha256 == json.loads((tmp_path / "result.json").read_text())["params_sha256"]
    assert_same(fm.load_run(tmp_path).state.params, run.state.params)


def test_kernels_and_their_optimizer_state_are_sharded(few):
    config = small(MLPConfig(hidden=(32,)), optimizer=Adam())
    mesh = parallel.make_mesh(8, model_parallel=4)
    state = program.initial_state(config, few, mesh)
    compiled = program.Program(config, state, program.put_split(few.train, mesh), mesh)
    state, _ = compiled(state, 0, 3)
    for tree in (state.params, state.opt_state[0].mu, state.opt_state[0].nu):
        first, last = (tree["layers"][index]["kernel"] for index in (0, 1))
        assert first.addressable_shards[0].data.shape == (8, 784), "32 outputs over 4 devices"
        assert last.addressable_shards[0].data.shape == (10, 8), "10 outputs are not divisible by 4, 32 inputs are"
        assert tree["layers"][0]["bias"].is_fully_replicated


@pytest.mark.parametrize(("size", "backend"), [(20, "jit"), slow(20, "pmap"), slow(6, "jit"), (6, "pmap")])
def test_a_batch_need_not_divide(size, backend, few):
    """Batches of 20 and 6 images, and a shorter last one, on 8 devices and on one."""
    config = small(batch_size=size, steps=15)
    one, eight = (fm.fit(config, few, devices=devices, backend=backend) for devices in (1, 8))
    for name in ("loss", "gradient_norm"):
        expected, found = ([r[name] for r in run.history if r["split"] == "train"] for run in (one, eight))
        np.testing.assert_allclose(found, expected, rtol=1e-5)


# --- Invalid combinations -------------------------------------------------------------------------------------------

INVALID = {
    "model_parallel": (small(), {"model_parallel": 3}, "--model-parallel 3 does not divide 8 devices"),
    "zero": (small(), {"model_parallel": 0}, "--model-parallel 0 does not divide"),
    "pmap": (small("mlp"), {"model_parallel": 2, "backend": "pmap"}, "--backend pmap supports neither"),
}


@pytest.mark.parametrize("name", INVALID)
def test_an_invalid_combination_is_an_error(name, few):
    config, options, message = INVALID[name]
    with pytest.raises(UserError, match=message):
        fm.fit(config, few, **options)


def test_a_model_that_cannot_be_sharded_is_an_error(few):
    data = replace(few, class_names=few.class_names[:7])
    with pytest.raises(UserError, match=r"divides no dimension of a dense kernel \(9×784, 7×9\)"):
        fm.fit(small(MLPConfig(hidden=(9,)), batch_size=5), data, devices=5, model_parallel=5)


# --- Communication --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["jit", "pmap"])
@pytest.mark.parametrize("model", ["softmax", slow("mlp"), slow("cnn")])
def test_a_step_exchanges_only_the_gradient_and_its_metrics(model, backend, few):
    """The metrics are the sums of loss, correct predictions and images; activations would grow with the batch."""
    trainer = benchmarks.Trainer(Experiment(small(model), few), parallel.make_mesh(8), backend)
    gradient = sum(leaf.nbytes for leaf in jax.tree.leaves(trainer.state.params))
    assert scaling.exchanged_bytes(trainer.compiled) - gradient in (8, 12)


@pytest.mark.slow
def test_scaling_report(few, monkeypatch):
    monkeypatch.setattr(benchmarks, "STRETCH_SECONDS", 0.01)
    monkeypatch.setattr(benchmarks, "ROUNDS", 1)
    rows = scaling.measure(Experiment(small(SoftmaxConfig(), batch_size=12), few))
    assert [(row["backend"], row["devices"]) for row in rows] == [(b, n) for b in ("jit", "pmap") for n in (1, 2, 4, 8)]
    assert {row["batch_size"] for row in rows} == {16}, "divisible by eight devices"
    assert all(row[kind]["ratio"] == 1 for row in rows if row["devices"] == 1 for kind in ("strong", "weak"))
    header, *lines = scaling.report(rows).splitlines()
    assert len(lines) == 8
    assert {len(line) for line in lines} == {len(header)}
