"""A training step and arrays of the user's: examples, records, resuming, sweeps, devices, and mistakes."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import ROOT, assert_same, fit_on_one, main, read_lines, slow, small

import flaxmnist as fm
from flaxmnist.config import Augment, Data
from flaxmnist.errors import UserError
from flaxmnist.experiment import read_experiment
from flaxmnist.sweeps.plan import Experiment
from flaxmnist.sweeps.runner import run_sweep

EXAMPLES = ROOT / "experiments/steps"


def train_records(run) -> list[dict]:
    return [record for record in run.history if record["split"] == "train"]


# --- Arrays of your own ---------------------------------------------------------------------------------------------


def weights_of_images(config, data):
    """Weigh each training image by a random number that depends on the seed."""
    return jnp.asarray(np.random.default_rng(config.seed).random(len(data.train.labels), np.float32))


def weighted_step(config, state, batch, weights, *, axis_name=None):
    """Weigh the loss of each image, and record the mean weight."""

    def losses(logits, batch):
        return weights[batch.indices] * optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)

    gradient = fm.gradient(config, state, state.params, batch, losses=losses, axis_name=axis_name)
    total = fm.sum_over_devices(jnp.sum(batch.weights * weights[batch.indices]), axis_name)
    state, metrics = fm.update(config, state, gradient)
    return state, metrics._replace(extra=metrics.extra | {"weight": total / metrics.batch.images})


OWN = {"step": weighted_step, "arrays": weights_of_images}


def test_a_step_gets_its_arrays_and_its_metrics_are_recorded(few, tmp_path):
    run = fit_on_one(small(steps=10), few, tmp_path, **OWN)
    first = train_records(run)[0]
    weights = weights_of_images(run.config, few)
    assert first["objective"] == pytest.approx(first["weight"] * np.log(10), rel=1e-5)
    assert first["loss"] == pytest.approx(np.log(10))
    epoch = train_records(run)[:5]
    mean = np.average([record["weight"] for record in epoch], weights=[16, 16, 16, 16, 6])
    assert mean == pytest.approx(float(weights.mean()), rel=1e-5)
    info = json.loads((tmp_path / "config.json").read_text())["step"]
    assert info["name"] == "test_own_steps.py:weighted_step" and len(info["sha256"]) == 64


@pytest.mark.parametrize(("devices", "backend"), [slow(2, "jit"), (8, "jit"), slow(2, "pmap")])
def test_a_step_trains_the_same_on_several_devices(devices, backend, few):
    data = Data(name="digits", augment=Augment(shift=2.0))
    runs = [fm.fit(small(steps=10, data=data), few, devices=count, backend=backend, **OWN) for count in (1, devices)]
    for one, other in zip(*map(train_records, runs), strict=True):
        assert one == pytest.approx(other, rel=1e-4) if isinstance(one, float) else one.keys() == other.keys()
        assert one["objective"] == pytest.approx(other["objective"], rel=1e-4)
        assert one["weight"] == pytest.approx(other["weight"], rel=1e-5)


def test_a_resumed_run_with_a_step_is_bitwise_identical(few, fit_until, tmp_path):
    config = small(evaluate_every=1, checkpoint_every=5, steps=12)
    full = fit_on_one(config, few, **OWN)
    fit_until(7, config, few, tmp_path, **OWN)
    with pytest.raises(UserError, match=r"step \(test_own_steps\.py:weighted_step before, the built-in one now\)"):
        fit_on_one(config, few, tmp_path, resume=True)
    assert_same(fit_on_one(config, few, tmp_path, resume=True, **OWN).state, full.state)


@pytest.mark.slow
def test_a_sweep_trains_the_runs_of_its_seeds(few):
    config = small(steps=8)
    sweep = fm.sweep(config, few, seeds=2, exact=True, devices=1, **OWN)
    vectorised = fm.sweep(config, few, seeds=2, share_order=True, devices=1, **OWN)
    for seed in range(2):
        run = fit_on_one(replace(config, seed=seed), few, **OWN)
        assert sweep.members[seed].params_sha256 == run.result.params_sha256
    alike = fm.fit(replace(config, seed=1, data=replace(config.data, order_seed=0)), few, devices=1, **OWN)
    assert vectorised.members[1].test_loss == pytest.approx(alike.result.test_loss, rel=1e-5)


# --- The examples ---------------------------------------------------------------------------------------------------


def test_sharpness_aware_minimisation(few):
    """A radius of almost 0 gives plain gradient descent, a large one gives another step."""
    step = read_experiment(EXAMPLES / "sam.py").options["step"]
    plain = fit_on_one(small(steps=3), few)

    def distance(radius):
        step.__globals__["RADIUS"] = radius
        other = fit_on_one(small(steps=3), few, step=step)
        return float(optax.tree.norm(optax.tree.sub(other.state.params, plain.state.params)))

    assert distance(1e-6) < 1e-5 < 1e-3 < distance(1.0)


def test_distillation(few, tmp_path):
    """A student of the teacher's own kind learns its predictions."""
    fit_on_one(small("mlp", steps=60), few, tmp_path)
    functions = read_experiment(EXAMPLES / "distillation.py").options
    functions["step"].__globals__["TEACHER"] = tmp_path
    run = fit_on_one(small("mlp", steps=60), few, **functions)
    first, *_, last = train_records(run)
    assert last["objective"] < first["objective"] - 0.1
    assert run.result.test_accuracy > 0.4


