"""A run in formats that others read says what its folder says, or nothing."""

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
from conftest import MODELS, ROOT, assert_same, main, small
from jax import export
from safetensors.numpy import load_file, save

import flaxmnist as fm
from flaxmnist import evaluation, exports, fields, trained
from flaxmnist.config import CNN
from flaxmnist.errors import UserError

# Of the largest logit: what another order of sums may make of float32.
TOLERANCE = 1e-5


def make(config, data, folder: Path) -> Path:
    """A run in ``folder``, exported there; returns where to."""
    fm.fit(config, data, folder, devices=1)
    exports.write(trained.load(folder), folder / "export")
    return folder / "export"


@pytest.fixture(scope="module")
def one(few, tmp_path_factory) -> Path:
    """The export of an MLP with averaged weights."""
    return make(small("mlp", steps=4, ema_decay=0.9), few, tmp_path_factory.mktemp("mlp"))


@pytest.fixture(scope="module", params=MODELS)
def each(request, few, tmp_path_factory) -> Path:
    """The export of a run of each model."""
    if request.param == "mlp":
        return request.getfixturevalue("one")
    return make(small(request.param, steps=4), few, tmp_path_factory.mktemp(request.param))


def assert_close(logits, wanted) -> None:
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=TOLERANCE * np.abs(wanted).max())


def test_both_files_are_evaluated_as_the_run_folder_is(each):
    folder = trained.evaluate_run(each.parent)
    weights, program = (exports.evaluate(each / f"model{suffix}") for suffix in exports.SUFFIXES)
    assert folder.count == weights.count == program.count == 360
    assert (weights.loss, weights.accuracy) == (folder.loss, folder.accuracy)
    assert program.accuracy == folder.accuracy
    assert program.loss == pytest.approx(folder.loss, rel=TOLERANCE)
    np.testing.assert_array_equal(weights.confusion, folder.confusion)
    np.testing.assert_array_equal(program.confusion, folder.confusion)


def test_the_program_takes_any_number_of_images_on_any_platform(each, digits):
    program = export.deserialize(bytearray((each / "model.stablehlo").read_bytes()))
    assert program.platforms == ("cpu", "cuda", "tpu")
    logits = evaluation.predict_logits(trained.load(each.parent).model, digits.test.images)
    for count in (1, 7, 250):
        assert_close(program.call(digits.test.images[:count]), logits[:count])


@pytest.mark.slow
def test_every_kind_of_cnn_is_written(few, digits, tmp_path):
    model = CNN(features=(4, 8), kernel=(3, 2), dense=16, space_to_depth=3, padding="VALID", dropout=0.5)
    folder = make(small(model, steps=4), few, tmp_path)
    program = export.deserialize(bytearray((folder / "model.stablehlo").read_bytes()))
    logits = evaluation.predict_logits(trained.load(tmp_path).model, digits.test.images)
    assert_close(program.call(digits.test.images), logits)


LOAD = """
import runpy, sys
for name in ("flaxmnist", "flax", "optax", "orbax", "jaxtyping", "safetensors"):
    sys.modules[name] = None  # as if it were not installed
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_loader_needs_nothing_of_ours(one, digits, tmp_path):
    np.save(tmp_path / "images.npy", digits.test.images)
    assert len([line for line in (one / "load.py").read_text().splitlines() if line]) == 10
    command = [sys.executable, "-W", "error", "-c", LOAD, one / "load.py", tmp_path / "images.npy"]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    said = subprocess.run(command, capture_output=True, text=True, env=environment, check=True, cwd=tmp_path).stdout
    classes, _ = fm.predict(trained.load(one.parent).model, digits.test.images)
    assert said.split() == [str(answer) for answer in classes]


def test_weights_have_dotted_names_and_are_the_averaged_ones(one):
    state, weights = trained.load(one.parent).state, load_file(one / "model.safetensors")
    assert set(weights) == {"layers.0.kernel", "layers.0.bias", "layers.1.kernel", "layers.1.bias"}
    assert_same(weights, fields.flatten(jax.device_get(state.ema)))
    assert not np.array_equal(weights["layers.0.kernel"], state.params["layers"][0]["kernel"])


def test_the_same_checkpoint_gives_the_same_bytes_which_tell_nothing_of_this_machine(one, tmp_path):
    limit = jax.config.values["jax_traceback_in_locations_limit"]
    for path in exports.write(trained.load(one.parent), tmp_path):
        assert path.read_bytes() == (one / path.name).read_bytes()
        assert str(ROOT).encode() not in path.read_bytes()
        assert b"site-packages" not in path.read_bytes()
    assert jax.config.values["jax_traceback_in_locations_limit"] == limit


# --- Damage ---------------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    """Changes one bit, in the middle of what are weights."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def rewrite(path: Path, content: bytes) -> None:
    """Puts ``content`` in place of what was exported, with its SHA-256."""
    path.write_bytes(content)
    beside = path.with_suffix(".json")
    about = json.loads(beside.read_text())
    about["sha256"][path.suffix] = hashlib.sha256(content).hexdigest()
    beside.write_text(json.dumps(about))


def retell(path: Path, name: str, value) -> None:
    """Has model.json say otherwise."""
    about = json.loads(path.with_suffix(".json").read_text())
    *parts, last = name.split(".")
    place = about
    for part in parts:
        place = place[part]
    place[last] = value
    path.with_suffix(".json").write_text(json.dumps(about))


