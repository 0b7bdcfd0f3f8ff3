"""Checkpoints that were damaged, and files beside them: each is noticed, named, and survived."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import assert_same, small

import flaxmnist as fm
from flaxmnist import manifest, runs
from flaxmnist.errors import UserError
from flaxmnist.results import Run

CONFIG = small("mlp", checkpoint_every=8, evaluate_every=8)


@pytest.fixture(scope="module")
def whole(few, tmp_path_factory) -> tuple[Path, Run]:
    """A run that stopped short of its result, with checkpoints at steps 16 and 20, and the same one finished."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    run = fm.fit(CONFIG, few, folder, devices=1)
    return folder, run


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    """A copy of the run, killed before its result was written."""
    shutil.copytree(whole[0], tmp_path / "run")
    (tmp_path / "run/result.json").unlink()
    return tmp_path / "run"


def resumed(folder, few) -> Run:
    return fm.fit(CONFIG, few, folder, devices=1, resume=True)


def assert_as_whole(run: Run, folder: Path, whole) -> None:
    assert_same(run.state, whole[1].state)
    assert (folder / "metrics.jsonl").read_bytes() == (whole[0] / "metrics.jsonl").read_bytes()


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {"truncated": truncate, "flipped in one bit": flip, "deleted": Path.unlink}


