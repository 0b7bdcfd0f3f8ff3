"""The convolutional network of TensorFlow's "Deep MNIST for Experts".

    python launch/train.py experiments/cnn_experts.py

Published: about 99.2 %. Here: 99.07 ± 0.04 % (mean ± std, seeds 0–2), 4 min on two cores of an AMD EPYC with AVX-512.
"""

from flaxmnist.config import Adam, CNNConfig, Config, Constant, Train, TruncatedNormal

config = Config(
    name="cnn_experts",
    model=CNNConfig(
        features=(32, 64),
        kernel=(5,),
        padding="SAME",
        dense=1024,
        dropout=0.5,
        kernel_init=TruncatedNormal(0.1),
        bias_init=Constant(0.1),
    ),
    optimizer=Adam(learning_rate=1e-4),
    train=Train(batch_size=50, steps=10_000, log_every=100, evaluate_every=1_000, report="batch_accuracy"),
)
