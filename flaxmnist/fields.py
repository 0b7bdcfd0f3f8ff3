"""Fields of nested dataclasses: types, JSON form, dotted names."""

import copy
import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from flaxmnist.errors import UserError


def union_kinds(hint: Any) -> list[Any]:
    """Return the dataclasses of a union type, and none for any other type."""
    return [kind for kind in typing.get_args(hint) if dataclasses.is_dataclass(kind)]


def typed_fields(value: Any) -> dict[str, tuple[Any, Any]]:
    """Return the type and the value of each field of a dataclass, by name."""
    hints = typing.get_type_hints(type(value))
    return {item.name: (hints[item.name], getattr(value, item.name)) for item in dataclasses.fields(value)}


def check_types(hint: Any, value: Any, path: str = "") -> None:
    """Raise UserError if ``value``, named ``path``, is not of type ``hint``. An int may stand for a float."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        valid = type(value) in arguments or (float in arguments and type(value) is int)
    elif origin is Literal:
        valid = type(value) is str and value in arguments
    elif origin is tuple:
        valid = type(value) is tuple and all(type(item) is arguments[0] for item in value)
    else:
        valid = type(value) is hint or (hint is float and type(value) is int)
    if not valid:
        raise UserError(f"{path or 'the config'} must be {type_name(hint)}, but is {value!r}")
    if dataclasses.is_dataclass(value):
        for name, (inner, item) in typed_fields(value).items():
            check_types(inner, item, f"{path}.{name}".lstrip("."))


def type_name(hint: Any) -> str:
    """Return a readable name of a type: ``int or None``, ``SGD or Adam``, ``'SAME' or 'VALID'``."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return f"a tuple of {type_name(arguments[0])}"
    if arguments:
        return " or ".join(repr(choice) if isinstance(choice, str) else type_name(choice) for choice in arguments)
    return "None" if hint is type(None) else hint.__name__


def to_json(value: Any, hint: Any = None) -> Any:
    """Convert ``value`` to dicts, lists and scalars. If ``hint`` is a union, the dict of a dataclass has a "kind"."""
    if isinstance(value, tuple):
        return list(value)
    if not dataclasses.is_dataclass(value):
        return value
    kind = {"kind": type(value).__name__} if union_kinds(hint) else {}
    return kind | {name: to_json(item, inner) for name, (inner, item) in typed_fields(value).items()}


def from_json(values: Any, hint: Any, path: str = "") -> Any:
    """Invert ``to_json``, for a value of type ``hint``. Raise UserError for anything that it cannot have written."""
    kinds = union_kinds(hint)
    if not (kinds or dataclasses.is_dataclass(hint)):
        return tuple(values) if isinstance(values, list) else values
    if not isinstance(values, Mapping):
        raise UserError(f"{path or 'the config'} must be an object, but is {values!r}")
    values = dict(values)
    kind: Any = hint
    if kinds:
        name = values.pop("kind", None)
        kind = next((choice for choice in kinds if choice.__name__ == name), None)
        if kind is None:
            choices = ", ".join(choice.__name__ for choice in kinds)
            raise UserError(f"{path}.kind must be one of {choices}, but is {name!r}")
    hints: dict[str, Any] = typing.get_type_hints(kind)
    names = [item.name for item in dataclasses.fields(kind)]
    if wrong := sorted(set(values) ^ set(names)):
        raise UserError(f"{path or 'the config'} has {'unknown' if wrong[0] in values else 'no'} field {wrong[0]!r}")
    return kind(**{name: from_json(values[name], hints[name], f"{path}.{name}".lstrip(".")) for name in names})


def is_zero(value: Any) -> bool:
    """Return True if ``value`` is the number 0. A traced value is not known yet and counts as not 0."""
    return isinstance(value, int | float) and value == 0


def get(value: Any, name: str) -> Any:
    """Return the field with the dotted ``name``. Raise UserError, listing the existing fields, if there is none."""
    for field in name.split("."):
        choices = typed_fields(value) if dataclasses.is_dataclass(value) else {}
        if field not in choices:
            existing = ", ".join(choices) or "none"
            raise UserError(f"there is no field {name}: {type(value).__name__} has no {field!r} (fields: {existing})")
        value = getattr(value, field)
    return value


def replace(value: Any, name: str, new: Any, *, check: bool = True) -> Any:
    """Return a copy of ``value`` in which the field with the dotted ``name`` is ``new``.

    For a tuple, ``new`` may also be a list, or the only item. Without ``check``, it may be a traced value.
    """
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