def three_classes() -> bytes:
    """A program for the same images whose answers are others'."""
    images = jax.ShapeDtypeStruct((*export.symbolic_shape("n"), 28, 28, 1), np.uint8)
    return bytes(export.export(jax.jit(lambda images: images[:, :3, 0, 0] / 255.0))(images).serialize())


DAMAGE = {
    "missing": (Path.unlink, "cannot be read: No such file"),
    "truncated": (truncate, "is not what .*model.json was written for"),
    "a bit flipped": (flip, "is not what .*model.json was written for"),
    "empty": (lambda path: path.write_bytes(b""), "is not what .*model.json was written for"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "cannot be read: Is a directory"),
    "alone": (lambda path: path.with_suffix(".json").unlink(), "has no model.json beside it"),
    "model.json truncated": (lambda path: truncate(path.with_suffix(".json")), "model.json cannot be read"),
    "model.json not ours": (lambda path: path.with_suffix(".json").write_text("{}"), "does not hold what was saved"),
    "no digests": (lambda path: retell(path, "sha256", {}), "does not hold what was saved"),
    "another config": (lambda path: retell(path, "config.model", {}), "model.json: model.kind must be one of"),
    "other data": (lambda path: retell(path, "data.source", "elsewhere"), "was trained on elsewhere"),
    "no data": (lambda path: retell(path, "data.shape", [28, 0]), "does not say what the data are"),
    "rubbish": (
        lambda path: rewrite(path, b"rubbish" * 99),
        "(holds no weights: |written with JAX .*, cannot be run with JAX )",
    ),
}
WEIGHTS = {
    "a wider model": (lambda path: retell(path, "config.model.hidden", [33]), "but their model has float32"),
    "a deeper model": (
        lambda path: retell(path, "config.model.hidden", [32, 32]),
        "the weights have no 'layers.2.bias'",
    ),
    "others": (lambda path: rewrite(path, save({"a": np.zeros(3)})), "the weights have unknown 'a'"),
}
PROGRAM = {
    "of other answers": (lambda path: rewrite(path, three_classes()), "does not give 10 logits an image, but float32"),
    "of other classes": (lambda path: retell(path, "data.classes", 9), "was trained on"),
}


def check_refused(file: Path, export_folder: Path, damage, message: str) -> None:
    shutil.copytree(export_folder, file.parent)
    damage(file)
    with pytest.raises(UserError, match=message) as refused:
        exports.evaluate(file)
    assert len(str(refused.value).splitlines()) == 1
    assert str(file.parent) in str(refused.value)


@pytest.mark.parametrize("suffix", exports.SUFFIXES)
@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_damaged_is_refused(name, suffix, one, tmp_path):
    check_refused(tmp_path / f"export/model{suffix}", one, *DAMAGE[name])


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_of_another_model_are_refused(name, one, tmp_path):
    check_refused(tmp_path / "export/model.safetensors", one, *WEIGHTS[name])


@pytest.mark.parametrize("name", PROGRAM)
def test_another_program_is_refused(name, one, tmp_path):
    check_refused(tmp_path / "export/model.stablehlo", one, *PROGRAM[name])


# --- The commands ---------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_wrote_and_what_to_try_next(one, tmp_path, capsys):
    assert main("export")([str(one.parent), "--out", str(tmp_path / "a/b")]) == 0
    told = capsys.readouterr().out.splitlines()
    files = [tmp_path / "a/b" / name for name in ("model.safetensors", "model.stablehlo", "load.py", "model.json")]
    assert told[:4] == [f"{file}  {file.stat().st_size:,} bytes" for file in files]
    words = told[4].removeprefix("next: python launch/evaluate.py ").split()
    assert main("evaluate")(words) == 0
    assert main("evaluate")([str(one.parent)]) == 0
    reports = capsys.readouterr().out
    assert reports[: len(reports) // 2] == reports[len(reports) // 2 :]


def test_files_keep_their_meaning_under_another_name(one, tmp_path):
    for suffix in (*exports.SUFFIXES, ".json"):
        shutil.copy(one / f"model{suffix}", tmp_path / f"mine{suffix}")
    for suffix in exports.SUFFIXES:
        content, about = exports.read(tmp_path / f"mine{suffix}")
        assert content == (one / f"model{suffix}").read_bytes()
        assert about["step"] == 4
    assert exports.evaluate(tmp_path / "mine.safetensors", "validation").count == 180


@pytest.mark.parametrize("package", ["flatbuffers", "safetensors"])
def test_without_the_extra_it_says_how_to_get_it(package, one, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    for command, first in (("export", one.parent), ("evaluate", one / "model.stablehlo")):
        assert main(command)([str(first)]) == 2
        told = capsys.readouterr().err
        assert "needs the extra export: pip install -c constraints.txt -e '.[export]'" in told
        assert len(told.splitlines()) == 1


def test_a_place_that_cannot_be_written_to_is_named(one, capsys):
    assert main("export")([str(one.parent), "--out", str(one / "load.py/within")]) == 2
    told = capsys.readouterr().err
    assert f"cannot write to {one / 'load.py/within'}: Not a directory; give another --out" in told
