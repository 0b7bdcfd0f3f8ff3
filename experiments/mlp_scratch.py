"""A dense network written from scratch, with plain gradient descent; the short last batch of 96 images is kept.

    python launch/train.py experiments/mlp_scratch.py

Published: 82 %. Here: 81.55 ± 0.32 % (mean ± std, seeds 0–9), 10 s on two cores of an AMD EPYC with AVX-512.
"""

from flaxmnist.config import SGD, Config, Data, MLPConfig, Train, Uniform

config = Config(
    name="mlp_scratch",
    model=MLPConfig(hidden=(512,), kernel_init=Uniform(0.0, 0.1)),
    optimizer=SGD(learning_rate=0.001),
    data=Data(validation=0, order="file", last_batch="keep"),
    train=Train(batch_size=128, epochs=10, log_every=100, report="batch_loss"),
)
