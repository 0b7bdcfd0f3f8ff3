"""Fields of nested dataclasses: their types and bounds, their JSON form, their dotted names."""

import copy
import dataclasses
import functools
import inspect
import logging
import math
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from flaxmnist.errors import UserError

Content = TypeVar("Content")

logger = logging.getLogger("flaxmnist")


class UnknownClass(UserError):
    """A file names a class of the user's, whose code is needed to read it."""


@dataclass(frozen=True)
class In:
    """Bounds of a number, for the annotation of a field: ``Annotated[float, In(0, 1, "[)")]``."""

    low: float = -math.inf
    high: float = math.inf
    ends: Literal["[]", "[)", "(]", "()"] = "[]"  # which bounds are included

    def __contains__(self, value: float) -> bool:
        above = self.low < value or (value == self.low and self.ends[0] == "[")
        return above and (value < self.high or (value == self.high and self.ends[1] == "]"))

    def __str__(self) -> str:
        return f"{self.ends[0]}{self.low}, {self.high}{self.ends[1]}"

    def describe(self) -> str:
        """Return the bounds in words: "in [0, 1)", "at least 1", "above 0" or "finite". The limit of int32 is none."""
        if self.high < 2**31 - 1:
            return f"in {self}"
        if self.low == -math.inf:
            return "finite"
        return f"{'at least' if self.ends[0] == '[' else 'above'} {self.low}"


@dataclass(frozen=True)
class Kinds:
    """The built-in dataclasses of a field that also takes a user's frozen dataclass with ``method``.

    ``method`` is that of a protocol; the user's must have the same name and number of arguments.
    """

    built_in: tuple[type, ...]
    method: Callable[..., Any]
    default: bool = False  # JSON without a "kind" is of the first one, as before there were others

    def accepts(self, kind: type) -> bool:
        """Return True if ``kind`` is a frozen dataclass with the method."""
        method = getattr(kind, self.method.__name__, None)
        frozen = dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen  # pyright: ignore
        return frozen and callable(method) and count_arguments(method) == count_arguments(self.method)


@functools.cache
def count_arguments(function: Callable[..., Any]) -> int:
    return len(inspect.signature(function).parameters)


def bounds(hint: Any) -> list[In]:
    """Return the bounds in an annotation, also those in a union or of the items of a tuple."""
    return [hint] if isinstance(hint, In) else [bound for part in typing.get_args(hint) for bound in bounds(part)]


def kind_name(kind: Any) -> str:
    """Return the name of a type in JSON and in messages: "CNN" for ``CNNConfig``."""
    return kind.__name__.removesuffix("Config")


def user_name(thing: Any) -> str:
    """Return the name of a user's class or function in JSON: "FILE.py:Class" or, without a file, "notebook:Class"."""
    file = getattr(sys.modules.get(thing.__module__), "__file__", None)
    return f"{Path(file).name if file else 'notebook'}:{getattr(thing, '__qualname__', type(thing).__name__)}"


def user_classes(value: Any) -> set[type]:
    """Return the user's dataclasses in the fields of a dataclass that take them."""
    classes = set()
    for name, field in field_types(type(value)).items():
        inner = getattr(value, name)
        for item in inner if isinstance(inner, tuple) else (inner,):
            if dataclasses.is_dataclass(item):
                classes |= user_classes(item)
                if field.open and type(item) not in field.types:
                    classes.add(type(item))
    return classes


