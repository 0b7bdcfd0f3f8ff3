"""The flagship without averaged weights."""

from dataclasses import replace

import flaxmnist as fm

flagship = fm.load_experiment("flagship")
config = replace(flagship, name="last_weights", train=replace(flagship.train, ema_decay=None))
