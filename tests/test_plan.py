"""The trials of a sweep, and which of them share a program."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import small

import flaxmnist as fm
from flaxmnist.config import SGD, Cosine, Data
from flaxmnist.errors import UserError
from flaxmnist.sweeps.plan import Experiment, group_trials, plan_trials


def test_trials_are_ordered_by_experiment_setting_and_seed(few):
    settings = [{"train.batch_size": 8}, {"train.batch_size": 16}]
    trials = plan_trials([Experiment(small(), few), Experiment(small("mlp"), few)], [5, 2], settings, share_order=False)
    assert [trial.index for trial in trials] == list(range(8))
    assert [(trial.config.train.batch_size, trial.config.seed) for trial in trials] == 2 * [
        (8, 5),
        (8, 2),
        (16, 5),
        (16, 2),
    ]
    assert [type(trial.config.model) for trial in trials[3:5]] == [type(small().model), type(small("mlp").model)]


def test_a_shared_order_is_that_of_the_experiment_or_of_the_first_seed(few):
    for own, shared in ((7, 7), (None, 2)):
        config = small(data=Data(name="digits", order_seed=own))
        trials = plan_trials([Experiment(config, few)], [2, 3], [{}], share_order=True)
        assert [trial.config.data.order_seed for trial in trials] == [shared, shared]


@pytest.mark.parametrize(
    ("model", "share_order", "exact", "groups"),
    [
        ("mlp", True, False, [(4, ("optimizer.learning_rate",), False), (4, ("optimizer.learning_rate",), False)]),
        ("mlp", True, True, 4 * [(2, (), True)]),
        ("mlp", False, False, 4 * [(2, (), True)]),
        ("cnn", True, False, 4 * [(2, (), True)]),
    ],
)
def test_trials_of_a_group_share_a_program(model, share_order, exact, groups, few):
    """On CPU, trials are vectorised only if they have the same batches and no convolutions."""
    settings = [{"optimizer.learning_rate": rate, "train.batch_size": size} for rate in (0.1, 0.2) for size in (8, 16)]
    trials = plan_trials([Experiment(small(model), few)], [0, 1], settings, share_order)
    planned = group_trials(trials, share_order, exact)
    assert [(len(group.trials), group.names, group.sequential) for group in planned] == groups
    assert sorted(trial.index for group in planned for trial in group.trials) == list(range(8))


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"optimizer.lerning_rate": [1]}, "there is no field optimizer.lerning_rate: SGD has no 'lerning_rate'"),
        ({"model.hidden.size": [1]}, "there is no field model.hidden.size"),
        (
            {"optimizer.learning_rate": [np.ones(2)]},
            "learning_rate must be numbers, words, None or tuples of them, not",
        ),
        ({"optimizer": [SGD()]}, "the values of optimizer must be numbers, words, None or tuples of them, not SGD"),
        ({"train.steps": [2]}, "optimizer.schedule.warmup_steps is 3, but the run has only 2 updates"),
        ({"model.dropout": [2.0]}, r"model.dropout must lie in \[0, 1\)"),
        ({"train.patience": [3]}, "cannot stop early|train.patience"),
        ({"train.batch_size": []}, "there is nothing to train"),
        ({"train.steps": [None], "train.epochs": [None]}, "exactly one of train.steps and train.epochs must be set"),
        ({"seed": [1, 2]}, "seed cannot be swept"),
        ({"data.order": ["shuffled", "file"]}, "data.order file needs the original files"),
    ],
)
def test_invalid_sweeps(over, message, few):
    config = small("mlp", optimizer=SGD(schedule=Cosine(warmup_steps=3)))
    with pytest.raises(UserError, match=message):
        fm.sweep(config, replace(few, file_order=False), seeds=1, over=over, devices=1)


def test_too_large_a_sweep_is_refused_before_it_fills_memory(few):
    with pytest.raises(UserError, match="a sweep has at most 100,000 trials"):
        fm.sweep(small("mlp"), few, seeds=10**12, devices=1)
