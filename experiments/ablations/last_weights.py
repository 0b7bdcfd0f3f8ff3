"""The flagship without averaged weights."""

import flaxmnist as fm

config = fm.replace(fm.load_experiment("flagship"), "name", "last_weights")
config = fm.replace(config, "train.ema_decay", None)
