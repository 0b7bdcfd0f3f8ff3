"""Measure speed: python launch/benchmark.py, the same as flaxmnist benchmark."""

import sys

from flaxmnist.commands import run

if __name__ == "__main__":
    sys.exit(run("benchmark", sys.argv[1:]))
