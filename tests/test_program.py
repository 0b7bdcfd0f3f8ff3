"""The compiled programs that train one run, or several trials at once."""

import functools
import logging
import os
import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest
from conftest import MODELS, assert_same, fit_on_one, slow, small

from flaxmnist.config import SGD, Adam, Augment, Data
from flaxmnist.core import steps
from flaxmnist.data import order
from flaxmnist.devices import parallel, program
from flaxmnist.devices.program import Program, TrialProgram

# A run of 20 steps, in epochs of 16 + 16 + 16 + 16 + 6 images.
CONFIG = small()
LAST_BATCH = 6  # images

# Also with dropout, augmentation, momenta and averaged weights.
COMPLEX = replace(
    small("mlp", optimizer=Adam(), ema_decay=0.9, data=Data(name="digits", augment=Augment(shift=2.0))),
    model=replace(MODELS["mlp"], dropout=0.5),
)


def compile_run(data, config=CONFIG, devices=1, backend="jit") -> Program:
    mesh = parallel.make_mesh(devices)
    state = program.initial_state(config, data, mesh)
    return Program(config, state, program.put_split(data.train, mesh), mesh, backend)


def train(compiled, data, *counts, config=CONFIG, devices=1):
    """Return the state after chunks of ``counts`` steps, and the metrics of each step."""
    state, step, metrics = program.initial_state(config, data, parallel.make_mesh(devices)), 0, []
    for count in counts:
        state, chunk = compiled(state, step, count)
        metrics.append(jax.tree.map(lambda values, count=count: np.asarray(values)[:count], chunk))
        step += count
    return state, jax.tree.map(lambda *values: np.concatenate(values), *metrics)


@pytest.fixture
def compilations(caplog):
    """A function that returns the names of the functions compiled so far."""
    caplog.set_level(logging.WARNING, logger="jax")
    with jax.log_compiles():
        yield lambda: [line.split()[4] for line in caplog.messages if line.startswith("Finished XLA compilation of")]


# --- One run --------------------------------------------------------------------------------------------------------

CHUNKS = [(20,), (1,) * 20, (7, 1, 12), (3, 3, 3, 3, 3, 3, 2)]


@pytest.mark.parametrize(("devices", "backend"), [(1, "jit"), slow(2, "jit"), (2, "pmap"), slow(1, "pmap")])
def test_bits_do_not_depend_on_chunks(devices, backend, few):
    compiled, options = compile_run(few, COMPLEX, devices, backend), {"config": COMPLEX, "devices": devices}
    expected = train(compiled, few, *CHUNKS[0], **options)
    assert expected[0].step == 20
    for counts in CHUNKS[1:]:
        assert_same(train(compiled, few, *counts, **options), expected)


@pytest.mark.parametrize("backend", ["jit", "pmap"])
def test_a_program_is_compiled_once(backend, few, compilations):
    compiled = compile_run(few, devices=2, backend=backend)
    assert len([name for name in compilations() if name in ("jit(train_steps)", "jit(_fun)")]) == 1
    train(compiled, few, 20, devices=2)
    before = compilations()
    for counts in CHUNKS:
        train(compiled, few, *counts, devices=2)
    assert compilations() == before


def test_a_run_compiles_one_training_program(few, tmp_path, compilations):
    """However its evaluations, checkpoints and reports fall."""
    fit_on_one(small(evaluate_every=7, checkpoint_every=3, log_every=2, report="batch_accuracy"), few, tmp_path)
    assert [name for name in compilations() if "train_step" in name] == ["jit(train_steps)"]


@pytest.mark.parametrize("backend", ["jit", "pmap"])
def test_the_state_is_donated(backend, few):
    compiled = compile_run(few, devices=2, backend=backend)
    before = program.initial_state(CONFIG, few, parallel.make_mesh(2))
    after, _ = compiled(before, 0, 1)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((after, compiled.train)))


@pytest.mark.parametrize(("devices", "backend"), [(1, "jit"), (2, "jit"), (2, "pmap")])
def test_a_short_last_batch_counts_only_its_images(devices, backend, few):
    compiled = compile_run(few, devices=devices, backend=backend)
    _, metrics = train(compiled, few, 20, devices=devices)
    assert metrics.batch.images.tolist() == [16, 16, 16, 16, LAST_BATCH] * 4
    assert metrics.epoch.images.tolist() == [16, 32, 48, 64, 70] * 4
    assert all(metrics.batch.correct <= metrics.batch.images)


