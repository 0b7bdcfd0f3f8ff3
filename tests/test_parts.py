"""What a sweep keeps of its members, and goes on from."""

import shutil
import threading

import numpy as np
import pytest
from conftest import small

from flaxmnist import parts, program, sweeps
from flaxmnist.config import Adam
from flaxmnist.errors import Stopped, UserError


@pytest.mark.slow
@pytest.mark.parametrize("alone", [True, False])
def test_a_stopped_sweep_goes_on_to_the_same_results(alone, few, tmp_path, monkeypatch):
    monkeypatch.setattr(sweeps, "trains_alone", lambda config, share_order: alone)
    config = small("mlp", steps=8, evaluate_every=4)
    settings = [{"optimizer.learning_rate": rate, "train.batch_size": size} for rate in (0.1, 0.2) for size in (8, 16)]
    settings = settings[2:] if alone else settings

    def run(folder, **options):
        return sweeps.run([(config, few)], [0, 1], settings, devices=1, workdir=tmp_path / folder, **options)

    whole = run("whole")
    stop, finish = threading.Event(), sweeps.Block.finish
    with monkeypatch.context() as patch:
        patch.setattr(sweeps.Block, "finish", lambda *a: stop.set() or finish(*a))
        with pytest.raises(Stopped, match="--resume goes on"):
            run("cut", stop=stop)
    (tmp_path / "cut/parts/half.npz.tmp").write_bytes(b"half")
    kept = len(list((tmp_path / "cut/parts").glob("*.npz")))
    assert kept >= 1
    resumed = run("cut", resume=True)
    assert resumed.members == whole.members
    assert resumed.groups == whole.groups
    for name, column in whole.curves.items():
        np.testing.assert_array_equal(resumed.curves[name], column)
    monkeypatch.setattr(program.Members, "__init__", None)
    assert run("cut", resume=True).members == whole.members, "nothing is trained again"


@pytest.mark.slow
@pytest.mark.parametrize("alone", [True, False])
def test_members_at_work_go_on_from_where_they_were(alone, few, tmp_path, monkeypatch):
    monkeypatch.setattr(sweeps, "trains_alone", lambda config, share_order: alone)
    config = small("mlp", optimizer=Adam(), steps=9, evaluate_every=3, skip_nonfinite=1)

    def run(folder, **options):
        return sweeps.run([(config, few)], [0, 1, 2], [{}], devices=1, workdir=tmp_path / folder, **options)

    whole = run("whole")
    stop, validate, done = threading.Event(), sweeps.Block.validate, []

    def validating(block, step):
        validate(block, step)
        done.append(step)
        if len(done) == (5 if alone else 2):
            stop.set()

    monkeypatch.setattr(sweeps.Block, "validate", validating)
    with pytest.raises(Stopped):
        run("cut", stop=stop)
    assert done.pop() == 6
    (tmp_path / "cut/unfinished.npz").rename(tmp_path / "unfinished.npz")
    done.clear()
    for damage in (b"", None):
        if damage is None:
            shutil.copy(tmp_path / "unfinished.npz", tmp_path / "cut")
        else:
            shutil.copytree(tmp_path / "cut", tmp_path / "damaged")
            (tmp_path / "damaged/unfinished.npz").write_bytes(damage)
        done.clear()
        resumed = run("cut" if damage is None else "damaged", resume=True)
        assert done[0] == (9 if damage is None else 3), "only what is not done is done"
        assert resumed.members == whole.members
        for name, column in whole.curves.items():
            np.testing.assert_array_equal(resumed.curves[name], column)
    assert not (tmp_path / "cut/unfinished.npz").exists()


def test_a_folder_of_another_sweep_is_left_alone(few, tmp_path):
    config = small(steps=2)
    sweeps.run([(config, few)], [0], [{}], devices=1, workdir=tmp_path / "a")
    with pytest.raises(UserError, match="is not empty: give --resume"):
        sweeps.run([(config, few)], [0], [{}], devices=1, workdir=tmp_path / "a")
    with pytest.raises(UserError, match="was begun with other seeds"):
        sweeps.run([(config, few)], [1], [{}], devices=1, workdir=tmp_path / "a", resume=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/thesis.tex").write_text("years")
    with pytest.raises(UserError, match="is not the folder of a sweep"):
        sweeps.run([(config, few)], [0], [{}], devices=1, workdir=tmp_path / "b", overwrite=True)
    assert (tmp_path / "b/thesis.tex").read_text() == "years"


@pytest.mark.parametrize("damage", [lambda content: content[:-100], lambda content: b"", lambda content: b"no part"])
def test_the_members_of_a_damaged_part_are_trained_again(damage, few, tmp_path, caplog):
    def sweep(**options):
        return sweeps.run([(small(steps=2), few)], [0], [{}], devices=1, workdir=tmp_path, **options)

    whole = sweep()
    (part,) = (tmp_path / "parts").iterdir()
    part.write_bytes(damage(part.read_bytes()))
    with pytest.raises(UserError, match=f"{part.name} is damaged"):
        parts.load_members(tmp_path)
    assert sweep(resume=True).members == whole.members
    assert f"{part.name} is damaged" in caplog.text
    assert len(parts.load_members(tmp_path)) == 1
