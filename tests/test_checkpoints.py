"""Damage to any file of a run folder is detected and reported, and the run resumes anyway."""

import json
import logging
import shutil
from pathlib import Path

import pytest
from conftest import assert_same, fit_on_one, small, user_error

import flaxmnist as fm
from flaxmnist.errors import UserError
from flaxmnist.store import checkpoints, manifest
from flaxmnist.store.load import Run

CONFIG = small("mlp", checkpoint_every=8, evaluate_every=8)


@pytest.fixture(scope="module")
def intact(few, tmp_path_factory) -> tuple[Path, Run]:
    """Return the folder of a finished run with checkpoints at steps 16 and 20, and the run."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return folder, fit_on_one(CONFIG, few, folder)


@pytest.fixture
def copy(intact, tmp_path) -> Path:
    """Return a copy of the run folder without result.json, as after a kill just before the end."""
    shutil.copytree(intact[0], tmp_path / "run")
    (tmp_path / "run/result.json").unlink()
    return tmp_path / "run"


def resume(folder, few) -> Run:
    return fit_on_one(CONFIG, few, folder, resume=True)


def assert_resumes(folder: Path, few, intact) -> None:
    """Resume the run in ``folder`` and check that it is bitwise identical to the intact run."""
    assert_same(resume(folder, few).state, intact[1].state)
    assert (folder / "metrics.jsonl").read_bytes() == (intact[0] / "metrics.jsonl").read_bytes()


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {"truncated": truncate, "flipped in one bit": flip, "deleted": Path.unlink}


def files(folder: Path) -> list[Path]:
    """Return the files of a checkpoint that restoring needs."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in manifest.UNCHECKED and p.stat().st_size)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_of_a_checkpoint_is_detected(damage, copy, caplog):
    newest = copy / "checkpoints/20"
    assert len(files(newest)) >= 12
    for file in files(newest):
        content = file.read_bytes()
        DAMAGES[damage](file)
        caplog.clear()
        assert manifest.newest(copy / "checkpoints").step == 16, file
        assert f"checkpoint {newest} is damaged: {file.relative_to(newest)}" in caplog.text
        file.write_bytes(content)
    assert manifest.newest(copy / "checkpoints").step == 20


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_run_resumes_after_damage_to_any_file_of_a_checkpoint(damage, copy, few, intact, tmp_path):
    newest = copy / "checkpoints/20"
    for index, file in enumerate(files(newest)):
        folder = tmp_path / f"{index}"
        shutil.copytree(copy, folder)
        DAMAGES[damage](folder / file.relative_to(copy))
        assert_resumes(folder, few, intact)
        assert (folder / "checkpoints/20.damaged").exists()
        assert manifest.newest(folder / "checkpoints").step == 20


def test_run_without_intact_checkpoint_starts_from_scratch(copy, few, intact, caplog):
    for step in (16, 20):
        flip(copy / f"checkpoints/{step}/manifest.json")
    assert_resumes(copy, few, intact)
    assert "has no intact checkpoint: the run starts from scratch" in caplog.text


@pytest.mark.parametrize("damage", ["overwritten", "deleted"])
@pytest.mark.parametrize("name", sorted(manifest.UNCHECKED))
def test_files_that_orbax_writes_last_are_not_needed(name, damage, copy, few, intact):
    file = copy / "checkpoints/20" / name
    file.unlink() if damage == "deleted" else file.write_bytes(b"\0\xff")
    assert_resumes(copy, few, intact)
    assert not (copy / "checkpoints/20.damaged").exists()


def test_temporary_files_of_a_killed_run_are_removed(copy, few, intact):
    unfinished = copy / "checkpoints/24.orbax-checkpoint-tmp"
    shutil.copytree(copy / "checkpoints/20", unfinished)
    (copy / "config.json.tmp").write_text('{"half')
    assert_resumes(copy, few, intact)
    assert sorted(path.name for path in (copy / "checkpoints").iterdir()) == ["16", "20"]


@pytest.mark.parametrize("damage", [b"", b'{"step": 0, "epo', b"\xff\0" * 5000, None], ids=str)
@pytest.mark.parametrize("finished", [True, False])
def test_damaged_records_are_restored_from_the_checkpoint(damage, finished, copy, few, intact):
    if finished:
        shutil.copy(intact[0] / "result.json", copy)
    path = copy / "metrics.jsonl"
    path.unlink() if damage is None else path.write_bytes(damage)
    assert_resumes(copy, few, intact)


@pytest.mark.parametrize(
    "damage", [b"1\n", b'{"step": 1, "epoch": 0}\n', b'{"step": -1, "epoch": 0, "split": "train"}\n', b'{"step": 1']
)
def test_invalid_record_is_reported(damage, copy):
    with (copy / "metrics.jsonl").open("ab") as file:
        file.write(damage)
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged"):
        fm.load_run(copy)


