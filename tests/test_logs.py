"""Progress of a run on a terminal, in a log file and in a notebook."""

import contextlib
import logging
import os
import pty
import re
import subprocess
import sys
import termios

import nbclient
import nbformat
import pytest
from conftest import ROOT

from flaxmnist import console

PROGRESS = r"[\d,.]+ steps/s, [\d,]+ images/s, loss \d\.\d{4}, accuracy \d\.\d{4}, \d\d:\d\d left"


def progress(start: int = 0, seconds: float = 10.0) -> console.Progress:
    """Return the progress of 1,000 steps of 50 images, started ``seconds`` ago."""
    bar = console.Progress(1000, start, 50)
    bar.start_time -= seconds
    return bar


@pytest.fixture
def lines(caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="flaxmnist")
    monkeypatch.setattr(console, "LINE_SECONDS", 0.0)
    return lambda: [record.getMessage() for record in caplog.records]


def test_without_a_terminal_progress_is_a_line(lines, capfd):
    bar = progress(start=200)
    bar.show(400, 0.5, 0.75)
    bar.close()
    assert lines() == [
        "400 of 1000 steps, 20.0 steps/s, 1,000 images/s, loss 0.5000, accuracy 0.7500, 00:30 left",
    ]
    assert capfd.readouterr().err == "", "no bar"


def test_lines_come_every_30_seconds(lines, monkeypatch):
    monkeypatch.setattr(console, "LINE_SECONDS", 30.0)
    bar = progress()
    bar.show(1)
    assert lines() == []
    bar.line_time -= 31
    bar.show(2)
    bar.show(3)
    assert len(lines()) == 1


def test_speed_is_measured_from_the_start_of_training(lines):
    bar = progress(seconds=1000)
    bar.begin()
    bar.start_time -= 1
    bar.show(500)
    assert re.fullmatch(r"500 of 1000 steps, (500|499) steps/s, 2\d,\d{3} images/s, 00:01 left", lines()[0])


def test_no_time_left_is_shown_before_the_first_step(lines):
    progress(start=200).show(200)
    assert lines() == ["200 of 1000 steps, 0.0 steps/s, 0 images/s"]


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
    cells = [nbformat.v4.new_code_cell(NOTEBOOK), nbformat.v4.new_code_cell('run.result["steps"]')]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": ROOT}}).execute()
    (display,), (steps,) = (cell.outputs for cell in notebook.cells)
    assert display.output_type == "display_data", "a widget, and no output on standard error"
    states = notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"].values()
    text = "".join(str(widget["state"].get("value", "")) for widget in states).replace("\u2007", " ")
    assert re.search(rf"30/30 steps, {PROGRESS}$", text)
    assert steps.data["text/plain"] == "30"
