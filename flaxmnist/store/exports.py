"""Export of a trained model for use without flaxmnist: its weights as safetensors, all of it as StableHLO and as ONNX.

The StableHLO file is written by ``jax.export``: a program that contains the weights and takes any number of images, on
CPU, CUDA and TPU. JAX guarantees that versions of the next six months can read it; older versions may not.
"""

import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, UInt8

from flaxmnist import fields
from flaxmnist.config import Config, Data
from flaxmnist.console import logger
from flaxmnist.core import models
from flaxmnist.core.convolution import set_form
from flaxmnist.core.layers import normalise
from flaxmnist.devices import evaluation
from flaxmnist.errors import UserError, check_local, one_line
from flaxmnist.store.files import read_json, write_file, write_json
from flaxmnist.store.load import Trained, classes_of, get_split, load_training_data
from flaxmnist.store.onnx_model import onnx_model
from flaxmnist.store.provenance import DataInfo

Content = TypeVar("Content")

# The extra that a format needs, and its packages.
EXTRAS = {
    ".safetensors": ("export", ("flatbuffers", "safetensors")),
    ".stablehlo": ("export", ("flatbuffers", "safetensors")),
    ".onnx": ("onnx", ("onnx", "onnxruntime")),
}
PLATFORMS = ("cpu", "cuda", "tpu")

# A script of ten lines that does not need flaxmnist.
LOADER = '''"""python load.py IMAGES.npy (uint8 {shape}, white on black), with jax and flatbuffers."""
import sys
from pathlib import Path

import jax.export
import numpy as np

program = jax.export.deserialize(bytearray(Path(__file__).with_name("model.stablehlo").read_bytes()))
logits = jax.jit(program.call)  # images -> [n, {classes}], float32
images = np.load(sys.argv[1])
for start in range(0, len(images), 250):  # all at once might take gigabytes of memory
    print(*np.asarray(logits(images[start : start + 250])).argmax(axis=1), sep="\\n")
'''


@dataclass(frozen=True, kw_only=True)
class ExportInfo:
    """The content of model.json, next to the exported models."""

    config: dict[str, Any]  # a Config as JSON, so that reading needs none of the user's classes
    data: DataInfo
    step: int
    jax: str  # version
    sha256: dict[str, str]  # of the models, by suffix


def write(trained: Trained, folder: Path) -> list[Path]:
    """Write model.safetensors, .stablehlo, .onnx, .json and load.py to ``folder``, replacing an earlier export.

    The weights are the averaged ones if the run has them. model.json holds config, data, step, the JAX version, and the
    SHA-256 of the models. A format that cannot express the model, or whose extra is not installed, is left out with a
    warning. Raise UserError if ``folder`` cannot be written to.
    """
    check_local(folder)
    contents = {}
    for name, make in FORMATS.items():
        try:
            check_extra(name, Path(name).suffix)
            contents[name] = make(trained)
        except UserError as error:
            logger.warning("no %s: %s", name, error)
    digests = {Path(name).suffix: sha256(content) for name, content in contents.items()}
    if "model.stablehlo" in contents:
        shape = ", ".join(map(str, ("n", *trained.data.shape)))
        contents["load.py"] = LOADER.format(shape=f"[{shape}]", classes=trained.data.classes).encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "load.py").exists() and not (folder / "model.json").exists():
            raise UserError(f"{folder} has a load.py that is not part of an export: pass another --out")
        for name, content in contents.items():
            write_file(folder / name, content)
        for name in {*FORMATS, "load.py"} - {*contents}:
            (folder / name).unlink(missing_ok=True)
        if not contents:
            (folder / "model.json").unlink(missing_ok=True)
            return []
        config, step = fields.to_json(trained.config), int(trained.state.step)
        info = ExportInfo(config=config, data=trained.data, step=step, jax=jax.__version__, sha256=digests)
        write_json(folder / "model.json", info)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}; pass another --out") from None
    return [folder / name for name in (*contents, "model.json")]


def safetensors(trained: Trained) -> bytes:
    """Return the weights and the batch statistics by dotted name, with the config, data and step as metadata."""
    from safetensors.numpy import save

    source = {"config": trained.config, "data": trained.data, "step": int(trained.state.step)}
    state = jax.device_get(trained.state)
    weights = fields.flatten(state.weights) | fields.flatten(state.evaluation_buffers)
    return save(weights, {"flaxmnist": json.dumps(fields.to_json(source))})


def stablehlo(model: nnx.Module, shape: tuple[int, ...]) -> bytes:
    """Return the program that maps images, uint8 [n, *shape], to logits, float32 [n, classes], for any n ≥ 1."""
    from jax import export

    # Winograd's form is for CPU only, and many more operations for readers of the file.
    set_form(model, "direct")

    def logits(images):
        return model(normalise(images))  # pyright: ignore[reportCallIssue]

    (count,) = export.symbolic_shape("n")
    images = jax.ShapeDtypeStruct((count, *shape), np.uint8)
    name = "jax_traceback_in_locations_limit"
    before = jax.config.values[name]
    # Tracebacks would put local paths into the file, and make each export of a run different.
    jax.config.update(name, 0)
    try:
        return bytes(export.export(jax.jit(logits), platforms=PLATFORMS)(images).serialize())
    except Exception as error:  # a model of the user's can raise anything
        remedy = "the number of images is symbolic, so use images.shape[0] and not len(images)"
        raise UserError(f"the model cannot be traced ({one_line(error)[:200]}): {remedy}") from error
    finally:
        jax.config.update(name, before)


