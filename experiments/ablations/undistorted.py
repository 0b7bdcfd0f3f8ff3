"""The flagship with images that are shifted, but neither rotated, scaled nor distorted."""

from dataclasses import replace

import flaxmnist as fm
from flaxmnist.config import Augment

flagship = fm.load_experiment("flagship")
config = replace(flagship, name="undistorted", data=replace(flagship.data, augment=Augment(shift=1.5)))
