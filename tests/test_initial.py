"""Training that starts from the weights of another run, and parameters that are not trained."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_same, fit_on_one, main, slow, small, user_error

import flaxmnist as fm
from flaxmnist.config import Adam, MLPConfig, Muon
from flaxmnist.core import steps
from flaxmnist.data import order
from flaxmnist.data.sets import Split

MLP = MLPConfig(hidden=(10,))  # as many as there are classes


@pytest.fixture(scope="module")
def teacher(few, tmp_path_factory):
    """The folder of a trained MLP with averaged weights."""
    folder = tmp_path_factory.mktemp("teacher")
    fit_on_one(small(MLP, steps=10, ema_decay=0.9), few, folder)
    return folder


def first_loss(run) -> float:
    return next(record["loss"] for record in run.history if record["split"] == "train")


def with_classes(data, classes):
    """Return ``data`` without the images of the last classes."""
    splits = {name: Split(*(a[split.labels < classes] for a in split)) for name, split in data.splits().items()}
    return replace(data, class_names=data.class_names[:classes], **splits)


def test_training_starts_from_the_averaged_weights_of_a_run(teacher, few, tmp_path):
    config = small(MLP, steps=5, start_from=str(teacher), ema_decay=0.5)
    run = fit_on_one(config, few, tmp_path / "run")
    state = fm.load_run(teacher).state
    rows = order.batch_indices(config, 70, 0, 1)[0]
    assert first_loss(run) == pytest.approx(fm.evaluate(state.model, *(a[rows] for a in few.train)).loss, rel=1e-5)
    assert json.loads((tmp_path / "run/config.json").read_text())["config"]["train"]["start_from"] == str(teacher)
    initial = state.model
    same = fit_on_one(replace(config, train=replace(config.train, start_from=None)), few, initial=initial)
    assert_same(same.state, run.state)
    assert fm.evaluate(initial, *few.test).count == 45, "its arrays are not donated"


@pytest.mark.slow
def test_a_resumed_run_does_not_need_the_other_run(teacher, few, fit_until, tmp_path):
    config = small(MLP, steps=12, evaluate_every=1, checkpoint_every=5, start_from=str(tmp_path / "teacher"))
    teacher.rename(tmp_path / "teacher")
    full = fit_on_one(config, few)
    fit_until(7, config, few, tmp_path / "run")
    (tmp_path / "teacher").rename(teacher)
    assert_same(fit_on_one(config, few, tmp_path / "run", resume=True).state, full.state)


@pytest.mark.slow
def test_a_sweep_starts_from_a_run(teacher, few):
    config = small(MLP, steps=5, start_from=str(teacher))
    sweep = fm.sweep(config, few, seeds=2, devices=1)
    runs = [fit_on_one(replace(config, seed=seed), few) for seed in range(2)]
    assert [trial.params_sha256 for trial in sweep.members] == [run.result.params_sha256 for run in runs]


@pytest.mark.parametrize("optimizer", [Adam(weight_decay=0.1), slow(Muon())])
def test_frozen_parameters_do_not_change(optimizer, few):
    config = small(MLP, optimizer=optimizer, steps=5, frozen=("layers.0", "layers.1.bias"), ema_decay=0.9)
    run, before = fit_on_one(config, few), steps.create_state(config, (28, 28, 1), 10)
    for weights in (run.state.params, run.state.ema):
        (first, last), (first_before, last_before) = (tree["layers"].values() for tree in (weights, before.params))
        assert_same((first, last["bias"]), (first_before, last_before["bias"]))
        assert not np.array_equal(last["kernel"], last_before["kernel"])
    batch = steps.take_batch(*map(jnp.asarray, few.train), jnp.arange(16, dtype=jnp.int32))
    gradient = fm.gradient(run.config, before, before.params, batch)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient.params["layers"][0]))


def test_a_head_for_other_classes_is_drawn_anew(teacher, few, caplog):
    caplog.set_level("INFO", logger="flaxmnist")
    config = small(MLP, steps=5, start_from=str(teacher), frozen=("layers.0",))
    run = fit_on_one(config, with_classes(few, 7))
    taught = fm.load_run(teacher).state.weights
    assert_same(run.state.params["layers"][0], taught["layers"][0])
    assert run.state.params["layers"][1]["bias"].shape == (7,)
    assert "another number of classes: layers.1.kernel keeps its initial values" in caplog.text


@pytest.mark.slow
def test_launch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--data.name", "digits", "--train.steps", "3", "--devices", "1"]
    assert main("train")(["speedrun", "--workdir", "a", *options]) == 0
    options += ["--train.start-from", "a", "--train.frozen", "convs.0"]
    assert main("train")(["speedrun", "--workdir", "b", *options]) == 0
    a, b = (fm.load_run(folder).state.weights["convs"] for folder in "ab")
    np.testing.assert_array_equal(a[0]["kernel"], b[0]["kernel"])
    assert not np.array_equal(a[1]["kernel"], b[1]["kernel"])


# --- Mistakes -------------------------------------------------------------------------------------------------------


def test_weights_must_fit(teacher, few, tmp_path):
    config = small(MLP, start_from=str(teacher))
    colours = {name: Split(np.repeat(s.images, 3, 3), s.labels) for name, s in few.splits().items()}
    wrong = {
        "the weights layers.0.bias of train.start_from": (replace(config, model=MLPConfig(hidden=(8,))), few, {}),
        "layers.0.kernel of train.start_from": (config, replace(few, **colours), {}),
        "is not a run folder": (small(MLP, start_from=str(tmp_path / "none")), few, {}),
        "has no weights dense.bias": (small("softmax", start_from=str(teacher)), few, {}),
        "pass only one": (config, few, {"initial": fm.load_run(teacher).model}),
        "initial has no weights dense.bias": (small("softmax"), few, {"initial": fm.load_run(teacher).model}),
    }
    for message, (wrong_config, data, options) in wrong.items():
        with user_error(message):
            fit_on_one(wrong_config, data, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_frozen_names_must_fit(few, tmp_path):
    with user_error("train.frozen layer fits no parameter: use the beginning of layers.0.bias, layers.0.kernel"):
        fit_on_one(small(MLP, frozen=("layer",)), few, tmp_path / "run")
    with user_error("train.frozen contains all parameters"):
        fm.sweep(small(MLP, frozen=("layers",)), few, seeds=1)
    assert not (tmp_path / "run").exists()
