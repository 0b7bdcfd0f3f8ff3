"""Whole sweeps: their results, the memory they may use, and the command."""

import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pandas
import pytest
from conftest import ROOT, assert_same, small, user_error

import flaxmnist as fm
from flaxmnist.config import CNNConfig
from flaxmnist.console import Progress
from flaxmnist.devices import parallel
from flaxmnist.errors import UserError
from flaxmnist.show import plots
from flaxmnist.sweeps import runner
from flaxmnist.sweeps.plan import Experiment, group_trials, plan_trials
from flaxmnist.sweeps.trials import Trials

RATES = {"optimizer.learning_rate": [1e-5, 0.1]}


@pytest.fixture(scope="module")
def sweep(few) -> fm.Sweep:
    return fm.sweep(small(), few, seeds=3, over=RATES, devices=1)


def test_best_setting_needs_validation_images(sweep, few):
    best = sweep.result.best
    assert best.fields == {"optimizer.learning_rate": 0.1}
    accuracies = [trial.test_accuracy for trial in sweep.members if trial.fields == best.fields]
    assert best.test.mean == pytest.approx(np.mean(accuracies))
    (other,) = sweep.result.comparisons
    assert other.n == 3
    assert other.mean < 0
    assert other.loss.mean > 0
    assert other.reference == "small optimizer.learning_rate=0.1"
    without = fm.sweep(small(), replace(few, validation=None), seeds=2, over=RATES, devices=1)
    assert {group.split for group in without.groups} == {"test"}
    assert without.result.best is None
    assert without.result.comparisons[0].reference == "small optimizer.learning_rate=1e-05"


def test_members_and_groups_are_rows_for_pandas(sweep):
    members, groups = pandas.DataFrame(sweep.members), pandas.DataFrame(sweep.groups)
    assert [*members.columns] == [
        *("experiment", "fields", "seed", "test_accuracy", "validation_accuracy", "test_loss"),
        *("params_sha256", "failed", "test", "validation", "train_seconds", "git_commit"),
    ]
    assert members["fields"].tolist() == 3 * [{"optimizer.learning_rate": 1e-5}] + 3 * [
        {"optimizer.learning_rate": 0.1}
    ]
    assert members["seed"].tolist() == [0, 1, 2, 0, 1, 2]
    assert members["test_accuracy"].tolist() == [trial.test_accuracy for trial in sweep.members]
    assert {"experiment", "fields", "split", "failed", "n", "mean", "std", "ci95", "min", "max"} == {*groups.columns}
    assert groups["mean"].tolist() == [members["validation_accuracy"][rows].mean() for rows in ([0, 1, 2], [3, 4, 5])]


@pytest.mark.slow
def test_several_experiments_in_figures_with_labelled_axes(few):
    configs = small("mlp", evaluate_every=5), replace(small(evaluate_every=5), name="other")
    settings = [{"optimizer.learning_rate": rate} for rate in (0.01, 0.1)]
    sweep = runner.run_sweep(
        [Experiment(config, few) for config in configs], [0, 1, 2], settings, share_order=True, devices=1
    )
    assert [group.title for group in sweep.groups] == [
        f"{name} optimizer.learning_rate={rate}" for name in ("small", "other") for rate in (0.01, 0.1)
    ]
    for figure in (plots.curves(sweep), plots.distribution(sweep), plots.against(sweep, "optimizer.learning_rate")):
        (axes,) = figure.axes
        assert "accuracy (%)" in axes.get_xlabel() + axes.get_ylabel()


def test_equal_seeds_and_settings_are_trained_once(few):
    sweep = fm.sweep(small("mlp", steps=1), few, seeds=[3, 3], over={"model.hidden": [[8], [8]]}, devices=1)
    assert [trial.seed for trial in sweep.members] == [3]
    assert sweep.result.over == {"model.hidden": [[8]]}
    assert sweep.result.best.test.n == 1


