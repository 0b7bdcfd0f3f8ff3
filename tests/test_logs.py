"""How far a run is, told on a terminal, in a log file and in a notebook."""

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

from flaxmnist import logs

TOLD = r"[\d,.]+ steps/s, [\d,]+ images/s, loss \d\.\d{4}, accuracy \d\.\d{4}, \d\d:\d\d left"


def progress(start: int = 0, seconds: float = 10.0) -> logs.Progress:
    """That of 1,000 steps of 50 images, which has gone on for so many ``seconds``."""
    shown = logs.Progress(1000, start, 50)
    shown.began -= seconds
    return shown


@pytest.fixture
def lines(caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="flaxmnist")
    monkeypatch.setattr(logs, "LINE_SECONDS", 0.0)
    return lambda: [record.getMessage() for record in caplog.records]


def test_where_there_is_no_terminal_a_line_tells_all(lines, capfd):
    shown = progress(start=200)
    shown.show(400, 0.5, 0.75)
    shown.close()
    assert lines() == [
        "400 of 1000 steps, 20.0 steps/s, 1,000 images/s, loss 0.5000, accuracy 0.7500, 00:30 left",
    ]
    assert capfd.readouterr().err == "", "no bar"


def test_lines_come_every_30_seconds(lines, monkeypatch):
    monkeypatch.setattr(logs, "LINE_SECONDS", 30.0)
    shown = progress()
    shown.show(1)
    assert lines() == []
    shown.lined -= 31
    shown.show(2)
    shown.show(3)
    assert len(lines()) == 1


def test_the_rate_counts_from_the_beginning_of_training(lines):
    shown = progress(seconds=1000)
    shown.begin()
    shown.began -= 1
    shown.show(500)
    assert re.fullmatch(r"500 of 1000 steps, (500|499) steps/s, 2\d,\d{3} images/s, 00:01 left", lines()[0])


def test_before_the_first_step_nobody_knows_how_long_it_takes(lines):
    progress(start=200).show(200)
    assert lines() == ["200 of 1000 steps, 0.0 steps/s, 0 images/s"]


CODE = """
import sys, time
from flaxmnist import logs
logs.show(sys.argv[1])
shown = logs.Progress(1000, 0, 50)
for step in (250, 500, 1000):
    time.sleep(0.15)
    shown.show(step, 1 / step, 0.5)
    logs.logger.info("a line at step %d", step)
shown.close()
"""


@pytest.mark.parametrize(("level", "drawn"), [("info", True), ("warning", False)])
def test_on_a_terminal_a_bar_tells_all(level, drawn):
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 120))
    subprocess.run([sys.executable, "-W", "error", "-c", CODE, level], stderr=follower, check=True, cwd=ROOT)
    os.close(follower)
    told = bytearray()
    while True:
        try:
            part = os.read(leader, 4096)
        except OSError:  # how Linux says that nobody has it open any more
            break
        if not part:
            break
        told += part
    os.close(leader)
    if not drawn:
        assert not told
        return
    *above, last, rest = told.decode().split("\r\n")
    # What a line shows at last follows the last return to its beginning.
    assert [line.rpartition("\r")[2] for line in above] == [f"a line at step {step}" for step in (250, 500, 1000)]
    assert re.fullmatch(rf"100%\|.*\| 1000/1000 steps, {TOLD}", last.rpartition("\r")[2])
    assert rest == "", "what is printed next begins a line"


NOTEBOOK = """
from dataclasses import replace
import flaxmnist as fm
config = fm.load_experiment("experiments/quickstart.py")
config = replace(config, train=replace(config.train, steps=30, epochs=None))
run = fm.fit(config, fm.load_data("digits"), devices=1)
"""


@pytest.mark.slow
def test_in_a_notebook_a_bar_tells_all():
    cells = [nbformat.v4.new_code_cell(NOTEBOOK), nbformat.v4.new_code_cell('run.result["steps"]')]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": ROOT}}).execute()
    (shown,), (steps,) = (cell.outputs for cell in notebook.cells)
    assert shown.output_type == "display_data", "a widget, and nothing on standard error"
    states = notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"].values()
    text = "".join(str(widget["state"].get("value", "")) for widget in states).replace("\u2007", " ")
    assert re.search(rf"30/30 steps, {TOLD}$", text)
    assert steps.data["text/plain"] == "30"
