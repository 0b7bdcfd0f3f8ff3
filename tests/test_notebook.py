"""The notebook runs from top to bottom, and numbers and names in its text occur in the code below it."""

import ast
import copy
import functools
import importlib.util
import io
import os
import re
import subprocess
import sys
import tokenize

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

import flaxmnist as fm

NOTEBOOK = nbformat.read(ROOT / "experiments/explore.ipynb", as_version=nbformat.NO_CONVERT)
CODE = [cell.source for cell in NOTEBOOK.cells if cell.cell_type == "code"]


def sections() -> list[tuple[str, str]]:
    """Return each text with the code between it and the next text."""
    found: list[tuple[str, str]] = []
    for cell in NOTEBOOK.cells:
        if cell.cell_type == "markdown":
            found.append((cell.source, ""))
        else:
            found[-1] = (found[-1][0], f"{found[-1][1]}{cell.source}\n")
    return found


SECTIONS = pytest.mark.parametrize(
    ("text", "code"), sections(), ids=[cell.id for cell in NOTEBOOK.cells if cell.cell_type == "markdown"]
)


def numbers(code: str) -> set[float]:
    """Return the number literals in ``code``."""
    tokens = tokenize.generate_tokens(io.StringIO(code).readline)
    return {float(ast.literal_eval(token.string)) for token in tokens if token.type == tokenize.NUMBER}


def test_it_is_stored_without_outputs():
    nbformat.validate(NOTEBOOK)
    assert NOTEBOOK.metadata.keys() == {"kernelspec", "language_info"}
    assert NOTEBOOK.metadata.kernelspec.name == "python3" and NOTEBOOK.metadata.language_info == {"name": "python"}
    assert len({cell.id for cell in NOTEBOOK.cells}) == len(NOTEBOOK.cells)
    for cell in NOTEBOOK.cells:
        assert re.fullmatch(r"[a-z-]+", cell.id) and not cell.metadata and not cell.get("attachments")
        if cell.cell_type == "code":
            assert cell.execution_count is None and not cell.outputs, cell.id


@SECTIONS
def test_numbers_in_the_text_occur_in_the_code(text, code):
    """The code either uses or asserts them, so that none can become outdated."""
    prose = re.sub(r"`.+?`", "", text)
    mentioned = {float(number.replace(",", "")) for number in re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", prose)}
    assert mentioned <= numbers(code)


@SECTIONS
def test_names_in_the_text_occur_in_the_code(text, code):
    assert code
    for name in re.findall(r"`(.+?)`", text):
        assert re.search(rf"(?<!\w){re.escape(name)}(?!\w)", code), name


def test_names_from_the_package_exist():
    for dotted in re.findall(r"\bfm\.([\w.]+)", "\n".join(CODE)):
        functools.reduce(getattr, dotted.split("."), fm)
    for node in ast.walk(ast.parse("\n".join(CODE))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flaxmnist"):
            exec(ast.unparse(node), {})


@pytest.mark.parametrize(
    ("missing", "installed"),
    [((), []), (("flaxmnist",), [".."]), (("pandas",), ["pandas"]), (("flaxmnist", "pandas"), ["..", "pandas"])],
)
def test_its_first_cell_installs_what_is_missing(missing, installed, monkeypatch):
    commands = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else object())
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append((command, check)))
    namespace = {}
    exec(CODE[0], namespace)
    assert namespace["SOURCE"] == ".."
    assert commands == ([([sys.executable, "-m", "pip", "install", "-q", *installed], True)] if installed else [])


@pytest.mark.slow
def test_it_runs_from_top_to_bottom_without_other_files(tmp_path):
    empty, notebook = tmp_path / "empty", copy.deepcopy(NOTEBOOK)
    empty.mkdir()
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "IPYTHONDIR": str(tmp_path / "ipython")}
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(empty)}})
    client.execute(env=environment)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            stderr = "".join(output.text for output in cell.outputs if output.get("name") == "stderr")
            # Only progress bars are allowed.
            lines = [line for line in re.split(r"[\r\n]", stderr) if line.strip() and not re.search(r"\d/\d+ \[", line)]
            assert not lines, f"{cell.id}: {lines}"
            media_types = {media_type for output in cell.outputs for media_type in output.get("data", {})}
            assert "fm.plots." not in cell.source.splitlines()[-1] or "image/png" in media_types, cell.id
    assert "text/html" in media_types  # the report
    assert not list(empty.iterdir())
