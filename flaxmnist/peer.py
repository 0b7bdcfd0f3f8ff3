"""The same experiments in PyTorch, to race against. PyTorch is no dependency: install it to use this."""

from collections.abc import Callable
from typing import Any

import numpy as np

from flaxmnist import config, layers, order
from flaxmnist.config import Config
from flaxmnist.data import Dataset
from flaxmnist.errors import UserError


def trainers(experiment: Config, data: Dataset) -> dict[str, Callable[[int], None]]:
    """PyTorch's two ways of training ``experiment``, op by op and compiled, as functions of a number of steps.

    Raises UserError where there is no PyTorch.
    """
    try:
        import torch
    except ImportError:
        raise UserError("--peer torch needs PyTorch, which is no dependency: pip install torch") from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    experiment = order.resolve(experiment, len(data.train.labels))
    return {f"torch {mode}": trainer(experiment, data, mode == "compiled", device) for mode in ("eager", "compiled")}


def trainer(experiment: Config, data: Dataset, compiled: bool, device: str) -> Callable[[int], None]:
    """One way of training ``experiment``: images stay on the device, convolutions are channels-last."""
    import torch

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
    from torch import nn

    height, width = data.train.images.shape[1:3]
    match model:
        case config.Softmax():
            return nn.Sequential(nn.Flatten(), nn.Linear(height * width, data.classes))
        case config.MLP(hidden=hidden):
            sizes = [height * width, *hidden]
            inner = [part for pair in zip(sizes, hidden, strict=False) for part in (nn.Linear(*pair), nn.ReLU())]
            return nn.Sequential(nn.Flatten(), *inner, nn.Linear(sizes[-1], data.classes))
        case config.CNN(features=features, kernel=kernel, padding=padding, dense=dense, dropout=rate):
            parts: list[Any] = []
            channels = 1
            for outputs in features:
                parts += [nn.Conv2d(channels, outputs, kernel, padding=padding.lower()), nn.ReLU()]
                parts += [nn.MaxPool2d(2, ceil_mode=True)]
                channels = outputs
                height, width = (-(-layers.output_size(side, kernel, padding) // 2) for side in (height, width))
            head = [nn.Linear(height * width * channels, dense), nn.ReLU(), nn.Dropout(rate)]
            return nn.Sequential(*parts, nn.Flatten(), *head, nn.Linear(dense, data.classes))


def make_optimizer(optimizer: config.Optimizer, model: Any) -> Any:
    """``optimizer`` in PyTorch, in its fused form, at its full rate."""
    import torch

    match optimizer:
        case config.SGD(learning_rate=rate, momentum=momentum, nesterov=nesterov):
            return torch.optim.SGD(model.parameters(), rate, momentum, nesterov=nesterov, fused=True)
        case config.Adam(learning_rate=rate, b1=b1, b2=b2, eps=eps, weight_decay=decay):
            kind = torch.optim.AdamW if decay else torch.optim.Adam
            return kind(model.parameters(), rate, (b1, b2), eps, decay, fused=True)
