"""What the README says is run: its Python, its changes, the commands it names."""

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


ASSERTED = """
assert run.history[-1]["step"] == 520
assert run.history[-1]["accuracy"] > 0.95
assert len(classes) == len(probabilities) == 360
assert logits.shape == (5, 10)
assert len(sweep.members) == 24 and len(sweep.groups) == 3
assert picture.axes[0].get_xlabel() == "optimizer.learning_rate"
assert abs(float(metrics.batch.loss / metrics.batch.images) - 2.3026) < 1e-4
"""


@pytest.mark.slow
def test_the_python_blocks_run_one_after_the_other():
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    code = "\n".join([*blocks("python"), ASSERTED])
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)


CHANGED = """
import flaxmnist as fm
from flaxmnist.config import *
from flaxmnist.inspection import parameter_table

config = Config(
    name="changed",
    model=Residual(width=16),
    optimizer=Lion(schedule=Linear()),
    data=Data(name="npz"),
    train=Train(batch_size=20, steps=5),
)
run = fm.fit(config, fm.load_data(config.data, "."), "run")
assert run.history[-1]["accuracy"] <= run.history[-1]["top2"] <= 1
assert "blocks.1.kernel" in parameter_table(run.state.params)
assert fm.load_run("run").config == config
"""


def test_the_changes_apply_and_train(digits, tmp_path):
    """All five at once: a model, a data set, an optimizer, a metric, a schedule."""
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "flaxmnist", copy / "flaxmnist")
    for number, change in enumerate(blocks("diff")):
        (tmp_path / f"{number}.diff").write_text(change)
        subprocess.run(["git", "apply", tmp_path / f"{number}.diff"], cwd=copy, check=True)
    assert number == 4
    splits = {"train": digits.train, "test": digits.test}
    few = {f"{part}_{kind}": array[:100] for part in splits for kind, array in splits[part]._asdict().items()}
    np.savez(copy / "data.npz", **few)
    environment = os.environ | {"PYTHONPATH": str(copy), "JAX_NUM_CPU_DEVICES": "1"}
    subprocess.run([sys.executable, "-c", CHANGED], cwd=copy, env=environment, check=True)


def test_every_experiment_stands_in_the_table_with_what_its_docstring_says():
    section = README.split("## Experiments")[1].split("## Speed")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \|(.*)$", section, re.MULTILINE))
    for path in (ROOT / "experiments").glob("*.py"):
        measured = re.search(r"[\d.]+ ± [\d.]+ %", path.read_text())[0]
        assert measured in rows[path.stem]


@pytest.mark.slow
@pytest.mark.parametrize(("section", "count", "runs"), [("Experiments", 9, 3), ("See it", 6, 3)])
def test_the_commands_run(section, count, runs, tmp_path, digits):
    """As they stand, but for two steps on the digits."""
    for name in ("launch", "experiments"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "folder").mkdir()
    for name in ("photo.png", "folder/another.png"):
        Image.fromarray(digits.test.images[0, :, :, 0]).save(tmp_path / name)
    commands = listed(section)
    assert len(commands) == count
    for command in commands:
        if "train.py" in command:
            command = re.sub(r"--train.steps \d+", "", command) + " --train.steps 2 --data.name digits"
        run(command, tmp_path)
    assert len([path for path in (tmp_path / "runs").iterdir() if (path / "config.json").exists()]) == runs


def listed(section: str) -> list[str]:
    """The commands of a section's first block."""
    block = README.split(f"## {section}\n")[1].split("```")[1]
    return [line.split("#")[0].strip() for line in block.strip().splitlines()]


def run(command: str, folder) -> None:
    words = [sys.executable if word == "python" else word for word in command.split()]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    subprocess.run(words, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.slow
@pytest.mark.skipif("FLAXMNIST_DATA" not in os.environ, reason="FLAXMNIST_DATA names no folder with MNIST")
def test_the_sweeps_run(tmp_path):
    """As they stand, but for two seeds and steps."""
    for name in ("launch", "experiments"):
        (tmp_path / name).symlink_to(ROOT / name)
    commands = listed("Sweeps")
    assert len(commands) == 4
    for command in commands:
        if "sweep.py" in command:
            command = re.sub(r"--seeds \d+", "--seeds 2", command).replace("--random 20", "--random 2")
            command += " --over train.epochs=None --over train.steps=2"
        run(f"{command} --data-dir {os.environ['FLAXMNIST_DATA']}", tmp_path)
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"rates", "random", "compared"}


def test_commands_name_files_that_are_there():
    for name in re.findall(r"((?:launch|experiments|\.ci)/[\w.]+)", README):
        assert (ROOT / name).exists(), name


def test_options_it_names_are_options_of_the_command():
    helped = subprocess.run(
        [sys.executable, ROOT / "launch/train.py", ROOT / "experiments/softmax_epochs.py", "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for line in README.splitlines():
        if line.startswith("python launch/train.py"):
            for option in re.findall(r"(--[\w.-]+)", line.split("#")[0]):
                assert option in helped, option
