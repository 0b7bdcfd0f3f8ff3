"""The patches in tests/changes, to which the README links, apply and train."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

PATCHES = sorted((ROOT / "tests/changes").glob("*.patch"))

CHANGED = """
from pathlib import Path

import flaxmnist as fm
from flaxmnist.config import *
from flaxmnist.show.text import parameter_table
from flaxmnist.store.tensorboard import read_events

config = Config(
    name="changed",
    model=ResidualConfig(width=16),
    optimizer=RMSProp(schedule=Linear()),
    data=Data(name="csv"),
    train=Train(batch_size=20, steps=5),
)
run = fm.fit(config, fm.load_data(config.data, "."), "run")
assert 0 < run.history[-1]["mean_f1"] <= 1 and run.result.test["mean_f1"] == run.history[-1]["mean_f1"]
assert "blocks.1.kernel" in parameter_table(run.state.params)
assert fm.load_run("run").config == config

# First weights that cannot be drawn are left out.
(file,) = Path("run/tensorboard").iterdir()
events, _ = read_events(file)
pictures = {value.tag for event in events for value in event.summary.value if value.HasField("image")}
assert pictures == {"validation/confusion", "test/confusion"}
"""


@pytest.fixture
def checkout(tmp_path):
    """A copy of the package."""
    shutil.copytree(ROOT / "flaxmnist", tmp_path / "copy/flaxmnist", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "copy"


def apply(patch, checkout) -> None:
    subprocess.run(["git", "apply", patch], cwd=checkout, check=True)


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_each_change_applies_by_itself(patch, checkout):
    before = {path: path.read_text() for path in checkout.rglob("*.py")}
    apply(patch, checkout)
    changed = [path for path in before if path.read_text() != before[path]]
    assert len(changed) <= 2
    for path in changed:
        compile(path.read_text(), path, "exec")


def test_all_changes_apply_and_train(checkout, digits):
    """All five together: a model, a data set, an optimizer, a metric, a schedule."""
    assert len(PATCHES) == 5
    for patch in PATCHES:
        apply(patch, checkout)
    for name, (images, labels) in (("train", digits.train), ("test", digits.test)):
        rows = np.column_stack([labels[:100], images[:100].reshape(100, -1)])
        np.savetxt(checkout / f"{name}.csv", rows, fmt="%d", delimiter=",")
    environment = os.environ | {"PYTHONPATH": str(checkout), "JAX_NUM_CPU_DEVICES": "1"}
    subprocess.run([sys.executable, "-c", CHANGED], cwd=checkout, env=environment, check=True)