@pytest.mark.parametrize("backend", ["jit", "pmap"])
def test_indices_are_those_of_the_steps_and_the_rest_is_padding(backend, few):
    compiled = compile_run(few, devices=2, backend=backend)
    indices, count = compiled.step_arguments(3, 4)
    assert indices.shape == ((20, 16) if backend == "jit" else (20, 2, 8))
    assert (indices.dtype, int(count)) == (np.int32, 4)
    rows = np.asarray(indices).reshape(20, 16)
    np.testing.assert_array_equal(rows[:4], order.batch_indices(CONFIG, 70, 3, 7))
    assert (rows[1] == -1).tolist() == [False] * LAST_BATCH + [True] * (16 - LAST_BATCH), "step 4 has a short batch"
    assert (rows[4:] == -1).all()


def test_steps_after_the_count_are_not_done(few):
    compiled = compile_run(few)
    state, metrics = compiled(program.initial_state(CONFIG, few, parallel.make_mesh(1)), 0, 3)
    assert state.step == 3
    for values in jax.tree.leaves(metrics):
        assert values.shape == (20,)
        assert not np.asarray(values)[3:].any()
    assert np.asarray(metrics.batch.images)[:3].all()


def test_zero_steps_change_nothing(few):
    compiled = compile_run(few)
    state, _ = compiled(program.initial_state(CONFIG, few, parallel.make_mesh(1)), 0, 0)
    assert_same(state, program.initial_state(CONFIG, few, parallel.make_mesh(1)))


def test_capacity_is_limited_by_the_run_the_steps_and_the_images(few, monkeypatch):
    assert compile_run(few).capacity == CONFIG.train.steps == 20
    monkeypatch.setattr(program, "MAX_STEPS", 7)
    assert compile_run(few).capacity == 7
    monkeypatch.setattr(program, "MAX_IMAGES", 5 * 16 + 15)
    assert compile_run(few).capacity == 5


def test_memory_includes_state_images_and_activations(few):
    compiled = compile_run(few)
    state = program.initial_state(CONFIG, few, parallel.make_mesh(1))
    minimum = sum(leaf.nbytes for leaf in jax.tree.leaves((state, few.train)))
    assert compiled.bytes > minimum
    larger = replace(CONFIG, train=replace(CONFIG.train, batch_size=64))
    assert compile_run(few, larger).bytes > compiled.bytes


def test_initial_state_has_the_given_shapes_and_shardings(few):
    for mesh in (parallel.make_mesh(1), parallel.make_mesh(4), parallel.make_mesh(4, model_parallel=2)):
        state = program.initial_state(CONFIG, few, mesh)
        assert_same(state, steps.create_state(CONFIG, (28, 28), 10))
        shapes = program.state_shapes(CONFIG, few, mesh)
        for leaf, shape in zip(jax.tree.leaves(state), jax.tree.leaves(shapes), strict=True):
            assert (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype)
            assert leaf.sharding.is_equivalent_to(shape.sharding, leaf.ndim)


def test_the_cost_of_a_step_grows_with_its_batch(few):
    one, two = (
        program.step_cost(replace(CONFIG, train=replace(CONFIG.train, batch_size=size)), few) for size in (16, 32)
    )
    products = 4 * 16 * 784 * 10  # forward and backward, with two operations per weight and image
    assert products < one.operations < 2 * products
    assert 1.5 < two.operations / one.operations < 2.1
    assert two.bytes > one.bytes > 0


# --- Several trials -------------------------------------------------------------------------------------------------

RATES, SEEDS = [0.3, 0.2, 0.1, 0.05], [0, 1, 0, 1]
TRIALS = small(optimizer=SGD(momentum=0.9), steps=7)


def compile_trials(data, devices: int, trials_per_device: int, share_order: bool) -> TrialProgram:
    mesh = parallel.make_mesh(devices)
    images, names = program.put_split(data.train, mesh), ("optimizer.learning_rate",)
    return TrialProgram(TRIALS, names, data, images, mesh, trials_per_device, share_order)


def train_trials(compiled: TrialProgram, *counts: int):
    """Return the state and the last metrics of trials with the first of RATES and SEEDS, after chunks of ``counts``."""
    seeds, values = np.array(SEEDS[: compiled.size], np.int32), np.array(RATES[: compiled.size], np.float32)[:, None]
    configs = [replace(TRIALS, seed=seed) for seed in seeds.tolist()]
    state, step, metrics = compiled.create(seeds, values), 0, None
    for count in counts:
        before, (state, metrics) = state, compiled(seeds, values, state, None, configs, step, count)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params)), "the state is donated"
        step += count
    return state, metrics


