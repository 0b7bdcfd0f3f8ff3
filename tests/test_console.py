"""Log messages, the clock, and the progress of a run on a terminal, in a log file and in a notebook."""

import contextlib
import logging
import os
import pty
import re
import subprocess
import sys
import termios
import time

import nbclient
import nbformat
import pytest
from conftest import ROOT

from flaxmnist import console

PROGRESS = r"[\d,.]+ steps/s, [\d,]+ images/s, loss \d\.\d{4}, accuracy \d\.\d{4}, \d\d:\d\d left"


@pytest.fixture
def now(monkeypatch):
    """A function that sets the time in seconds, which stands still otherwise."""
    times = [1000.0]
    monkeypatch.setattr(time, "perf_counter", lambda: times[0])
    return lambda seconds: times.__setitem__(0, 1000.0 + seconds)


def progress(start: int = 0) -> console.Progress:
    """Return the progress of 1,000 steps of 50 images, which starts at ``start``."""
    return console.Progress(1000, start, 50)


@pytest.fixture
def lines(caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="flaxmnist")
    monkeypatch.setattr(console, "LINE_SECONDS", 0.0)
    return lambda: [record.getMessage() for record in caplog.records]


def test_without_a_terminal_progress_is_a_line(lines, now, capfd):
    bar = progress(start=200)
    now(10)
    bar.show(400, 0.5, 0.75)
    bar.close()
    assert lines() == [
        "400 of 1000 steps, 20.0 steps/s, 1,000 images/s, loss 0.5000, accuracy 0.7500, 00:30 left",
    ]
    assert capfd.readouterr().err == "", "no bar"


def test_lines_come_every_30_seconds(lines, now, monkeypatch):
    monkeypatch.setattr(console, "LINE_SECONDS", 30.0)
    bar = progress()
    for step, seconds in enumerate((1, 29, 31, 32, 60, 62), start=1):
        now(seconds)
        bar.show(step)
    assert [line.split(",")[0] for line in lines()] == ["3 of 1000 steps", "6 of 1000 steps"]


def test_speed_is_measured_from_the_start_of_training(lines, now):
    bar = progress()
    now(1000)
    bar.begin()
    now(1001)
    bar.show(500)
    assert lines() == ["500 of 1000 steps, 500 steps/s, 25,000 images/s, 00:01 left"]


def test_no_time_left_is_shown_before_the_first_step(lines, now):
    bar = progress(start=200)
    now(10)
    bar.show(200)
    assert lines() == ["200 of 1000 steps, 0.0 steps/s, 0 images/s"]


def test_the_clock_adds_up_the_seconds_of_each_activity(now):
    clock = console.Clock(start_time=999.0)
    for start, activity in ((1, "train"), (4, "evaluate"), (5, "train")):
        now(start)
        with clock(activity):
            now(start + 1)
    now(8)
    with contextlib.suppress(KeyboardInterrupt), clock("checkpoint"):
        now(10)
        raise KeyboardInterrupt
    assert clock.seconds == {"train": 2.0, "evaluate": 1.0, "checkpoint": 2.0}
    assert clock.total() == 11.0
    clock.resume({"train": 100.0, "data": 7.0, "total": 110.0})
    assert clock.seconds == {"train": 102.0, "evaluate": 1.0, "checkpoint": 2.0, "data": 7.0}
    assert clock.total() == 121.0


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
def test_messages_go_to_standard_error_from_a_level_on(level):
    code = f"""
from flaxmnist import console
console.show_messages({level!r})
for name in ("debug", "info", "warning", "error"):
    getattr(console.logger, name)("a message of %s", name)
"""
    names = ["debug", "info", "warning", "error"]
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert completed.stderr.splitlines() == [f"a message of {name}" for name in names[names.index(level) :]]
    assert completed.stdout == ""


CODE = """
import sys, time
from flaxmnist import console
console.show_messages(sys.argv[1])
bar = console.Progress(1000, 0, 50)
for step in (250, 500, 1000):
    time.sleep(0.15)
    bar.show(step, 1 / step, 0.5)
    console.logger.info("a line at step %d", step)
bar.close()
"""


@pytest.mark.parametrize(("level", "visible"), [("info", True), ("warning", False)])
def test_on_a_terminal_progress_is_a_bar(level, visible):
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 120))
    subprocess.run([sys.executable, "-W", "error", "-c", CODE, level], stderr=follower, check=True, cwd=ROOT)
    os.close(follower)
    output = bytearray()
    with contextlib.suppress(OSError):  # Linux raises it at the end of the output
        while data := os.read(leader, 4096):
            output += data
    os.close(leader)
    if not visible:
        assert not output
        return
    *above, last, rest = output.decode().split("\r\n")
    # The final content of a line follows its last carriage return.
    assert [line.rpartition("\r")[2] for line in above] == [f"a line at step {step}" for step in (250, 500, 1000)]
    assert re.fullmatch(rf"100%\|.*\| 1000/1000 steps, {PROGRESS}", last.rpartition("\r")[2])
    assert rest == "", "the next output starts on a new line"


NOTEBOOK = """
from dataclasses import replace
import flaxmnist as fm
config = fm.load_experiment("experiments/quickstart.py")
config = replace(config, train=replace(config.train, steps=30, epochs=None))
run = fm.fit(config, fm.load_data("digits"), devices=1)
"""


@pytest.mark.slow
def test_in_a_notebook_progress_is_a_widget():
    cells = [nbformat.v4.new_code_cell(NOTEBOOK), nbformat.v4.new_code_cell("run.result.steps")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": ROOT}}).execute()
    (display,), (steps,) = (cell.outputs for cell in notebook.cells)
    assert display.output_type == "display_data", "a widget, and no output on standard error"
    states = notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"].values()
    text = "".join(str(widget["state"].get("value", "")) for widget in states).replace("\u2007", " ")
    assert re.search(rf"30/30 steps, {PROGRESS}$", text)
    assert steps.data["text/plain"] == "30"
