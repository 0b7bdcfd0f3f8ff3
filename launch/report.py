"""Draw a run, several runs side by side, or a sweep: python launch/report.py, the same as flaxmnist report."""

import sys

from flaxmnist.commands import run

if __name__ == "__main__":
    sys.exit(run("report", sys.argv[1:]))
