"""Where a run comes from: config.json, with the config, code, versions, devices and data of a run."""

import functools
import hashlib
import inspect
import linecache
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated

import jax
from jax.sharding import Mesh

from flaxmnist import fields
from flaxmnist.config import Config
from flaxmnist.core.steps import Step, train_step
from flaxmnist.data.sets import Dataset
from flaxmnist.errors import UserError
from flaxmnist.fields import In

Positive = Annotated[int, In(1)]


@dataclass(frozen=True, kw_only=True)
class DataInfo:
    """A description of a data set."""

    name: str
    source: str  # its files, with their SHA-256
    classes: Positive
    shape: tuple[Positive, ...]  # of an image: height, width, channels; [28, 28] in old files means [28, 28, 1]
    train: Positive  # images
    validation: Annotated[int, In(0)]
    test: Positive
    class_names: tuple[str, ...] = ()  # () in old files: the numbers of the classes

    def __post_init__(self):
        if len(self.shape) not in (2, 3):
            raise UserError(f"data.shape must be height, width and channels, but is {list(self.shape)}")
        object.__setattr__(self, "shape", (*self.shape, 1)[:3])
        names = self.class_names or tuple(map(str, range(self.classes)))
        if len(names) != self.classes:
            raise UserError(f"data.class_names must have {self.classes} names, but has {len(names)}")
        object.__setattr__(self, "class_names", names)

    @classmethod
    def of(cls, data: Dataset) -> "DataInfo":
        sizes = {name: 0 if split is None else len(split.labels) for name, split in data.splits().items()}
        shape = data.train.images.shape[1:]
        names = data.class_names
        return cls(name=data.name, source=data.source, classes=len(names), shape=shape, class_names=names, **sizes)


@dataclass(frozen=True, kw_only=True)
class DeviceInfo:
    """The devices of a run."""

    count: int
    kind: str
    processes: int
    backend: str  # jit or pmap
    mesh: dict[str, int]  # size of each axis

    @classmethod
    def of(cls, mesh: Mesh, backend: str) -> "DeviceInfo":
        kind, processes = mesh.devices.flat[0].device_kind, jax.process_count()
        return cls(count=mesh.size, kind=kind, processes=processes, backend=backend, mesh=dict(mesh.shape))


@dataclass(frozen=True, kw_only=True)
class StepInfo:
    """A training step of the user's."""

    name: str  # "FILE.py:function", or "notebook:function" without a file
    sha256: str | None  # of its source; None if there is none, as at a Python prompt

    @classmethod
    def of(cls, step: Step) -> "StepInfo | None":
        """Return None for the built-in step."""
        if step is train_step:
            return None
        # Unlike inspect.getsource, this does not import what the modules in memory import lazily.
        code = getattr(step, "__code__", None)
        linecache.checkcache(code and code.co_filename)
        lines = linecache.getlines(code.co_filename)[code.co_firstlineno - 1 :] if code else []
        source = "".join(inspect.getblock(lines))
        return cls(name=fields.user_name(step), sha256=hashlib.sha256(source.encode()).hexdigest() if source else None)


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """The content of config.json."""

    config: Config
    experiment: str | None  # the experiment file
    command: tuple[str, ...]
    git_commit: str | None  # of this code
    versions: dict[str, str]
    devices: DeviceInfo
    data: DataInfo
    step: StepInfo | None = None  # None: the built-in one

    @classmethod
    def of(
        cls, config: Config, data: Dataset, step: Step, mesh: Mesh, backend: str, experiment: str | Path | None
    ) -> "RunInfo":
        return cls(
            config=config,
            experiment=None if experiment is None else str(experiment),
            command=tuple(sys.argv),
            git_commit=git_commit(),
            versions=versions(),
            devices=DeviceInfo.of(mesh, backend),
            data=DataInfo.of(data),
            step=StepInfo.of(step),
        )


@functools.cache
def git_commit() -> str | None:
    """Return the commit of this code, or None if it is not in a repository or git is not installed."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        process = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return process.stdout.strip()


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    packages = ("flaxmnist", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {"python": sys.version.split()[0]} | {name: metadata.version(name) for name in packages}
