"""Runs whose loss, gradient or weights are not finite: they end with a message, or skip the step."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import assert_same, fit_on_one, slow, small

import flaxmnist as fm
from flaxmnist.config import SGD, Adam, Data, Exponential, MLPConfig, Normal, Objective
from flaxmnist.data.sets import Split
from flaxmnist.errors import Diverged

# With these initial values the loss is finite, but the norm of its gradient is not.
OVERFLOW = MLPConfig(hidden=(8, 8, 8), kernel_init=Normal(1e7))
IN_FILE_ORDER = Data(name="digits", order="file")


@pytest.fixture
def with_nan_losses(digits):
    """A function that returns data whose loss, in file order with batches of 16, is NaN at the given of 20 steps.

    A batch of these steps has a label outside of the classes.
    """

    def make(*steps: int):
        images, labels = (array[: 20 * 16].copy() for array in digits.train)
        labels[[16 * step + 5 for step in steps]] = 10
        return replace(digits, train=Split(images, labels))

    return make


def test_divergence_message_names_step_and_checkpoint(few, tmp_path):
    unstable = Objective(labels="one_hot", form="probabilities")
    config = replace(small(optimizer=SGD(learning_rate=1e3), checkpoint_every=1, keep=1), objective=unstable)
    with pytest.raises(
        Diverged, match=r"the loss at step (\d+) is (inf|nan): training diverged, the checkpoint"
    ) as error:
        fit_on_one(config, few, tmp_path)
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    assert f"the checkpoint at step {checkpoint.name} is kept" in str(error.value)
    loaded = fm.load_run(tmp_path, checkpoint.name)
    assert np.isfinite(fm.evaluate(loaded.model, *few.train).loss)


def test_infinite_final_weights_raise_diverged(few, tmp_path):
    """Every recorded loss is finite, because the last update is the first to overflow."""
    config = small(optimizer=SGD(learning_rate=3e38), steps=1)
    for folder in (None, tmp_path):
        with pytest.raises(Diverged, match="after step 1"):
            fit_on_one(config, few, folder)


@pytest.mark.parametrize("report", ["batch_accuracy", "probabilities"])
def test_reports_of_nan_do_not_hide_that_the_run_diverged(report, few):
    with pytest.raises(Diverged, match=r"at step 1 is (nan|inf)"):
        fit_on_one(small(optimizer=SGD(learning_rate=1e38), report=report), few)


def test_nonfinite_loss_raises_diverged(with_nan_losses):
    advice = "try a smaller --optimizer.learning-rate or an --optimizer.clip-norm"
    message = f"the loss at step 7 is nan: training diverged, no checkpoint was saved; {advice}"
    with pytest.raises(Diverged, match=f"^{message}$"):
        fit_on_one(small(data=IN_FILE_ORDER), with_nan_losses(7))


@pytest.mark.parametrize(
    ("allowed", "message"),
    [
        (0, "at step 0 is inf: training diverged"),
        (2, "at step 2 is inf, after 2 steps in a row were skipped: training"),
    ],
)
def test_nonfinite_gradient_raises_diverged(allowed, message, few):
    with pytest.raises(Diverged, match=f"the gradient norm {message}"):
        fit_on_one(small(OVERFLOW, skip_nonfinite=allowed), few)


def test_nonfinite_steps_can_be_skipped(with_nan_losses, fit_until, tmp_path, caplog):
    """The count of skipped steps continues if the run is stopped and resumed; the learning rate counts updates."""
    optimizer = Adam(schedule=Exponential(decay=0.5, every=1))
    config = small(optimizer=optimizer, data=IN_FILE_ORDER, evaluate_every=3, skip_nonfinite=2, ema_decay=0.9)
    data = with_nan_losses(3, 4, 9)
    caplog.set_level("WARNING", logger="flaxmnist")
    full = fit_on_one(config, data, tmp_path / "full")
    assert np.isfinite(fm.evaluate(full.model, *data.test).loss)
    skipped = [(record["step"], record["count"]) for record in full.history if record["split"] == "skipped"]
    assert skipped == [(3, 1), (4, 2), (9, 3)]
    assert caplog.messages == [f"the loss at step {step} is nan: this step is skipped" for step in (3, 4, 9)]
    trained = {r["step"]: r["learning_rate"] for r in full.history if r["split"] == "train"}
    assert list(trained) == [step for step in range(20) if step not in (3, 4, 9)]
    assert list(trained.values()) == pytest.approx([1e-3 * 0.5**update for update in range(17)])
    fit_until(4, config, data, tmp_path / "stopped")
    assert_same(fit_on_one(config, data, tmp_path / "stopped", resume=True).state, full.state)
    assert (tmp_path / "stopped/metrics.jsonl").read_bytes() == (tmp_path / "full/metrics.jsonl").read_bytes()


@pytest.mark.parametrize("reason", ["loss", slow("gradient")])
def test_skipped_step_changes_nothing(reason, with_nan_losses):
    """After the last step, or after two steps that must be skipped from the start."""
    config = small("mlp", optimizer=Adam(), data=IN_FILE_ORDER, skip_nonfinite=2)
    if reason == "gradient":
        config = replace(config, model=OVERFLOW)
    steps = {"loss": (19, 20), "gradient": (1, 2)}[reason]
    before, after = (
        fit_on_one(replace(config, train=replace(config.train, steps=length)), with_nan_losses(19)) for length in steps
    )
    assert_same((after.state.params, after.state.opt_state), (before.state.params, before.state.opt_state))
    assert after.state.step == steps[1]
    assert [r["step"] for r in after.history if r["split"] == "skipped"][-1] == steps[0]


@pytest.mark.parametrize("stopped", [False, True])
def test_too_many_consecutive_skipped_steps_raise_diverged(stopped, with_nan_losses, fit_until, tmp_path):
    config = small(data=IN_FILE_ORDER, evaluate_every=3, skip_nonfinite=2)
    data = with_nan_losses(3, 4, 5)
    if stopped:
        fit_until(4, config, data, tmp_path)
    with pytest.raises(Diverged, match="the loss at step 5 is nan, after 2 steps in a row were skipped"):
        fit_on_one(config, data, tmp_path, resume=True)
