"""What TensorBoard's own reader finds of a run: every scalar once, however often the run was stopped, and pictures."""

import io
import json
import logging
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import small
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_runs import stop_at

import flaxmnist as fm
from flaxmnist import archive, events, folders
from flaxmnist.errors import Stopped, UserError

CONFIG = small(checkpoint_every=5, evaluate_every=5, keep=10)


def fit(few, folder, config=CONFIG, **options):
    return fm.fit(config, few, folder, devices=1, **options)


@pytest.fixture(scope="module")
def whole(few, tmp_path_factory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    fit(few, folder)
    return folder


def reader(folder) -> EventAccumulator:
    """What TensorBoard finds, all of it."""
    # It warns of every file that takes back steps of the one before.
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    return found.Reload()


def scalars(folder) -> list[tuple[str, int, float]]:
    found = reader(folder)
    return sorted((tag, event.step, event.value) for tag in found.Tags()["scalars"] for event in found.Scalars(tag))


def recorded(folder) -> list[tuple[str, int, float]]:
    """What metrics.jsonl says TensorBoard should find."""
    return sorted(
        (tag, record["step"], float(np.float32(value)))
        for record in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        for tag, value in events.scalars(record).items()
    )


def pictures(folder) -> dict[str, dict[int, bytes]]:
    found = reader(folder)
    for tag in found.Tags()["images"]:
        steps = [event.step for event in found.Images(tag)]
        assert len(set(steps)) == len(steps), tag
    return {
        tag: {event.step: event.encoded_image_string for event in found.Images(tag)} for tag in found.Tags()["images"]
    }


def assert_as_whole(folder, whole) -> None:
    assert (folder / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert scalars(folder) == recorded(whole)
    assert pictures(folder) == pictures(whole)


def test_every_scalar_and_picture_is_found(whole):
    assert scalars(whole) == recorded(whole)
    assert {tag for tag, _, _ in scalars(whole)} == {
        *(f"{split}/{name}" for split in ("train", "epoch", "validation", "test") for name in ("loss", "accuracy")),
        "train/gradient_norm",
    }
    seen = pictures(whole)
    assert {tag: list(steps) for tag, steps in seen.items()} == {
        "validation/confusion": [5, 10, 15, 20],
        "weights": [5, 10, 15, 20],
        "test/confusion": [20],
    }
    weights = np.asarray(Image.open(io.BytesIO(seen["weights"][20])))
    model = fm.load_run(whole).model
    np.testing.assert_array_equal(weights, events.mosaic(fm.models.first_weights(model)))
    assert len(list((whole / "tensorboard").iterdir())) == 1


def test_hyper_parameters_are_found(whole):
    from tensorboard.plugins.hparams import metadata

    found = reader(whole).PluginTagToContent("hparams")
    values = metadata.parse_session_start_info_plugin_data(found["_hparams_/session_start_info"]).hparams
    assert values["optimizer.learning_rate"].number_value == 0.1
    assert values["train.batch_size"].number_value == 16
    assert values["model.kernel_init.kind"].string_value == "Constant"
    assert values["train.epochs"].string_value == "None"
    described = metadata.parse_experiment_plugin_data(found["_hparams_/experiment"])
    assert [metric.name.tag for metric in described.metric_infos] == ["test/accuracy"]
    assert metadata.parse_session_end_info_plugin_data(found["_hparams_/session_end_info"]).status == 1


def test_pytorch_is_not_imported(whole):
    assert "torch" not in sys.modules


@pytest.mark.parametrize("stop", [pytest.param(7, marks=pytest.mark.slow), 10])
def test_a_run_that_was_stopped_has_each_event_once(stop, few, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        fit(few, tmp_path / "run", stop=stop_at(patch, stop))
    fit(few, tmp_path / "run", resume=True)
    assert_as_whole(tmp_path / "run", whole)


def killed(whole, folder, step: int) -> None:
    """A copy of the run, killed long after its checkpoint at ``step``."""
    shutil.copytree(whole, folder)
    (folder / "result.json").unlink()
    for path in (folder / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)


@pytest.mark.parametrize(
    "cut", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(5000, marks=pytest.mark.slow)]
)
def test_a_killed_run_has_each_event_once(cut, few, whole, tmp_path):
    """And so it has where it was killed twice, and where the last event is cut off in the middle."""
    killed(whole, tmp_path / "run", 10)
    (file,) = (tmp_path / "run/tensorboard").iterdir()
    file.write_bytes(file.read_bytes()[: file.stat().st_size - cut])
    fit(few, tmp_path / "run", resume=True)
    assert_as_whole(tmp_path / "run", whole)
    killed(tmp_path / "run", tmp_path / "again", 15)
    fit(few, tmp_path / "again", resume=True)
    assert_as_whole(tmp_path / "again", whole)
    assert len(list((tmp_path / "again/tensorboard").iterdir())) == 3


def test_what_a_damaged_file_lost_is_told_anew(few, whole, tmp_path):
    """One bit, in the middle: TensorBoard reads no further in that file."""
    killed(whole, tmp_path / "run", 15)
    (file,) = (tmp_path / "run/tensorboard").iterdir()
    content = bytearray(file.read_bytes())
    content[content.index(b"train/loss", 5000) + 3] ^= 1
    file.write_bytes(content)
    fit(few, tmp_path / "run", resume=True)
    assert scalars(tmp_path / "run") == recorded(whole)


def test_a_file_in_place_of_the_folder_is_refused_at_once(few, tmp_path):
    (tmp_path / "tensorboard").touch()
    with pytest.raises(UserError, match="cannot write to"):
        fit(few, tmp_path, overwrite=False, resume=True)


def test_a_run_that_begins_anew_takes_all_back(few, whole, tmp_path):
    killed(whole, tmp_path / "run", 0)
    fit(few, tmp_path / "run", resume=True)
    assert_as_whole(tmp_path / "run", whole)


def test_a_longer_run_takes_back_the_test(few, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    longer = small(checkpoint_every=5, evaluate_every=5, keep=10, steps=25)
    fit(few, tmp_path / "run", longer, resume=True)
    assert scalars(tmp_path / "run") == recorded(tmp_path / "run")
    assert list(pictures(tmp_path / "run")["test/confusion"]) == [25]


@pytest.mark.slow
def test_overwriting_removes_them(few, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    fit(few, tmp_path / "run", overwrite=True)
    assert len(list((tmp_path / "run/tensorboard").iterdir())) == 1
    assert_as_whole(tmp_path / "run", whole)


@pytest.mark.parametrize("when", [pytest.param("between lives", marks=pytest.mark.slow), "in one"])
def test_scalars_that_vanish_are_written_again(when, few, whole, tmp_path, monkeypatch):
    if when == "between lives":
        killed(whole, tmp_path / "run", 10)
        shutil.rmtree(tmp_path / "run/tensorboard")
    else:
        draw = archive.Archive.draw

        def drawing(kept, step, *what):
            if step == 10:
                shutil.rmtree(tmp_path / "run/tensorboard")
            draw(kept, step, *what)

        monkeypatch.setattr(archive.Archive, "draw", drawing)
    fit(few, tmp_path / "run", resume=True)
    assert scalars(tmp_path / "run") == recorded(whole)


def test_what_could_not_be_written_is_written_later(few, whole, tmp_path, monkeypatch, caplog):
    """As on a full disk: a part is written, then nothing for a while."""
    monkeypatch.setattr(archive, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(folders, "LAST_RETRIES", (0.0, 0.0, 0.0))
    opened, room = Path.open, iter([10, 0, 3000, 0, 0, 20])

    class Full(io.FileIO):
        def write(self, content):
            left = next(room, None)
            if left == 0:
                raise OSError(28, "No space left on device")
            return super().write(content[:left])

    def opening(path, mode="r", *arguments, **options):
        full = "tfevents" in path.name and mode != "rb"
        return Full(path, mode.replace("b", "")) if full else opened(path, mode, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", opening)
        fit(few, tmp_path / "run")
    assert "No space left on device" in caplog.text
    assert_as_whole(tmp_path / "run", whole)
    assert len(list((tmp_path / "run/tensorboard").iterdir())) == 1


def test_a_model_that_is_not_ours_has_no_picture_of_weights(few, tmp_path, monkeypatch):
    monkeypatch.setattr(fm.models, "first_weights", lambda model, shape: None)
    fit(few, tmp_path, small())
    assert set(pictures(tmp_path)) == {"validation/confusion", "test/confusion"}


def test_numbers_alone_are_scalars():
    records = [
        {"step": 1, "epoch": 0, "split": "train", "loss": 0.5, "accuracy": 1},
        {"step": 1, "epoch": 0, "split": "batch", "probabilities": [[0.5, 0.5]]},
        {"step": 2, "epoch": 0, "split": "skipped", "count": 3},
    ]
    assert [events.scalars(record) for record in records] == [
        {"train/loss": 0.5, "train/accuracy": 1}, {}, {"skipped/count": 3},
    ]  # fmt: skip


def test_only_what_follows_a_step_is_told_again():
    text = b'{"step": 1}\n{"step": 4}\n{"step": 4}\n{"step": 9}\n'
    assert [text[events.beginning_of(step, text) :].count(b"\n") for step in (0, 2, 4, 5, 10)] == [4, 3, 3, 1, 0]
    assert events.beginning_of(0, b"") == 0


# --- Pictures -------------------------------------------------------------------------------------------------------

WHITE, RED, BLUE = (255, 255, 255), (255, 0, 0), (0, 0, 255)


def test_weights_as_tiles():
    weights = np.zeros((10, 4, 6), np.float32)
    weights[0, 1, 2], weights[9, 3, 5] = 2, -2
    picture = events.mosaic(weights)
    scale = 480 // (5 * 7 - 1)
    assert picture.shape == ((2 * 5 - 1) * scale, (5 * 7 - 1) * scale, 3)
    small = picture[::scale, ::scale]
    np.testing.assert_array_equal(small.repeat(scale, axis=0).repeat(scale, axis=1), picture)
    assert (tuple(small[1, 2]), tuple(small[-1, -1])) == (BLUE, RED)
    assert (small != 255).any(axis=2).sum() == 2, "all else is white"
    assert tuple(events.mosaic(weights / 4)[scale, 2 * scale]) == BLUE, "the scale is that of the largest weight"


@pytest.mark.parametrize(("count", "rows", "columns"), [(1, 1, 1), (7, 3, 3), (32, 4, 8), (64, 8, 8), (512, 8, 8)])
def test_tiles_are_as_many_as_fit(count, rows, columns):
    height, width, _ = events.mosaic(np.ones((count, 3, 3), np.float32)).shape
    assert height * (columns * 4 - 1) == width * (rows * 4 - 1)


def test_no_weights_at_all_are_white():
    assert (events.mosaic(np.zeros((10, 28, 28), np.float32)) == 255).all()


def test_confusion():
    confusion = np.array([[900, 100], [0, 0]])
    picture = events.confusion_picture(confusion)
    # Corners of the cells, where no text stands.
    cells = {(row, column): picture[58 + 40 * row, 58 + 40 * column] for row in (0, 1) for column in (0, 1)}
    assert cells[0, 0].sum() < cells[0, 1].sum() < 765
    assert tuple(cells[1, 0]) == tuple(cells[1, 1]) == WHITE, "a class without images"
    other = events.confusion_picture(np.array([[899, 100], [0, 0]]))
    assert (picture != other).any(), "the counts are written"


@pytest.mark.parametrize("classes", [2, 10, 47, 256])
def test_any_number_of_classes_makes_a_picture_of_bearable_size(classes):
    picture = events.confusion_picture(np.ones((classes, classes), np.int64))
    assert picture.dtype == np.uint8
    assert 100 < max(picture.shape) < 900
