"""Exports of a run give the results of the run folder; damaged ones are rejected."""

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import ROOT, assert_same, main, slow, small
from jax import export
from safetensors.numpy import load_file, save

import flaxmnist as fm
from flaxmnist import fields
from flaxmnist.commands import command
from flaxmnist.config import CNNConfig
from flaxmnist.devices import evaluation
from flaxmnist.errors import UserError
from flaxmnist.store import exports
from flaxmnist.store.load import evaluate_run, load_checkpoint

# Rounding differences from another order of float32 sums, relative to the largest logit.
TOLERANCE = 1e-5


NAMES = ("model.safetensors", "model.stablehlo", "model.onnx", "load.py", "model.json", "draw.html")


def train_and_export(config, data, folder: Path) -> Path:
    """Train and export a run in ``folder``; return the folder of the export."""
    fm.fit(config, data, folder, devices=1)
    exports.write(load_checkpoint(folder), folder / "export")
    return folder / "export"


@pytest.fixture(scope="module")
def mlp_export(few, tmp_path_factory) -> Path:
    """The export of an MLP with averaged weights."""
    return train_and_export(small("mlp", steps=4, ema_decay=0.9), few, tmp_path_factory.mktemp("mlp"))


@pytest.fixture(scope="module", params=["mlp", "cnn", slow("softmax")])
def export_folder(request, few, tmp_path_factory) -> Path:
    """The export of a run, for each model."""
    if request.param == "mlp":
        return request.getfixturevalue("mlp_export")
    return train_and_export(small(request.param, steps=4), few, tmp_path_factory.mktemp(request.param))


def assert_close(logits, expected) -> None:
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


def test_all_files_give_the_results_of_the_run_folder(export_folder):
    run = evaluate_run(export_folder.parent)
    for suffix in exports.EXTRAS:
        exported = exports.evaluate(export_folder / f"model{suffix}")
        assert (exported.count, exported.accuracy) == (run.count, run.accuracy)
        assert exported.loss == (run.loss if suffix == ".safetensors" else pytest.approx(run.loss, rel=TOLERANCE))
        np.testing.assert_array_equal(exported.confusion, run.confusion)


def test_all_files_predict_over_shifts(mlp_export):
    run = evaluate_run(mlp_export.parent, shifts=1)
    for suffix in exports.EXTRAS:
        assert exports.evaluate(mlp_export / f"model{suffix}", shifts=1).loss == pytest.approx(run.loss, rel=TOLERANCE)


def test_the_program_takes_any_number_of_images_on_any_platform(export_folder, digits):
    program = export.deserialize(bytearray((export_folder / "model.stablehlo").read_bytes()))
    assert program.platforms == ("cpu", "cuda", "tpu")
    logits = evaluation.predict_logits(load_checkpoint(export_folder.parent).model, digits.test.images)
    for count in (1, 7, 250):
        assert_close(program.call(digits.test.images[:count]), logits[:count])


@pytest.mark.slow
def test_any_cnn_can_be_exported(few, digits, tmp_path):
    model = CNNConfig(features=(4, 8), kernel=(3, 2), dense=16, space_to_depth=3, padding="VALID", dropout=0.5)
    folder = train_and_export(small(model, steps=4), few, tmp_path)
    program = export.deserialize(bytearray((folder / "model.stablehlo").read_bytes()))
    logits = evaluation.predict_logits(load_checkpoint(tmp_path).model, digits.test.images)
    assert_close(program.call(digits.test.images), logits)


