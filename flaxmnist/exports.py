"""A trained model in formats that others read: its weights as safetensors, the whole of it as StableHLO.

StableHLO is what ``jax.export`` writes: a program with the weights in it, for any number of images, on CPU, CUDA and
TPU. JAX promises that its versions of the next six months read it too; older ones may not.
"""

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, UInt8

from flaxmnist import evaluation, fields, folders, models
from flaxmnist.config import Config
from flaxmnist.errors import UserError
from flaxmnist.logs import write_file, write_json
from flaxmnist.trained import Trained, data_of, split_of

SUFFIXES = (".safetensors", ".stablehlo")
PLATFORMS = ("cpu", "cuda", "tpu")

# Ten lines of code that need nothing of ours.
LOADER = '''"""python load.py IMAGES.npy (uint8 [n, {height}, {width}, 1], ink light on 0), with jax and flatbuffers."""
import sys
from pathlib import Path

import jax.export
import numpy as np

program = jax.export.deserialize(bytearray(Path(__file__).with_name("model.stablehlo").read_bytes()))
logits = jax.jit(program.call)  # images -> [n, {classes}], float32
images = np.load(sys.argv[1])
for start in range(0, len(images), 250):  # all of them at once might take gigabytes
    print(*np.asarray(logits(images[start : start + 250])).argmax(axis=1), sep="\\n")
'''


def write(trained: Trained, folder: Path) -> list[Path]:
    """Writes model.safetensors, model.stablehlo, load.py and model.json to ``folder``, in place of earlier ones.

    The weights are those to evaluate with. model.json holds config, data, step, JAX's version, and the SHA-256 of the
    first two. Raises UserError where the extra is not installed, or ``folder`` cannot be written to.
    """
    check_extra("launch/export.py")
    from safetensors.numpy import save

    about = {"config": fields.to_json(trained.config), "data": trained.data, "step": int(trained.state.step)}
    weights = fields.flatten(jax.device_get(trained.state.weights))
    contents = {
        ".safetensors": save(weights, {"flaxmnist": json.dumps(about)}),
        ".stablehlo": stablehlo(trained.model, trained.data["shape"]),
    }
    (height, width), classes = trained.data["shape"], trained.data["classes"]
    loader = LOADER.format(height=height, width=width, classes=classes)
    paths = [folder / f"model{suffix}" for suffix in SUFFIXES]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "load.py").exists() and not (folder / "model.json").exists():
            raise UserError(f"{folder} has a load.py of its own: give another --out")
        for path in paths:
            write_file(path, contents[path.suffix])
        write_file(folder / "load.py", loader.encode())
        digests = {suffix: sha256(content) for suffix, content in contents.items()}
        write_json(folder / "model.json", about | {"jax": jax.__version__, "sha256": digests})
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}; give another --out") from None
    return [*paths, folder / "load.py", folder / "model.json"]


def stablehlo(model: nnx.Module, shape: tuple[int, int] | list[int]) -> bytes:
    """The function from images, uint8 [n, *shape, 1], to logits, float32 [n, classes], for any n from 1 on."""
    from jax import export

    def logits(images):
        return model(images)  # pyright: ignore[reportCallIssue]

    (count,) = export.symbolic_shape("n")
    images = jax.ShapeDtypeStruct((count, *shape, 1), np.uint8)
    name = "jax_traceback_in_locations_limit"
    before = jax.config.values[name]
    # Else the file would tell where the code lies on this machine, and be another one each time.
    jax.config.update(name, 0)
    try:
        return bytes(export.export(jax.jit(logits), platforms=PLATFORMS)(images).serialize())
    finally:
        jax.config.update(name, before)


def evaluate(file: Path, split: str = "test", data_dir: str | Path | None = None) -> evaluation.Evaluation:
    """How the model in ``file``, one of SUFFIXES, does on a split of the data it was trained on.

    Needs the model.json that was written beside it. Weights give what their run folder gives, to the bit; the logits of
    StableHLO agree to 1e-5 of the largest. Raises UserError where a file is missing or damaged, where the extra is not
    installed, and where ``data_dir`` holds other data.
    """
    check_extra(f"reading {file}")
    content, about = read(file)
    config: Config = fields.from_json(about["config"], Config)
    images, labels = split_of(file, data_of(file, config, about["data"], data_dir), split)
    if file.suffix == ".stablehlo":
        return evaluation.score(predict_logits(file, content, about, images), labels)
    return evaluation.evaluate(load_model(file, content, config, about["data"]), images, labels)


def read(file: Path) -> tuple[bytes, dict[str, Any]]:
    """What ``file`` holds, and what the model.json beside it says. Raises UserError where either is not whole."""
    beside = file.with_suffix(".json")
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from None
    if not beside.exists():
        raise UserError(f"{file} has no {beside.name} beside it, which launch/export.py wrote too: put it there")
    about = folders.read_json(beside)
    folders.check_described(beside, about)
    with folders.as_saved(beside.parent):
        written = about["sha256"][file.suffix]
    if sha256(content) != written:
        raise UserError(f"{file} is not what {beside} was written for: one of them is damaged or another's")
    return content, about


def load_model(file: Path, content: bytes, config: Config, data: dict[str, Any]) -> nnx.Module:
    """The model of ``config`` with the weights of a safetensors file. Raises UserError where they do not fit it."""
    from safetensors.numpy import load

    try:
        weights = load(content)
    except Exception as error:  # whatever the file has it raise
        raise UserError(f"{file} holds no weights: {one_line(error)}") from None
    try:
        return models.with_weights(config.model, tuple(data["shape"]), data["classes"], weights)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def predict_logits(
    file: Path, content: bytes, about: dict[str, Any], images: UInt8[np.ndarray, "n h w 1"]
) -> Float[np.ndarray, "n classes"]:
    """The logits of each image by the program of a StableHLO file. Raises UserError where it is none for them."""
    from jax import export

    # As many at a time as elsewhere: 10,000 at once take a large CNN 2 GB, and twice as long.
    starts = range(0, len(images), evaluation.FORWARD_BATCH)
    try:
        call = jax.jit(export.deserialize(bytearray(content)).call)
        answers = [np.asarray(call(images[start : start + evaluation.FORWARD_BATCH])) for start in starts]
    except Exception as error:  # whatever the file has it raise
        versions = f"written with JAX {about.get('jax')}, cannot be run with JAX {jax.__version__}"
        raise UserError(f"{file}, {versions}: {one_line(error)}") from None
    logits, classes = np.concatenate(answers), about["data"]["classes"]
    if (logits.shape, logits.dtype) != ((len(images), classes), np.float32):
        raise UserError(f"{file} does not give {classes} logits an image, but {logits.dtype} {list(logits.shape)}")
    return logits


def check_extra(what: str) -> None:
    """Raises UserError where the packages that ``what`` needs are not installed."""
    if any(importlib.util.find_spec(name) is None for name in ("flatbuffers", "safetensors")):
        raise UserError(f"{what} needs the extra export: pip install -c constraints.txt -e '.[export]'")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