class FieldType:
    """The type of a field, from its annotation.

    An annotation is Any, a plain type, a dataclass, a Literal of strings, a tuple or a dict; one of these with bounds;
    a type with Kinds; or a union of these. It is parsed only once, because a sweep checks up to 100,000 configs.
    """

    def __init__(self, hint: Any):
        self.bounds = bounds(hint)
        self.types: list[Any] = []
        self.literals: tuple[str, ...] = ()
        self.items: FieldType | None = None  # of a tuple or dict
        self.length: int | None = None  # of a tuple; None: any
        self.open: Kinds | None = None
        names = []
        for choice in typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,):
            if typing.get_origin(choice) is Annotated:
                choice, *metadata = typing.get_args(choice)
                self.open = next((item for item in metadata if isinstance(item, Kinds)), None)
                if self.open is not None:
                    self.types += self.open.built_in
                    names += [
                        *map(kind_name, self.open.built_in),
                        f"a frozen dataclass with {self.open.method.__name__}",
                    ]
                    continue
            origin, arguments = typing.get_origin(choice), typing.get_args(choice)
            if origin is Literal:
                self.types.append(str)
                self.literals = arguments
                names += map(repr, arguments)
            elif origin is tuple:
                self.types.append(tuple)
                if len({*arguments} - {...}) > 1:
                    raise UserError(f"{choice}: the items of a tuple must have one type; use a field for each")
                self.items = FieldType(arguments[0])
                self.length = None if arguments[-1] is ... else len(arguments)
                names.append(f"a tuple of {'' if self.length is None else f'{self.length} '}{self.items.name}")
            elif origin is dict:
                self.types.append(dict)
                self.items = FieldType(arguments[1])
                names.append("an object")
            else:
                self.types += [float, int] if choice is float else [choice]
                names.append("None" if choice is type(None) else kind_name(choice))
        self.name = " or ".join(names)
        self.kinds: dict[str, Any] = {kind_name(kind): kind for kind in self.types if dataclasses.is_dataclass(kind)}

    def check(self, value: Any, path: str) -> None:
        """Raise UserError if ``value``, named ``path``, has another type or is out of bounds. An int may be a float."""
        kind = type(value)
        if self.open is not None and self.open.accepts(kind):
            return check_fields(value, path)
        if (
            (kind not in self.types and Any not in self.types)
            or (kind is str and self.literals and value not in self.literals)
            or (kind is tuple and self.length not in (None, len(value)))
        ):
            raise UserError(f"{path} must be {self.name}, but is {value!r}")
        if kind in (int, float):
            for bound in self.bounds:
                if value not in bound:
                    raise UserError(f"{path} must lie in {bound}, but is {value}")
        elif self.items and kind in (tuple, dict):
            for key, item in value.items() if kind is dict else enumerate(value):
                self.items.check(item, f"{path}[{key}]")
        elif kind in self.kinds.values():
            check_fields(value, path)


