"""The structure of the repository: which package may import which, what each may use, and what an import does."""

import ast
import graphlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, small
from jaxtyping import TypeCheckError

import flaxmnist as fm
from flaxmnist.core import pictures
from flaxmnist.data import order
from flaxmnist.devices import evaluation
from flaxmnist.show import text
from flaxmnist.store import tensorboard

PACKAGE = ROOT / "flaxmnist"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")

# Imports run downwards in this list only.
ORDER = [
    "commands", "api", "speed", "show", "sweeps", "runs", "loop", "store", "devices", "core", "data",
    "console", "experiment", "config", "fields", "errors",
]  # fmt: skip

# Libraries, and the packages or modules that may import them.
USERS = {
    "jax": {"speed", "show", "sweeps", "runs", "loop", "store", "devices", "core"},
    "orbax": {"store/checkpoints.py"},
    "matplotlib": {"show"},
    "tyro": {"commands"},
    "tensorboardX": {"store/tensorboard.py"},
    "tensorflow_datasets": {"data"},
    "sklearn": {"data"},
    "scipy": {"data", "sweeps"},
    "torch": {"speed/torch_peer.py"},
    "tqdm": {"data", "console.py"},
    "subprocess": {"store/provenance.py", "speed"},
}


def locate(path: Path) -> tuple[str, str]:
    """Return the name of a module's package, or of the module if it is in none, and its path in flaxmnist."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py"), str(relative)


def imports(path: Path) -> Iterator[str]:
    """Yield the dotted names that a file imports, at any level of the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: use absolute imports"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(path: Path) -> set[str]:
    """Return the dotted names of flaxmnist that a file imports, without the first word.

    The methods ``make`` and ``losses`` of config.py are exempt: they turn a config into what ``core`` has for it.
    """
    names = {name.removeprefix("flaxmnist.") for name in imports(path) if name.split(".")[0] == "flaxmnist"}
    return {name for name in names if path.name != "config.py" or not name.startswith("core.")}


