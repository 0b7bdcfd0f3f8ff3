"""The folders in ``samples``, which an earlier version wrote, can be used as if this version had written them.

They hold a run, the same run killed after its checkpoint at step 20, a sweep, the same sweep stopped in the middle of
its second trial, and a run with a model and a step of its own (own.py), finished and stopped at step 40. Losses are
compared up to rounding, because CPUs and versions of JAX round differently.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pytest
from conftest import ROOT, fit_on_one, read_lines

import flaxmnist as fm
from flaxmnist.config import Adam, CNNConfig, Config, Data, Train
from flaxmnist.experiment import read_experiment
from flaxmnist.show import reports
from flaxmnist.store import exports
from flaxmnist.store.load import evaluate_run, load_checkpoint
from flaxmnist.sweeps.ensembles import evaluate_ensemble
from flaxmnist.sweeps.folder import load_sweep
from flaxmnist.sweeps.plan import Experiment
from flaxmnist.sweeps.runner import run_sweep

SAMPLES = ROOT / "tests/samples"

CONFIG = Config(
    name="tiny",
    model=CNNConfig(features=(2,), kernel=(3,), dense=8, dropout=0.1),
    optimizer=Adam(learning_rate=3e-3),
    data=Data(name="digits"),
    train=Train(batch_size=32, steps=60, log_every=5, evaluate_every=20, checkpoint_every=20, keep=1),
)


@pytest.fixture
def copy(tmp_path):
    """A function that returns a copy of a sample, in which it may be changed."""
    return lambda name: Path(shutil.copytree(SAMPLES / name, tmp_path / name))


def result(name: str, folder: Path = SAMPLES) -> dict:
    return json.loads((folder / name / "result.json").read_text())


def resume_sweep(folder, digits):
    settings = [{"optimizer.learning_rate": rate} for rate in (0.001, 0.003)]
    return run_sweep([Experiment(CONFIG, digits)], [0, 1], settings, workdir=folder, devices=1, resume=True)


def assert_close(actual: list[dict], expected: list[dict]) -> None:
    """Assert that records have the ``expected`` values, up to rounding of numbers; new ones may have more."""
    for one, other in zip(actual, expected, strict=True):
        rounded = {name: pytest.approx(x, rel=1e-4) if isinstance(x, float) else x for name, x in other.items()}
        assert {name: one[name] for name in other} == rounded


def test_run_loads(copy):
    """Config, description of the data, records, result and weights of a run are read."""
    run = fm.load_run(copy("finished"))
    assert (run.config, run.state.step, run.data.source) == (CONFIG, 60, "scikit-learn load_digits")
    assert vars(run.result).items() >= result("finished").items()
    assert run.history == read_lines(SAMPLES / "finished")
    assert fm.load_run(copy("stopped")).state.step == 20


def test_run_evaluates(copy):
    """A run has the accuracies in its result.json."""
    folder, expected = copy("finished"), result("finished")
    for split in ("validation", "test"):
        scores = evaluate_run(folder, split=split)
        assert scores.accuracy == pytest.approx(expected[f"{split}_accuracy"])
    assert scores.loss == pytest.approx(expected["test_loss"], rel=1e-4)


def test_run_is_exported(copy, tmp_path):
    """The exported weights of a run have its accuracy."""
    exports.write(load_checkpoint(copy("finished")), tmp_path / "export")
    scores = exports.evaluate(tmp_path / "export/model.safetensors")
    assert scores.accuracy == pytest.approx(result("finished")["test_accuracy"])


def test_run_and_sweep_are_reported(copy):
    """The pages of a finished run and of a finished sweep are drawn."""
    for name in ("finished", "sweep_finished"):
        page, figures = reports.write([copy(name)])
        assert page.exists() and figures


def test_finished_run_is_not_trained_again(copy, digits):
    """A finished run is recognised as the same one, and its folder is left as it is."""
    folder = copy("finished")
    assert vars(fit_on_one(CONFIG, digits, folder, resume=True).result).items() >= result("finished").items()
    assert (folder / "config.json").read_bytes() == (SAMPLES / "finished/config.json").read_bytes()


def test_killed_run_resumes_to_the_same_result(copy, digits):
    """A killed run ends with the records and the accuracies of the run that was not killed."""
    folder = copy("stopped")
    run = fit_on_one(CONFIG, digits, folder, resume=True)
    assert_close(read_lines(folder), read_lines(SAMPLES / "finished"))
    assert run.result.test_accuracy == pytest.approx(result("finished")["test_accuracy"])


def test_sweep_loads(copy, digits):
    """A finished sweep is loaded, and recognised as the same one when it is resumed."""
    folder = copy("sweep_finished")
    loaded, resumed = load_sweep(folder), resume_sweep(folder, digits)
    without_losses = tuple(replace(comparison, loss=None) for comparison in resumed.result.comparisons)
    assert loaded.result == replace(resumed.result, comparisons=without_losses)
    members = result("sweep_finished")["members"]
    for trial, expected in zip(loaded.members, members, strict=True):
        assert vars(trial).items() >= expected.items()
    assert_close(result(folder.name, folder.parent)["members"], members)


@pytest.mark.slow
def test_stopped_sweep_resumes_to_the_same_results(copy, digits, caplog):
    """A stopped sweep ends with the trials and curves of the sweep that was not stopped."""
    caplog.set_level("INFO", logger="flaxmnist")
    folder = copy("sweep_stopped")
    sweep = resume_sweep(folder, digits)
    assert "finished trials: 1" in caplog.text and "unfinished trials: 1" in caplog.text
    hashes = {"params_sha256": ANY}  # of the bytes of rounded numbers
    expected = [member | hashes for member in result("sweep_finished")["members"]]
    assert_close(result(folder.name, folder.parent)["members"], expected)
    for name, column in load_sweep(SAMPLES / "sweep_finished").curves.items():
        np.testing.assert_allclose(sweep.curves[name], column, rtol=1e-4)


def test_ensemble_of_a_sweep_is_evaluated(copy):
    """The trials of the best setting have the accuracies in result.json, and predict together."""
    ensemble, expected = evaluate_ensemble(copy("sweep_finished"), None), result("sweep_finished")
    best = [trial for trial in expected["members"] if trial["fields"] == expected["best"]["fields"]]
    assert [scores.accuracy for scores in ensemble.members] == pytest.approx([trial["test_accuracy"] for trial in best])
    assert ensemble.together.accuracy > 0.5


# --- A model and a step of the user's -------------------------------------------------------------------------------


def test_own_run_loads_evaluates_and_is_exported(copy, tmp_path):
    config, folder = fm.load_experiment(SAMPLES / "own.py"), copy("own_finished")
    run = fm.load_run(folder, config=config)
    assert run.config == config and vars(run.result) == result("own_finished")
    assert fm.evaluate_run(folder, config=config).loss == pytest.approx(run.result.test_loss, rel=1e-4)
    exports.write(load_checkpoint(folder, config=config), tmp_path / "export")
    scores = exports.evaluate(tmp_path / "export/model.safetensors", config=config)
    assert scores.accuracy == pytest.approx(run.result.test_accuracy)


def test_own_stopped_run_resumes_to_the_same_result(copy, digits):
    config, functions = read_experiment(SAMPLES / "own.py")
    folder = copy("own_stopped")
    run = fit_on_one(config, digits, folder, resume=True, **functions)
    assert_close(read_lines(folder), read_lines(SAMPLES / "own_finished"))
    assert run.result.test_accuracy == pytest.approx(result("own_finished")["test_accuracy"])
