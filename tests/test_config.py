"""Validation of configs, their JSON form, and experiment files."""

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, small

from flaxmnist import config, fields
from flaxmnist.config import CNN, MLP, SGD, Adam, Augment, Config, Data, Objective, Softmax, Train
from flaxmnist.errors import UserError

EXPERIMENTS = sorted((ROOT / "experiments").glob("*.py"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiment_file_survives_json(path):
    experiment = config.load_experiment(path)
    assert fields.from_json(fields.to_json(experiment), Config) == experiment
    assert experiment.name == path.stem


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiment_docstring_has_command_and_result(path):
    text = path.read_text()
    assert text.startswith('"""')
    assert f"python launch/train.py experiments/{path.name}" in text
    assert "±" in text


def test_only_unions_have_a_kind_in_json():
    values = fields.to_json(small(optimizer=Adam()))
    assert values["optimizer"]["kind"] == "Adam"
    assert values["optimizer"]["schedule"] == {"kind": "Flat"}
    assert "kind" not in values["train"]


INVALID = {
    "seed must lie in [0, 2.14748e+09], but is -1": lambda: replace(small(), seed=-1),
    "seed must be int, but is 1.5": lambda: replace(small(), seed=1.5),
    "name must be a word": lambda: replace(small(), name="a/b"),
    "train.batch_size must lie in [1,": lambda: small(batch_size=0),
    "train.epochs must be set, but they are 20 and 3: set one and leave the other None": lambda: small(epochs=3),
    "but they are None and None: set one": lambda: small(steps=None),
    "train.ema_decay must lie in [0, 1), but is 1.0": lambda: small(ema_decay=1.0),
    "set train.evaluate_every": lambda: small(patience=3),
    "data.validation must not be 0": lambda: small(
        patience=3, evaluate_every=1, data=Data(name="digits", validation=0)
    ),
    "train.report must be 'loss' or": lambda: small(report="everything"),
    "optimizer.learning_rate must lie in (0, inf), but is nan": lambda: small(
        optimizer=SGD(learning_rate=float("nan"))
    ),
    "optimizer.learning_rate must be float, but is '1'": lambda: small(optimizer=SGD(learning_rate="1")),
    "optimizer.momentum must lie in [0, 1), but is 1": lambda: small(optimizer=SGD(momentum=1)),
    "optimizer.nesterov needs": lambda: small(optimizer=SGD(nesterov=True)),
    "optimizer.b2 must lie in": lambda: small(optimizer=Adam(b2=1.0)),
    "optimizer.schedule.peak must lie in (0, 1)": lambda: small(optimizer=SGD(schedule=config.OneCycle(peak=0.0))),
    "optimizer must be SGD or Adam or Muon, but is Softmax": lambda: small(optimizer=Softmax()),
    "model.hidden must be a tuple of int": lambda: small(MLP(hidden=[3])),
    "model.hidden must be at most 100 layers of at least 1 unit": lambda: small(MLP(hidden=(0,))),
    "model.kernel must be sides": lambda: small(CNN(features=(2, 2, 2), kernel=(5, 3))),
    "optimizer.newton_schulz_steps must lie in [1, 20]": lambda: small(optimizer=config.Muon(newton_schulz_steps=0)),
    "model.features must be at least one": lambda: small(CNN(features=())),
    "model.padding must be 'SAME' or 'VALID', but is 'same'": lambda: small(CNN(padding="same")),
    "model.dropout must lie in [0, 1), but is 1.0": lambda: small(CNN(dropout=1.0)),
    "model.bias_init cannot be Glorot or LeCun": lambda: small(Softmax(bias_init=config.Glorot())),
    "model.kernel_init: low must be below high": lambda: small(Softmax(kernel_init=config.Uniform(1.0, 0.0))),
    "model.kernel_init.stddev must not be negative": lambda: small(Softmax(kernel_init=config.Normal(-1.0))),
    "objective.form probabilities needs objective.labels one_hot": lambda: replace(
        small(), objective=Objective(form="probabilities")
    ),
    "objective.label_smoothing needs": lambda: replace(small(), objective=Objective(label_smoothing=0.1)),
    "data.augment.shift must lie in [0, 14]": lambda: small(data=Data(augment=Augment(shift=15))),
}


@pytest.mark.parametrize("message", INVALID)
def test_invalid_value_is_named(message):
    with pytest.raises(UserError) as raised:
        INVALID[message]()
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_invalid_json_is_rejected():
    values = fields.to_json(small())
    for change, message in [
        ({"speed": 1}, "the config has unknown field 'speed'"),
        ({"optimizer": {"kind": "Adagrad"}}, "optimizer.kind must be one of SGD, Adam, Muon, but is 'Adagrad'"),
        ({"model": 3}, "model must be an object, but is 3"),
        ({"seed": "x"}, "seed must be int"),
    ]:
        with pytest.raises(UserError, match=message):
            fields.from_json(values | change, Config)
    del values["train"]["keep"]
    with pytest.raises(UserError, match="train has no field 'keep'"):
        fields.from_json(values, Config)


EMPTY_NAME = """
from flaxmnist.config import *
config = Config(name="", model=Softmax(), optimizer=SGD(), train=Train(steps=1))
"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "defines no config"),
        ("config = 3", "defines no config"),
        ("config = Config(", "does not run: SyntaxError"),
        ("import nowhere", "does not run: ModuleNotFoundError: No module named 'nowhere'"),
        ("raise SystemExit", "does not run: SystemExit"),
        (EMPTY_NAME, "name must be"),
    ],
)
def test_broken_experiment_file_is_named(text, message, tmp_path):
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(UserError) as raised:
        config.load_experiment(path)
    assert message in str(raised.value)
    assert str(path) in str(raised.value)


def test_missing_experiment_file_is_named():
    with pytest.raises(UserError, match=r"no experiment file nowhere\.py: pass the path of"):
        config.load_experiment(Path("nowhere.py"))


def test_flatten():
    flat = fields.flatten(fields.to_json(small(optimizer=SGD(learning_rate=0.25))))
    assert flat["optimizer.learning_rate"] == 0.25
    assert flat["model.kernel_init.kind"] == "Constant"
    assert not any(isinstance(value, dict) for value in flat.values())


def test_configs_are_frozen_and_hashable():
    assert hash(small()) == hash(small())
    with pytest.raises(AttributeError):
        small().seed = 3  # pyright: ignore[reportAttributeAccessIssue]
    assert Train(steps=1) == Train(steps=1)
    assert isinstance(small(), Config)
