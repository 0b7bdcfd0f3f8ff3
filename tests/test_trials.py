"""Trials against single runs."""

import json
import threading
from dataclasses import replace

import jax
import numpy as np
import pytest
from conftest import MODELS, fit_on_one, slow, small

import flaxmnist as fm
from flaxmnist import fields
from flaxmnist.config import SGD, Adam, Exponential, Objective, OneCycle, TruncatedNormal
from flaxmnist.console import Progress
from flaxmnist.data import order
from flaxmnist.devices import parallel, program
from flaxmnist.speed import scaling
from flaxmnist.store.provenance import git_commit
from flaxmnist.sweeps.plan import Experiment, Group, group_trials, plan_trials
from flaxmnist.sweeps.results import SweepResult
from flaxmnist.sweeps.runner import compile_group
from flaxmnist.sweeps.trials import Trials


def training_loss(sweep, trial: int) -> np.ndarray:
    columns = sweep.curves
    return columns["loss"][(columns["member"] == trial) & ~columns["validation"]]


def loss_of(run) -> list[float]:
    return [record["loss"] for record in run.history if record["split"] == "train"]


def with_dropout(name: str):
    return replace(MODELS[name], dropout=0.5) if name != "softmax" else MODELS[name]


@pytest.mark.parametrize("model", ["softmax", slow("cnn")])
def test_sequential_trials_are_bitwise_identical_to_single_runs(model, few):
    config = small(with_dropout(model), optimizer=Adam(), evaluate_every=7, ema_decay=0.9)
    sweep = fm.sweep(config, few, seeds=[5, 2], over={"optimizer.learning_rate": [1e-3, 1e-2]}, devices=1)
    assert [(trial.fields["optimizer.learning_rate"], trial.seed) for trial in sweep.members] == [
        (1e-3, 5),
        (1e-3, 2),
        (1e-2, 5),
        (1e-2, 2),
    ]
    for index, trial in enumerate(sweep.members):
        optimizer = Adam(learning_rate=trial.fields["optimizer.learning_rate"])
        run = fit_on_one(replace(config, seed=trial.seed, optimizer=optimizer), few)
        common = vars(trial).keys() & vars(run.result).keys()
        assert common == {
            *("experiment", "seed", "test_accuracy", "validation_accuracy", "test_loss", "params_sha256"),
            *("test", "validation"),
        }
        assert {name: getattr(trial, name) for name in common} == {name: getattr(run.result, name) for name in common}
        np.testing.assert_array_equal(training_loss(sweep, index), np.float32(loss_of(run)))
        assert trial.train_seconds > 0 and trial.git_commit == git_commit()


VARIED = {
    "learning rate": (small(steps=50), "optimizer.learning_rate", [0.03, 0.1]),
    "schedule": (
        small(steps=50, optimizer=Adam(learning_rate=0.01, schedule=OneCycle())),
        "optimizer.learning_rate",
        [0.01, 0.02],
    ),
    "decay": (
        small(steps=50, optimizer=SGD(learning_rate=0.1, schedule=Exponential())),
        "optimizer.learning_rate",
        [0.05, 0.1],
    ),
    "momentum": (small(steps=50, optimizer=SGD(learning_rate=0.01)), "optimizer.momentum", [0.0, 0.9]),
    "b1": (small(steps=50, optimizer=Adam(learning_rate=1e-3)), "optimizer.b1", [0.8, 0.95]),
    "b2": (small(steps=50, optimizer=Adam(learning_rate=1e-3)), "optimizer.b2", [0.99, 0.999]),
    "weight decay": (small(steps=50, optimizer=Adam(learning_rate=1e-3)), "optimizer.weight_decay", [0.0, 0.1]),
    "dropout": (small(with_dropout("mlp"), steps=50), "model.dropout", [0.0, 0.4]),
    "label smoothing": (
        replace(small(steps=50), objective=Objective(labels="one_hot")),
        "objective.label_smoothing",
        [0.0, 0.1],
    ),
    "initial scale": (
        small(replace(MODELS["mlp"], kernel_init=TruncatedNormal(0.1)), steps=50),
        "model.kernel_init.stddev",
        [0.05, 0.2],
    ),
}


