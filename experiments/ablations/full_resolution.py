"""The flagship with a layer of 24 channels on single pixels and max-pooling, not on blocks of 2×2 pixels."""

import flaxmnist as fm

config = fm.replace(fm.load_experiment("flagship"), "name", "full_resolution")
config = fm.replace(config, "model.stages", ((24, 1), (48, 2), (96, 2), (192, 1)))
config = fm.replace(config, "model.block", 1)
