"""The cache of compiled programs."""

import subprocess
import sys

import pytest

PRINT_CACHE = """
import jax
from flaxmnist.devices import program
jax.default_backend = lambda: {backend!r}
program.use_compilation_cache()
print(jax.config.jax_compilation_cache_dir)
"""


@pytest.mark.parametrize(
    ("backend", "environment", "folder"),
    [
        ("cpu", {}, "None"),
        ("gpu", {"HOME": "/home/someone"}, "/home/someone/.cache/flaxmnist"),
        ("gpu", {"JAX_COMPILATION_CACHE_DIR": "/elsewhere"}, "/elsewhere"),
    ],
)
def test_only_accelerators_have_a_compilation_cache(backend, environment, folder, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code = PRINT_CACHE.format(backend=backend)
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == folder
