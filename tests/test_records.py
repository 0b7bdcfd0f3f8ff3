"""metrics.jsonl: what it contains, and how it is continued, restored and read."""

import json

import numpy as np
import pytest

from flaxmnist.errors import UserError
from flaxmnist.store.records import Records, read_records, to_json_value


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def add(records: Records, steps: range, split: str = "train") -> Records:
    for step in steps:
        records.add(step, 0, split, loss=step / 8, accuracy=0.5)
    return records


def test_a_record_is_one_line_of_json(path):
    records = Records(path)
    records.add(5, 1, "train", loss=np.float32(0.1), accuracy=np.float64(0.25), gradient_norm=np.float32(3))
    records.add(6, 1, "skipped", count=np.int64(1))
    assert path.read_text() == "", "nothing is written before"
    records.write()
    assert path.read_text() == (
        '{"step": 5, "epoch": 1, "split": "train", "loss": 0.1, "accuracy": 0.25, "gradient_norm": 3.0}\n'
        '{"step": 6, "epoch": 1, "split": "skipped", "count": 1}\n'
    )
    assert read_records(path) == records.history


def test_records_without_a_path_are_in_memory_only(tmp_path):
    records = add(Records(None), range(3))
    records.write()
    assert [record["step"] for record in records.history] == [0, 1, 2]
    assert not list(tmp_path.iterdir())


def test_values_are_plain_and_round_trip():
    values = np.random.default_rng(0).normal(size=100).astype(np.float32)
    for value in (*values, np.float32(1e-40), np.float32(3e38)):
        number = to_json_value(value)
        assert type(number) is float
        assert np.float32(number) == value
        assert len(json.dumps(number)) <= 23
    assert to_json_value(np.array([[0.1], [2]], np.float32)) == [[0.1], [2.0]]
    assert to_json_value(np.array(7)) == 7 and to_json_value("text") == "text" and to_json_value(None) is None
    assert to_json_value(np.array([np.nan, np.inf, 1], np.float32)) == [None, None, 1], "JSON has no others"


def test_only_new_records_are_appended(path):
    records = add(Records(path), range(3))
    records.write()
    with path.open("r+b") as file:
        file.write(b"[")  # would be overwritten if everything was written again
    add(records, range(3, 5)).write()
    assert path.read_bytes() == b"[" + bytes(records.text)[1:]


def test_records_are_written_again_if_the_file_was_removed(path):
    records = add(Records(path), range(3))
    records.write()
    path.unlink()
    add(records, range(3, 5)).write()
    assert read_records(path) == records.history


def test_records_that_cannot_be_written_are_kept_for_the_next_attempt(path):
    records = add(Records(path), range(3))
    path.unlink()
    path.mkdir()
    with pytest.raises(OSError, match="Is a directory"):
        records.write()
    path.rmdir()
    add(records, range(3, 5)).write()
    assert [record["step"] for record in read_records(path)] == list(range(5))


def test_a_resumed_run_continues_after_the_records_of_its_checkpoint(path, caplog):
    """The file has later ones, and possibly half of a line."""
    saved = bytes(add(Records(None), range(3)).text)
    path.write_bytes(saved + bytes(add(Records(None), range(3, 6)).text)[:-10])
    records = Records(path, saved)
    assert path.read_bytes() == saved
    assert caplog.messages == []
    add(records, range(3, 4)).write()
    assert [record["step"] for record in read_records(path)] == [0, 1, 2, 3]


@pytest.mark.parametrize("content", [b"", b"{}\n", None])
def test_a_damaged_or_missing_file_is_restored_from_the_checkpoint(content, path, caplog):
    saved = bytes(add(Records(None), range(3)).text)
    if content is not None:
        path.write_bytes(content)
    Records(path, saved)
    assert path.read_bytes() == saved
    expected = [] if content is None else [f"{path} is damaged: restoring it from the checkpoint"]
    assert caplog.messages == expected


def test_evaluations_can_be_read_back():
    """Also those before a resume."""
    first = add(add(Records(None), range(2)), range(2, 4), "validation")
    records = add(Records(None, bytes(first.text)), range(4, 5), "validation")
    assert [record["accuracy"] for record in records.validations] == [0.5, 0.5, 0.5]
    assert records.last("validation")["step"] == 4
    assert records.last("test") is None
    assert [record["step"] for record in records.rare] == [2, 3, 4], "records of steps are too many to be kept"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", r"is damaged \(Expecting"),
        (b"\xff\n", r"is damaged \('utf-8' codec"),
        (b"[1]\n", "line 1 is not a record"),
        (b'{"step": 1, "epoch": 0, "split": "batch"}\n{"step": 1}\n', "line 2 is not a record"),
        (b'{"step": 1, "epoch": 0, "split": "train"}\n', "line 1 is not a record"),
        (b'{"step": -1, "epoch": 0, "split": "batch"}\n', "line 1 is not a record"),
        (b'{"step": 1.0, "epoch": 0, "split": "batch"}\n', "line 1 is not a record"),
        (None, "No such file"),
    ],
)
def test_damage_is_an_error(content, message, path):
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_records(path)