LOAD = """
import runpy, sys
for name in ("flaxmnist", "flax", "optax", "orbax", "jaxtyping", "safetensors"):
    sys.modules[name] = None  # behave as if not installed
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_loader_does_not_need_flaxmnist(mlp_export, digits, tmp_path):
    np.save(tmp_path / "images.npy", digits.test.images)
    assert len([line for line in (mlp_export / "load.py").read_text().splitlines() if line]) == 10
    command = [sys.executable, "-W", "error", "-c", LOAD, mlp_export / "load.py", tmp_path / "images.npy"]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=True, cwd=tmp_path)
    classes, _ = fm.predict(load_checkpoint(mlp_export.parent).model, digits.test.images)
    assert ended.stdout.split() == [str(number) for number in classes]


def test_exported_weights_are_the_averaged_ones_by_dotted_name(mlp_export):
    state, weights = load_checkpoint(mlp_export.parent).state, load_file(mlp_export / "model.safetensors")
    assert set(weights) == {"layers.0.kernel", "layers.0.bias", "layers.1.kernel", "layers.1.bias"}
    assert_same(weights, fields.flatten(jax.device_get(state.ema)))
    assert not np.array_equal(weights["layers.0.kernel"], state.params["layers"][0]["kernel"])


def test_exports_are_reproducible_and_contain_no_local_paths(mlp_export, tmp_path):
    limit = jax.config.values["jax_traceback_in_locations_limit"]
    for path in exports.write(load_checkpoint(mlp_export.parent), tmp_path):
        assert path.read_bytes() == (mlp_export / path.name).read_bytes()
        assert str(ROOT).encode() not in path.read_bytes()
        assert b"site-packages" not in path.read_bytes()
    assert jax.config.values["jax_traceback_in_locations_limit"] == limit


# --- Damage ---------------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    """Flip one bit in the middle of the weights."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def rewrite(path: Path, content: bytes) -> None:
    """Replace the content of a file, and its SHA-256."""
    path.write_bytes(content)
    change_metadata(path, f"sha256/{path.suffix}", hashlib.sha256(content).hexdigest())


def change_metadata(path: Path, keys: str, value) -> None:
    """Change one value in model.json, such as "data/shape"."""
    metadata = json.loads(path.with_suffix(".json").read_text())
    *parents, last = keys.split("/")
    functools.reduce(dict.__getitem__, parents, metadata)[last] = value
    path.with_suffix(".json").write_text(json.dumps(metadata))


def three_classes() -> bytes:
    """Return a program that takes the same images, but returns three logits."""
    images = jax.ShapeDtypeStruct((*export.symbolic_shape("n"), 28, 28, 1), np.uint8)
    return bytes(export.export(jax.jit(lambda images: images[:, :3, 0, 0] / 255.0))(images).serialize())


DAMAGE = {
    "missing": (Path.unlink, "cannot be read: No such file"),
    "truncated": (truncate, "does not match its SHA-256 in .*model.json"),
    "a flipped bit": (flip, "does not match its SHA-256 in .*model.json"),
    "empty": (lambda path: path.write_bytes(b""), "does not match its SHA-256 in .*model.json"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "cannot be read: Is a directory"),
    "no model.json": (lambda path: path.with_suffix(".json").unlink(), "has no model.json next to it"),
    "model.json truncated": (lambda path: truncate(path.with_suffix(".json")), "model.json cannot be read"),
    "another model.json": (
        lambda path: path.with_suffix(".json").write_text("{}"),
        "is damaged: the JSON has no",
    ),
    "no digests": (lambda path: change_metadata(path, "sha256", {}), "does not match its SHA-256"),
    "another config": (
        lambda path: change_metadata(path, "config/data", 3),
        "is damaged: the JSON must be an object, but is 3",
    ),
    "other data": (lambda path: change_metadata(path, "data/source", "elsewhere"), "was trained on elsewhere"),
    "no data": (lambda path: change_metadata(path, "data/shape", [28, 0]), r"is damaged: data.shape.* must lie in"),
    "a fourth side": (lambda path: change_metadata(path, "data/shape", [28, 28, 1, 1]), "is damaged"),
    "rubbish": (
        lambda path: rewrite(path, b"rubbish" * 99),
        "(is not a safetensors file: |written with JAX .*, cannot be run with JAX )",
    ),
}
WEIGHTS = {
    "a wider model": (lambda path: change_metadata(path, "config/model/hidden", [33]), "but the model needs float32"),
    "a deeper model": (
        lambda path: change_metadata(path, "config/model/hidden", [32, 32]),
        "the weights have no 'layers.2.bias'",
    ),
    "other weights": (lambda path: rewrite(path, save({"a": np.zeros(3)})), "the weights have unknown 'a'"),
}
PROGRAM = {
    "other logits": (
        lambda path: rewrite(path, three_classes()),
        r"must return 10 float32 logits per image, not float32 \[360, 3\]",
    ),
    "other classes": (lambda path: change_metadata(path, "data/classes", 9), "must have 9 names, but has 10"),
}


