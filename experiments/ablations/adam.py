"""The flagship with Adam."""

import flaxmnist as fm
from flaxmnist.config import Adam, WarmupStableDecay

SCHEDULE = WarmupStableDecay(warmup=0.1, decay=0.9, end=0.001)

config = fm.replace(fm.load_experiment("flagship"), "name", "adam")
config = fm.replace(config, "optimizer", Adam(learning_rate=0.003, schedule=SCHEDULE))
