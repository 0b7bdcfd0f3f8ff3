"""The benchmark runs, and its numbers fit together. How large they are is for the benchmark to say."""

import json
import os
import subprocess
import sys
import time

import jax
import pytest
from conftest import ROOT, small
from PIL import Image

from flaxmnist import benchmarks, inspection, order


@pytest.fixture
def brief(monkeypatch):
    """Short stretches and small matrices, and one device of the eight."""
    monkeypatch.setattr(benchmarks, "STRETCH_SECONDS", 0.01)
    monkeypatch.setattr(benchmarks, "ROUNDS", 2)
    monkeypatch.setattr(benchmarks, "MATRIX", 64)
    make_mesh = benchmarks.parallel.make_mesh
    monkeypatch.setattr(benchmarks.parallel, "make_mesh", lambda: make_mesh(1))


def test_the_figures_of_an_experiment_fit_together(brief, few, tmp_path):
    config = small("mlp", steps=40)
    peers = {"slow": lambda count: time.sleep(count * 0.01), "quick": lambda count: time.sleep(count * 1e-6)}
    result = benchmarks.measure(config, few, peers)
    assert result["name"] == "small"
    assert result["images_per_second"] == result["steps_per_second"] * config.train.batch_size
    operations = inspection.step_cost(config, few).operations
    assert result["gflops_per_second"] * 1e9 == pytest.approx(result["steps_per_second"] * operations)
    assert result["share_of_peak"] == pytest.approx(result["gflops_per_second"] / result["peak_gflops_per_second"])
    assert set(result["peer_steps_per_second"]) == {"slow", "quick"}
    assert 0 < result["ratio_to_peer"] < 1, "it is the quicker peer that counts"

    result["start_up_seconds"] = {"first_step": 1.0}
    head, row = benchmarks.report([result]).splitlines()
    assert len(head) == len(row)
    assert f"{result['steps_per_second']:,.1f}" in row
    benchmarks.draw([result, result], tmp_path / "bars.png")
    with Image.open(tmp_path / "bars.png") as picture:
        assert min(picture.size) > 300
    json.dumps(result)


def test_the_path_measured_is_that_of_a_run(brief, few, monkeypatch):
    """As many steps as asked for, from the first on, whatever the program holds at once."""
    config = order.resolve(small(steps=7), 70)
    train, seconds = benchmarks.our_trainer(config, few)
    assert seconds > 0
    calls, call = [], benchmarks.program.Program.__call__

    def calling(compiled, state, start, count):
        calls.append((start, count))
        return call(compiled, state, start, count)

    monkeypatch.setattr(benchmarks.program.Program, "__call__", calling)
    train(25)
    train(3)
    starts = [start for start, _ in calls]
    assert sum(count for _, count in calls) == 28
    assert starts == sorted(starts)
    assert starts[0] == 0
    assert jax.device_count() == 8


@pytest.mark.slow
def test_the_command(tmp_path):
    command = [sys.executable, ROOT / "launch/benchmark.py", "quickstart", "--json", tmp_path / "figures.json"]
    command += ["--plot", tmp_path / "bars.png"]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    (figures,) = json.loads((tmp_path / "figures.json").read_text())
    names = "name batch_size steps_per_second images_per_second compile_seconds gflops_per_second share_of_peak"
    assert {*names.split(), "evaluate_images_per_second", "device", "versions"} <= set(figures)
    parts = figures["start_up_seconds"]
    assert parts["first_step"] == pytest.approx(sum(parts[name] for name in ("import", "data", "compile", "train")))
    assert parts["first_step"] < parts["whole_command"]
    assert "quickstart" in ended.stdout
    assert (tmp_path / "bars.png").exists()


def test_an_experiment_that_is_not_there_is_named():
    command = [sys.executable, ROOT / "launch/benchmark.py", "nothing"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "no experiment file" in ended.stderr