def test_every_setting_is_checked_before_the_first_is_trained(few, tmp_path):
    model = CNNConfig(features=(2, 2), kernel=(3,), dense=4, padding="VALID")
    settings = [{"model.kernel": kernel} for kernel in (3, 25, 5)]
    with user_error("28×28"):
        runner.run_sweep([Experiment(small(model), few)], [0], settings, devices=1, workdir=tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


def test_experiments_need_different_names(few):
    with pytest.raises(UserError, match="need different names, but these are small, small"):
        runner.run_sweep([Experiment(small(), few), Experiment(small("mlp"), few)], [0], [{}], devices=1)


@pytest.mark.slow
def test_memory_limits_the_trials_per_program(few, monkeypatch):
    config, mesh = small(steps=4), parallel.make_mesh(1)
    trials = plan_trials([Experiment(config, few)], range(8), [{}], share_order=True)
    (group,) = group_trials(trials, share_order=True, exact=False)
    eight = runner.compile_group(group, mesh)
    assert eight.size == 8
    one_block = Trials(eight, trials, ())
    one_block.train(Progress(32, 0, 16), threading.Event(), lambda: False, lambda: None)
    monkeypatch.setattr(runner, "MEMORY_FRACTION", (eight.bytes - 1) / parallel.device_memory(mesh))
    assert runner.compile_group(group, mesh).size == 4
    two_blocks = fm.sweep(config, few, seeds=8, share_order=True, devices=1)
    for row, trial in enumerate(two_blocks.members):
        assert trial.test_loss == pytest.approx(one_block.result(row).test_loss, rel=1e-5)


# --- The command ----------------------------------------------------------------------------------------------------


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
        "config = Config(name='small', model=SoftmaxConfig(), optimizer=SGD(learning_rate=0.1),\n"
        "    data=Data(name='digits'),\n"
        "    train=Train(batch_size=50, epochs=2, evaluate_every=10))\n"
    )
    options = ["--seeds", 3, "--over", "optimizer.learning-rate=0.01,0.1", "--workdir", tmp_path / "swept"]
    options += ["--validation", 400]
    arguments = [experiment, *options]
    first = launch("sweep", *arguments)
    assert first.returncode == 0, first.stderr
    assert "best: small optimizer.learning_rate=0.1: test accuracy 0." in first.stdout
    assert "same seeds: accuracy " in first.stdout
    resumed = launch("sweep", *arguments, "--resume")
    assert resumed.stdout == first.stdout
    refused = launch("sweep", *arguments)
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) == 1
    evaluated = launch("evaluate", tmp_path / "swept", "--ensemble", "--shifts", 1, "--split", "validation")
    assert evaluated.returncode == 0, evaluated.stderr
    assert "ensemble of 3" in evaluated.stdout
    assert "400 images" in evaluated.stdout
    without_workdir = launch("sweep", *arguments[:3], "--random", 2, "--over", "optimizer.learning-rate=1e-3..1,log")
    assert without_workdir.returncode == 2


@pytest.mark.slow
def test_killed_sweep_resumes_to_the_same_results(tmp_path):
    """Kill the sweep as soon as the first part is written, with the trials that are finished by then."""
    arguments = [ROOT / "experiments/quickstart.py", "--seeds", 3, "--over", "train.epochs=4,6", "--workdir"]
    full = launch("sweep", *arguments, tmp_path / "full")
    assert full.returncode == 0, full.stderr
    command = [sys.executable, ROOT / "launch/sweep.py", *arguments, tmp_path / "killed"]
    with subprocess.Popen(list(map(str, command)), env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"}) as process:
        while not list((tmp_path / "killed").glob("parts/*.npz")):
            assert process.poll() is None
        process.kill()
    resumed = launch("sweep", *arguments, tmp_path / "killed", "--resume")
    assert re.search(r"resuming: finished trials: [1-5]\n", resumed.stderr), resumed.stderr
    one, other = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("full", "killed"))
    for trial in one["members"] + other["members"]:
        assert trial.pop("train_seconds") > 0
    assert one["members"] == other["members"]
    with np.load(tmp_path / "full/curves.npz") as a, np.load(tmp_path / "killed/curves.npz") as b:
        assert_same(dict(a), dict(b))
