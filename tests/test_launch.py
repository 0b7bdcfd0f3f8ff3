"""The commands as a person types them: what they print, and the codes they exit with."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, main
from PIL import Image

import flaxmnist as fm

SMALL = """
from flaxmnist.config import *
config = Config(
    name="small",
    model=MLP(hidden=(16,)),
    optimizer=SGD(learning_rate=0.1),
    data=Data(name="digits"),
    train=Train(batch_size=50, epochs=4, log_every=20, evaluate_every=25),
)
"""


@pytest.fixture
def experiment(tmp_path) -> Path:
    path = tmp_path / "small.py"
    path.write_text(SMALL)
    return path


def launch(script: str, *arguments, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a command in a process of its own, on one device."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    command = [sys.executable, "-W", "error", ROOT / "launch" / f"{script}.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=300, check=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """A small run, launched without --workdir, and its folder."""
    home = tmp_path_factory.mktemp("home")
    (home / "small.py").write_text(SMALL)
    ended = launch("train", "small.py", "--min-accuracy", "0.5", cwd=home)
    assert ended.returncode == 0, ended.stderr
    (folder,) = (home / "runs").iterdir()
    return ended, folder


def test_train(trained):
    ended, folder = trained
    assert re.fullmatch(r"small-\d{8}-\d{6}", folder.name)
    assert f"run folder runs/{folder.name}" in ended.stdout
    assert f"next: python launch/evaluate.py runs/{folder.name}" in ended.stdout
    assert re.search(r"^step 20, loss \d\.\d{4}, accuracy \d\.\d{4}$", ended.stderr, re.MULTILINE)
    assert not {"\x1b", "\r"} & set(ended.stderr + ended.stdout), "no colour and no bar where there is no terminal"
    result = json.loads((folder / "result.json").read_text())
    assert f"test accuracy {result['test_accuracy']:.4f} of 360 images" in ended.stdout
    assert json.loads((folder / "config.json").read_text())["experiment"] == "small.py"


def test_train_ends_with_where_time_went_and_what_was_trained(trained):
    ended, folder = trained
    result = json.loads((folder / "result.json").read_text())
    times, parameters = ([line.split() for line in part.splitlines()] for part in ended.stdout.split("\n\n")[1:3])
    assert [row[0] for row in times[1:]] == [
        "import", "data", "compile", "train", "evaluate", "save", "other", "all",
    ]  # fmt: skip
    seconds = [float(row[1]) for row in times[1:]]
    assert sum(seconds[:-1]) == pytest.approx(seconds[-1], abs=0.05)
    assert seconds[3] == pytest.approx(result["seconds"]["train"], abs=0.01)
    assert times[-1][2] == "100%"
    assert parameters[0] == ["parameter", "shape", "count", "bytes"]
    assert parameters[2] == ["layers.0.kernel", "16×784", "12,544", "50,176"]
    assert parameters[-1] == ["all", f"{result['params']:,}", f"{4 * result['params']:,}"]


def test_evaluate(trained, capsys):
    _, folder = trained
    result = json.loads((folder / "result.json").read_text())
    evaluated = launch("evaluate", folder)
    assert evaluated.returncode == 0, evaluated.stderr
    assert evaluated.stderr == ""
    assert f"accuracy {result['test_accuracy']:.4f}" in evaluated.stdout
    assert "360 images" in evaluated.stdout
    assert main("evaluate")([str(folder), "--step", "best", "--split", "validation"]) == 0
    assert "180 images" in capsys.readouterr().out


def test_predict(trained, digits, tmp_path):
    _, folder = trained
    for i in range(5):
        Image.fromarray(digits.test.images[i, :, :, 0]).save(tmp_path / f"{i}.png")
    predicted = launch("predict", folder, tmp_path, "--json")
    assert predicted.returncode == 0, predicted.stderr
    answers = [json.loads(line) for line in predicted.stdout.splitlines()]
    assert [Path(answer["file"]).name for answer in answers] == [f"{i}.png" for i in range(5)]
    classes, probabilities = fm.predict(fm.load_run(folder).model, digits.test.images[:5])
    assert [answer["class"] for answer in answers] == classes.tolist()
    assert all(sum(answer["probabilities"]) == pytest.approx(1) for answer in answers)
    assert answers[0]["probabilities"] == pytest.approx(probabilities[0].tolist(), abs=1e-5)
    (tmp_path / "rubbish.png").write_text("no picture")
    rubbish = launch("predict", folder, tmp_path)
    assert rubbish.returncode == 2
    assert "rubbish.png is not an image" in rubbish.stderr


MISTAKES = {
    "no experiment": (["train"], "give an experiment file first"),
    "missing experiment": (["train", "nowhere.py"], "no experiment file nowhere.py"),
    "unknown field": (["train", "EXPERIMENT", "--optimizer.lerning-rate", "1"], "--optimizer.learning-rate"),
    "no number": (["train", "EXPERIMENT", "--train.steps", "many"], "--train.steps"),
    "wrong value": (["train", "EXPERIMENT", "--train.batch-size", "0"], "train.batch_size must lie in"),
    "too large a batch": (["train", "EXPERIMENT", "--train.batch-size", "2000", "--data.last-batch", "drop"], "1257"),
    "no such data": (["train", "EXPERIMENT", "--data.name", "idx", "--data-dir", "nowhere"], "--data.name digits"),
    "both": (["train", "EXPERIMENT", "--resume", "--overwrite"], "give one of them"),
    "too many devices": (["train", "EXPERIMENT", "--devices", "9"], "9 devices were asked for, but 8"),
    "a file for a folder": (["train", "EXPERIMENT", "--devices", "1", "--workdir", "EXPERIMENT"], "cannot write to"),
    "no run folder": (["evaluate", "nowhere"], "nowhere is no run folder: it has no config.json"),
    "no run to export": (["export", "nowhere"], "nowhere is no run folder"),
    "no export": (["evaluate", "nowhere.stablehlo"], "nowhere.stablehlo cannot be read"),
    "a step of a file": (["evaluate", "model.stablehlo", "--step", "3"], "leave out --step"),
    "an ensemble in a file": (["evaluate", "model.safetensors", "--ensemble"], "leave out --ensemble"),
    "no run to predict with": (["predict", "nowhere", "image.png"], "nowhere is no run folder"),
    "resuming nothing": (["train", "EXPERIMENT", "--resume"], "--resume needs the --workdir"),
    "percents": (["train", "EXPERIMENT", "--min-accuracy", "95"], "--min-accuracy is a fraction in [0, 1]"),
    "a trace in a file": (
        ["train", "EXPERIMENT", "--devices", "1", "--profile", "EXPERIMENT"],
        "cannot write a trace to",
    ),
    "no pixel left": (["train", "CNN", "--devices", "1"], "no pixel left"),
    "no end": (["train", "EXPERIMENT", "--grace", "inf"], "--grace is a number of seconds"),
    "no memory": (
        ["train", "EXPERIMENT", "--devices", "1", "--model.hidden", "1048576", "1048576"],
        "the state of this model takes 4,4",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_the_caller_can_mend_exits_with_2(name, experiment, tmp_path, monkeypatch, capsys):
    arguments, message = MISTAKES[name]
    (tmp_path / "cnn.py").write_text(SMALL.replace("MLP(hidden=(16,))", "CNN(features=(2, 2, 2), padding='VALID')"))
    paths = {"EXPERIMENT": experiment, "CNN": tmp_path / "cnn.py"}
    monkeypatch.chdir(tmp_path)
    assert main(arguments[0])([str(paths.get(word, word)) for word in arguments[1:]]) == 2
    told = capsys.readouterr()
    assert message in told.err
    assert told.out == ""
    if name not in ("unknown field", "no number"):  # those the argument parser answers, with a box
        assert len(told.err.splitlines()) == 1


@pytest.mark.slow
def test_what_a_gpu_needs_to_be_deterministic_changes_nothing_on_cpu(experiment, trained):
    """XLA would refuse an option that it does not know."""
    ended = launch("train", experiment, "--deterministic", "--workdir", "run", cwd=experiment.parent)
    assert ended.returncode == 0, ended.stderr
    hashes = [
        json.loads((folder / "result.json").read_text())["params_sha256"]
        for folder in (experiment.parent / "run", trained[1])
    ]
    assert hashes[0] == hashes[1]


def test_divergence_exits_with_3(experiment, tmp_path, capsys):
    options = ["--devices", "1", "--workdir", str(tmp_path / "run"), "--optimizer.learning-rate", "1e38"]
    assert main("train")([str(experiment), *options]) == 3
    told = capsys.readouterr().err
    assert "the loss at step" in told
    assert "--optimizer.learning-rate" in told


def test_too_low_an_accuracy_exits_with_4(experiment, tmp_path, capsys):
    options = ["--devices", "1", "--workdir", str(tmp_path / "run"), "--train.steps", "1", "--min-accuracy", "0.99"]
    assert main("train")([str(experiment), *options]) == 4
    told = capsys.readouterr()
    assert "under --min-accuracy 0.99" in told.err
    assert "test accuracy" in told.out


@pytest.mark.slow
def test_a_signal_exits_with_75_and_resume_goes_on(experiment, tmp_path):
    arguments = [experiment, "--train.evaluate-every", "None", "--workdir", tmp_path / "run"]
    command = [sys.executable, ROOT / "launch/train.py", *map(str, arguments), "--train.steps", "1000000"]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        for line in process.stderr:
            if line.startswith("step 200,"):
                process.send_signal(signal.SIGTERM)
                break
        told = process.stderr.read()
    assert process.returncode == 75
    stopped = int(re.search(r"stopped at step (\d+) of 1000000; --resume goes on", told)[1])
    resumed, again = (launch("train", *arguments, "--resume", "--train.steps", stopped + 7) for _ in range(2))
    assert resumed.returncode == 0, resumed.stderr
    assert f"going on from the checkpoint at step {stopped}" in resumed.stderr
    assert again.returncode == 0, again.stderr
    assert "is finished" in again.stderr
    assert again.stdout.splitlines()[0] == resumed.stdout.splitlines()[0]


def test_print_config(experiment, tmp_path):
    printed = launch("train", experiment, "--print-config", "--model.hidden", "20", "30", cwd=tmp_path)
    assert printed.returncode == 0
    config, table = printed.stdout.split("\n\n")[:2]
    assert json.loads(config)["model"]["hidden"] == [20, 30]
    assert re.search(r"layers\.1\.kernel +30×20 +600 +2,400$", table, re.MULTILINE)
    assert f"{784 * 20 + 20 + 20 * 30 + 30 + 30 * 10 + 10:,}" in table
    # Three products of a pass and its gradient, less the one for the images, each of two operations.
    products = 2 * 50 * (2 * 784 * 20 + 3 * 20 * 30 + 3 * 30 * 10)
    operations = float(re.search(r"operations a step +(\S+) GFLOP", printed.stdout)[1]) * 1e9
    assert products < operations < 1.3 * products
    assert not list(tmp_path.glob("runs*"))


@pytest.mark.parametrize("script", ["train", "evaluate", "predict", "export"])
def test_help_exits_with_0(script):
    helped = launch(script, "--help")
    assert helped.returncode == 0
    assert helped.stderr == ""
    assert f"python launch/{script}.py" in helped.stdout


def test_help_names_every_field_with_its_meaning_and_the_value_of_the_experiment(experiment):
    helped = " ".join(launch("train", experiment, "--help").stdout.replace("│", " ").split())
    assert "--optimizer.learning-rate FLOAT step size; the schedule's full rate (default: 0.1)" in helped
    assert "--train.batch-size INT images a step (default: 50)" in helped
    assert "--model.hidden [INT [INT ...]] units of each hidden layer" in helped


@pytest.mark.slow
def test_quickstart_reaches_its_accuracy(tmp_path):
    ended = launch("train", ROOT / "experiments/quickstart.py", "--min-accuracy", "0.95", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "next: python launch/evaluate.py" in ended.stdout
