"""The commands: their output and exit codes."""

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
from flaxmnist import commands

SMALL = """
from flaxmnist.config import *
config = Config(
    name="small",
    model=MLPConfig(hidden=(16,)),
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
    """Run a command in a new process, on one device."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    command = [sys.executable, "-W", "error", ROOT / "launch" / f"{script}.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=300, check=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """The completed process of a small run without --workdir, and its run folder."""
    home = tmp_path_factory.mktemp("home")
    (home / "small.py").write_text(SMALL)
    completed = launch("train", "small.py", "--min-accuracy", "0.5", cwd=home)
    assert completed.returncode == 0, completed.stderr
    (folder,) = (home / "runs").iterdir()
    return completed, folder


def test_train(trained):
    completed, folder = trained
    assert re.fullmatch(r"small-\d{8}-\d{6}", folder.name)
    assert f"run folder runs/{folder.name}" in completed.stdout
    assert f"next: python launch/evaluate.py runs/{folder.name}" in completed.stdout
    assert re.search(r"^step 20, loss \d\.\d{4}, accuracy \d\.\d{4}$", completed.stderr, re.MULTILINE)
    assert not {"\x1b", "\r"} & set(completed.stderr + completed.stdout), (
        "no colours and no progress bar without a terminal"
    )
    result = json.loads((folder / "result.json").read_text())
    assert f"test accuracy {result['test_accuracy']:.4f} of 360 images" in completed.stdout
    assert json.loads((folder / "config.json").read_text())["experiment"] == "small.py"


def test_train_prints_tables_of_time_and_parameters(trained):
    completed, folder = trained
    result = json.loads((folder / "result.json").read_text())
    times, parameters = ([line.split() for line in table.splitlines()] for table in completed.stdout.split("\n\n")[1:3])
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


