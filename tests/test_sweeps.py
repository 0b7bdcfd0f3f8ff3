"""Sweeps: trials against single runs, results, invalid arguments, ensembles and the command."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest
from conftest import MODELS, ROOT, assert_same, small

import flaxmnist as fm
from flaxmnist.config import SGD, Adam, Exponential, Objective, OneCycle, TruncatedNormal
from flaxmnist.devices import parallel, program
from flaxmnist.errors import UserError
from flaxmnist.show import plots
from flaxmnist.sweeps import ensembles, parts, sweeps


def swept(config, data, **options) -> fm.Sweep:
    """Run a sweep on one of the eight devices of the test process."""
    return fm.sweep(config, data, devices=1, **options)


def training_loss(sweep, trial: int) -> np.ndarray:
    columns = sweep.curves
    return columns["loss"][(columns["member"] == trial) & ~columns["validation"]]


def loss_of(run) -> list[float]:
    return [record["loss"] for record in run.history if record["split"] == "train"]


def with_dropout(name: str):
    return replace(MODELS[name], dropout=0.5) if name != "softmax" else MODELS[name]


# --- Trials against single runs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["softmax", pytest.param("cnn", marks=pytest.mark.slow)])
def test_sequential_trials_are_bitwise_identical_to_single_runs(model, few):
    config = small(with_dropout(model), optimizer=Adam(), evaluate_every=7, ema_decay=0.9)
    sweep = swept(config, few, seeds=[5, 2], over={"optimizer.learning_rate": [1e-3, 1e-2]})
    assert [(line["fields"]["optimizer.learning_rate"], line["seed"]) for line in sweep.members] == [
        (1e-3, 5),
        (1e-3, 2),
        (1e-2, 5),
        (1e-2, 2),
    ]
    for trial, line in enumerate(sweep.members):
        optimizer = Adam(learning_rate=line["fields"]["optimizer.learning_rate"])
        run = fm.fit(replace(config, seed=line["seed"], optimizer=optimizer), few, devices=1)
        assert {name: line[name] for name in line if name in run.result} == {
            name: run.result[name] for name in line if name in run.result
        }
        np.testing.assert_array_equal(training_loss(sweep, trial), np.float32(loss_of(run)))


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


QUICK = {"learning rate", "b1"}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in VARIED]
)
def test_vectorised_trials_equal_single_runs_up_to_rounding(name, few, monkeypatch):
    """The losses of 50 steps differ by at most 1e-5, relative, and there is only one program."""
    programs = []
    init = program.TrialProgram.__init__
    monkeypatch.setattr(program.TrialProgram, "__init__", lambda self, *a: programs.append(1) or init(self, *a))
    monkeypatch.setattr(sweeps, "runs_sequentially", lambda config, share_order: False)
    config, field, values = VARIED[name]
    sweep = swept(config, few, seeds=2, over={field: values})
    assert len(programs) == 1
    for trial, line in enumerate(sweep.members):
        single = sweeps.fields.replace(replace(config, seed=line["seed"]), field, line["fields"][field])
        run = fm.fit(single, few, devices=1)
        np.testing.assert_allclose(training_loss(sweep, trial), loss_of(run), rtol=1e-5)


@pytest.mark.parametrize("share_order", [False, True])
def test_trials_are_distributed_over_devices(share_order, few):
    """Five trials on two devices need three sequential blocks of two, or one block of six with padding."""
    config = small("mlp", steps=8)
    one, two = (fm.sweep(config, few, seeds=5, share_order=share_order, devices=count) for count in (1, 2))
    assert len(two.members) == 5
    for a, b in zip(one.members, two.members, strict=True):
        assert a["seed"] == b["seed"]
        assert a["test_loss"] == pytest.approx(b["test_loss"], rel=1e-5)
        assert share_order or a["params_sha256"] == b["params_sha256"]


def test_shared_order_is_that_of_the_first_seed(few):
    config = small("mlp", steps=12)
    sweep = swept(config, few, seeds=[3, 4], share_order=True)
    for trial, seed in enumerate([3, 4]):
        run = fm.fit(replace(config, seed=seed, data=replace(config.data, order_seed=3)), few, devices=1)
        np.testing.assert_allclose(training_loss(sweep, trial), loss_of(run), rtol=1e-5)
    exact = swept(config, few, seeds=[3, 4], share_order=True, exact=True)
    assert exact.members[1]["params_sha256"] == run.result["params_sha256"]


@pytest.mark.slow
def test_sweep_over_a_field_that_changes_shapes(few):
    config = small("mlp", steps=6)
    sweep = swept(config, few, seeds=1, over={"model.hidden": [8, (8, 4)]})
    assert [group["fields"] for group in sweep.groups] == [{"model.hidden": 8}, {"model.hidden": (8, 4)}]
    configs = [sweeps.fields.replace(config, "model.hidden", hidden) for hidden in ((8,), (8, 4))]
    runs = [fm.fit(config, few, devices=1) for config in configs]
    assert [line["params_sha256"] for line in sweep.members] == [run.result["params_sha256"] for run in runs]


def test_memory_limits_the_trials_per_program(few, monkeypatch):
    config = small(steps=4)
    programs = []
    init = program.TrialProgram.__init__
    monkeypatch.setattr(program.TrialProgram, "__init__", lambda self, *a: programs.append(self) or init(self, *a))
    one_block = swept(config, few, seeds=8, share_order=True)
    (eight,) = programs
    assert eight.size == 8
    monkeypatch.setattr(parallel, "device_memory", lambda mesh: (eight.bytes - 1) / sweeps.MEMORY_FRACTION)
    two_blocks = swept(config, few, seeds=8, share_order=True)
    assert [compiled.size for compiled in programs] == [8, 8, 4]
    for a, b in zip(one_block.members, two_blocks.members, strict=True):
        assert a["test_loss"] == pytest.approx(b["test_loss"], rel=1e-5)


# --- Results --------------------------------------------------------------------------------------------------------


def test_diverged_trial_is_marked_and_others_continue(few):
    sweep = swept(small(), few, seeds=2, over={"optimizer.learning_rate": [0.1, 1e38]}, share_order=True)
    bad, good = ([line for line in sweep.members if (line["failed"] is not None) == failed] for failed in (True, False))
    assert [line["fields"]["optimizer.learning_rate"] for line in bad] == [1e38] * 2
    assert all("the loss at step" in line["failed"] and line["test_accuracy"] is None for line in bad)
    assert len(good) == 2
    assert [group["failed"] for group in sweep.groups] == [0, 2]
    assert sweep.result["best"]["fields"] == {"optimizer.learning_rate": 0.1}
    assert json.loads(json.dumps(sweep.result, allow_nan=False)) == sweep.result


def test_best_setting_needs_validation_images(few):
    over = {"optimizer.learning_rate": [1e-5, 0.1]}
    sweep = swept(small(), few, seeds=3, over=over)
    best = sweep.result["best"]
    assert best["fields"] == {"optimizer.learning_rate": 0.1}
    accuracies = [line["test_accuracy"] for line in sweep.members if line["fields"] == best["fields"]]
    assert best["test"]["mean"] == pytest.approx(np.mean(accuracies))
    (other,) = sweep.result["comparisons"]
    assert other["n"] == 3
    assert other["mean"] < 0
    assert other["reference"] == "small optimizer.learning_rate=0.1"
    without = swept(small(), replace(few, validation=None), seeds=2, over=over)
    assert {group["split"] for group in without.groups} == {"test"}
    assert without.result["best"] is None
    assert without.result["comparisons"][0]["reference"] == "small optimizer.learning_rate=1e-05"


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"optimizer.lerning_rate": [1]}, "there is no field optimizer.lerning_rate: SGD has no 'lerning_rate'"),
        ({"model.hidden.size": [1]}, "there is no field model.hidden.size"),
        ({"model.dropout": [2.0]}, r"model.dropout must lie in \[0, 1\)"),
        ({"train.patience": [3]}, "cannot stop early|train.patience"),
        ({"train.batch_size": []}, "there is nothing to train"),
        ({"train.steps": [None]}, "exactly one of train.steps and train.epochs must be set"),
        ({"seed": [1, 2]}, "seed cannot be swept"),
    ],
)
def test_invalid_sweeps(over, message, few):
    with pytest.raises(UserError, match=message):
        swept(small("mlp"), few, seeds=1, over=over)


def test_too_large_a_sweep_is_refused_before_it_fills_memory(few):
    with pytest.raises(UserError, match="a sweep has at most 100,000 trials"):
        swept(small("mlp"), few, seeds=10**12)


def test_experiments_need_different_names(few):
    with pytest.raises(UserError, match="need different names, but these are small, small"):
        sweeps.run([(small(), few), (small("mlp"), few)], [0], [{}], devices=1)


# --- Saved sweeps ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved_sweep(few, tmp_path_factory):
    """A sweep of two experiments with two learning rates each, and its folder."""
    folder = tmp_path_factory.mktemp("sweep")
    config = small("mlp", evaluate_every=5)
    experiments = [(config, few), (replace(small(evaluate_every=5), name="other"), few)]
    settings = [{"optimizer.learning_rate": rate} for rate in (0.01, 0.1)]
    return sweeps.run(experiments, [0, 1, 2], settings, devices=1, workdir=folder), folder


def test_trials_load_from_the_folder(saved_sweep, few):
    sweep, folder = saved_sweep
    loaded = parts.load_trials(folder)
    assert [line for line, _ in loaded] == sweep.members
    for line, model in loaded[::5]:
        assert fm.evaluate(model, *few.test).accuracy == line["test_accuracy"]


def test_ensemble_averages_probabilities(saved_sweep, digits):
    sweep, folder = saved_sweep
    best = sweep.result["best"]
    models = [
        model
        for line, model in parts.load_trials(folder)
        if (line["experiment"], line["fields"]) == (best["experiment"], best["fields"])
    ]
    ensemble = ensembles.evaluate(folder, 2)
    mean = np.mean([fm.predict(model, digits.test.images)[1] for model in models[:2]], axis=0)
    assert ensemble.together.accuracy == (mean.argmax(1) == digits.test.labels).mean()
    assert ensemble.together == ensembles.score(mean, digits.test.labels)
    assert len(ensemble.members) == 2
    assert ensemble.count == 360
    with pytest.raises(UserError, match="has 3 trials of its best setting"):
        ensembles.evaluate(folder, 4)


def test_figures_have_labelled_axes(saved_sweep):
    sweep, _ = saved_sweep
    for figure in (plots.curves(sweep), plots.distribution(sweep), plots.against(sweep, "optimizer.learning_rate")):
        (axes,) = figure.axes
        assert "accuracy (%)" in axes.get_xlabel() + axes.get_ylabel()


def launch(script: str, *arguments) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    command = [sys.executable, "-W", "error", ROOT / "launch" / f"{script}.py", *arguments]
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment, timeout=300, check=False
    )


@pytest.mark.slow
def test_sweep_command(tmp_path):
    experiment = tmp_path / "small.py"
    experiment.write_text(
        "from flaxmnist.config import *\n"
        "config = Config(name='small', model=Softmax(), optimizer=SGD(learning_rate=0.1), data=Data(name='digits'),\n"
        "    train=Train(batch_size=50, epochs=2, evaluate_every=10))\n"
    )
    arguments = [
        experiment,
        "--seeds",
        3,
        "--over",
        "optimizer.learning-rate=0.01,0.1",
        "--workdir",
        tmp_path / "swept",
    ]
    first = launch("sweep", *arguments)
    assert first.returncode == 0, first.stderr
    assert "best: small optimizer.learning_rate=0.1: test accuracy 0." in first.stdout
    assert "same seeds, p = " in first.stdout
    resumed = launch("sweep", *arguments, "--resume")
    assert resumed.stdout == first.stdout
    refused = launch("sweep", *arguments)
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) == 1
    evaluated = launch("evaluate", tmp_path / "swept", "--ensemble")
    assert evaluated.returncode == 0, evaluated.stderr
    assert "ensemble of 3" in evaluated.stdout
    assert "360 images" in evaluated.stdout
    without_workdir = launch("sweep", *arguments[:3], "--random", 2, "--over", "optimizer.learning-rate=1e-3..1,log")
    assert without_workdir.returncode == 2


@pytest.mark.slow
def test_killed_sweep_resumes_to_the_same_results(tmp_path):
    """Kill the sweep as soon as the first part is written."""
    arguments = [ROOT / "experiments/quickstart.py", "--seeds", 3, "--over", "train.epochs=4,6", "--workdir"]
    full = launch("sweep", *arguments, tmp_path / "full")
    assert full.returncode == 0, full.stderr
    command = [sys.executable, ROOT / "launch/sweep.py", *arguments, tmp_path / "killed"]
    with subprocess.Popen(list(map(str, command)), env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"}) as process:
        while not list((tmp_path / "killed").glob("parts/*.npz")):
            assert process.poll() is None
        process.kill()
    resumed = launch("sweep", *arguments, tmp_path / "killed", "--resume")
    assert "resuming: 3 trials are finished" in resumed.stderr
    one, other = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("full", "killed"))
    assert one["members"] == other["members"]
    with np.load(tmp_path / "full/curves.npz") as a, np.load(tmp_path / "killed/curves.npz") as b:
        assert_same(dict(a), dict(b))


def test_devices_exchange_no_bytes(few):
    from flaxmnist.data import order
    from flaxmnist.devices import parallel
    from flaxmnist.speed import scaling

    config = order.resolve_length(small("mlp", steps=4), 70)
    mesh = parallel.make_mesh(4)
    compiled = program.TrialProgram(config, (), few, program.put_split(few.train, mesh), mesh, 2, False)
    assert scaling.exchanged_bytes(compiled) == 0
    assert jax.device_count() == 8