@pytest.mark.parametrize("name", ["b1", *(slow(name) for name in VARIED if name != "b1")])
def test_vectorised_trials_equal_single_runs_up_to_rounding(name, few):
    """The losses of 50 steps differ by at most 1e-5, relative, and there is only one program.

    Each trial has its own batches, as on GPU.
    """
    config, field, values = VARIED[name]
    trials = plan_trials([Experiment(config, few)], [0, 1], [{field: value} for value in values], share_order=False)
    (group,) = group_trials(trials, share_order=True, exact=False)
    assert group == Group(trials, (field,), sequential=False, share_order=True)
    compiled = compile_group(replace(group, share_order=False), parallel.make_mesh(1))
    assert compiled.size == 4
    training = Trials(compiled, trials, (field,))
    training.train(Progress(200, 0, 16), threading.Event(), lambda: False, lambda: None)
    for trial, points in zip(trials, training.curves, strict=True):
        run = fit_on_one(fields.replace(replace(config, seed=trial.config.seed), field, trial.fields[field]), few)
        losses = [point.loss for point in points if not point.validation]
        np.testing.assert_allclose(losses, loss_of(run), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("share_order", [False, True])
def test_trials_are_distributed_over_devices(share_order, few):
    """Five trials on two devices need three sequential blocks of two, or one block of six with padding."""
    config = small("mlp", steps=8)
    one, two = (fm.sweep(config, few, seeds=5, share_order=share_order, devices=count) for count in (1, 2))
    assert len(two.members) == 5
    for a, b in zip(one.members, two.members, strict=True):
        assert a.seed == b.seed
        assert a.test_loss == pytest.approx(b.test_loss, rel=1e-5)
        assert share_order or a.params_sha256 == b.params_sha256


def test_shared_order_is_that_of_the_first_seed(few):
    config = small(steps=12)
    sweep = fm.sweep(config, few, seeds=[3, 4], share_order=True, devices=1)
    for trial, seed in enumerate([3, 4]):
        run = fit_on_one(replace(config, seed=seed, data=replace(config.data, order_seed=3)), few)
        np.testing.assert_allclose(training_loss(sweep, trial), loss_of(run), rtol=1e-5)
    exact = fm.sweep(config, few, seeds=[3, 4], share_order=True, exact=True, devices=1)
    assert exact.members[1].params_sha256 == run.result.params_sha256


@pytest.mark.slow
def test_sweep_over_a_field_that_changes_shapes(few):
    config = small("mlp", steps=6)
    sweep = fm.sweep(config, few, seeds=1, over={"model.hidden": [8, (8, 4)]}, devices=1)
    assert [group.fields for group in sweep.groups] == [{"model.hidden": 8}, {"model.hidden": (8, 4)}]
    runs = [fit_on_one(fields.replace(config, "model.hidden", hidden), few) for hidden in ((8,), (8, 4))]
    assert [trial.params_sha256 for trial in sweep.members] == [run.result.params_sha256 for run in runs]


def test_diverged_trial_is_marked_and_others_continue(few):
    over = {"optimizer.learning_rate": [0.1, 1e38]}
    sweep = fm.sweep(small(), few, seeds=2, over=over, share_order=True, devices=1)
    bad, good = ([trial for trial in sweep.members if (trial.failed is not None) == bad] for bad in (True, False))
    assert [trial.fields["optimizer.learning_rate"] for trial in bad] == [1e38] * 2
    assert all("the loss at step" in trial.failed and trial.test_accuracy is None for trial in bad)
    assert len(good) == 2
    assert [group.failed for group in sweep.groups] == [0, 2]
    assert sweep.result.best.fields == {"optimizer.learning_rate": 0.1}
    text = json.dumps(fields.to_json(sweep.result), allow_nan=False)
    assert fields.from_json(json.loads(text), SweepResult) == sweep.result


def test_devices_exchange_no_bytes(few):
    config = order.resolve_length(small("mlp", steps=4), 70)
    mesh = parallel.make_mesh(4)
    compiled = program.TrialProgram(config, (), few, program.put_split(few.train, mesh), mesh, 2, False)
    assert scaling.exchanged_bytes(compiled) == 0
    assert jax.device_count() == 8
