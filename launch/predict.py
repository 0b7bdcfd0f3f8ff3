"""Classify digits in image files: python launch/predict.py, the same as flaxmnist predict."""

import sys

from flaxmnist.commands import run

if __name__ == "__main__":
    sys.exit(run("predict", sys.argv[1:]))
