"""TensorBoard's own reader finds each scalar and image of a run once, however often the run was stopped."""

import io
import json
import logging
import resource
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import small
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import flaxmnist as fm
from flaxmnist.core import models
from flaxmnist.core.metrics import METRICS
from flaxmnist.devices import program
from flaxmnist.errors import Stopped, UserError
from flaxmnist.store import run_folder, tensorboard
from flaxmnist.store.records import Records

CONFIG = small(checkpoint_every=5, evaluate_every=5, keep=10)


def fit(few, folder, config=CONFIG, **options):
    return fm.fit(config, few, folder, devices=1, **options)


@pytest.fixture(scope="module")
def finished(few, tmp_path_factory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    fit(few, folder)
    return folder


def reader(folder) -> EventAccumulator:
    """Load all events of a run with TensorBoard."""
    # It warns about every file that discards steps of the one before.
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    return EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()


def scalars(folder) -> list[tuple[str, int, float]]:
    found = reader(folder)
    return sorted((tag, event.step, event.value) for tag in found.Tags()["scalars"] for event in found.Scalars(tag))


def recorded(folder) -> list[tuple[str, int, float]]:
    """Return the scalars that TensorBoard should find, from metrics.jsonl."""
    return sorted(
        (tag, record["step"], float(np.float32(value)))
        for record in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        for tag, value in tensorboard.scalars(record).items()
    )


def images(folder) -> dict[str, dict[int, bytes]]:
    found = reader(folder)
    events_by_tag = {tag: found.Images(tag) for tag in found.Tags()["images"]}
    contents = {tag: {event.step: event.encoded_image_string for event in events_by_tag[tag]} for tag in events_by_tag}
    assert all(len(contents[tag]) == len(events_by_tag[tag]) for tag in contents), "one image per step"
    return contents


def assert_same_run(folder, finished) -> None:
    assert (folder / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()
    assert scalars(folder) == recorded(finished)
    assert images(folder) == images(finished)


def test_every_scalar_and_image_is_found(finished):
    assert scalars(finished) == recorded(finished)
    assert {tag for tag, _, _ in scalars(finished)} == {
        *(f"{split}/{name}" for split in ("train", "epoch", "validation", "test") for name in ("loss", "accuracy")),
        *(f"{split}/{name}" for split in ("validation", "test") for name in METRICS),
        *("train/gradient_norm", "train/learning_rate"),
    }
    found = images(finished)
    assert {tag: list(steps) for tag, steps in found.items()} == {
        "validation/confusion": [5, 10, 15, 20],
        "weights": [5, 10, 15, 20],
        "test/confusion": [20],
    }
    weights = np.asarray(Image.open(io.BytesIO(found["weights"][20])))
    model = fm.load_run(finished).model
    np.testing.assert_array_equal(weights, tensorboard.mosaic(models.first_weights(model)))
    assert len(list((finished / "tensorboard").iterdir())) == 1


def test_hyper_parameters_are_found(finished):
    from tensorboard.plugins.hparams import metadata

    found = reader(finished).PluginTagToContent("hparams")
    values = metadata.parse_session_start_info_plugin_data(found["_hparams_/session_start_info"]).hparams
    assert values["optimizer.learning_rate"].number_value == 0.1
    assert values["train.batch_size"].number_value == 16
    assert values["model.kernel_init.kind"].string_value == "Constant"
    assert values["train.epochs"].string_value == "None"
    described = metadata.parse_experiment_plugin_data(found["_hparams_/experiment"])
    assert [metric.name.tag for metric in described.metric_infos] == ["test/accuracy"]
    assert metadata.parse_session_end_info_plugin_data(found["_hparams_/session_end_info"]).status == 1


def test_pytorch_is_not_imported(finished):
    assert "torch" not in sys.modules


@pytest.mark.parametrize("step", [pytest.param(7, marks=pytest.mark.slow), 10])
def test_a_stopped_run_has_each_event_once(step, few, finished, tmp_path, monkeypatch):
    """The stop is requested after the evaluation at step 5, and obeyed after the next chunk."""
    monkeypatch.setattr(program, "MAX_STEPS", step - 5)
    stop = threading.Event()
    with pytest.raises(Stopped, match=f"stopped at step {step} of 20"):
        fit(few, tmp_path / "run", stop=stop, on_evaluation=lambda *_: stop.set())
    fit(few, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", finished)


def copy_killed(finished, folder, step: int) -> None:
    """Copy a run as if it had been killed long after its checkpoint at ``step``."""
    shutil.copytree(finished, folder)
    (folder / "result.json").unlink()
    for path in (folder / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)


@pytest.mark.parametrize(
    "cut", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(5000, marks=pytest.mark.slow)]
)
def test_a_killed_run_has_each_event_once(cut, few, finished, tmp_path):
    """Also if it was killed twice, or the last event is cut off."""
    copy_killed(finished, tmp_path / "run", 10)
    (file,) = (tmp_path / "run/tensorboard").iterdir()
    file.write_bytes(file.read_bytes()[: file.stat().st_size - cut])
    fit(few, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", finished)
    copy_killed(tmp_path / "run", tmp_path / "again", 15)
    fit(few, tmp_path / "again", resume=True)
    assert_same_run(tmp_path / "again", finished)
    assert len(list((tmp_path / "again/tensorboard").iterdir())) == 3


def test_events_of_a_damaged_file_are_written_again(few, finished, tmp_path):
    """TensorBoard stops reading a file at the first wrong bit."""
    copy_killed(finished, tmp_path / "run", 15)
    (file,) = (tmp_path / "run/tensorboard").iterdir()
    content = bytearray(file.read_bytes())
    content[content.index(b"train/loss", 5000) + 3] ^= 1
    file.write_bytes(content)
    fit(few, tmp_path / "run", resume=True)
    assert scalars(tmp_path / "run") == recorded(finished)


def test_a_file_in_place_of_the_folder_is_rejected_immediately(few, tmp_path):
    (tmp_path / "tensorboard").touch()
    with pytest.raises(UserError, match="cannot write to"):
        fit(few, tmp_path, overwrite=False, resume=True)


def test_a_run_that_restarts_from_scratch_discards_all_events(few, finished, tmp_path):
    copy_killed(finished, tmp_path / "run", 0)
    fit(few, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", finished)


def test_a_longer_run_discards_the_test_events(few, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    longer = small(checkpoint_every=5, evaluate_every=5, keep=10, steps=25)
    fit(few, tmp_path / "run", longer, resume=True)
    assert scalars(tmp_path / "run") == recorded(tmp_path / "run")
    assert list(images(tmp_path / "run")["test/confusion"]) == [25]


@pytest.mark.slow
def test_overwriting_a_run_removes_its_events(few, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    fit(few, tmp_path / "run", overwrite=True)
    assert len(list((tmp_path / "run/tensorboard").iterdir())) == 1
    assert_same_run(tmp_path / "run", finished)


@pytest.mark.parametrize("when", [pytest.param("before resuming", marks=pytest.mark.slow), "while running"])
def test_deleted_scalars_are_written_again(when, few, finished, tmp_path):
    if when == "before resuming":
        copy_killed(finished, tmp_path / "run", 10)
        shutil.rmtree(tmp_path / "run/tensorboard")

    def delete(step, split, scores):
        if when == "while running" and step == 10:
            shutil.rmtree(tmp_path / "run/tensorboard")

    fit(few, tmp_path / "run", resume=True, on_evaluation=delete)
    assert scalars(tmp_path / "run") == recorded(finished)


def test_failed_writes_are_repeated(few, finished, tmp_path, monkeypatch, caplog):
    """From the first evaluation to the third, the disk is full."""
    monkeypatch.setattr(run_folder, "RETRY_SECONDS", 0.0)
    file, aside = tmp_path / "run/tensorboard/events.out.tfevents.000001", tmp_path / "aside"

    def fill_disk(step, split, scores):
        if step == 5:
            file.rename(aside)
            file.symlink_to("/dev/full")
        elif step == 15:
            aside.replace(file)

    fit(few, tmp_path / "run", on_evaluation=fill_disk)
    assert "No space left on device" in caplog.text
    assert_same_run(tmp_path / "run", finished)
    assert len(list((tmp_path / "run/tensorboard").iterdir())) == 1


def test_a_write_continues_after_the_last_byte_that_a_full_disk_accepted(finished, tmp_path):
    """The disk is simulated by a limit of file sizes."""
    records = Records(None, (finished / "metrics.jsonl").read_bytes())
    (tmp_path / "tensorboard").mkdir()
    writer = tensorboard.EventWriter(tmp_path / "tensorboard", records, 0, CONFIG)
    writer.draw(20, "weights", np.zeros((50, 50, 3), np.uint8))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (10, 10, 3000, 3020):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                writer.write()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert writer.path.stat().st_size == size
    writer.write()
    assert scalars(tmp_path) == recorded(finished)
    assert list(images(tmp_path)["weights"]) == [20]
    _, intact = tensorboard.read_events(writer.path)
    assert intact


def test_only_numbers_are_scalars():
    records = [
        {"step": 1, "epoch": 0, "split": "train", "loss": 0.5, "accuracy": 1},
        {"step": 1, "epoch": 0, "split": "batch", "probabilities": [[0.5, 0.5]]},
        {"step": 2, "epoch": 0, "split": "skipped", "count": 3},
    ]
    assert [tensorboard.scalars(record) for record in records] == [
        {"train/loss": 0.5, "train/accuracy": 1}, {}, {"skipped/count": 3},
    ]  # fmt: skip


def test_offset_of_step():
    text = b'{"step": 1}\n{"step": 4}\n{"step": 4}\n{"step": 9}\n'
    assert [text[tensorboard.offset_of_step(step, text) :].count(b"\n") for step in (0, 2, 4, 5, 10)] == [4, 3, 3, 1, 0]
    assert tensorboard.offset_of_step(0, b"") == 0


# --- Images ---------------------------------------------------------------------------------------------------------

WHITE, RED, BLUE = (255, 255, 255), (255, 0, 0), (0, 0, 255)


def test_mosaic_tiles_weights():
    weights = np.zeros((10, 4, 6), np.float32)
    weights[0, 1, 2], weights[9, 3, 5] = 2, -2
    picture = tensorboard.mosaic(weights)
    scale = 480 // (5 * 7 - 1)
    assert picture.shape == ((2 * 5 - 1) * scale, (5 * 7 - 1) * scale, 3)
    small = picture[::scale, ::scale]
    np.testing.assert_array_equal(small.repeat(scale, axis=0).repeat(scale, axis=1), picture)
    assert (tuple(small[1, 2]), tuple(small[-1, -1])) == (BLUE, RED)
    assert (small != 255).any(axis=2).sum() == 2, "zero is white"
    assert tuple(tensorboard.mosaic(weights / 4)[scale, 2 * scale]) == BLUE, (
        "colours are relative to the largest weight"
    )


@pytest.mark.parametrize(("count", "rows", "columns"), [(1, 1, 1), (7, 3, 3), (32, 4, 8), (64, 8, 8), (512, 8, 8)])
def test_mosaic_fills_its_rows(count, rows, columns):
    height, width, _ = tensorboard.mosaic(np.ones((count, 3, 3), np.float32)).shape
    assert height * (columns * 4 - 1) == width * (rows * 4 - 1)


def test_zero_weights_are_white():
    assert (tensorboard.mosaic(np.zeros((10, 28, 28), np.float32)) == 255).all()


def test_confusion_picture():
    confusion = np.array([[900, 100], [0, 0]])
    picture = tensorboard.confusion_picture(confusion)
    # Corners of the cells, which hold no text.
    cells = {(row, column): picture[58 + 40 * row, 58 + 40 * column] for row in (0, 1) for column in (0, 1)}
    assert cells[0, 0].sum() < cells[0, 1].sum() < 765
    assert tuple(cells[1, 0]) == tuple(cells[1, 1]) == WHITE, "a class without images"
    another = tensorboard.confusion_picture(np.array([[899, 100], [0, 0]]))
    assert (picture != another).any(), "the counts are shown"


@pytest.mark.parametrize("classes", [2, 10, 47, 256])
def test_confusion_picture_has_a_reasonable_size_for_any_number_of_classes(classes):
    picture = tensorboard.confusion_picture(np.ones((classes, classes), np.int64))
    assert picture.dtype == np.uint8
    assert 100 < max(picture.shape) < 900