def test_predictions_over_shifts(trained, digits, tmp_path, capsys):
    _, folder = trained
    scores = fm.evaluate(fm.load_run(folder).model, *digits.test, shifts=1)
    assert main("evaluate")([str(folder), "--shifts", "1", "--plot", str(tmp_path / "mistakes.png")]) == 0
    output = capsys.readouterr().out
    assert f"loss {scores.loss:.4f}" in output and f"\n{len(scores.mistakes)} mistakes\n" in output
    with Image.open(tmp_path / "mistakes.png") as picture:
        assert picture.width > 300
    Image.fromarray(digits.test.images[0, :, :, 0]).save(tmp_path / "digit.png")
    assert main("predict")([str(folder), str(tmp_path / "digit.png"), "--shifts", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["probabilities"] == pytest.approx(scores.probabilities[0], abs=1e-5)
    assert main("predict")([str(folder), str(tmp_path / "digit.png"), "--shifts", "9"]) == 2
    assert capsys.readouterr().err == "flaxmnist: shifts must be in [0, 4] pixels, but is 9\n"


def test_predict(trained, digits, tmp_path):
    _, folder = trained
    for i in range(5):
        Image.fromarray(digits.test.images[i, :, :, 0]).save(tmp_path / f"{i}.png")
    predicted = launch("predict", folder, tmp_path, "--json")
    assert predicted.returncode == 0, predicted.stderr
    predictions = [json.loads(line) for line in predicted.stdout.splitlines()]
    assert [Path(prediction["file"]).name for prediction in predictions] == [f"{i}.png" for i in range(5)]
    classes, probabilities = fm.predict(fm.load_run(folder).model, digits.test.images[:5])
    assert [prediction["class"] for prediction in predictions] == classes.tolist()
    assert all(sum(prediction["probabilities"]) == pytest.approx(1) for prediction in predictions)
    assert predictions[0]["probabilities"] == pytest.approx(probabilities[0].tolist(), abs=1e-5)
    (tmp_path / "text.png").write_text("not an image")
    failed = launch("predict", folder, tmp_path)
    assert failed.returncode == 2
    assert "text.png is not an image" in failed.stderr


MISTAKES = {
    "no experiment": (["train"], "no experiment file: pass it first"),
    "missing experiment": (["train", "nowhere.py"], "no experiment file nowhere.py"),
    "unknown field": (["train", "EXPERIMENT", "--optimizer.lerning-rate", "1"], "--optimizer.learning-rate"),
    "not a number": (["train", "EXPERIMENT", "--train.steps", "many"], "--train.steps"),
    "invalid value": (["train", "EXPERIMENT", "--train.batch-size", "0"], "train.batch_size must lie in"),
    "too large a batch size": (
        ["train", "EXPERIMENT", "--train.batch-size", "2000", "--data.last-batch", "drop"],
        "1257",
    ),
    "missing data": (["train", "EXPERIMENT", "--data.name", "idx", "--data-dir", "nowhere"], "--data.name digits"),
    "resume and overwrite": (["train", "EXPERIMENT", "--resume", "--overwrite"], "use only one of them"),
    "too many devices": (["train", "EXPERIMENT", "--devices", "9"], "--devices is 9, but 8 are available: use 1 to 8"),
    "a file as run folder": (["train", "EXPERIMENT", "--devices", "1", "--workdir", "EXPERIMENT"], "cannot write to"),
    "no run to evaluate": (["evaluate", "nowhere"], "nowhere is not a run folder: config.json is missing"),
    "no run to export": (["export", "nowhere"], "nowhere is not a run folder"),
    "no export": (["evaluate", "nowhere.stablehlo"], "nowhere.stablehlo cannot be read"),
    "a step of an export": (["evaluate", "model.stablehlo", "--step", "3"], "omit --step"),
    "an ensemble of an export": (["evaluate", "model.safetensors", "--ensemble"], "omit --ensemble"),
    "no run to predict with": (["predict", "nowhere", "image.png"], "nowhere is not a run folder"),
    "a file to predict with": (["predict", "EXPERIMENT", "image.png"], "is not a run folder: config.json is missing"),
    "a picture of another format": (["evaluate", "nowhere", "--plot", "a.jpg"], "pictures are PNG files: use a.png"),
    "a picture in no folder": (
        ["predict", "nowhere", "a.png", "--plot", "no/a.png"],
        "cannot write no/a.png: use a file",
    ),
    "resume without a folder": (["train", "EXPERIMENT", "--resume"], "--resume needs a run folder: pass --workdir"),
    "percent": (["train", "EXPERIMENT", "--min-accuracy", "95"], "--min-accuracy must be a fraction in [0, 1]"),
    "a trace without a folder": (["train", "EXPERIMENT", "--profile-at", "5"], "pass --profile with the folder for it"),
    "a file as trace folder": (
        ["train", "EXPERIMENT", "--devices", "1", "--profile", "EXPERIMENT"],
        "cannot write a trace to",
    ),
    "no pixel left": (["train", "CNN", "--devices", "1"], "no pixel left"),
    "infinite grace": (["train", "EXPERIMENT", "--grace", "inf"], "--grace must be in (0, 86400] seconds"),
    "not enough memory": (
        ["train", "EXPERIMENT", "--devices", "1", "--model.hidden", "1048576", "1048576"],
        "the state of this model takes 4,4",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_user_error_exits_with_2(name, experiment, tmp_path, monkeypatch, capsys):
    arguments, message = MISTAKES[name]
    cnn = "CNNConfig(features=(2, 2, 2), padding='VALID')"
    (tmp_path / "cnn.py").write_text(SMALL.replace("MLPConfig(hidden=(16,))", cnn))
    paths = {"EXPERIMENT": experiment, "CNN": tmp_path / "cnn.py"}
    monkeypatch.chdir(tmp_path)
    assert main(arguments[0])([str(paths.get(word, word)) for word in arguments[1:]]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""
    if name not in ("unknown field", "not a number"):  # for these the argument parser prints a box
        assert len(printed.err.splitlines()) == 1


def test_output_on_a_full_disk_is_an_error_of_one_line():
    with open("/dev/full", "w") as full:
        command = [sys.executable, ROOT / "launch/report.py", "--help"]
        completed = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    message = "flaxmnist: cannot write the output: No space left on device; write it elsewhere\n"
    assert (completed.returncode, completed.stderr) == (2, message)


def test_a_reader_that_leaves_does_not_change_the_exit_code():
    for arguments, code in ((["--help"], 0), (["nowhere"], 2)):
        with subprocess.Popen(
            [sys.executable, ROOT / "launch/report.py", *arguments], stdout=subprocess.PIPE
        ) as process:
            process.stdout.close()
        assert process.returncode == code


@pytest.mark.slow
def test_deterministic_changes_nothing_on_cpu(experiment, trained):
    """XLA rejects unknown flags, so this checks its name too."""
    completed = launch("train", experiment, "--deterministic", "--workdir", "run", cwd=experiment.parent)
    assert completed.returncode == 0, completed.stderr
    hashes = [
        json.loads((folder / "result.json").read_text())["params_sha256"]
        for folder in (experiment.parent / "run", trained[1])
    ]
    assert hashes[0] == hashes[1]


def test_divergence_exits_with_3(experiment, tmp_path, capsys):
    options = ["--devices", "1", "--workdir", str(tmp_path / "run"), "--optimizer.learning-rate", "1e38"]
    assert main("train")([str(experiment), *options]) == 3
    stderr = capsys.readouterr().err
    assert "the loss at step" in stderr
    assert "--optimizer.learning-rate" in stderr


def test_an_accuracy_below_target_exits_with_4(experiment, tmp_path, capsys):
    options = ["--devices", "1", "--workdir", str(tmp_path / "run"), "--train.steps", "1", "--min-accuracy", "0.99"]
    assert main("train")([str(experiment), *options]) == 4
    printed = capsys.readouterr()
    assert "below --min-accuracy 0.99" in printed.err
    assert "test accuracy" in printed.out


@pytest.mark.slow
def test_a_signal_exits_with_75_and_resume_continues(experiment, tmp_path):
    arguments = [experiment, "--train.evaluate-every", "None", "--workdir", tmp_path / "run"]
    command = [sys.executable, ROOT / "launch/train.py", *map(str, arguments), "--train.steps", "1000000"]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        for line in process.stderr:
            if line.startswith("step 200,"):
                process.send_signal(signal.SIGTERM)
                break
        stderr = process.stderr.read()
    assert process.returncode == 75
    stopped = int(re.search(r"stopped at step (\d+) of 1000000; --resume continues", stderr)[1])
    resumed, again = (launch("train", *arguments, "--resume", "--train.steps", stopped + 7) for _ in range(2))
    assert resumed.returncode == 0, resumed.stderr
    assert f"resuming from the checkpoint at step {stopped}" in resumed.stderr
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
    # Three matrix products per layer (no gradient of the images in the first), two operations per multiply-add.
    products = 2 * 50 * (2 * 784 * 20 + 3 * 20 * 30 + 3 * 30 * 10)
    operations = float(re.search(r"operations per step +(\S+) GFLOP", printed.stdout)[1]) * 1e9
    assert products < operations < 1.3 * products
    assert not list(tmp_path.glob("runs*"))


@pytest.mark.parametrize("verb", ["train", "evaluate", "predict", "sweep", "report", "export", "benchmark"])
def test_help_exits_with_0(verb, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"launch/{verb}.py", "--help"])
    assert main(verb)(["--help"]) == 0
    helped = capsys.readouterr()
    assert helped.err == ""
    assert f"python launch/{verb}.py" in helped.out


def test_help_lists_fields_with_their_meaning_and_the_values_of_the_experiment(experiment):
    helped = " ".join(launch("train", experiment, "--help").stdout.replace("│", " ").split())
    assert "--optimizer.learning-rate FLOAT step size; the full rate of the schedule; above 0 (default: 0.1)" in helped
    assert "--train.batch-size INT images per step; at least 1 (default: 50)" in helped
    assert "--model.hidden [INT [INT ...]] units of each hidden layer" in helped


@pytest.mark.parametrize("name", ["softmax_beginners", "cnn_experts", "speedrun"])
def test_help_has_the_meaning_and_bounds_of_every_field(name, capsys, monkeypatch):
    """The three models and optimizers."""
    monkeypatch.setenv("COLUMNS", "100")
    assert main("train")([name, "--help"]) == 0
    helped = capsys.readouterr().out
    options = re.findall(r"^│ +(--\S+).*│\n│ +(\S.*?) *│$", helped, re.MULTILINE)
    assert not [option for option, meaning in options if meaning.startswith("(default")]
    names = [option for option, _ in options]
    assert len(names) == len(set(names))
    words = " ".join(helped.replace("│", " ").split())
    for option, bound in {
        "--model.dropout": "in [0, 1)",
        "--optimizer.learning-rate": "above 0",
        "--optimizer.clip-norm": "above 0",
        "--optimizer.accumulate": "at least 1",
        "--model.bias-init.value": "finite",
        "--data.augment.rotate": "in [0, 180]",
    }.items():
        assert re.search(rf"{re.escape(option)} [^(]*; {re.escape(bound)} \(default", words), option


# --- The console script ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", commands.VERBS)
def test_each_verb_has_help(verb, capsys):
    assert main(verb)(["--help"]) == 0
    assert f"usage: flaxmnist {verb} " in capsys.readouterr().out
    assert (ROOT / f"launch/{verb}.py").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--help"], 0, ""),
        (["-h"], 0, ""),
        ([], 2, "flaxmnist: no verb: use one of these\n"),
        (["trian", "small.py"], 2, "flaxmnist: there is no verb 'trian': use one of these\n"),
    ],
)
def test_usage_lists_the_verbs(arguments, code, message, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["flaxmnist", *arguments])
    assert commands.main() == code
    printed = capsys.readouterr()
    assert printed.err == (f"{message}{commands.USAGE}\n" if code else "")
    assert printed.out == ("" if code else f"{commands.USAGE}\n")
    assert all(re.search(rf"^  {verb} ", commands.USAGE, re.MULTILINE) for verb in commands.VERBS)


def test_the_console_script_runs_a_verb_and_names_the_next_ones(experiment):
    command = [sys.executable, "-W", "error", "-m", "flaxmnist.commands", "train", "small.py", "--workdir", "run"]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    cwd = experiment.parent
    completed = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, check=False)
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout.splitlines()[-3:] == [
        "next: flaxmnist evaluate run",
        "      flaxmnist report run",
        "      flaxmnist predict run IMAGE.png",
    ]


@pytest.mark.slow
def test_quickstart_reaches_its_accuracy(tmp_path):
    completed = launch("train", ROOT / "experiments/quickstart.py", "--min-accuracy", "0.95", cwd=tmp_path)
    assert completed.returncode == 0, completed.stderr
    assert "next: python launch/evaluate.py" in completed.stdout