@pytest.fixture(scope="module")
def alone(few):
    """A cached function that returns the state of the trial in ``row``, trained as a run."""

    @functools.cache
    def train(row: int, order_seed: int | None):
        config = replace(TRIALS, seed=SEEDS[row], optimizer=replace(TRIALS.optimizer, learning_rate=RATES[row]))
        return fit_on_one(replace(config, data=replace(config.data, order_seed=order_seed)), few).state

    return train


@pytest.mark.parametrize(("devices", "share_order"), [(1, False), slow(4, False), slow(4, True)])
def test_a_trial_per_device_is_bitwise_a_run(devices, share_order, few, alone):
    compiled = compile_trials(few, devices, 1, share_order)
    assert compiled.size == devices
    state, _ = train_trials(compiled, 7)
    for row in range(devices):
        trial = jax.tree.map(lambda x, row=row: x[row], state)
        assert_same(trial, alone(row, SEEDS[0] if share_order else None))


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "share_order"), [(1, False), (1, True), (2, False), (2, True)])
def test_vectorised_trials_are_runs_up_to_rounding(devices, share_order, few, alone):
    state, metrics = train_trials(compile_trials(few, devices, 4 // devices, share_order), 7)
    assert state.step.tolist() == [7] * 4
    assert np.asarray(metrics.batch.images)[:, :7].tolist() == [[16, 16, 16, 16, LAST_BATCH, 16, 16]] * 4
    for row in range(4):
        run = alone(row, SEEDS[0] if share_order else None)
        for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(run.params), strict=True):
            np.testing.assert_allclose(np.asarray(a)[row], b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("trials_per_device", [1, 2])
def test_bits_of_trials_do_not_depend_on_chunks(trials_per_device, few):
    compiled = compile_trials(few, 2, trials_per_device, False)
    full, _ = train_trials(compiled, 7)
    for counts in ((1,) * 7, (3, 4)):
        assert_same(train_trials(compiled, *counts)[0], full)


def test_trials_share_their_batches_or_have_their_own(few):
    configs = [replace(TRIALS, seed=seed) for seed in SEEDS]
    shared, own = (compile_trials(few, 2, 2, share_order).batch_indices(configs, 2, 4) for share_order in (True, False))
    assert shared.shape == (7, 16)
    assert own.shape == (4, 7, 16)
    for row, config in enumerate(configs):
        expected = order.batch_indices(config, 70, 2, 6)
        np.testing.assert_array_equal(own[row, :4], expected)
        assert not np.asarray(own)[row, 4:].any()
    np.testing.assert_array_equal(shared[:4], own[0, :4])
    assert shared.sharding.is_fully_replicated and not own.sharding.is_fully_replicated


@pytest.mark.slow
def test_the_capacity_of_trials_is_limited_by_all_their_indices(few, monkeypatch):
    def capacity(trials_per_device: int, share_order: bool) -> int:
        return compile_trials(few, 2, trials_per_device, share_order).capacity

    monkeypatch.setattr(program, "MAX_IMAGES", 4 * 2 * 16)
    assert (capacity(1, False), capacity(2, False), capacity(2, True)) == (4, 2, 7)
    monkeypatch.setattr(program, "MAX_STEPS", 12)
    assert capacity(2, True) == 3, "vectorised trials do a quarter of the steps"


@pytest.mark.slow
def test_memory_grows_with_the_trials(few):
    two, eight = (compile_trials(few, 1, count, True).bytes for count in (2, 8))
    state = sum(leaf.nbytes for leaf in jax.tree.leaves(program.initial_state(TRIALS, few, parallel.make_mesh(1))))
    assert eight - two >= 6 * state


# --- Settings of XLA ------------------------------------------------------------------------------------------------

PRINT_CACHE = """
import jax
from flaxmnist.devices import program
jax.default_backend = lambda: {backend!r}
program.use_compilation_cache()
print(jax.config.jax_compilation_cache_dir)
"""


@pytest.mark.parametrize(
    ("backend", "environment", "folder"),
    [
        ("cpu", {}, "None"),
        ("gpu", {"HOME": "/home/someone"}, "/home/someone/.cache/flaxmnist"),
        ("gpu", {"JAX_COMPILATION_CACHE_DIR": "/elsewhere"}, "/elsewhere"),
    ],
)
def test_only_accelerators_have_a_compilation_cache(backend, environment, folder, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code = PRINT_CACHE.format(backend=backend)
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == folder


@pytest.mark.parametrize("flags", [None, "--xla_force_host_platform_device_count=2"])
def test_deterministic_programs_keep_other_flags(flags, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    if flags:
        monkeypatch.setenv("XLA_FLAGS", flags)
    program.make_deterministic()
    assert os.environ["XLA_FLAGS"].split() == [*(flags or "").split(), "--xla_gpu_deterministic_ops=true"]