@functools.cache
def field_types(kind: type) -> dict[str, FieldType]:
    """Return the type of each field of a dataclass."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: FieldType(hints[field.name]) for field in dataclasses.fields(kind)}


def check_fields(value: Any, path: str = "") -> None:
    """Raise UserError if a field of a dataclass, or of one inside it, has another type or is out of bounds."""
    prefix = path and f"{path}."
    for name, field in field_types(type(value)).items():
        field.check(getattr(value, name), prefix + name)


# --- JSON -----------------------------------------------------------------------------------------------------------


def to_json(value: Any, field: FieldType | None = None) -> Any:
    """Convert ``value`` to dicts, lists and scalars. If ``field`` has several dataclasses, a dict has a "kind"."""
    items = field and field.items
    if isinstance(value, tuple | list):
        return [to_json(item, items) for item in value]
    if isinstance(value, Mapping):
        return {name: to_json(item, items) for name, item in value.items()}
    if not dataclasses.is_dataclass(value):
        return value
    name = kind_name if field and type(value) in field.types else user_name
    kind = {"kind": name(type(value))} if field and len(field.kinds) > 1 else {}
    return kind | {name: to_json(getattr(value, name), inner) for name, inner in field_types(type(value)).items()}


def from_json(values: Any, kind: type[Content], classes: Iterable[type] = ()) -> Content:
    """Invert ``to_json``, for the dataclass ``kind``. Raise UserError for anything that it cannot have written.

    ``classes`` are the user's dataclasses that it may contain. Fields that an older version did not have get their
    defaults, with a warning unless that is None or ().
    """
    reader = Reader({user_name(own): own for own in classes}, [])
    content = reader.build(values, FieldType(kind), "")
    if reader.missing:
        logger.warning("an older version wrote no %s: using the default", ", ".join(reader.missing))
    return content


class Reader(NamedTuple):
    """The conversion of JSON to dataclasses."""

    classes: dict[str, type]  # of the user's, by kind
    missing: list[str]  # fields that got their defaults

    def build(self, values: Any, field: FieldType, path: str) -> Any:
        """Convert ``values`` to the tuples, dicts and dataclasses of ``field``, with checked fields."""
        if isinstance(values, list) and tuple in field.types and field.items:
            return tuple(self.build(value, field.items, f"{path}[{index}]") for index, value in enumerate(values))
        if isinstance(values, Mapping) and dict in field.types and field.items:
            return {name: self.build(value, field.items, f"{path}[{name}]") for name, value in values.items()}
        kinds = field.kinds | self.classes if field.open else field.kinds
        if not kinds or (values is None and type(None) in field.types):
            return values
        if not isinstance(values, Mapping):
            raise UserError(f"{path or 'the JSON'} must be an object, but is {values!r}")
        first = next(iter(kinds))
        name = values.get("kind", first if field.open and field.open.default else None) if len(kinds) > 1 else first
        if name not in list(kinds):  # it may be unhashable
            if field.open and ":" in str(name):
                others = f" (this one defines {', '.join(self.classes)})" if self.classes else ""
                remedy = f"pass the file that defines it as --experiment{others}, or in Python its config"
                raise UnknownClass(f"{path} is {name}: {remedy}")
            raise UserError(f"{path}.kind must be one of {', '.join(kinds)}, but is {name!r}")
        return self.build_dataclass(values, kinds[name], path, {"kind"} if len(kinds) > 1 else set())

    def build_dataclass(self, values: Mapping[str, Any], kind: Any, path: str, others: set[str]) -> Any:
        """Convert ``values``, which may also have the keys ``others``, to the dataclass ``kind``."""
        prefix, inner = path and f"{path}.", field_types(kind)
        optional = {field.name for field in dataclasses.fields(kind) if has_default(field)}
        if wrong := sorted((values.keys() - inner.keys() - others) | (inner.keys() - values.keys() - optional)):
            raise UserError(f"{path or 'the JSON'} has {'unknown' if wrong[0] in values else 'no'} field {wrong[0]!r}")
        defaults = {field.name: field.default for field in dataclasses.fields(kind)}
        # None and () say that a feature is not used, as it was before there was a field for it.
        self.missing.extend(prefix + name for name in inner if name not in values and defaults[name] not in (None, ()))
        arguments = {name: self.build(values[name], inner[name], prefix + name) for name in inner if name in values}
        for argument, value in arguments.items():
            inner[argument].check(value, prefix + argument)
        return kind(**arguments)


def has_default(field: dataclasses.Field) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


# --- Dotted names ---------------------------------------------------------------------------------------------------


def is_zero(value: Any) -> bool:
    """Return True if ``value`` is the number 0. A traced value is not known yet and counts as not 0."""
    return isinstance(value, int | float) and value == 0


def get(value: Any, name: str) -> Any:
    """Return the field with the dotted ``name``. Raise UserError, listing the existing fields, if there is none."""
    for field in name.split("."):
        choices = field_types(type(value)) if dataclasses.is_dataclass(value) else {}
        if field not in choices:
            existing = ", ".join(choices) or "none"
            raise UserError(f"there is no field {name}: {type(value).__name__} has no {field!r} (fields: {existing})")
        value = getattr(value, field)
    return value


def replace(value: Any, name: str, new: Any, *, check: bool = True) -> Any:
    """Return a copy of ``value`` in which the field with the dotted ``name`` is ``new``.

    For a tuple, ``new`` may also be a list, or the only item. Raise UserError if there is no such field, or if ``new``
    is not valid. Without ``check``, it may be a traced value.
    """
    if check:
        get(value, name)  # raises UserError if there is no such field
    first, _, rest = name.partition(".")
    inner = replace(getattr(value, first), rest, new, check=check) if rest else new
    if not rest and isinstance(getattr(value, first), tuple):
        inner = tuple(new) if isinstance(new, tuple | list) else (new,)
    if check:
        return dataclasses.replace(value, **{first: inner})
    changed = copy.copy(value)
    object.__setattr__(changed, first, inner)
    return changed


def flatten(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Return every value of nested dicts under its dotted name: ``{"optimizer.learning_rate": 0.1, …}``."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{path}{name}.") if isinstance(value, Mapping) else {path + name: value}
    return flat
