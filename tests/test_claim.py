"""Which folders a run or a sweep may use: files of other people and of other kinds of folders are not touched."""

from pathlib import Path

import pytest
from conftest import fit_on_one, small

import flaxmnist as fm
from flaxmnist.errors import UserError
from flaxmnist.sweeps.plan import Experiment
from flaxmnist.sweeps.runner import run_sweep

CONFIG = small(steps=2)


def train(few, folder, **options):
    return fit_on_one(CONFIG, few, folder, **options)


def sweep(few, folder, **options):
    return run_sweep([Experiment(CONFIG, few)], [0, 1], [{}], workdir=folder, devices=1, **options)


def read(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("start", [train, sweep])
def test_overwriting_leaves_the_files_of_others_alone(start, few, tmp_path):
    start(few, tmp_path)
    (tmp_path / "plots").mkdir()
    (tmp_path / "notes.txt").write_text("keep")
    start(few, tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "keep"
    assert not (tmp_path / "plots").exists(), "it showed the overwritten results"


@pytest.mark.parametrize("option", ["resume", "overwrite"])
@pytest.mark.parametrize(
    ("first", "second", "noun"), [(train, sweep, "the folder of a sweep"), (sweep, train, "a run")]
)
def test_run_and_sweep_do_not_touch_each_other(first, second, noun, option, few, tmp_path):
    """Otherwise they would remove each other's result.json."""
    first(few, tmp_path)
    before = read(tmp_path)
    with pytest.raises(UserError, match=f"is not {noun}"):
        second(few, tmp_path, **{option: True})
    assert read(tmp_path) == before


@pytest.mark.parametrize("start", [train, sweep])
def test_first_start_with_resume_among_other_files(start, few, tmp_path):
    """As in a scheduler's job, which always passes --resume and writes its log to the folder."""
    (tmp_path / "slurm-1.out").write_text("log")
    start(few, tmp_path, resume=True)
    assert (tmp_path / "result.json").exists()


@pytest.mark.parametrize("path", ["gs://bucket/run", "s3://bucket/run"])
def test_paths_with_a_scheme_are_refused(path, few, tmp_path, monkeypatch):
    """Also as a Path, which drops a slash."""
    monkeypatch.chdir(tmp_path)
    for folder in (path, Path(path)):
        for call in (
            lambda folder=folder: fit_on_one(small(steps=1), few, folder),
            lambda folder=folder: run_sweep([Experiment(small(steps=1), few)], [0], [{}], workdir=Path(folder)),
            lambda folder=folder: fm.load_run(folder),
            lambda folder=folder: fm.load_data("mnist", folder),
        ):
            with pytest.raises(UserError, match="is not on a file system: mount the storage"):
                call()
    assert list(tmp_path.iterdir()) == []
