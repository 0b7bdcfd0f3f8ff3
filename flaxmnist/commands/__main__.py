"""``python -m flaxmnist.commands VERB …``: the same as the console script ``flaxmnist VERB …``."""

import sys

from flaxmnist.commands import main

if __name__ == "__main__":
    sys.exit(main())
