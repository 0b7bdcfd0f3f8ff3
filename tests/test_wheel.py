"""The commands of an installed wheel, in a folder without the repository."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest
from conftest import ROOT
from PIL import Image

TRAIN = ["train", "quickstart", "--train.epochs", "None", "--train.steps", "5", "--workdir", "run"]
SWEEP = ["sweep", "quickstart", "--seeds", "2", "--over", "train.epochs=None", "--over", "train.steps=5"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, ROOT]
    subprocess.run(build, check=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.slow
def test_every_verb_runs(wheel, digits, tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel], check=True)
    # The dependencies come from this environment; Python does not read the .pth file there that names the repository.
    installed = sysconfig.get_path("purelib", vars={"base": str(tmp_path / "venv")})
    paths = f"{installed}:{sysconfig.get_path('purelib')}"
    environment = os.environ | {"PYTHONPATH": paths, "JAX_NUM_CPU_DEVICES": "1"}
    home = tmp_path / "home"
    home.mkdir()

    def flaxmnist(*arguments: str) -> str:
        command = [tmp_path / "venv/bin/flaxmnist", *arguments]
        completed = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=False)
        assert completed.returncode == 0, completed.stderr
        return completed.stdout

    Image.fromarray(digits.test.images[0, :, :, 0]).save(home / "digit.png")
    assert "next: flaxmnist evaluate run" in flaxmnist(*TRAIN)
    assert "360 images" in flaxmnist("evaluate", "run")
    assert "digit.png: " in flaxmnist("predict", "run", "digit.png")
    assert "run/report.html" in flaxmnist("report", "run")
    assert "n = 2" in flaxmnist(*SWEEP, "--workdir", "swept")
    exported = flaxmnist("export", "run")
    assert "run/export/draw.html  " in exported and "next: flaxmnist evaluate run/export/model.stablehlo" in exported
    assert "360 images" in flaxmnist("evaluate", "run/export/model.stablehlo")
    assert "default: the five" in flaxmnist("benchmark", "--help")
    assert "quickstart" in flaxmnist("benchmark", "quickstart")


@pytest.mark.slow
def test_the_wheel_contains_the_package_and_the_experiments(wheel):
    files = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "flaxmnist").rglob("*")
        if path.suffix in (".py", ".html", ".css", ".js")
    }
    experiments = {f"flaxmnist/experiments/{path.name}" for path in (ROOT / "experiments").glob("*.py")}
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == files | experiments | {"flaxmnist/py.typed"}
