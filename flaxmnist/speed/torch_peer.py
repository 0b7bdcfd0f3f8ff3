"""The same experiments in PyTorch, for speed comparisons. PyTorch is not a dependency: install it to use this module.

PyTorch runs in a separate process, as its users run it, so that neither library uses threads or memory that the other
has set up.
"""

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from flaxmnist import config as configs
from flaxmnist.config import Config
from flaxmnist.data import order
from flaxmnist.data.sets import Dataset, load_data
from flaxmnist.errors import UserError
from flaxmnist.experiment import ExperimentFile, load_experiment, read_experiment

MODES = ("eager", "compiled")


@contextmanager
def trainers(experiment: Path, data_dir: Path | None) -> Iterator[dict[str, Callable[[int], None]]]:
    """Yield one function per PyTorch mode (eager and compiled) that trains ``experiment`` for a number of steps.

    Yield none for an experiment that is not ``supported``. Raise UserError without PyTorch.
    """
    if importlib.util.find_spec("torch") is None:
        raise UserError("--peer torch needs PyTorch, which is not installed: pip install torch")
    if not supported(read_experiment(experiment)):
        yield {}
        return
    command = [sys.executable, "-m", "flaxmnist.speed.torch_peer", *filter(None, (experiment, data_dir))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        requests, replies = process.stdin, process.stdout
        assert requests is not None
        assert replies is not None

        def train(mode: str, count: int) -> None:
            with suppress(BrokenPipeError):
                print(mode, count, file=requests, flush=True)
            if replies.readline() != "done\n":
                raise UserError("the PyTorch process ended early: see its last messages above")

        yield {f"torch {mode}": partial(train, mode) for mode in MODES}
        requests.close()


def supported(experiment: ExperimentFile) -> bool:
    """Return True if a step of ``trainer`` does the same work as one of the experiment."""
    config, functions = experiment
    model, optimizer, objective = config.model, config.optimizer, config.objective
    return (
        not functions
        and isinstance(model, configs.MODELS)
        and (isinstance(model, configs.CNNConfig) or model.dropout == 0)
        and isinstance(optimizer, configs.SGD | configs.Adam)
        and (optimizer.accumulate, optimizer.clip_norm) == (1, None)
        and isinstance(objective, configs.Objective)
        and objective.label_smoothing == 0
        and config.data.augment == configs.Augment()
        and (config.train.ema_decay, config.train.compute_dtype) == (None, "float32")
    )


def serve(trainers: dict[str, Callable[[int], None]], requests: Iterable[str]) -> None:
    """Train for each request, a line with a mode and a number of steps, and print "done" after each."""
    for request in requests:
        mode, count = request.split()
        trainers[mode](int(count))
        print("done", flush=True)


def main(experiment: str, data_dir: str | None = None) -> None:
    """Serve the requests on standard input."""
    config = load_experiment(experiment)
    data = load_data(config.data, data_dir)
    config = order.resolve_length(config, len(data.train.labels))
    serve({mode: trainer(config, data, mode == "compiled") for mode in MODES}, sys.stdin)


def trainer(config: Config, data: Dataset, compiled: bool) -> Callable[[int], None]:
    """Return a function that trains for a number of steps. Images stay on the device; the layout is channels-last."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = make_model(config.model, data).to(device=device, memory_format=torch.channels_last)
    optimizer = make_optimizer(config.optimizer, model)
    images = torch.from_numpy(np.array(data.train.images)).permute(0, 3, 1, 2).to(device)
    labels = torch.from_numpy(np.array(data.train.labels)).long().to(device)

    def loss_of(x: Any, y: Any) -> Any:
        return torch.nn.functional.cross_entropy(model(x / 255), y)

    loss_of = torch.compile(loss_of) if compiled else loss_of
    step = 0

    def train(count: int) -> None:
        nonlocal step
        for row in order.batch_indices(config, len(labels), step, step + count):
            # The padding of a short last batch (−1) becomes image 0: another batch shape would be compiled again.
            indices = torch.from_numpy(np.maximum(row, 0)).to(device)
            optimizer.zero_grad(set_to_none=True)
            loss_of(images[indices], labels[indices]).backward()
            optimizer.step()
        step += count
        if device == "cuda":
            torch.cuda.synchronize()

    return train


def make_model(model: configs.Model, data: Dataset) -> Any:
    """Return ``model`` as a PyTorch module. It has PyTorch's initial values, which do not matter for speed."""
    import torch
    from torch import nn

    height, width, channels = data.train.images.shape[1:]
    match model:
        case configs.SoftmaxConfig():
            return nn.Sequential(nn.Flatten(), nn.Linear(height * width * channels, data.classes))
        case configs.MLPConfig(hidden=hidden):
            sizes = [height * width * channels, *hidden]
            inner = [layer for pair in zip(sizes, hidden, strict=False) for layer in (nn.Linear(*pair), nn.ReLU())]
            return nn.Sequential(nn.Flatten(), *inner, nn.Linear(sizes[-1], data.classes))
        case configs.CNNConfig(features=features, kernel=kernel, dense=dense):
            layers: list[Any] = [nn.PixelUnshuffle(model.space_to_depth)] if model.space_to_depth > 1 else []
            for i, channels in enumerate(features):
                side = kernel[i % len(kernel)]
                layers += [nn.LazyConv2d(channels, side, padding=model.padding.lower()), nn.ReLU()]
                layers += [nn.MaxPool2d(2, ceil_mode=True)]
            layers += [nn.Flatten(), nn.LazyLinear(dense), nn.ReLU(), nn.Dropout(model.dropout)]
            network = nn.Sequential(*layers, nn.Linear(dense, data.classes))
            network(torch.zeros(1, channels, height, width))  # sets the shapes of the lazy layers
            return network


def make_optimizer(optimizer: configs.Optimizer, model: Any) -> Any:
    """Return the fused PyTorch form of ``optimizer``, SGD or Adam, with a constant learning rate."""
    import torch

    match optimizer:
        case configs.SGD(learning_rate=rate, momentum=momentum, nesterov=nesterov):
            return torch.optim.SGD(model.parameters(), rate, momentum, nesterov=nesterov, fused=True)
        case configs.Adam(learning_rate=rate, b1=b1, b2=b2, eps=eps, weight_decay=decay):
            adam = torch.optim.AdamW if decay else torch.optim.Adam
            return adam(model.parameters(), rate, (b1, b2), eps, decay, fused=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
