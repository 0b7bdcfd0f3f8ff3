"""The parser for the settings of a sweep."""

import pytest

from flaxmnist.errors import UserError
from flaxmnist.sweeps import settings


def test_combinations_in_order():
    assert settings.parse_settings([]) == [{}]
    assert settings.parse_settings(["optimizer.learning-rate=1e-3,0.1", "model.padding=SAME,VALID"]) == [
        {"optimizer.learning_rate": 1e-3, "model.padding": "SAME"},
        {"optimizer.learning_rate": 1e-3, "model.padding": "VALID"},
        {"optimizer.learning_rate": 0.1, "model.padding": "SAME"},
        {"optimizer.learning_rate": 0.1, "model.padding": "VALID"},
    ]
    hidden = [{"model.hidden": (8, 8)}, {"model.hidden": [16]}]
    assert settings.parse_settings(["model.hidden=(8,8),[16]"]) == hidden
    assert settings.parse_settings(["train.clip_norm=None,1"]) == [{"train.clip_norm": None}, {"train.clip_norm": 1}]


def test_random_settings_are_reproducible():
    over = ["optimizer.learning-rate=1e-4..1,log", "model.dropout=0.0..0.5", "train.batch-size=16..64", "seed=1,2"]
    samples = settings.parse_settings(over, 200)
    assert samples == settings.parse_settings(over, 200)
    rates = sorted(sample["optimizer.learning_rate"] for sample in samples)
    assert 1e-4 <= rates[0] < 1e-3
    assert rates[-1] <= 1
    assert 5e-3 < rates[100] < 2e-2, "the median is near the geometric mean of the bounds"
    assert all(0 <= sample["model.dropout"] <= 0.5 for sample in samples)
    assert {type(sample["train.batch_size"]) for sample in samples} == {int}
    assert {sample["seed"] for sample in samples} == {1, 2}


@pytest.mark.parametrize(
    ("over", "random", "message"),
    [
        (["model.dropout"], None, "must be FIELD=V1,V2"),
        (["=1"], None, "must be FIELD=V1,V2"),
        (["model.dropout=0..1"], None, "is a range: pass --random N"),
        (["model.dropout=0..1"], 10**9, "--random samples 1 to 100,000 settings"),
        ([f"{name}={'1,' * 999}1" for name in ("seed", "train.steps")], None, "are over 100,000 combinations"),
        (["model.dropout=1..0"], 3, "with LOW below HIGH"),
        (["model.dropout=0..1,log"], 3, "above 0 for log"),
        (["model.dropout=0..1,lin"], 3, "must be LOW..HIGH"),
        (["model.dropout=a..b"], 3, "must be LOW..HIGH"),
        (["model.dropout=0..1e999"], 3, "must be LOW..HIGH"),
        (["train.log-every=1", "train.log_every=2"], None, "--over train.log_every is given twice"),
        ([], 3, "the values of at least one --over"),
        (["model.dropout=0..1"], 0, "samples 1 to 100,000 settings"),
    ],
)
def test_invalid_options(over, random, message):
    with pytest.raises(UserError, match=message):
        settings.parse_settings(over, random)
