"""99.5 % on MNIST with as little training as we could manage: 128,000 images, two epochs.

    python launch/train.py experiments/speedrun_995.py

Here: 99.50 ± 0.04 % (mean ± std, seeds 0–29), 16.3 ± 1.1 s of training on two cores of an AMD EPYC with AVX-512.
"""

from flaxmnist.config import Augment, CNNConfig, Config, Data, Muon, Objective, OneCycle, Train

config = Config(
    name="speedrun_995",
    model=CNNConfig(features=(24, 96), kernel=(5,), padding="VALID", dense=96),
    optimizer=Muon(
        learning_rate=0.02,
        momentum=0.8,
        newton_schulz_steps=2,
        schedule=OneCycle(peak=0.1, start_divisor=5, end_divisor=10),
    ),
    objective=Objective(labels="one_hot", label_smoothing=0.1),
    data=Data(validation=0, augment=Augment(batch_shift=1)),
    train=Train(batch_size=128, steps=1000, ema_decay=0.98),
)
