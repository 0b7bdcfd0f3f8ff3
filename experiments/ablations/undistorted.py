"""The flagship with images that are shifted, but neither rotated, scaled nor distorted."""

import flaxmnist as fm
from flaxmnist.config import Augment

config = fm.replace(fm.load_experiment("flagship"), "name", "undistorted")
config = fm.replace(config, "data.augment", Augment(shift=1.5))