@pytest.mark.parametrize(
    "damage", [b"", b"[1, 2", b"{}", b'{"config": null, "data": null}', None, [28], [28, 0], [28, 28, 1, 1]], ids=str
)
def test_damaged_config_is_restored_from_the_checkpoint(damage, copy, few, intact, caplog):
    """``damage`` is the content, None for no file, or the shape of the images."""
    path = copy / "config.json"
    before = json.loads(path.read_text())
    if isinstance(damage, list):
        damage = json.dumps(before | {"data": before["data"] | {"shape": damage}}).encode()
    path.unlink() if damage is None else path.write_bytes(damage)
    assert fm.load_run(copy).config == CONFIG
    assert "using its copy in the checkpoint at step 20" in caplog.text
    assert_resumes(copy, few, intact)
    assert json.loads(path.read_text())["config"] == before["config"]


@pytest.mark.parametrize(
    "damage",
    [b"", b"[]", b"{", "seconds", "test_count", {"seconds": 1}, {"seconds": {"total": "1"}}, {"test_count": 0}],
    ids=str,
)
def test_damaged_result_is_computed_again(damage, copy, few, intact):
    """``damage`` is the content, the name of a field to remove, or other values of fields."""
    path = copy / "result.json"
    if not isinstance(damage, bytes):
        result = json.loads((intact[0] / "result.json").read_text())
        result.update(damage) if isinstance(damage, dict) else result.pop(damage)
        damage = json.dumps(result).encode()
    path.write_bytes(damage)
    with pytest.raises(UserError, match=r"result\.json"):
        fm.load_run(copy)
    assert_resumes(copy, few, intact)
    assert json.loads((copy / "result.json").read_text())["params_sha256"] == intact[1].result.params_sha256


def test_finished_run_with_a_damaged_last_checkpoint_is_finished_again(few, intact, copy):
    shutil.copy(intact[0] / "result.json", copy)
    flip(copy / "checkpoints/20/records.jsonl")
    assert_resumes(copy, few, intact)
    assert manifest.newest(copy / "checkpoints").step == 20


@pytest.mark.parametrize("name", ["config.json.tmp", "metrics.jsonl", "lock"])
def test_run_killed_at_its_very_start_can_be_started_again(name, few, intact, tmp_path):
    (tmp_path / name).write_text('{"half')
    assert_resumes(tmp_path, few, intact)


def test_damaged_checkpoint_is_replaced_only_if_no_step_is_given(copy):
    flip(copy / "checkpoints/20/records.jsonl")
    assert fm.load_run(copy).state.step == 16
    with pytest.raises(UserError, match=r"checkpoints/20 is damaged: records.jsonl has changed; use --step latest"):
        fm.load_run(copy, "20")


def test_damaged_checkpoint_does_not_count_as_one_to_keep(copy, few):
    """Otherwise the only intact ones would be removed instead of it."""
    flip(copy / "checkpoints/20/records.jsonl")
    longer = small("mlp", checkpoint_every=1, evaluate_every=8, keep=1, steps=22)
    fit_on_one(longer, few, copy, resume=True)
    assert [step for step in manifest.steps(copy / "checkpoints") if step > 16] == [22]


def test_checkpoint_is_removed_only_after_the_next_one_is_complete(few, tmp_path):
    """Even with ``keep=1`` there is always a checkpoint to resume from."""
    newest = []
    hook = {"on_evaluation": lambda *_: newest.append(manifest.newest(tmp_path / "checkpoints"))}
    fit_on_one(small(checkpoint_every=2, evaluate_every=1, keep=1), few, tmp_path, **hook)
    assert all(saved is not None for saved in newest[4:])


def test_checkpoint_of_another_version_is_refused_and_kept(copy, few):
    """A run must not start from scratch because of an intact checkpoint that this version cannot read."""
    file = copy / "checkpoints/20/manifest.json"
    content = json.loads(file.read_text())["checkpoint"]
    content["about"]["layers"] = 3
    text = json.dumps({"sha256": manifest.sha256(content), "checkpoint": content})
    file.write_text(text)
    for use in (fm.load_run, lambda folder: resume(folder, few)):
        with pytest.raises(UserError, match=rf"{file} is from another version .* unknown field 'layers'"):
            use(copy)
    assert file.read_text() == text


def test_a_checkpoint_that_a_run_has_removed_meanwhile(copy):
    with user_error(f"checkpoint {copy}/checkpoints/3 was removed by the run that saves there: try again"):
        checkpoints.restore(copy / "checkpoints", 3, fm.load_run(copy).state)


def test_only_messages_of_orbax_are_suppressed(copy, few, caplog):
    """Other users of its logger, "absl", are heard during a run; level and filters are the same after it."""
    logger = logging.getLogger("absl")
    before = logger.level, list(logger.filters)
    fit_on_one(CONFIG, few, copy.parent / "other", on_evaluation=lambda step, *_: logger.error("%d", step))
    fm.load_run(copy)
    with pytest.raises(UserError, match="cannot be restored as this model"):
        fit_on_one(small(), few, copy, resume=True, allow_config_change=True)
    assert (logger.level, logger.filters) == before
    assert [record.message for record in caplog.records if record.name == "absl"] == ["8", "16", "20", "20"]
