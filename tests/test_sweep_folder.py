"""The folder of a sweep: resuming, damage, and folders of other sweeps."""

import json
import shutil
import threading
from dataclasses import replace

import pytest
from conftest import assert_same, slow, small

from flaxmnist.config import Adam
from flaxmnist.data.sets import Dataset, Split
from flaxmnist.errors import Stopped, UserError
from flaxmnist.store.files import read_arrays
from flaxmnist.sweeps import folder as sweep_folder
from flaxmnist.sweeps.folder import load_trials
from flaxmnist.sweeps.plan import Experiment
from flaxmnist.sweeps.runner import run_sweep


class Watched(Split):
    """Images that count their evaluations, and call ``hook`` with the count."""

    evaluations = 0

    def __iter__(self):
        self.evaluations += 1
        self.hook(self.evaluations)
        return super().__iter__()

    def hook(self, count: int) -> None:
        pass


def watched(data: Dataset) -> tuple[Dataset, Watched, Watched]:
    """Return ``data`` with watched images, and those for validation and for testing."""
    assert data.validation is not None
    validation, test = Watched(*data.validation), Watched(*data.test)
    return replace(data, validation=validation, test=test), validation, test


@pytest.mark.slow
@pytest.mark.parametrize("exact", [True, False])
def test_stopped_sweep_resumes_to_the_same_results(exact, few, tmp_path):
    """Stop it after the first trials are finished."""
    config = small("mlp", steps=8, evaluate_every=4)
    settings = [{"optimizer.learning_rate": rate, "train.batch_size": size} for rate in (0.1, 0.2) for size in (8, 16)]
    settings = settings[2:] if exact else settings

    def run(data, folder, **options):
        options |= {"exact": exact, "share_order": True, "devices": 1, "workdir": tmp_path / folder}
        return run_sweep([Experiment(config, data)], [0, 1], settings, **options)

    full = run(few, "full")
    stop, (data, validation, test) = threading.Event(), watched(few)
    test.hook = lambda count: stop.set()
    with pytest.raises(Stopped, match="--resume continues"):
        run(data, "stopped", stop=stop)
    (tmp_path / "stopped/parts/truncated.npz.tmp").write_bytes(b"truncated")
    finished = read_arrays(tmp_path / "stopped/parts/00000.npz")["numbers"].tolist()
    assert finished == ([0] if exact else [0, 1, 4, 5])
    data, validation, test = watched(few)
    resumed = run(data, "stopped", resume=True)
    assert test.evaluations == len(full.members) - len(finished), "finished trials are not trained again"
    assert resumed.members == full.members
    assert resumed.groups == full.groups
    assert_same(resumed.curves, full.curves)
    data, validation, test = watched(few)
    assert run(data, "stopped", resume=True).members == full.members
    assert (validation.evaluations, test.evaluations) == (0, 0), "nothing is trained again"


@pytest.mark.slow
@pytest.mark.parametrize("exact", [True, False])
def test_unfinished_trials_resume_from_their_last_step(exact, few, tmp_path, caplog):
    """Stop three trials of nine steps at step six: the second of them if they run sequentially, else all."""
    config = small("mlp", optimizer=Adam(), steps=9, evaluate_every=3, skip_nonfinite=1)
    caplog.set_level("INFO", logger="flaxmnist")

    def run(data, folder, **options):
        options |= {"exact": exact, "share_order": True, "devices": 1, "workdir": tmp_path / folder}
        return run_sweep([Experiment(config, data)], [0, 1, 2], [{}], **options)

    full = run(few, "full")
    stop, (data, validation, _) = threading.Event(), watched(few)
    validation.hook = lambda count: stop.set() if count == (4 if exact else 1) else None
    with pytest.raises(Stopped):
        run(data, "stopped", stop=stop)
    unfinished = read_arrays(tmp_path / "stopped/unfinished.npz")
    assert unfinished["numbers"].tolist() == ([1] if exact else [0, 1, 2])
    assert json.loads(str(unfinished["told"]))["step"] == 6
    shutil.copytree(tmp_path / "stopped", tmp_path / "damaged")
    (tmp_path / "damaged/unfinished.npz").write_bytes(b"")
    for folder, evaluations in (("damaged", 6 if exact else 9), ("stopped", 4 if exact else 3)):
        caplog.clear()
        data, validation, _ = watched(few)
        resumed = run(data, folder, resume=True)
        assert validation.evaluations == evaluations
        assert resumed.members == full.members
        assert_same(resumed.curves, full.curves)
        message = "is damaged" if folder == "damaged" else f"unfinished trials: {1 if exact else 3}, at step 6"
        assert message in caplog.text
    assert not (tmp_path / "stopped/unfinished.npz").exists()


