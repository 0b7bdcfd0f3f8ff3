"""The test images of MNIST whose labels are known to be wrong.

Northcutt, Athalye & Mueller 2021, "Pervasive label errors in test sets destabilize machine learning benchmarks": five
people were shown each image that a model found suspect. For each of these 15 images, at most two of the five saw the
given digit (mturk/mnist_mturk.json in github.com/cleanlab/label-errors).
"""

import hashlib

import numpy as np
from jaxtyping import Bool, Num

# The image's index in the test file, and the first 16 digits of the SHA-256 of its bytes: it is known by its content,
# wherever it comes from and in whatever order.
IMAGES = {
    947: "9e571df431674b22",
    1621: "a6dbd7572d6b5235",
    1901: "ac85fc88d75848d8",
    2130: "3b659aa46e7e60f0",
    2462: "b79f052864e49eef",
    2597: "a8b3e479c863b2ec",
    2654: "2d23b44093568126",
    3520: "78b0ae6da7b031aa",
    3558: "2ade8bec31ce7dba",
    5937: "ae0606c84402b2d7",
    6651: "e58ee418a2c482c9",
    6783: "848efc6d40483e6f",
    8527: "b147b498facaa9a7",
    9679: "6d535e9edb86d534",
    9729: "142caf3509596eb9",
}


def known(images: Num[np.ndarray, "n h w c"]) -> Bool[np.ndarray, " n"]:
    """Return which of ``images`` are among these. Only uint8 images are recognised."""
    digests = set(IMAGES.values())
    return np.array([hashlib.sha256(image.tobytes()).hexdigest()[:16] in digests for image in images], bool)
