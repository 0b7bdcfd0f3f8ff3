"""Every experiment loads, trains and lowers for every platform; every field of a config has an effect."""

import dataclasses
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, slow, small
from jax import export

import flaxmnist as fm
from flaxmnist import config, fields
from flaxmnist.config import SGD, Adam, CNNConfig, Config, MLPConfig, Objective, SoftmaxConfig
from flaxmnist.core import steps
from flaxmnist.data import order
from flaxmnist.devices import evaluation

# Without the flagship's network with a step of its own, which tests/test_own_steps.py tests.
NAMES = sorted({path.stem for path in (ROOT / "experiments").glob("*.py")} - {"distilled"})
LARGE = {"cnn_experts", "cnn_layers", "flagship", "record", "resnet", "tiny"}
LARGE |= {"speedrun", "speedrun_994", "speedrun_995"}


def load(name: str, count: int) -> Config:
    return order.resolve_length(fm.load_experiment(ROOT / f"experiments/{name}.py"), count)


@pytest.mark.parametrize("name", NAMES)
def test_training_and_prediction_lower_for_every_platform(name, digits):
    experiment = load(name, len(digits.train.labels))
    state = jax.eval_shape(partial(steps.create_state, experiment, (28, 28), 10))
    images, labels = (jax.ShapeDtypeStruct(array.shape, array.dtype) for array in digits.train)
    indices = jax.ShapeDtypeStruct((10, experiment.train.batch_size), np.int32)
    # Flat arguments, because an exported program does not support our classes.
    leaves, structure = jax.tree.flatten(state)

    def train(leaves, *rest):
        return jax.tree.leaves(steps.train_steps(experiment, jax.tree.unflatten(structure, leaves), *rest))

    def predict(leaves, images, indices):
        state = jax.tree.unflatten(structure, leaves)
        return evaluation.forward(state.definition, state.params, state.buffers, images, indices)

    count = jax.ShapeDtypeStruct((), np.int32)
    for program, arguments in ((train, (leaves, images, labels, indices, count)), (predict, (leaves, images, indices))):
        exported = export.export(jax.jit(program), platforms=("cpu", "cuda", "tpu"))(*arguments)
        assert exported.platforms == ("cpu", "cuda", "tpu")


@pytest.mark.parametrize("name", [slow(name) if name in {*LARGE, "quickstart"} else name for name in NAMES])
def test_every_experiment_trains_a_step_and_predicts(name, few):
    experiment = fm.load_experiment(ROOT / f"experiments/{name}.py")
    run = fm.fit(replace(experiment, train=replace(experiment.train, steps=1, epochs=None)), few, devices=1)
    assert run.result.steps == 1
    assert fm.predict(run.model, few.test.images)[1].shape == (45, 10)


# Base configs, and for each field a change that must affect the history or the result of a run.
BASES = {
    "softmax": small(SoftmaxConfig(), optimizer=SGD(momentum=0.5, schedule=config.Cosine())),
    "mlp": small(
        MLPConfig(hidden=(8,)), optimizer=Adam(schedule=config.OneCycle(), weight_decay=0.1), evaluate_every=2
    ),
    "cnn": small(CNNConfig(features=(2,), kernel=(3,), dense=8), optimizer=SGD(schedule=config.Exponential())),
    "muon": small(MLPConfig(hidden=(8,)), optimizer=config.Muon()),
    "lion": small(MLPConfig(hidden=(8,)), optimizer=config.Lion(schedule=config.WarmupStableDecay(), weight_decay=0.1)),
}
CHANGES = {
    "softmax": {
        "name": "other",
        "seed": 1,
        "model.dropout": 0.5,
        "model.kernel_init": config.Normal(1.0),
        "model.kernel_init.value": 0.1,
        "model.bias_init.value": 0.1,
        "model.bias_init": config.Uniform(0.0, 2.0),
        "optimizer.learning_rate": 0.2,
        "optimizer.momentum": 0.9,
        "optimizer.nesterov": True,
        "optimizer.schedule.warmup_steps": 3,
        "optimizer.schedule.end": 0.5,
        "optimizer.clip_norm": 0.01,
        "optimizer.accumulate": 2,
        "objective": Objective(labels="one_hot", label_smoothing=0.2),
        "data.order": "file",
        "data.order_seed": 5,
        "data.last_batch": "drop",
        "data.augment.batch_shift": 2,
        "data.augment.shift": 2.0,
        "data.augment.rotate": 20.0,
        "data.augment.scale": 0.2,
        "data.augment.elastic": 2.0,
        "train.batch_size": 8,
        "train.steps": 5,
        "train.log_every": 2,
        "train.evaluate_every": 3,
        "train.compute_dtype": "bfloat16",
        "train.ema_decay": 0.9,
        "train.report": "batch_accuracy",
    },
    "mlp": {
        "model.hidden": (4, 4),
        "model.dropout": 0.5,
        "model.kernel_init.scale": 2.0,
        "model.bias_init.value": 0.1,
        "optimizer.learning_rate": 0.2,
        "optimizer.b1": 0.5,
        "optimizer.b2": 0.5,
        "optimizer.eps": 0.1,
        "optimizer.weight_decay": 0.5,
        "optimizer.decay_vectors": False,
        "optimizer.clip_norm": 0.01,
        "optimizer.accumulate": 2,
        "optimizer.schedule.peak": 0.8,
        "optimizer.schedule.start_divisor": 2.0,
        "optimizer.schedule.end_divisor": 2.0,
        "train.stop_accuracy": 0.01,
        "train.patience": 1,
    },
    "cnn": {
        "train.convolution": "winograd",
        "model.features": (2, 2),
        "model.kernel": (5,),
        "model.space_to_depth": 2,
        "model.padding": "VALID",
        "model.dense": 9,
        "model.dropout": 0.5,
        "model.kernel_init": config.TruncatedNormal(0.3),
        "model.kernel_init.scale": 2.0,
        "model.bias_init.value": 0.1,
        "optimizer.schedule.decay": 0.5,
        "optimizer.schedule.every": 2,
    },
    "lion": {
        "optimizer.learning_rate": 0.1,
        "optimizer.b1": 0.5,
        "optimizer.b2": 0.5,
        "optimizer.weight_decay": 0.5,
        "optimizer.decay_vectors": False,
        "optimizer.schedule.warmup": 0.5,
        "optimizer.schedule.decay": 0.5,
        "optimizer.schedule.end": 0.5,
        "objective": config.FocalLoss(),
    },
    "muon": {
        "optimizer.learning_rate": 0.1,
        "optimizer.momentum": 0.5,
        "optimizer.newton_schulz_steps": 2,
        "optimizer.clip_norm": 0.01,
        "optimizer.accumulate": 2,
    },
}
# Fields with effects tested in other files.
TESTED_ELSEWHERE = {
    "data.name": "test_data",
    "data.validation": "test_data",
    "train.epochs": "test_order",
    "train.checkpoint_every": "test_resuming",
    "train.start_from": "test_initial",
    "train.frozen": "test_initial",
    "train.monitor": "test_metrics",
    "train.keep": "test_runs",
    "train.skip_nonfinite": "test_divergence",
    "train.statistics_images": "test_batch_norm",
    "objective.form": "test_objective",
    "objective.labels": "test_objective",
    "objective.label_smoothing": "test_objective",
}