def fail_at(last: int):
    """Return a hook that raises RuntimeError at the evaluation ``last``."""

    def hook(count: int) -> None:
        if count == last:
            raise RuntimeError(f"evaluation {count}")

    return hook


def test_finished_trials_are_saved_if_the_sweep_fails(few, tmp_path):
    data, _, test = watched(few)
    test.hook = fail_at(2)
    with pytest.raises(RuntimeError, match="evaluation 2"):
        run_sweep([Experiment(small(steps=2), data)], [0, 1], [{}], devices=1, workdir=tmp_path)
    assert [trial.seed for trial, _ in load_trials(tmp_path)] == [0]
    assert not (tmp_path / "lock").exists()


def test_unfinished_trials_are_saved_at_intervals(few, tmp_path, monkeypatch):
    """The failed sweep has saved step 3 but not step 6."""
    monkeypatch.setattr(sweep_folder, "SAVE_SECONDS", 0.0)
    config, (data, validation, _) = small(steps=9, evaluate_every=3), watched(few)
    validation.hook = fail_at(2)
    with pytest.raises(RuntimeError, match="evaluation 2"):
        run_sweep([Experiment(config, data)], [0], [{}], devices=1, workdir=tmp_path)
    data, validation, _ = watched(few)
    resumed = run_sweep([Experiment(config, data)], [0], [{}], devices=1, workdir=tmp_path, resume=True)
    assert validation.evaluations == 2
    assert resumed.curves["step"][resumed.curves["validation"]].tolist() == [3, 6, 9]


def test_other_folders_are_not_changed(few, tmp_path):
    experiment = Experiment(small(steps=2), few)

    def run(seed, folder, **options):
        return run_sweep([experiment], [seed], [{}], devices=1, workdir=tmp_path / folder, **options)

    run(0, "a")
    with pytest.raises(UserError, match="is not empty: pass --resume"):
        run(0, "a")
    with pytest.raises(UserError, match="was started with different seeds: use the same, or another --workdir"):
        run(1, "a", resume=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/thesis.tex").write_text("years")
    with pytest.raises(UserError, match="is not the folder of a sweep"):
        run(0, "b", overwrite=True)
    assert (tmp_path / "b/thesis.tex").read_text() == "years"
    assert [trial.seed for trial in run(1, "a", overwrite=True).members] == [1]


@pytest.mark.parametrize(
    "damage", [lambda content: content[:-100], slow(lambda content: b""), slow(lambda content: b"no part")]
)
def test_trials_of_a_damaged_part_are_trained_again(damage, few, tmp_path, caplog):
    def sweep(**options):
        return run_sweep([Experiment(small(steps=2), few)], [0], [{}], devices=1, workdir=tmp_path, **options)

    full = sweep()
    (part,) = (tmp_path / "parts").iterdir()
    part.write_bytes(damage(part.read_bytes()))
    with pytest.raises(UserError, match=f"{part.name} is damaged"):
        load_trials(tmp_path)
    assert sweep(resume=True).members == full.members
    assert f"{part.name} is damaged" in caplog.text
    assert len(load_trials(tmp_path)) == 1
