"""The house: which part may use which, and what an import may do."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

FILES = sorted(path for path in (ROOT / "flaxmnist").glob("*.py") if path.stem != "__init__")


def imports(path) -> set[str]:
    """The modules of the package that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("flaxmnist.") for alias in node.names), (
                "write: from flaxmnist import x"
            )
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError("say: from flaxmnist import x")
        elif isinstance(node, ast.ImportFrom) and node.module == "flaxmnist":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flaxmnist."):
            found.add(node.module.split(".")[1])
    return found


def layout() -> list[str]:
    """The files of the package in the order of the README's layout."""
    return re.findall(r"(\w+)\.py", (ROOT / "README.md").read_text().split("## Layout")[1].split("## ")[0])


def test_every_file_stands_in_the_layout():
    assert sorted(layout()) == [path.stem for path in FILES]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_imports_run_downwards_in_the_layout(path):
    below = layout()[layout().index(path.stem) + 1 :]
    assert imports(path) <= set(below), f"{path.stem} looks up"


def test_experiments_import_the_config_alone():
    for path in (ROOT / "experiments").glob("*.py"):
        assert imports(path) == {"config"}, path


def test_launchers_hold_no_jax():
    for path in (ROOT / "launch").glob("*.py"):
        assert "jax" not in path.read_text().replace("flaxmnist", ""), path


def test_no_room_bears_the_name_of_a_public_function():
    import flaxmnist as fm

    assert not {path.stem for path in FILES} & set(fm.__all__)


def test_importing_does_nothing_beside():
    """No TensorFlow, no heavy part before its use, no device touched, no flag changed."""
    code = """
import sys, jax
before = dict(jax.config.values)
import flaxmnist
heavy = {"tensorflow", "tensorflow_datasets", "orbax.checkpoint", "tyro", "matplotlib", "sklearn", "PIL.Image"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
assert dict(jax.config.values) == before
from jax._src import xla_bridge
assert not xla_bridge._backends
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_the_top_level_holds_nothing_else():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    top = {line.split("/")[0] for line in listed.splitlines()}
    files = {"CITATION.cff", "LICENSE", "README.md", "constraints.txt", "pyproject.toml"}
    assert {name for name in top if not name.startswith(".")} <= files | {"experiments", "flaxmnist", "launch", "tests"}
