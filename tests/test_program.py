"""Whether compiled programs are kept between processes."""

import subprocess
import sys

import pytest

KEEPING = """
import jax
from flaxmnist import program
jax.default_backend = lambda: {backend!r}
program.keep_programs()
print(jax.config.jax_compilation_cache_dir)
"""


@pytest.mark.parametrize(
    ("backend", "environment", "kept"),
    [
        ("cpu", {}, "None"),
        ("gpu", {"HOME": "/home/someone"}, "/home/someone/.cache/flaxmnist"),
        ("gpu", {"JAX_COMPILATION_CACHE_DIR": "/elsewhere"}, "/elsewhere"),
    ],
)
def test_programs_are_kept_on_accelerators_alone(backend, environment, kept, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code = KEEPING.format(backend=backend)
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == kept
