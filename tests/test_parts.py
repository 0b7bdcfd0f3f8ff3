"""The folder of a sweep: resuming, damage, and folders of other sweeps."""

import shutil
import threading

import numpy as np
import pytest
from conftest import small

from flaxmnist.config import Adam
from flaxmnist.devices import program
from flaxmnist.errors import Stopped, UserError
from flaxmnist.sweeps import parts, sweeps


@pytest.mark.slow
@pytest.mark.parametrize("sequential", [True, False])
def test_stopped_sweep_resumes_to_the_same_results(sequential, few, tmp_path, monkeypatch):
    monkeypatch.setattr(sweeps, "runs_sequentially", lambda config, share_order: sequential)
    config = small("mlp", steps=8, evaluate_every=4)
    settings = [{"optimizer.learning_rate": rate, "train.batch_size": size} for rate in (0.1, 0.2) for size in (8, 16)]
    settings = settings[2:] if sequential else settings

    def run(folder, **options):
        return sweeps.run([(config, few)], [0, 1], settings, devices=1, workdir=tmp_path / folder, **options)

    full = run("full")
    stop, finish = threading.Event(), sweeps.Block.finish
    with monkeypatch.context() as patch:
        patch.setattr(sweeps.Block, "finish", lambda *a: stop.set() or finish(*a))
        with pytest.raises(Stopped, match="--resume continues"):
            run("stopped", stop=stop)
    (tmp_path / "stopped/parts/truncated.npz.tmp").write_bytes(b"truncated")
    assert list((tmp_path / "stopped/parts").glob("*.npz"))
    resumed = run("stopped", resume=True)
    assert resumed.members == full.members
    assert resumed.groups == full.groups
    for name, column in full.curves.items():
        np.testing.assert_array_equal(resumed.curves[name], column)
    monkeypatch.setattr(program.TrialProgram, "__init__", None)
    assert run("stopped", resume=True).members == full.members, "nothing is trained again"


@pytest.mark.slow
@pytest.mark.parametrize("sequential", [True, False])
def test_unfinished_trials_resume_from_their_last_step(sequential, few, tmp_path, monkeypatch):
    monkeypatch.setattr(sweeps, "runs_sequentially", lambda config, share_order: sequential)
    config = small("mlp", optimizer=Adam(), steps=9, evaluate_every=3, skip_nonfinite=1)

    def run(folder, **options):
        return sweeps.run([(config, few)], [0, 1, 2], [{}], devices=1, workdir=tmp_path / folder, **options)

    full = run("full")
    stop, validate, steps = threading.Event(), sweeps.Block.validate, []

    def validate_and_stop(block, step):
        validate(block, step)
        steps.append(step)
        if len(steps) == (5 if sequential else 2):
            stop.set()

    monkeypatch.setattr(sweeps.Block, "validate", validate_and_stop)
    with pytest.raises(Stopped):
        run("stopped", stop=stop)
    assert steps.pop() == 6
    shutil.copytree(tmp_path / "stopped", tmp_path / "damaged")
    (tmp_path / "damaged/unfinished.npz").write_bytes(b"")
    for folder, first_validation in (("damaged", 3), ("stopped", 9)):
        steps.clear()
        resumed = run(folder, resume=True)
        assert steps[0] == first_validation
        assert resumed.members == full.members
        for name, column in full.curves.items():
            np.testing.assert_array_equal(resumed.curves[name], column)
    assert not (tmp_path / "stopped/unfinished.npz").exists()


def test_other_folders_are_not_changed(few, tmp_path):
    config = small(steps=2)
    sweeps.run([(config, few)], [0], [{}], devices=1, workdir=tmp_path / "a")
    with pytest.raises(UserError, match="is not empty: pass --resume"):
        sweeps.run([(config, few)], [0], [{}], devices=1, workdir=tmp_path / "a")
    with pytest.raises(UserError, match="was started with different seeds"):
        sweeps.run([(config, few)], [1], [{}], devices=1, workdir=tmp_path / "a", resume=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/thesis.tex").write_text("years")
    with pytest.raises(UserError, match="is not the folder of a sweep"):
        sweeps.run([(config, few)], [0], [{}], devices=1, workdir=tmp_path / "b", overwrite=True)
    assert (tmp_path / "b/thesis.tex").read_text() == "years"


@pytest.mark.parametrize("damage", [lambda content: content[:-100], lambda content: b"", lambda content: b"no part"])
def test_trials_of_a_damaged_part_are_trained_again(damage, few, tmp_path, caplog):
    def sweep(**options):
        return sweeps.run([(small(steps=2), few)], [0], [{}], devices=1, workdir=tmp_path, **options)

    full = sweep()
    (part,) = (tmp_path / "parts").iterdir()
    part.write_bytes(damage(part.read_bytes()))
    with pytest.raises(UserError, match=f"{part.name} is damaged"):
        parts.load_trials(tmp_path)
    assert sweep(resume=True).members == full.members
    assert f"{part.name} is damaged" in caplog.text
    assert len(parts.load_trials(tmp_path)) == 1