def test_config_imports_core_only_in_the_methods_of_its_classes():
    tree = ast.parse((PACKAGE / "config.py").read_text())
    methods = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in ("make", "losses")]
    inside = {node for method in methods for node in ast.walk(method)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flaxmnist.core"):
            assert node in inside, ast.unparse(node)


def attributes(path: Path) -> set[str]:
    """Return the dotted attributes that a file reads, such as ``jax.jit``."""
    return {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}


def run_python(code: str) -> str:
    """Return what ``code`` prints in a new process."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


# --- Packages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: locate(path)[1])
def test_imports_run_downwards(path):
    package = locate(path)[0]
    allowed = set(ORDER[ORDER.index(package) :])
    assert {name.split(".")[0] for name in own_imports(path)} <= allowed, f"{package} imports from above"


def test_every_package_has_a_place_in_the_order():
    assert {locate(path)[0] for path in FILES} == set(ORDER)


def test_modules_do_not_import_each_other_in_circles():
    modules = {locate(path)[1].removesuffix(".py").replace("/", ".").removesuffix(".__init__"): path for path in FILES}
    graph = {}
    for module, path in modules.items():
        names = own_imports(path)
        graph[module] = {name for name in names | {name.rpartition(".")[0] for name in names} if name in modules}
    assert list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("library", USERS)
def test_libraries_are_used_only_where_they_may_be(library):
    users = {path for path in FILES if library in {name.split(".")[0] for name in imports(path)}}
    assert users, f"nothing uses {library}"
    assert not {locate(path)[1] for path in users if not USERS[library] & set(locate(path))}


def test_some_packages_do_not_compile():
    for path in FILES:
        # The functions of winograd.py are inlined in the program that calls them.
        if locate(path)[0] in ("core", "data", "loop", "runs", "sweeps") and path.name != "winograd.py":
            used = attributes(path) | set(imports(path))
            assert not used & {"jax.jit", "jax.pmap", "jax.shard_map", "flax.nnx.jit", "nnx.jit"}, path


def test_only_devices_compiles_training():
    for path in FILES:
        if locate(path)[0] not in ("core", "devices", "api"):
            used = {name.partition("core.")[2] or name for name in attributes(path) | own_imports(path)}
            assert "steps.train_steps" not in used, path


def test_each_package_states_its_rule():
    for package in {path.parent for path in FILES} - {PACKAGE}:
        assert ast.get_docstring(ast.parse((package / "__init__.py").read_text())), package


def test_experiments_import_only_config_and_public_names():
    for path in (ROOT / "experiments").rglob("*.py"):
        own = {name for name in imports(path) if name.split(".")[0] == "flaxmnist"}
        assert {name.rpartition(".")[0] or name for name in own} <= {"flaxmnist.config", "flaxmnist"}, path


def test_launchers_import_only_commands():
    for path in (ROOT / "launch").glob("*.py"):
        assert set(imports(path)) == {"sys", "flaxmnist.commands.run"}, path


# --- Imports --------------------------------------------------------------------------------------------------------


def test_public_names_are_complete_and_come_on_first_use():
    assert {"fit", "sweep", "load_run", "load_data", "plots", "predict"} < set(fm.__all__)
    assert set(fm.__all__) < set(dir(fm))
    assert all(getattr(fm, name) is not None for name in fm.__all__)
    code = "import sys, flaxmnist as fm; print('jax' in sys.modules); fm.fit; print('jax' in sys.modules)"
    assert run_python(code).split() == ["False", "True"]
    with pytest.raises(AttributeError, match="nothing"):
        _ = fm.nothing
    with pytest.raises(ImportError, match="nothing"):
        from flaxmnist import nothing  # noqa: F401


def test_no_module_has_the_name_of_a_public_function():
    assert not {path.stem for path in PACKAGE.iterdir()} & set(fm.__all__)


def test_commands_are_imported_without_slow_libraries():
    """Otherwise a signal in the first second would be lost."""
    loaded = run_python("import sys, flaxmnist.commands; print(*sys.modules)").split()
    assert "flaxmnist.commands" in loaded
    assert not {"jax", "numpy", "flax", "tyro", "flaxmnist.api"} & set(loaded)


SIDE_EFFECTS = """
import logging, os, random, signal, threading, warnings
def state():
    numbers = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
    handlers = {number: signal.getsignal(number) for number in numbers}
    logger = logging.getLogger("flaxmnist")
    return handlers, threading.enumerate(), os.getcwd(), random.getstate(), logger.handlers, logger.level
import jax, matplotlib, optax, orbax.checkpoint, flax.nnx
before, settings = state(), dict(jax.config.values)
import flaxmnist.api
from jax._src import xla_bridge
assert state() == before
assert dict(jax.config.values) == settings
assert not xla_bridge.backends_are_initialized()
"""


def test_the_import_has_no_side_effects(tmp_path):
    """No handlers, threads or settings, no output, no files, and no devices."""
    command = [sys.executable, "-W", "error", "-c", SIDE_EFFECTS]
    completed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stderr
    assert (completed.stdout, completed.stderr) == ("", "")
    assert not list(tmp_path.iterdir())


# --- Shapes of arrays -----------------------------------------------------------------------------------------------


def test_jaxtyping_checks_every_module_with_shapes():
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["addopts"]
    checked = tuple(re.findall(r"flaxmnist[\w.]*", options.replace("\\\n", "")))
    for path in FILES:
        if "jaxtyping" in {name.split(".")[0] for name in imports(path)}:
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            assert module.startswith(checked) == (module != "flaxmnist.core.state"), module


WRONG = {
    "core": lambda: pictures.sheet(np.zeros((2, 2)), 1),
    "data": lambda: order.steps_per_epoch(small(), "70"),
    "devices": lambda: evaluation.score_logits(np.zeros(3), np.zeros((3, 8, 8, 1), np.uint8), np.zeros(3, np.int32)),
    "store": lambda: tensorboard.enlarge(np.zeros((2, 2, 3)), 2),
    "show": lambda: text.show_prediction("a.png", np.zeros((2, 2), np.uint8), np.zeros(10), "0123456789"),
}


@pytest.mark.parametrize("package", WRONG)
def test_a_wrong_shape_or_type_raises(package):
    with pytest.raises(TypeCheckError):
        WRONG[package]()
