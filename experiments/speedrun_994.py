"""99.4 % on MNIST with as little training as we could manage: 80,640 images, four thirds of an epoch.

    python launch/train.py experiments/speedrun_994.py

Here: 99.45 ± 0.05 % (mean ± std, seeds 0–29), 7.9 ± 0.9 s of training on two cores of an AMD EPYC with AVX-512.
"""

from flaxmnist.config import Augment, CNNConfig, Config, Data, Muon, Objective, OneCycle, Train

config = Config(
    name="speedrun_994",
    model=CNNConfig(features=(24, 64), kernel=(5,), padding="VALID", dense=96),
    optimizer=Muon(
        learning_rate=0.02,
        momentum=0.8,
        newton_schulz_steps=2,
        schedule=OneCycle(peak=0.1, start_divisor=5, end_divisor=10),
    ),
    objective=Objective(labels="one_hot", label_smoothing=0.1),
    data=Data(validation=0, augment=Augment(batch_shift=1)),
    train=Train(batch_size=96, steps=840, ema_decay=0.98),
)
