"""Evaluate a run, a sweep or an export: python launch/evaluate.py, the same as flaxmnist evaluate."""

import sys

from flaxmnist.commands import run

if __name__ == "__main__":
    sys.exit(run("evaluate", sys.argv[1:]))
