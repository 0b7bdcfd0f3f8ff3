"""The weights that training starts from, if they are those of another run or of a module in memory."""

import itertools

import numpy as np
from flax import nnx

from flaxmnist import fields
from flaxmnist.config import Config
from flaxmnist.console import logger
from flaxmnist.core import steps
from flaxmnist.core.definition import split
from flaxmnist.data.sets import Dataset
from flaxmnist.errors import UserError
from flaxmnist.store.load import load_checkpoint


def load_initial(config: Config, data: Dataset, initial: nnx.Module | None = None) -> dict[str, np.ndarray]:
    """Return the parameters and buffers to start from, by dotted name; none if the model draws its own.

    They are those of ``initial`` or of the newest checkpoint in ``train.start_from``: its averaged weights if it has
    any. If that run had another number of classes, arrays whose size depends on it keep their initial values. Raise
    UserError for any other difference.
    """
    folder, resized = config.train.start_from, set()
    if folder is None and initial is None:
        return {}
    if folder is not None and initial is not None:
        raise UserError("both train.start_from and initial are given: pass only one of them")
    if initial is not None and not isinstance(initial, nnx.Module):
        raise UserError(f"initial must be an nnx.Module, such as run.model, but is a {type(initial).__name__}")
    if initial is None:
        trained = load_checkpoint(str(folder), config=config)
        initial, resized = trained.model, {(trained.data.classes, data.classes)}
    source = "initial" if folder is None else f"train.start_from {folder}"
    _, *variables = split(initial)
    # Copies, because training donates its arrays.
    weights = {name: np.array(leaf) for tree in variables for name, leaf in fields.flatten(tree).items()}
    state = steps.state_shapes(config, data.train.images.shape[1:], data.classes)
    expected = fields.flatten(state.params) | fields.flatten(state.buffers)
    if wrong := sorted(expected.keys() ^ weights.keys()):
        raise UserError(f"{source} has {'no' if wrong[0] in expected else 'unknown'} weights {wrong[0]}: use its model")
    for name, leaf in expected.items():
        if weights[name].shape == leaf.shape:
            continue
        sizes = itertools.zip_longest(weights[name].shape, leaf.shape)
        if any(old != new and (old, new) not in resized for old, new in sizes):
            shapes = f"{list(weights[name].shape)}, but the model needs {list(leaf.shape)}"
            raise UserError(f"the weights {name} of {source} are {shapes}: use its model and images of its shape")
        logger.info("%s has another number of classes: %s keeps its initial values", source, name)
        del weights[name]
    return weights
