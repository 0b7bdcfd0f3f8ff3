"""The READMEs: snippets and commands run, links lead to files, the table has the accuracies of the docstrings."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from PIL import Image

READMES = {
    name: (ROOT / name).read_text()
    for name in ("README.md", "experiments/README.md", "launch/README.md", "tests/README.md")
}
TEXT = "\n".join(READMES.values())

ASSERTIONS = """
assert run.history[-1]["step"] == 520
assert run.history[-1]["accuracy"] > 0.95
assert len(classes) == len(probabilities) == 360
assert logits.shape == (360, 10) and losses.shape == (360,) and float(losses.mean()) < 2.2
assert len(sweep.members) == 24 and len(sweep.groups) == 3
assert picture.axes[0].get_xlabel() == "optimizer.learning_rate"
assert int(state.step) == 20 and float(metrics.batch.loss / metrics.batch.images) < 2.2
"""


def blocks(text: str, language: str = "") -> list[str]:
    """Return the code blocks of a language; those without a language are commands."""
    return [
        code for name, code in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL) if name == language
    ]


def section(file: str, title: str) -> str:
    return READMES[file].split(f"## {title}\n")[1].split("\n## ")[0]


def commands(file: str, title: str) -> list[str]:
    """Return the commands of a section, except those that install."""
    lines = "".join(blocks(section(file, title))).splitlines()
    return [line.split("#")[0].strip() for line in lines if not line.startswith("pip install")]


def run(command: str, folder) -> None:
    words = [sys.executable if word == "python" else word for word in command.split()]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    subprocess.run(words, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)


def shorten(command: str) -> str:
    """Make a command train for only two steps, and with only two seeds and random settings."""
    if "train.py" in command:
        return re.sub(r"--train.steps \d+", "", command) + " --train.steps 2 --data.name digits"
    if "sweep.py" in command:
        command = re.sub(r"--seeds \d+", "--seeds 2", command).replace("--random 20", "--random 2")
        return f"{command} --over train.epochs=None --over train.steps=2"
    return command


@pytest.fixture
def folder(tmp_path, digits):
    """A folder in which the commands find the launchers, the experiments and images of digits."""
    for name in ("launch", "experiments"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "folder").mkdir()
    for name in ("photo.png", "folder/another.png"):
        Image.fromarray(digits.test.images[0, :, :, 0]).save(tmp_path / name)
    return tmp_path


@pytest.mark.slow
def test_python_snippets_run_one_after_another():
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    code = "\n".join([*blocks(TEXT, "python"), ASSERTIONS])
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "title", "count", "runs"),
    [
        ("README.md", "Experiments", 2, 1),
        ("launch/README.md", "One run", 11, 3),
        ("launch/README.md", "Pictures and reports", 6, 3),
        ("experiments/README.md", "Your own step", 2, 2),
    ],
)
def test_commands_run(file, title, count, runs, folder):
    """Run them on the digits, for two steps."""
    listed = commands(file, title)
    assert len(listed) == count
    for command in listed:
        run(shorten(command), folder)
    assert len([path for path in (folder / "runs").iterdir() if (path / "config.json").exists()]) == runs


@pytest.mark.slow
@pytest.mark.skipif("FLAXMNIST_DATA" not in os.environ, reason="FLAXMNIST_DATA names no folder with MNIST")
@pytest.mark.parametrize(
    ("file", "title", "count", "folders"),
    [
        ("README.md", "Sweeps, reports, exports", 6, {"rates", "speedrun"}),
        ("launch/README.md", "Sweeps", 4, {"rates", "random", "compared"}),
    ],
)
def test_sweeps_run(file, title, count, folders, folder):
    """Run them for two seeds and steps."""
    listed = commands(file, title)
    assert len(listed) == count
    for command in listed:
        data = f" --data-dir {os.environ['FLAXMNIST_DATA']}" if re.search(r"sweep|evaluate|report", command) else ""
        run(shorten(command) + data, folder)
    assert {path.name for path in (folder / "runs").iterdir()} == folders


def test_the_table_has_every_experiment_with_the_accuracy_in_its_docstring():
    rows = dict(re.findall(r"^\| `(\w+)` \|(.*)$", section("README.md", "Experiments"), re.MULTILINE))
    for path in (ROOT / "experiments").glob("*.py"):
        measured = re.search(r"[\d.]+ ± [\d.]+ %", path.read_text())[0]
        assert measured in rows[path.stem]


def test_commands_name_files_that_exist():
    for name in re.findall(r"((?:launch|experiments|tests|\.ci)/\w[\w./]*\w)", TEXT):
        assert (ROOT / name).exists(), name


def slug(title: str) -> str:
    """Return the anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


LINKS = [
    (file, target) for file, text in READMES.items() for target in re.findall(r'(?:\]\(|src=")([^)":]+)[)"]', text)
]


@pytest.mark.parametrize(("file", "target"), LINKS)
def test_links_lead_to_files_and_headings(file, target):
    name, _, anchor = target.partition("#")
    path = (ROOT / file).parent / name if name else ROOT / file
    assert path.exists()
    if anchor:
        assert anchor in map(slug, re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE))


def test_the_readme_links_to_every_change():
    linked = {
        name for file, target in LINKS if file == "README.md" for name in re.findall(r"tests/changes/(.+)", target)
    }
    assert linked == {path.name for path in (ROOT / "tests/changes").iterdir()}


@pytest.mark.parametrize("verb", ["train", "sweep", "benchmark"])
def test_options_of_commands_exist(verb):
    used = {
        option
        for line in TEXT.splitlines()
        if re.match(rf"([A-Z_]+=\d+ )?python launch/{verb}\.py", line)
        for option in re.findall(r"(--[a-z][\w.-]+)", line.split("#")[0])
    }
    experiment = [ROOT / "experiments/softmax_epochs.py"] if verb == "train" else []
    listed = subprocess.run(
        [sys.executable, ROOT / f"launch/{verb}.py", *experiment, "--help"], capture_output=True, text=True, check=True
    ).stdout
    for option in used:
        assert option in listed, option
