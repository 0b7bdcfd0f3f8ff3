"""The flagship with Adam."""

from dataclasses import replace

import flaxmnist as fm
from flaxmnist.config import Adam

flagship = fm.load_experiment("flagship")
config = replace(flagship, name="adam", optimizer=Adam(learning_rate=0.003, schedule=flagship.optimizer.schedule))
