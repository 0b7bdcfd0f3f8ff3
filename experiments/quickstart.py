"""A small CNN on the digits included in scikit-learn: no download needed.

    python launch/train.py experiments/quickstart.py

98.92 ± 0.36 % of the 360 test images (mean ± std, seeds 0–9), 12 s on two cores of an AMD EPYC with AVX-512.
"""

from flaxmnist.config import Adam, CNNConfig, Config, Cosine, Data, Train

config = Config(
    name="quickstart",
    model=CNNConfig(features=(16, 32), kernel=(3,), dense=128, dropout=0.3),
    optimizer=Adam(learning_rate=2e-3, schedule=Cosine()),
    data=Data(name="digits"),
    train=Train(batch_size=50, epochs=20, log_every=50, evaluate_every=100),
)
