"""The structure of the repository: which package may import which, what each may use, and what an import does."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "flaxmnist"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")

# Imports run downwards in this list only.
ORDER = ["speed", "show", "sweeps", "runs", "store", "devices", "core", "data", "console", "config", "fields", "errors"]

# Libraries, and the packages or modules that may import them.
USERS = {
    "jax": {"speed", "show", "sweeps", "runs", "store", "devices", "core"},
    "orbax": {"store/checkpoints.py"},
    "matplotlib": {"show"},
    "tensorboardX": {"store/tensorboard.py"},
    "tensorflow_datasets": {"data"},
    "sklearn": {"data", "show"},
    "scipy": {"data", "sweeps"},
    "torch": {"speed/torch_peer.py"},
    "tqdm": {"data", "console.py"},
    "subprocess": {"store/provenance.py", "store/folders.py", "speed"},
}


def place(path: Path) -> tuple[str, str]:
    """Return the name of a module's package, or of the module if it is in none, and its path in the package."""
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
    return {name.removeprefix("flaxmnist.") for name in imports(path) if name.startswith("flaxmnist.")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: place(path)[1])
def test_imports_run_downwards(path):
    package = place(path)[0]
    allowed = set(ORDER[ORDER.index(package) :])
    assert {name.split(".")[0] for name in own_imports(path)} <= allowed, f"{package} imports from above"


def test_modules_do_not_import_each_other_in_circles():
    modules = {place(path)[1].removesuffix(".py").replace("/", ".").removesuffix(".__init__"): path for path in FILES}
    graph = {}
    for module, path in modules.items():
        names = own_imports(path)
        graph[module] = {name for name in names | {name.rpartition(".")[0] for name in names} if name in modules}
    assert list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("library", USERS)
def test_libraries_are_used_only_where_they_may_be(library):
    users = {path for path in FILES if library in {name.split(".")[0] for name in imports(path)}}
    assert users, f"nothing uses {library}"
    assert not {place(path)[1] for path in users if not USERS[library] & set(place(path))}


def attributes(path: Path) -> set[str]:
    """Return the dotted attributes that a file reads, such as ``jax.jit``."""
    return {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}


def test_core_does_not_compile():
    for path in FILES:
        if place(path)[0] in ("core", "data", "sweeps", "runs"):
            assert not attributes(path) & {"jax.jit", "jax.pmap", "jax.shard_map"}, path


def test_only_devices_compiles_training():
    for path in FILES:
        if place(path)[0] not in ("core", "devices"):
            assert not attributes(path) & {"steps.train_step", "steps.train_steps"}, path


def test_each_package_states_its_rule():
    for package in filter(Path.is_dir, PACKAGE.iterdir()):
        if package.name != "__pycache__":
            assert ast.get_docstring(ast.parse((package / "__init__.py").read_text())), package


def test_experiments_import_only_config():
    for path in (ROOT / "experiments").glob("*.py"):
        assert {name.split(".")[0] for name in own_imports(path)} == {"config"}, path


def test_launchers_do_not_use_jax():
    for path in (ROOT / "launch").glob("*.py"):
        assert "jax" not in path.read_text().replace("flaxmnist", ""), path


def test_no_module_has_the_name_of_a_public_function():
    import flaxmnist as fm

    assert not {path.stem for path in PACKAGE.iterdir()} & set(fm.__all__)