def check_rejected(file: Path, source: Path, damage, message: str) -> None:
    shutil.copytree(source, file.parent)
    damage(file)
    with pytest.raises(UserError, match=message) as raised:
        exports.evaluate(file)
    assert len(str(raised.value).splitlines()) == 1
    assert str(file.parent) in str(raised.value)


@pytest.mark.parametrize("suffix", exports.EXTRAS)
@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_exports_are_rejected(name, suffix, mlp_export, tmp_path):
    check_rejected(tmp_path / f"export/model{suffix}", mlp_export, *DAMAGE[name])


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_of_another_model_are_rejected(name, mlp_export, tmp_path):
    check_rejected(tmp_path / "export/model.safetensors", mlp_export, *WEIGHTS[name])


@pytest.mark.parametrize("name", PROGRAM)
def test_another_program_is_rejected(name, mlp_export, tmp_path):
    check_rejected(tmp_path / "export/model.stablehlo", mlp_export, *PROGRAM[name])


# --- Commands -------------------------------------------------------------------------------------------------------


def test_the_command_lists_its_files_and_what_to_try_next(mlp_export, tmp_path, capsys):
    assert main("export")([str(mlp_export.parent), "--out", str(tmp_path / "a/b")]) == 0
    lines = capsys.readouterr().out.splitlines()
    files = [tmp_path / "a/b" / name for name in NAMES]
    assert lines[:6] == [f"{file}  {file.stat().st_size:,} bytes" for file in files]
    arguments = lines[6].removeprefix(f"next: {command('evaluate')} ").split()
    assert main("evaluate")(arguments) == 0
    assert main("evaluate")([str(mlp_export.parent)]) == 0
    reports = capsys.readouterr().out
    assert reports[: len(reports) // 2] == reports[len(reports) // 2 :]


def test_exports_can_be_renamed(mlp_export, tmp_path):
    for suffix in (*exports.EXTRAS, ".json"):
        shutil.copy(mlp_export / f"model{suffix}", tmp_path / f"renamed{suffix}")
    for suffix in exports.EXTRAS:
        content, info = exports.read_export(tmp_path / f"renamed{suffix}")
        assert content == (mlp_export / f"model{suffix}").read_bytes()
        assert info.step == 4
    assert exports.evaluate(tmp_path / "renamed.safetensors", "validation").count == 180


@pytest.mark.parametrize("package", ["flatbuffers", "safetensors"])
def test_a_missing_extra_is_reported_with_its_command(package, mlp_export, monkeypatch, capsys, tmp_path):
    """What needs no extra is exported, and an earlier export of the rest is removed."""
    shutil.copytree(mlp_export, tmp_path, dirs_exist_ok=True)
    monkeypatch.setitem(sys.modules, package, None)
    command = "needs the extra export: pip install -c constraints.txt -e '.[export]'"
    assert main("evaluate")([str(mlp_export / "model.stablehlo")]) == 2
    assert capsys.readouterr().err.count(command) == 1
    assert main("export")([str(mlp_export.parent), "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().err.count(command) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "model.json", "draw.html"}
    assert exports.evaluate(tmp_path / "model.onnx").count == 360


def test_without_any_extra_an_earlier_export_is_removed(mlp_export, monkeypatch, tmp_path):
    shutil.copytree(mlp_export, tmp_path, dirs_exist_ok=True)
    for package in ("flatbuffers", "safetensors", "onnx"):
        monkeypatch.setitem(sys.modules, package, None)
    assert main("export")([str(mlp_export.parent), "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"draw.html"}


def test_an_unwritable_folder_is_reported(mlp_export, capsys):
    assert main("export")([str(mlp_export.parent), "--out", str(mlp_export / "load.py/within")]) == 2
    message = capsys.readouterr().err
    assert f"cannot write to {mlp_export / 'load.py/within'}: Not a directory; pass another --out" in message
