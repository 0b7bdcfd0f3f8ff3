"""The flagship with a layer on the pixels before the 2×2 blocks, by pooling: 1.5 times the time."""

from dataclasses import replace

import flaxmnist as fm

flagship = fm.load_experiment("flagship")
stages = ((24, 1), *flagship.model.stages)
config = replace(flagship, name="full_resolution", model=replace(flagship.model, block=1, stages=stages))