FORMATS: dict[str, Callable[[Trained], bytes]] = {
    "model.safetensors": safetensors,
    "model.stablehlo": lambda trained: stablehlo(trained.model, trained.data.shape),
    "model.onnx": lambda trained: onnx_model(trained.model, trained.data.shape, trained.data.classes),
}


def evaluate(
    file: Path,
    split: str = "test",
    data_dir: str | Path | None = None,
    config: Config | None = None,
    shifts: int = 0,
) -> evaluation.Evaluation:
    """Evaluate the model in ``file``, an exported one, on a split of the data it was trained on.

    Needs the model.json of the same export. Results from safetensors are bitwise identical to those of the run folder;
    logits from StableHLO and ONNX agree to 1e-5 of the largest. Weights of a model of your own need a ``config`` with
    its class. For ``shifts`` see ``evaluation.predict``. Raise UserError if a file is missing or damaged, if the extra
    is not installed, or if ``data_dir`` holds other data.
    """
    check_extra(f"reading {file}", file.suffix)
    content, info = read_export(file)
    data_config = read_config(file, info.config.get("data"), Data)
    data = load_training_data(file, data_config, info.data, data_dir)
    images, labels = get_split(file, data, split)
    if file.suffix != ".safetensors":
        logits = evaluation.over_shifts(partial(predict_logits, file, content, info), images, shifts)
        return evaluation.score_logits(logits, images, labels, data.class_names)
    return evaluation.evaluate(load_model(file, content, info, config), images, labels, data.class_names, shifts)


def read_export(file: Path) -> tuple[bytes, ExportInfo]:
    """Return the content of ``file`` and of its model.json. Raise UserError if either is missing or damaged."""
    info_file = file.with_suffix(".json")
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from None
    if not info_file.exists():
        raise UserError(f"{file} has no {info_file.name} next to it: copy the model.json of the export there")
    info = read_json(info_file, ExportInfo)
    if sha256(content) != info.sha256.get(file.suffix):
        raise UserError(f"{file} does not match its SHA-256 in {info_file}: export the run again")
    return content, info


def read_config(file: Path, values: Any, kind: type[Content], classes: Iterable[type] = ()) -> Content:
    """Return a part of the config of an exported model. Raise UserError if it is damaged, or a class is missing."""
    try:
        return fields.from_json(values, kind, classes)
    except fields.UnknownClass as error:
        raise UserError(f"{file}: {error}") from None
    except UserError as error:
        raise UserError(f"{file.with_suffix('.json')} is damaged: {error}") from None


def load_model(file: Path, content: bytes, info: ExportInfo, config: Config | None) -> nnx.Module:
    """Return the model of a run with the weights of a safetensors file. Raise UserError if they do not fit."""
    from safetensors.numpy import load

    try:
        weights = load(content)
    except Exception as error:  # safetensors raises several types
        raise UserError(f"{file} is not a safetensors file: {one_line(error)}") from None
    trained = read_config(file, info.config, Config, classes_of(config))
    try:
        return models.with_weights(trained, info.data.shape, info.data.classes, weights)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def predict_logits(
    file: Path, content: bytes, info: ExportInfo, images: UInt8[np.ndarray, "n h w c"]
) -> Float[np.ndarray, "n classes"]:
    """Run the program of a StableHLO or ONNX file on each image. Raise UserError unless it returns logits."""
    # The usual batches: 10,000 images at once take a large CNN 2 GB, and twice as long.
    starts = range(0, len(images), evaluation.FORWARD_BATCH)
    try:
        call = load_program(file, content)
        batches = [call(images[start : start + evaluation.FORWARD_BATCH]) for start in starts]
    except Exception as error:  # a damaged program can raise anything
        versions = f"written with JAX {info.jax}, cannot be run with JAX {jax.__version__}"
        raise UserError(f"{file}, {versions}: {one_line(error)}") from None
    logits, classes = np.concatenate(batches), info.data.classes
    if (logits.shape, logits.dtype) != ((len(images), classes), np.float32):
        found = f"{logits.dtype} {list(logits.shape)}"
        raise UserError(f"{file} must return {classes} float32 logits per image, not {found}")
    return logits


def load_program(file: Path, content: bytes) -> Callable[[UInt8[np.ndarray, "n h w c"]], np.ndarray]:
    """Return the program in a file as a function of images. Damaged content can raise anything."""
    if file.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(content)
        return lambda images: np.asarray(session.run(None, {"images": images})[0])
    from jax import export

    program = jax.jit(export.deserialize(bytearray(content)).call)
    return lambda images: np.asarray(program(images))


def check_extra(action: str, suffix: str) -> None:
    """Raise UserError if the packages that ``action`` on a format needs are not installed."""
    extra, packages = EXTRAS[suffix]
    if any(importlib.util.find_spec(name) is None for name in packages):
        raise UserError(f"{action} needs the extra {extra}: pip install -c constraints.txt -e '.[{extra}]'")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
