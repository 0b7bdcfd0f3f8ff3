"""Ensembles of the trials of a saved sweep."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import small, user_error

import flaxmnist as fm
from flaxmnist.core.definition import split
from flaxmnist.errors import UserError
from flaxmnist.store.result import params_sha256
from flaxmnist.sweeps.ensembles import evaluate_ensemble
from flaxmnist.sweeps.folder import load_trials
from flaxmnist.sweeps.plan import Experiment
from flaxmnist.sweeps.runner import run_sweep


@pytest.fixture(scope="module")
def saved_sweep(few, tmp_path_factory):
    """A sweep of two experiments with two learning rates each, and its folder."""
    folder = tmp_path_factory.mktemp("sweep")
    configs = small("mlp", evaluate_every=5), replace(small(evaluate_every=5), name="other")
    settings = [{"optimizer.learning_rate": rate} for rate in (0.01, 0.1)]
    return run_sweep(
        [Experiment(config, few) for config in configs], [0, 1, 2], settings, devices=1, workdir=folder
    ), folder


def test_trials_load_from_the_folder(saved_sweep, few):
    sweep, folder = saved_sweep
    loaded = load_trials(folder)
    assert [trial for trial, _ in loaded] == sweep.members
    for trial, model in loaded[::5]:
        assert fm.evaluate(model, *few.test).accuracy == trial.test_accuracy


def test_ensemble_averages_probabilities(saved_sweep, digits):
    sweep, folder = saved_sweep
    best = sweep.result.best
    models = [
        model
        for trial, model in load_trials(folder)
        if (trial.experiment, trial.fields) == (best.experiment, best.fields)
    ]
    ensemble = evaluate_ensemble(folder, 2)
    mean = np.mean([fm.predict(model, digits.test.images)[1] for model in models[:2]], axis=0)
    assert ensemble.together.accuracy == (mean.argmax(1) == digits.test.labels).mean()
    losses = -np.log(mean[np.arange(360), digits.test.labels])
    assert ensemble.together.loss == pytest.approx(losses.mean())
    assert len(ensemble.members) == 2
    assert ensemble.together.count == 360
    assert ensemble.setting == best.title
    with pytest.raises(UserError, match="has 3 trials of its best setting: use 1 to 3 of them"):
        evaluate_ensemble(folder, 4)
    shifted = np.mean([fm.predict(model, digits.test.images, shifts=1)[1] for model in models[:2]], axis=0)
    np.testing.assert_allclose(evaluate_ensemble(folder, 2, shifts=1).together.probabilities, shifted, atol=1e-12)


def test_members_are_the_models_of_the_best_setting(saved_sweep):
    sweep, folder = saved_sweep
    best = [trial for trial in sweep.members if trial.setting == sweep.result.best.setting]
    members = fm.load_members(folder, 2)
    assert [params_sha256(split(member)[1]) for member in members] == [trial.params_sha256 for trial in best[:2]]
    with pytest.raises(UserError, match="there is no sweep in"):
        fm.load_members(folder / "parts")


def test_a_sweep_is_not_a_run(saved_sweep):
    with user_error("is the folder of a sweep: pass that of a run"):
        fm.load_run(saved_sweep[1])


def test_sweep_without_a_best_setting_has_no_ensemble(few, tmp_path):
    settings = [{"optimizer.learning_rate": rate} for rate in (0.01, 0.1)]
    run_sweep([Experiment(small(steps=2), replace(few, validation=None))], [0], settings, devices=1, workdir=tmp_path)
    with pytest.raises(UserError, match="has no best setting: an ensemble needs validation images"):
        evaluate_ensemble(tmp_path, None)


def test_best_setting_without_trials_is_refused(few, tmp_path):
    """For instance, the parts were deleted."""
    run_sweep([Experiment(small(steps=2), few)], [0], [{}], devices=1, workdir=tmp_path)
    for part in (tmp_path / "parts").iterdir():
        part.unlink()
    with pytest.raises(UserError, match="has 0 trials of its best setting"):
        evaluate_ensemble(tmp_path, None)