def files(folder: Path) -> list[Path]:
    """All that a checkpoint is made of, but what holds nothing that is needed."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in manifest.UNCHECKED and p.stat().st_size)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_is_noticed_and_the_one_before_taken(damage, copy, caplog):
    newest = copy / "checkpoints/20"
    assert len(files(newest)) >= 12
    for file in files(newest):
        content = file.read_bytes()
        DAMAGES[damage](file)
        caplog.clear()
        assert manifest.newest(copy / "checkpoints").step == 16, file
        assert f"checkpoint {newest} is damaged and left out: {file.relative_to(newest)}" in caplog.text
        file.write_bytes(content)
    assert manifest.newest(copy / "checkpoints").step == 20


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_survives_damage_to_any_file(damage, copy, few, whole, tmp_path):
    newest = copy / "checkpoints/20"
    for number, file in enumerate(file.relative_to(copy) for file in files(newest)):
        folder = tmp_path / f"{number}"
        shutil.copytree(copy, folder)
        DAMAGES[damage](folder / file)
        assert_as_whole(resumed(folder, few), folder, whole)
        assert (folder / "checkpoints/20.damaged").exists()
        assert manifest.newest(folder / "checkpoints").step == 20


def test_a_run_begins_anew_where_no_checkpoint_is_whole(copy, few, whole, caplog):
    for step in (16, 20):
        flip(copy / f"checkpoints/{step}/manifest.json")
    assert_as_whole(resumed(copy, few), copy, whole)
    assert "no checkpoint in" in caplog.text
    assert "the run begins anew" in caplog.text


@pytest.mark.parametrize("how", ["rubbish", "nothing"])
@pytest.mark.parametrize("name", sorted(manifest.UNCHECKED))
def test_what_orbax_writes_last_is_not_needed(name, how, copy, few, whole):
    file = copy / "checkpoints/20" / name
    file.unlink() if how == "nothing" else file.write_bytes(b"\0\xff")
    assert_as_whole(resumed(copy, few), copy, whole)
    assert not (copy / "checkpoints/20.damaged").exists()


def test_leftovers_of_an_unfinished_save_are_removed(copy, few, whole):
    unfinished = copy / "checkpoints/24.orbax-checkpoint-tmp"
    shutil.copytree(copy / "checkpoints/20", unfinished)
    (copy / "config.json.tmp").write_text('{"half')
    assert_as_whole(resumed(copy, few), copy, whole)
    assert sorted(path.name for path in (copy / "checkpoints").iterdir()) == ["16", "20"]


@pytest.mark.parametrize("damage", [b"", b'{"step": 0, "epo', b"\xff\0" * 5000, None], ids=str)
@pytest.mark.parametrize("finished", [True, False])
def test_records_are_written_anew_as_the_checkpoint_has_them(damage, finished, copy, few, whole):
    if finished:
        shutil.copy(whole[0] / "result.json", copy)
    path = copy / "metrics.jsonl"
    path.unlink() if damage is None else path.write_bytes(damage)
    assert_as_whole(resumed(copy, few), copy, whole)


@pytest.mark.parametrize(
    "damage", [b"1\n", b'{"step": 1, "epoch": 0}\n', b'{"step": -1, "epoch": 0, "split": "train"}\n', b'{"step": 1']
)
def test_a_line_that_is_no_record_is_named(damage, copy):
    with (copy / "metrics.jsonl").open("ab") as file:
        file.write(damage)
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged"):
        fm.load_run(copy)


@pytest.mark.parametrize("damage", [b"", b"[1, 2", b"{}", b'{"config": null, "data": null}', None], ids=str)
def test_a_damaged_config_is_taken_from_the_checkpoint(damage, copy, few, whole, caplog):
    path = copy / "config.json"
    before = json.loads(path.read_text())
    path.unlink() if damage is None else path.write_bytes(damage)
    assert fm.load_run(copy).config == CONFIG
    assert "taken from the checkpoint at step 20" in caplog.text
    assert_as_whole(resumed(copy, few), copy, whole)
    assert json.loads(path.read_text())["config"] == before["config"]


@pytest.mark.parametrize("damage", [b"", b"[]", b"{", "seconds", "test_count"], ids=str)
def test_a_damaged_result_is_found_again(damage, copy, few, whole):
    """Also where it lacks a field."""
    path = copy / "result.json"
    if isinstance(damage, str):
        known = json.loads((whole[0] / "result.json").read_text())
        damage = json.dumps({name: value for name, value in known.items() if name != damage}).encode()
    path.write_bytes(damage)
    with pytest.raises(UserError, match=r"result\.json"):
        fm.load_run(copy)
    assert_as_whole(resumed(copy, few), copy, whole)
    assert json.loads((copy / "result.json").read_text())["params_sha256"] == whole[1].result["params_sha256"]


def test_a_finished_run_whose_newest_checkpoint_is_damaged_is_finished_again(few, whole, copy):
    shutil.copy(whole[0] / "result.json", copy)
    flip(copy / "checkpoints/20/records.jsonl")
    assert_as_whole(resumed(copy, few), copy, whole)
    assert manifest.newest(copy / "checkpoints").step == 20


@pytest.mark.parametrize("name", ["config.json.tmp", "metrics.jsonl", "lock"])
def test_a_run_killed_in_its_first_moments_is_begun(name, few, whole, tmp_path):
    (tmp_path / name).write_text('{"half')
    assert_as_whole(resumed(tmp_path, few), tmp_path, whole)


def test_only_the_newest_has_a_stand_in(copy):
    """Where one checkpoint is asked for by its name, another one is no answer."""
    flip(copy / "checkpoints/20/records.jsonl")
    assert fm.load_run(copy).state.step == 16
    with pytest.raises(UserError, match=r"checkpoints/20 is damaged: records.jsonl has changed; take --step latest"):
        fm.load_run(copy, "20")


def test_a_damaged_checkpoint_does_not_count_among_those_kept(copy, few, monkeypatch):
    """Else the only good ones would be removed in its favour."""
    flip(copy / "checkpoints/20/records.jsonl")
    longer = small("mlp", checkpoint_every=1, evaluate_every=8, keep=1, steps=22)
    fm.fit(longer, few, copy, devices=1, resume=True)
    assert [step for step in manifest.steps(copy / "checkpoints") if step > 16] == [22]


def test_nothing_is_removed_before_its_successor_is_whole(few, tmp_path, monkeypatch):
    """At every moment there is a checkpoint to go on from, though only one is kept."""
    there = []
    evaluate = runs.Loop.evaluate

    def looking(loop, split, images):
        there.append(manifest.newest(tmp_path / "checkpoints"))
        return evaluate(loop, split, images)

    monkeypatch.setattr(runs.Loop, "evaluate", looking)
    fm.fit(small(checkpoint_every=2, evaluate_every=1, keep=1), few, tmp_path, devices=1)
    assert all(saved is not None for saved in there[4:])
