"""The structure of the repository: which module may import which, and the side effects of an import."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

FILES = sorted(path for path in (ROOT / "flaxmnist").glob("*.py") if path.stem != "__init__")


def imports(path) -> set[str]:
    """Return the modules of the package that a file imports, at any level of the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("flaxmnist.") for alias in node.names), "use: from flaxmnist import x"
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError("use: from flaxmnist import x")
        elif isinstance(node, ast.ImportFrom) and node.module == "flaxmnist":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flaxmnist."):
            found.add(node.module.split(".")[1])
    return found


def layout() -> list[str]:
    """Return the modules of the package, from the highest to the lowest level of imports."""
    names = """
        scaling benchmarks reports plots figures ensembles sweeps parts settings statistics runs program archive
        results exports trained peer events checkpoints folders manifest lock inspection steps evaluation state
        models layers objective optim augment order data idx downloads digits logs parallel hosts signals config
        fields errors
    """
    return names.split()


def test_every_module_is_in_the_layout():
    assert sorted(layout()) == [path.stem for path in FILES]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_modules_import_only_from_below_in_the_layout(path):
    below = layout()[layout().index(path.stem) + 1 :]
    assert imports(path) <= set(below), f"{path.stem} imports from above"


def test_experiments_import_only_config():
    for path in (ROOT / "experiments").glob("*.py"):
        assert imports(path) == {"config"}, path


def test_launchers_do_not_use_jax():
    for path in (ROOT / "launch").glob("*.py"):
        assert "jax" not in path.read_text().replace("flaxmnist", ""), path


def test_no_module_has_the_name_of_a_public_function():
    import flaxmnist as fm

    assert not {path.stem for path in FILES} & set(fm.__all__)


def test_import_has_no_side_effects():
    """It loads no slow library, initializes no device and changes no JAX flag."""
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


def test_the_top_level_has_no_other_files():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    top = {line.split("/")[0] for line in listed.splitlines()}
    files = {"CITATION.cff", "LICENSE", "README.md", "constraints.txt", "pyproject.toml"}
    assert {name for name in top if not name.startswith(".")} <= files | {"experiments", "flaxmnist", "launch", "tests"}
