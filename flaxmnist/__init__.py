"""MNIST in JAX and Flax: experiments to run from the command line, and a library to import."""

import importlib
import importlib.util
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from flaxmnist.api import *  # noqa: F403
else:

    def __getattr__(name):
        """Return a submodule, or a public name. The first of these imports JAX, which takes a second."""
        if name.startswith("_") and name != "__all__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if importlib.util.find_spec(f"{__name__}.{name}"):
            return importlib.import_module(f"{__name__}.{name}")
        return getattr(importlib.import_module("flaxmnist.api"), name)

    def __dir__():
        return [*globals(), *__getattr__("__all__")]
