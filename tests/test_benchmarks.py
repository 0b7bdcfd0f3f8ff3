"""Tests of the benchmark: that it runs and its numbers are consistent, not how fast anything is."""

import importlib.util
import io
import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import jax
import numpy as np
import pytest
from conftest import ROOT, assert_same, main, small, user_error
from PIL import Image

from flaxmnist.core import steps
from flaxmnist.data import order
from flaxmnist.devices import parallel, program
from flaxmnist.errors import UserError
from flaxmnist.experiment import load_experiment, read_experiment
from flaxmnist.runs import fit
from flaxmnist.speed import benchmarks, torch_peer
from flaxmnist.sweeps.plan import Experiment


@pytest.fixture
def brief(monkeypatch):
    """Shorten the timings and shrink the matrices."""
    monkeypatch.setattr(benchmarks, "STRETCH_SECONDS", 0.01)
    monkeypatch.setattr(benchmarks, "ROUNDS", 2)
    monkeypatch.setattr(benchmarks, "MATRIX", 64)


def test_results_of_an_experiment_are_consistent(brief, few, tmp_path):
    config = small("mlp", steps=40)
    peers = {"slow": lambda count: time.sleep(count * 0.01), "fast": lambda count: time.sleep(count * 1e-6)}
    result = benchmarks.measure(Experiment(config, few), parallel.make_mesh(1), peers)
    assert result["name"] == "small"
    assert result["images_per_second"] == result["steps_per_second"] * config.train.batch_size
    operations = program.step_cost(config, few).operations
    assert result["gflops_per_second"] * 1e9 == pytest.approx(result["steps_per_second"] * operations)
    assert result["share_of_peak"] == pytest.approx(result["gflops_per_second"] / result["peak_gflops_per_second"])
    assert set(result["peer_steps_per_second"]) == {"slow", "fast"}
    assert 0 < result["ratio_to_peer"] < 1, "the ratio is to the faster peer"

    result["start_up_seconds"] = dict.fromkeys(("import", "data", "compile", "train"), 0.25) | {"first_step": 1.0}
    header, row, _, second_header, second_row = benchmarks.report([result]).splitlines()
    assert (len(header), len(second_header)) == (len(row), len(second_row))
    assert f"{result['steps_per_second']:,.1f}" in row
    assert second_row.split()[1:6] == ["0.25"] * 4 + ["1.00"]
    benchmarks.draw([result, result], tmp_path / "bars.png")
    with Image.open(tmp_path / "bars.png") as image:
        assert min(image.size) > 300
    json.dumps(result)


def test_trainer_takes_consecutive_steps_from_the_first(few):
    """The number of steps is exact, also when it exceeds the capacity of the program."""
    experiment = Experiment(order.resolve_length(small(steps=7), 70), few)
    trainer = benchmarks.Trainer(experiment, parallel.make_mesh(1))
    assert trainer.compile_seconds > 0
    assert trainer.compiled.capacity == 7
    trainer.run(25)
    trainer.run(3)
    assert int(trainer.state.step) == trainer.step == 28
    assert_same(trainer.state, fit(small(steps=28), few, devices=1).state)


