"""Train an experiment: python launch/train.py, the same as flaxmnist train."""

import sys

from flaxmnist.commands import run

if __name__ == "__main__":
    sys.exit(run("train", sys.argv[1:]))
