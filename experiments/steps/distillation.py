"""Distillation (Hinton et al. 2015) of a trained run, here in runs/teacher, into a smaller model."""

from dataclasses import replace

import jax

import flaxmnist as fm
from flaxmnist.config import MLPConfig

TEACHER, TEMPERATURE = "runs/teacher", 2.0
config = replace(fm.load_experiment("quickstart"), name="distillation", model=MLPConfig(hidden=(64,)))


def arrays(config, data):
    return fm.load_run(TEACHER).state


def step(config, state, batch, teacher, *, axis_name=None):
    def losses(logits, batch):
        targets = jax.nn.softmax(teacher.model(batch.images) / TEMPERATURE)
        return -(targets * jax.nn.log_softmax(logits / TEMPERATURE)).sum(axis=1)

    return fm.update(config, state, fm.gradient(config, state, state.params, batch, losses=losses, axis_name=axis_name))
