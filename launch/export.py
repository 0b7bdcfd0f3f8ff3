"""Export a run, and a page to draw digits on: python launch/export.py, the same as flaxmnist export."""

import sys

from flaxmnist.commands import run

if __name__ == "__main__":
    sys.exit(run("export", sys.argv[1:]))
