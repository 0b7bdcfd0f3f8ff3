"""The settings of a sweep, as they are written on the command line."""

import pytest

from flaxmnist import settings
from flaxmnist.errors import UserError


def test_all_combinations_in_order():
    assert settings.read([]) == [{}]
    assert settings.read(["optimizer.learning-rate=1e-3,0.1", "model.padding=SAME,VALID"]) == [
        {"optimizer.learning_rate": 1e-3, "model.padding": "SAME"},
        {"optimizer.learning_rate": 1e-3, "model.padding": "VALID"},
        {"optimizer.learning_rate": 0.1, "model.padding": "SAME"},
        {"optimizer.learning_rate": 0.1, "model.padding": "VALID"},
    ]
    assert settings.read(["train.clip_norm=None,1"]) == [{"train.clip_norm": None}, {"train.clip_norm": 1}]


def test_random_settings_are_the_same_ones_each_time():
    over = ["optimizer.learning-rate=1e-4..1,log", "model.dropout=0.0..0.5", "train.batch-size=16..64", "seed=1,2"]
    drawn = settings.read(over, 200)
    assert drawn == settings.read(over, 200)
    rates = sorted(each["optimizer.learning_rate"] for each in drawn)
    assert 1e-4 <= rates[0] < 1e-3
    assert rates[-1] <= 1
    assert 5e-3 < rates[100] < 2e-2, "half of them below the geometric middle"
    assert all(0 <= each["model.dropout"] <= 0.5 for each in drawn)
    assert {type(each["train.batch_size"]) for each in drawn} == {int}
    assert {each["seed"] for each in drawn} == {1, 2}


@pytest.mark.parametrize(
    ("over", "random", "message"),
    [
        (["model.dropout"], None, "must be FIELD=V1,V2"),
        (["=1"], None, "must be FIELD=V1,V2"),
        (["model.dropout=0..1"], None, "is a range: give --random N"),
        (["model.dropout=0..1"], 10**9, "--random draws 1 to 100,000 settings"),
        ([f"{name}={'1,' * 999}1" for name in ("seed", "train.steps")], None, "are over 100,000 combinations"),
        (["model.dropout=1..0"], 3, "with LOW below HIGH"),
        (["model.dropout=0..1,log"], 3, "above 0 for log"),
        (["model.dropout=0..1,lin"], 3, "must be LOW..HIGH"),
        (["model.dropout=a..b"], 3, "must be LOW..HIGH"),
        ([], 3, "the ranges of at least one --over"),
        (["model.dropout=0..1"], 0, "draws 1 to 100,000 settings"),
    ],
)
def test_what_cannot_be_read(over, random, message):
    with pytest.raises(UserError, match=message):
        settings.read(over, random)
