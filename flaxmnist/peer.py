"""The same experiments in PyTorch, to race against. PyTorch is no dependency: install it to use this.

It runs in a process of its own, as its users run it: neither then runs on threads or memory that the other set up.
"""

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from flaxmnist import config, order
from flaxmnist.config import Config, load_experiment
from flaxmnist.data import Dataset, load_data
from flaxmnist.errors import UserError

MODES = ("eager", "compiled")


@contextmanager
def trainers(experiment: Path, data_dir: Path | None) -> Iterator[dict[str, Callable[[int], None]]]:
    """PyTorch's two ways of training ``experiment``, op by op and compiled, as functions of a number of steps.

    None of them where the optimizer is Muon, which PyTorch has for dense layers only. Raises UserError where there is
    no PyTorch.
    """
    if importlib.util.find_spec("torch") is None:
        raise UserError("--peer torch needs PyTorch, which is no dependency: pip install torch")
    if isinstance(load_experiment(experiment).optimizer, config.Muon):
        yield {}
        return
    command = [sys.executable, "-m", "flaxmnist.peer", str(experiment), *([str(data_dir)] if data_dir else [])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        requests, answers = process.stdin, process.stdout
        assert requests is not None
        assert answers is not None

        def train(mode: str, count: int) -> None:
            with suppress(BrokenPipeError):
                print(mode, count, file=requests, flush=True)
            if answers.readline() != "done\n":
                raise UserError("the process of PyTorch ended: what it said last stands above")

        yield {f"torch {mode}": partial(train, mode) for mode in MODES}
        requests.close()


def serve(experiment: Path, data_dir: Path | None) -> None:
    """Trains as each line of standard input says, a mode and a number of steps, and answers each with a line."""
    config = load_experiment(experiment)
    data = load_data(config.data, data_dir)
    config = order.resolve(config, len(data.train.labels))
    trainers = {mode: trainer(config, data, mode == "compiled") for mode in MODES}
    for request in sys.stdin:
        mode, count = request.split()
        trainers[mode](int(count))
        print("done", flush=True)


def trainer(experiment: Config, data: Dataset, compiled: bool) -> Callable[[int], None]:
    """One way of training ``experiment``: images stay on the device, convolutions are channels-last."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = make_model(experiment.model, data).to(device=device, memory_format=torch.channels_last)
    optimizer = make_optimizer(experiment.optimizer, model)
    images = torch.from_numpy(np.array(data.train.images)).permute(0, 3, 1, 2).to(device)
    labels = torch.from_numpy(np.array(data.train.labels)).long().to(device)

    def loss_of(x: Any, y: Any) -> Any:
        return torch.nn.functional.cross_entropy(model(x / 255), y)

    loss_of = torch.compile(loss_of) if compiled else loss_of
    done = 0

    def train(count: int) -> None:
        nonlocal done
        for row in order.batch_indices(experiment, len(labels), done, done + count):
            # An epoch's short batch is filled up, since another shape would be compiled anew.
            chosen = torch.from_numpy(np.maximum(row, 0)).to(device)
            optimizer.zero_grad(set_to_none=True)
            loss_of(images[chosen], labels[chosen]).backward()
            optimizer.step()
        done += count
        if device == "cuda":
            torch.cuda.synchronize()

    return train


def make_model(model: config.Model, data: Dataset) -> Any:
    """``model`` as a PyTorch module with its own initial values, which do not matter for speed."""
    import torch
    from torch import nn

    height, width = data.train.images.shape[1:3]
    match model:
        case config.Softmax():
            return nn.Sequential(nn.Flatten(), nn.Linear(height * width, data.classes))
        case config.MLP(hidden=hidden):
            sizes = [height * width, *hidden]
            inner = [part for pair in zip(sizes, hidden, strict=False) for part in (nn.Linear(*pair), nn.ReLU())]
            return nn.Sequential(nn.Flatten(), *inner, nn.Linear(sizes[-1], data.classes))
        case config.CNN(features=features, kernel=kernel, dense=dense):
            parts: list[Any] = [nn.PixelUnshuffle(model.space_to_depth)] if model.space_to_depth > 1 else []
            for number, outputs in enumerate(features):
                side = kernel[number % len(kernel)]
                parts += [nn.LazyConv2d(outputs, side, padding=model.padding.lower()), nn.ReLU()]
                parts += [nn.MaxPool2d(2, ceil_mode=True)]
            parts += [nn.Flatten(), nn.LazyLinear(dense), nn.ReLU(), nn.Dropout(model.dropout)]
            network = nn.Sequential(*parts, nn.Linear(dense, data.classes))
            network(torch.zeros(1, 1, height, width))
            return network


def make_optimizer(optimizer: config.Optimizer, model: Any) -> Any:
    """``optimizer``, SGD or Adam, in PyTorch, in its fused form, at its full rate."""
    import torch

    match optimizer:
        case config.SGD(learning_rate=rate, momentum=momentum, nesterov=nesterov):
            return torch.optim.SGD(model.parameters(), rate, momentum, nesterov=nesterov, fused=True)
        case config.Adam(learning_rate=rate, b1=b1, b2=b2, eps=eps, weight_decay=decay):
            kind = torch.optim.AdamW if decay else torch.optim.Adam
            return kind(model.parameters(), rate, (b1, b2), eps, decay, fused=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), Path(sys.argv[2]) if sys.argv[2:] else None)