def change(value, path: list[str], new):
    """Return ``value`` with the field at ``path`` replaced by ``new``."""
    if not path:
        return new
    return replace(value, **{path[0]: change(getattr(value, path[0]), path[1:], new)})


def observed(experiment: Config, data) -> str:
    """Return the history of a run, and its result without times and memory."""
    run = fm.fit(experiment, data, devices=1)
    result = {
        name: value for name, value in vars(run.result).items() if "second" not in name and name != "peak_memory_bytes"
    }
    return repr((run.history, result))


@pytest.fixture(scope="module")
def baselines():
    """A cache of what the base configs result in."""
    return {}


@pytest.mark.slow
@pytest.mark.parametrize(("base", "field"), [(base, field) for base, changes in CHANGES.items() for field in changes])
def test_every_field_has_an_effect(base, field, few, baselines):
    if base not in baselines:
        baselines[base] = observed(BASES[base], few)
    assert observed(change(BASES[base], field.split("."), CHANGES[base][field]), few) != baselines[base]


ABLATIONS = sorted((ROOT / "experiments/ablations").glob("*.py"))


@pytest.mark.parametrize("file", ABLATIONS, ids=lambda file: file.stem)
def test_an_ablation_changes_one_part_of_the_flagship(file, digits):
    flagship, ablation = (fields.flatten(fields.to_json(fm.load_experiment(path))) for path in ("flagship", file))
    changed = {name for name in flagship | ablation if flagship.get(name) != ablation.get(name)}
    assert ablation["name"] == file.stem
    assert len({name.partition(".")[0] for name in changed}) == 2
    experiment = order.resolve_length(fm.load_experiment(file), len(digits.train.labels))
    state = steps.state_shapes(experiment, (28, 28, 1), 10)
    images = jax.ShapeDtypeStruct((2, 28, 28, 1), np.float32)
    assert jax.eval_shape(lambda state, images: state.model(images), state, images).shape == (2, 10)


def test_every_field_is_covered():
    """Except those of initial values, which test_layers covers."""
    covered = {field for fields in CHANGES.values() for field in fields} | set(TESTED_ELSEWHERE)
    names = {f"optimizer.schedule.{item.name}" for kind in config.SCHEDULES for item in dataclasses.fields(kind)}
    for base in BASES.values():
        names |= {name for name in fields.flatten(fields.to_json(base)) if not name.endswith(".kind")}
    assert names <= covered, names - covered


def test_only_the_stable_form_of_the_cost_is_finite_if_probabilities_vanish(few):
    """With these initial values some probabilities round to 0, and their logarithms are infinite."""
    stable = small(SoftmaxConfig(kernel_init=config.Normal(30.0)))
    as_written = replace(stable, objective=Objective(labels="one_hot", form="probabilities"))
    batch = steps.take_batch(*map(jnp.asarray, few.train), jnp.arange(16, dtype=jnp.int32))

    def loss(experiment: Config) -> float:
        state = steps.create_state(experiment, (28, 28), 10)
        return float(jax.jit(partial(steps.train_step, experiment))(state, batch)[1].batch.loss)

    assert np.isfinite(loss(stable))
    assert not np.isfinite(loss(as_written))
