"""Train many trials at once: python launch/sweep.py, the same as flaxmnist sweep."""

import sys

from flaxmnist.commands import run

if __name__ == "__main__":
    sys.exit(run("sweep", sys.argv[1:]))
