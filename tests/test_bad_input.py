"""Property tests: any input ends in success or with a message, without traceback, hang or excessive memory.

Each test draws hundreds of cases; in the slow suite thousands.
"""

import contextlib
import gzip
import io
import json
import os
import resource
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, main, small
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import flaxmnist as fm
from flaxmnist import fields, runs
from flaxmnist.config import Adam, Augment, CNNConfig, Config, Cosine, Data, MLPConfig, Muon, OneCycle
from flaxmnist.core import steps
from flaxmnist.data.idx import read_idx
from flaxmnist.data.photos import read_digit
from flaxmnist.devices import parallel
from flaxmnist.errors import Stopped, UserError
from flaxmnist.sweeps.ensembles import evaluate_ensemble
from flaxmnist.sweeps.plan import Experiment
from flaxmnist.sweeps.runner import run_sweep


def cases(quick: int, slow: int):
    """Parametrize a test with ``count``: that many cases in the quick and in the slow suite."""
    return pytest.mark.parametrize("count", [quick, pytest.param(slow, marks=pytest.mark.slow)])


def try_all(count: int, strategy, check) -> None:
    """Call ``check`` with ``count`` cases. Only UserError may be raised, and memory may grow by at most 2 GB."""

    def attempt(case):
        with contextlib.suppress(UserError):
            check(case)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    options = {"deadline": None, "database": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
    settings(max_examples=count, **options)(given(strategy)(attempt))()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 << 20, "memory grew by more than 2 GB"


# --- Strategies ------------------------------------------------------------------------------------------------------

words = st.text(max_size=8) | st.sampled_from(
    ["", "None", "SGD", "CNN", "mnist", "digits", "../x", "a\0b", "nan", "\ud800"]
)
numbers = (
    st.integers()
    | st.sampled_from([0, 1, -1, 2, 7, 2**20, 2**31 - 1, 2**31, 2**63, 10**400, 1e38, 1e-300, -0.0])
    | st.floats()
)
values = st.recursive(
    st.none() | st.booleans() | numbers | words,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def damaged(draw, contents: list[bytes]) -> bytes:
    """Draw one of ``contents``, with some bytes replaced or its end changed, or a few random bytes."""
    content = draw(st.sampled_from(contents))
    start = draw(st.integers(0, len(content)))
    stop = draw(st.integers(start, min(len(content), start + 16)))
    new = draw(st.binary(max_size=16) | st.just(content[start:stop]))
    tail = draw(st.sampled_from([content[stop:], b"", content[stop:] + b"\0" * 9]))
    return draw(st.sampled_from([content[:start] + new + tail, new]))


# --- Configs and experiment files -----------------------------------------------------------------------------------

CONFIGS = [
    small(),
    small(MLPConfig(dropout=0.1), optimizer=Adam(schedule=Cosine(warmup_steps=2)), ema_decay=0.9),
    small(CNNConfig(), optimizer=Muon(schedule=OneCycle()), data=Data(name="digits", augment=Augment(shift=1))),
]


@st.composite
def changed(draw, config: Config) -> dict:
    """Draw the JSON of ``config`` with up to three values or nested objects replaced."""
    tree = json.loads(json.dumps(fields.to_json(config)))
    for _ in range(draw(st.integers(1, 3))):
        node = tree
        while True:
            name = draw(st.sampled_from(sorted(node)))
            if not (isinstance(node[name], dict) and node[name] and draw(st.booleans())):
                break
            node = node[name]
        node[name] = draw(values)
    return tree


@cases(150, 3000)
def test_configs(count, digits):
    mesh = parallel.make_mesh(1)

    def check(tree):
        config = fields.from_json(tree, Config)
        runs.check(runs.order.resolve_length(config, 1257), digits, steps.train_step, None, mesh, "jit")

    try_all(count, st.sampled_from(CONFIGS).flatmap(changed), check)


SOURCE = (ROOT / "experiments/quickstart.py").read_bytes()


@cases(100, 2000)
def test_experiment_files(count, tmp_path):
    path = tmp_path / "experiment.py"

    def check(content):
        path.write_bytes(content)
        assert isinstance(fm.load_experiment(path), Config)

    try_all(count, damaged([SOURCE, b"config = 1", b"\xff\xfe", b"raise SystemExit", b"config = [" * 500]), check)


# --- Files ----------------------------------------------------------------------------------------------------------

LABELS = struct.pack(">HBBI", 0, 8, 1, 12) + bytes(range(12))
IMAGES = struct.pack(">HBB3I", 0, 8, 3, 12, 9, 8) + bytes(12 * 72)
BOMB = gzip.compress(struct.pack(">HBB3I", 0, 8, 3, 2000, 28, 28) + bytes(64 << 20))


@cases(300, 6000)
def test_idx_files(count, tmp_path):
    path = tmp_path / "file"

    def check(content):
        path.write_bytes(content)
        assert read_idx(path).dtype == np.uint8

    try_all(count, damaged([LABELS, IMAGES, gzip.compress(LABELS), gzip.compress(IMAGES), BOMB]), check)


@cases(100, 2000)
def test_data_sets_of_four_files(count, tmp_path):
    names = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]

    def check(case):
        contents, validation = case
        for name, content in zip(names, contents, strict=True):
            (tmp_path / name).write_bytes(content)
        data = fm.load_data(Data(name="idx", validation=validation), tmp_path)
        assert len(data.train.images) == len(data.train.labels)

    intact = [LABELS, IMAGES, gzip.compress(IMAGES)]
    file = st.sampled_from(intact) | damaged(intact)
    files = st.tuples(*(st.just(content) | file for content in (IMAGES, LABELS, IMAGES, LABELS)))
    try_all(count, st.tuples(files, st.none() | st.integers(0, 20)), check)


def pictures() -> list[bytes]:
    """Return a digit in several formats, and a picture of 100 million pixels in a few bytes."""
    digit = Image.fromarray((np.eye(40) * 200).astype(np.uint8)).resize((60, 80))
    formats = dict.fromkeys(("PNG", "GIF", "BMP", "WEBP"), digit)
    formats |= {"TIFF": digit.convert("F"), "JPEG": digit.convert("RGB")}
    contents = []
    for name, picture in [*formats.items(), ("PNG", Image.new("1", (20_000, 5_000)))]:
        picture.save(file := io.BytesIO(), name)
        contents.append(file.getvalue())
    return contents


@cases(120, 2400)
def test_pictures(count, tmp_path):
    path = tmp_path / "digit.png"

    def check(content):
        path.write_bytes(content)
        assert read_digit(path).shape == (28, 28, 1)

    try_all(count, damaged(pictures()), check)


# --- Run folders ----------------------------------------------------------------------------------------------------


def read_files(folder: Path) -> dict[str, bytes]:
    """Return the content of each file in ``folder`` by its relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@cases(5, 150)
def test_run_folders(count, few, tmp_path):
    """With any file damaged or replaced, a run can be loaded and resumed, or is refused."""
    config = small(steps=4, checkpoint_every=2)
    fm.fit(config, few, tmp_path / "intact", devices=1)
    contents = read_files(tmp_path / "intact")
    (tmp_path / "intact/result.json").unlink()
    json_text = values.map(lambda value: json.dumps(value).encode())
    case = st.sampled_from(sorted(contents)).flatmap(
        lambda name: st.tuples(st.just(name), damaged([contents[name], b"[" * 100_000]) | json_text)
    )
    numbers = iter(range(count * 10))

    def check(case):
        name, content = case
        folder = tmp_path / f"{next(numbers)}"
        shutil.copytree(tmp_path / "intact", folder)
        (folder / name).write_bytes(content)
        try:
            with contextlib.suppress(UserError):
                fm.load_run(folder)
            fm.fit(config, few, folder, devices=1, resume=True)
        finally:
            shutil.rmtree(folder)

    try_all(count, case, check)


@cases(5, 150)
def test_sweep_folders(count, few, tmp_path):
    def sweep(folder, **options):
        return run_sweep([Experiment(small(steps=2), few)], [0, 1], [{}], devices=1, workdir=folder, **options)

    sweep(tmp_path / "intact")
    contents = read_files(tmp_path / "intact")
    numbers = iter(range(count * 10))

    def check(case):
        name, content = case
        folder = tmp_path / f"{next(numbers)}"
        shutil.copytree(tmp_path / "intact", folder)
        (folder / name).write_bytes(content)
        try:
            with contextlib.suppress(UserError):
                evaluate_ensemble(folder, None)
            sweep(folder, resume=True)
        finally:
            shutil.rmtree(folder)

    case = st.sampled_from(sorted(contents)).flatmap(
        lambda name: st.tuples(st.just(name), damaged([contents[name], b"[1]", b"{}"]))
    )
    try_all(count, case, check)


# --- Command lines --------------------------------------------------------------------------------------------------

TINY = """
from flaxmnist.config import *
model = MLPConfig(hidden=(4,))
config = Config(name="tiny", model=model, optimizer=SGD(), data=Data(name="digits"), train=Train(steps=2))
"""
SHARED = ["--help", "--nothing", "--data-dir", "--step"]
RUNNING = ["--workdir", "--resume", "--overwrite", "--devices", "--grace"]
OPTIONS = {
    "train": [
        *(*SHARED, *RUNNING, "--allow-config-change", "--backend", "--model-parallel", "--processes", "--process-id"),
        *("--heartbeat", "--min-accuracy", "--print-config", "--log-level", "--seed", "--name", "--data.name"),
        *("--data.validation", "--model.hidden", "--optimizer.learning-rate", "--train.batch-size", "--train.steps"),
        *("--train.epochs", "--train.evaluate-every", "--train.keep", "--train.report", "--objective.labels"),
    ],
    "evaluate": [*SHARED, "--split", "--ensemble", "--shifts", "--plot"],
    "predict": [*SHARED, "--json", "--shifts"],
    "export": [*SHARED, "--out"],
    "sweep": [*SHARED, *RUNNING, "--seeds", "--over", "--random", "--share-order", "--exact", "--validation"],
    "benchmark": [*SHARED, "--json", "--peer", "--plot"],
}
WORDS = [
    *("0", "-1", "1", "2", "nan", "inf", "1e999", "", "None", "True", "x", "digits", "idx", "run", "new", "tiny.py"),
    ".",
    *("/dev/null", "/proc/none", "∞", "9" * 30, "model.hidden=3", "optimizer.learning-rate=1,nan", "seed=1", "=", "--"),
    *("optimizer.learning_rate=1..2,log", "model=1", "digit.png", "((((", "\udcff", "a" * 300, "jit", "pmap", "test"),
]


@cases(10, 600)
def test_command_lines(count, tmp_path, monkeypatch, few):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.py").write_text(TINY)
    Image.fromarray(few.test.images[0, :, :, 0]).save("digit.png")
    fm.fit(fm.load_experiment("tiny.py"), fm.load_data("digits"), "run", devices=1)
    commands = {name: main(name) for name in OPTIONS}
    first = {"train": "tiny.py", "sweep": "tiny.py", "benchmark": "nothing"}

    def check(case):
        name, options = case
        errors = io.StringIO()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
            code = commands[name]([first.get(name, "run"), *options])
        assert code in (0, 2, 3, 4, Stopped.exit_code), errors.getvalue()
        assert code != 2 or errors.getvalue().strip(), (name, options)

    case = st.sampled_from(sorted(OPTIONS)).flatmap(
        lambda name: st.tuples(
            st.just(name), st.lists(st.sampled_from(OPTIONS[name]) | st.sampled_from(WORDS), max_size=5)
        )
    )
    try_all(count, case, check)
    assert sorted(path for path in os.listdir() if Path(path).is_file() and path.startswith("core")) == []
