"""The flagship with 4/3 of its channels: 1.8 times the operations."""

import flaxmnist as fm

config = fm.replace(fm.load_experiment("flagship"), "name", "wide")
config = fm.replace(config, "model.stages", ((64, 2), (128, 2), (256, 1)))