def test_a_slow_first_step_does_not_shorten_the_timings(brief, monkeypatch):
    """The clock is simulated, because sleeps take longer on a busy machine."""
    calls, clock = [], [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def train(count):
        clock[0] += 0.001 * count if calls else 0.2
        calls.append(count)

    (speeds,) = benchmarks.compare_speeds({"compiling": train}).values()
    assert min(calls[-2:]) > 3
    assert min(speeds) > 100


def test_full_runs_match_fit(brief, few):
    """The same seeds give exactly the same test accuracies as ``fit``."""
    config = small(steps=30)
    result = benchmarks.full_runs(Experiment(config, few), parallel.make_mesh(1), 2)
    runs = [fit(replace(config, seed=seed), few, devices=1).result.test_accuracy for seed in range(2)]
    assert result["test_accuracy"] == runs
    assert min(result["seconds"]) > 0
    header, row = benchmarks.runs_report([{"name": "small", "runs": result}]).splitlines()
    assert f"{np.mean(runs):.3%}" in row
    assert len(header) == len(row)


def test_tracks_are_experiments_trained_alone(brief, monkeypatch, capsys, tmp_path):
    """Each has a file and, in the table, its own target, which a part of the runs reaches."""
    for name in benchmarks.TRACKS:
        assert load_experiment(ROOT / f"experiments/{name}.py").name == name
    monkeypatch.setattr(benchmarks, "TRACKS", {"quickstart": 0.5})
    monkeypatch.setattr(benchmarks, "full_run", lambda experiment, _: (2.0, [0.45, 0.55][experiment.config.seed]))
    assert main("benchmark")(["--tracks", "--runs", "2", "--json", str(tmp_path / "tracks.json")]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split("  ")[-1].strip() == "reached"
    assert " ".join(row.split()) == "quickstart 206,922 2 2.000 ± 0.000 50.000% ± 7.071% 45.00% 50.0% 50%"
    assert json.loads((tmp_path / "tracks.json").read_text())[0]["runs"]["target"] == 0.5


def test_the_peer_process_serves_requests(capsys):
    """Each line is a mode and a number of steps, and is answered when they are done."""
    calls = []
    trainers = {mode: lambda count, mode=mode: calls.append((mode, count)) for mode in torch_peer.MODES}
    torch_peer.serve(trainers, io.StringIO("eager 3\ncompiled 20\n"))
    assert calls == [("eager", 3), ("compiled", 20)]
    assert capsys.readouterr().out == "done\ndone\n"


def test_devices_that_cache_programs_measure_cold_and_warm_startup():
    """Both use one compilation cache, which is empty at first. On CPU there is one startup, without a cache."""
    assert benchmarks.start_up_times(dict, caches=False) == {"start_up_seconds": {}}
    cold, warm = benchmarks.start_up_times(dict, caches=True).values()
    assert cold == warm
    assert set(cold) == {"JAX_COMPILATION_CACHE_DIR"}


def test_a_step_of_the_experiment_is_measured(brief, few):
    """This one replaces the weights by its arrays, which are the initial weights."""

    def step(config, state, batch, arrays, *, axis_name=None):
        trained, metrics = steps.train_step(config, state, batch, axis_name=axis_name)
        return replace(trained, params=arrays), metrics

    def arrays(config, data):
        return steps.create_state(config, (28, 28, 1), 10).params

    experiment = Experiment(order.resolve_length(small(steps=7), 70), few, step, arrays)
    trainer = benchmarks.Trainer(experiment, parallel.make_mesh(1))
    trainer.run(5)
    assert_same(trainer.state.params, arrays(experiment.config, few))


def test_pytorch_is_compared_only_if_it_does_the_same_work():
    names = {"softmax_epochs": True, "record": True, "flagship": False, "speedrun": False, "steps/sam": False}
    found = {name: torch_peer.supported(read_experiment(ROOT / f"experiments/{name}.py")) for name in names}
    assert found == names


def test_the_start_of_an_experiment_that_cannot_train_for_one_step_is_an_error(tmp_path):
    (tmp_path / "slow.py").write_text("""
import flaxmnist as fm
config = fm.replace(fm.load_experiment("quickstart"), "optimizer.accumulate", 4)
""")
    with user_error("slow.py cannot train for one step"):
        benchmarks.start_up_time(tmp_path / "slow.py", None, {})


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="PyTorch is installed")
def test_missing_pytorch_is_reported():
    with pytest.raises(UserError, match="pip install torch"):
        benchmarks.run(ROOT / "experiments/quickstart.py", None, "torch", 0)


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")
@pytest.mark.parametrize("name", ["quickstart", "softmax_beginners", "mlp_scratch", "record"])
def test_pytorch_models_have_as_many_parameters(name, few):
    config = order.resolve_length(load_experiment(ROOT / f"experiments/{name}.py"), len(few.train.labels))
    torch_peer.trainer(config, few, compiled=False)(2)
    network = torch_peer.make_model(config.model, few)
    params = steps.create_state(config, (28, 28), 10).params
    assert sum(p.numel() for p in network.parameters()) == sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.slow
def test_command(tmp_path):
    command = [sys.executable, ROOT / "launch/benchmark.py", "quickstart", "--json", tmp_path / "figures.json"]
    command += ["--plot", tmp_path / "bars.png"]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    completed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    (result,) = json.loads((tmp_path / "figures.json").read_text())
    names = "name batch_size steps_per_second images_per_second compile_seconds gflops_per_second share_of_peak"
    assert {*names.split(), "evaluate_images_per_second", "device", "versions"} <= set(result)
    phases = result["start_up_seconds"]
    assert phases["first_step"] == pytest.approx(sum(phases[name] for name in ("import", "data", "compile", "train")))
    assert phases["first_step"] < phases["whole_command"]
    assert "quickstart" in completed.stdout
    assert (tmp_path / "bars.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "no experiment file"),
        (["a" * 300], "no experiment file"),
        (["--json", "nowhere/figures.json"], "use a file in a folder that exists"),
        (["--json", "."], "cannot write .: use a file"),
        (["--runs", "-1"], "--runs must be at least 0"),
        (["--tracks"], "pass --runs 30"),
    ],
)
def test_wrong_arguments_are_reported_before_measuring(arguments, message, capsys):
    assert main("benchmark")(arguments) == 2
    assert message in capsys.readouterr().err