@pytest.mark.slow
def test_distillation_of_a_committee(few, tmp_path, monkeypatch):
    """The targets are the probabilities of the members in turn, for the images of the step."""
    config = small("mlp", data=Data(name="digits", augment=Augment(shift=2.0)), steps=2)
    run_sweep([Experiment(config, few)], [0, 1], [{}], devices=1, workdir=tmp_path)
    functions = read_experiment(ROOT / "experiments/distilled.py").options
    monkeypatch.setitem(functions["arrays"].__globals__, "COMMITTEE", tmp_path)
    records = train_records(fit_on_one(config, few, **functions))
    before_step = [
        fm.create_state(config, (28, 28), 10),
        fit_on_one(fm.replace(config, "train.steps", 1), few, **functions).state,
    ]
    config = fm.resolve_length(config, len(few.train.labels))
    batches = fm.batch_indices(config, len(few.train.labels), 0, 2)
    for index, member in enumerate(fm.load_members(tmp_path)):
        images = fm.augmented_images(config, jnp.asarray(few.train.images[batches[index]]), index)
        targets, probabilities = (fm.predict(model, images)[1] for model in (member, before_step[index].model))
        expected = -(targets * np.log(probabilities)).sum(1).mean()
        assert records[index]["objective"] == pytest.approx(expected, rel=1e-4)


def test_norms_of_layers_are_recorded(few):
    run = fit_on_one(small("mlp", steps=3), few, **read_experiment(EXAMPLES / "layer_norms.py").options)
    for record in train_records(run):
        norms = [record[f"gradient_norm/layers.{index}"] for index in range(2)]
        assert record["gradient_norm"] == pytest.approx(np.hypot(*norms), rel=1e-6)


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.py")), ids=lambda file: file.stem)
def test_an_example_is_short(file):
    assert len(file.read_text().splitlines()) <= 25


def test_a_step_may_augment_the_images_itself(few):
    """Images of zeros leave only the biases to train."""

    def step(config, state, batch, arrays, *, axis_name=None):
        zeros = jnp.zeros(batch.images.shape)
        gradient = fm.gradient(config, state, state.params, batch, images=zeros, axis_name=axis_name)
        return fm.update(config, state, gradient)

    params = fit_on_one(small(steps=3), few, step=step).state.params["dense"]
    assert params["bias"].any() and not params["kernel"].any()


# --- Experiment files -----------------------------------------------------------------------------------------------

FILE = """
import flaxmnist as fm
from flaxmnist.config import *

config = Config(name="own", model=SoftmaxConfig(), optimizer=SGD(), data=Data(name="digits"), train=Train(steps=8))

def arrays(config, data):
    return len(data.train.labels)

def step(config, state, batch, arrays, *, axis_name=None):
    state, metrics = fm.train_step(config, state, batch, axis_name=axis_name)
    return state, metrics._replace(extra={"images": fm.sum_over_devices(arrays, axis_name) * 1.0})  # comment
"""


def test_an_experiment_file_may_define_step_and_arrays(tmp_path, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file, run = tmp_path / "own.py", Path("run")
    file.write_text(FILE)
    assert main("train")(["own.py", "--workdir", "run", "--devices", "1"]) == 0
    assert [r["images"] for r in read_lines(run) if r["split"] == "train"] == [1257.0]
    assert main("sweep")(["own.py", "--workdir", "sweep", "--seeds", "2", "--devices", "1"]) == 0
    file.write_text(FILE.replace("# comment", "# other"))
    assert main("train")(["own.py", "--workdir", "run", "--train.steps", "9", "--resume", "--devices", "1"]) == 0
    file.write_text(FILE.replace("def step", "def other_step"))
    assert main("train")(["own.py", "--workdir", "run", "--train.steps", "10", "--resume", "--devices", "1"]) == 2
    file.write_text(FILE + "\nstep = 3\n")
    with pytest.raises(UserError, match="step must be a function"):
        fm.load_experiment(file)


# --- Mistakes -------------------------------------------------------------------------------------------------------


def with_mistake(mistake):
    def step(config, state, batch, arrays, *, axis_name=None):
        state, metrics = fm.train_step(config, state, batch, axis_name=axis_name)
        match mistake:
            case "no metrics":
                return state
            case "shape":
                params = jax.tree.map(lambda leaf: leaf[:5], state.params)
                return replace(state, params=params), metrics
            case "name":
                return state, metrics._replace(extra={"accuracy": metrics.batch.loss})
            case "metric":
                return state, metrics._replace(extra={"weights": batch.weights})
            case "losses":
                function = lambda logits, batch: logits.mean()  # noqa: E731
                return fm.update(config, state, fm.gradient(config, state, state.params, batch, losses=function))

    def without_axis_name(config, state, batch, arrays): ...

    return without_axis_name if mistake == "arguments" else step


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("no metrics", "the step must return a pair of TrainState and Metrics, as flaxmnist.update does"),
        ("shape", r"a state like its argument, but state\.params\['dense'\]\['bias'\] is float32 \[10\] before and"),
        ("name", r"metrics\.extra has 'accuracy', which every record has already"),
        ("losses", r"losses must return one loss for each of 16 images, but returns the shape \[\]"),
        ("arguments", r"step must take \(config, state, batch, arrays, \*, axis_name=None\)"),
        ("metric", r"scalar metrics, but metrics\.extra\['weights'\] has shape \[16\]"),
    ],
)
def test_mistakes_are_errors_before_anything_is_written(mistake, message, few, tmp_path):
    with pytest.raises(UserError, match=message):
        fit_on_one(small(), few, tmp_path / "run", step=with_mistake(mistake))
    with pytest.raises(UserError, match=message):
        fm.sweep(small(), few, seeds=1, step=with_mistake(mistake))
    assert not (tmp_path / "run").exists()
