"""The fields of nested dataclasses: their types, their JSON form, their dotted names."""

import copy
import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from flaxmnist.errors import UserError


def members(hint: Any) -> list[Any]:
    """The dataclasses that a union names; none for anything else."""
    return [kind for kind in typing.get_args(hint) if dataclasses.is_dataclass(kind)]


def described(value: Any) -> dict[str, tuple[Any, Any]]:
    """The type and the value of each field of a dataclass."""
    hints = typing.get_type_hints(type(value))
    return {item.name: (hints[item.name], getattr(value, item.name)) for item in dataclasses.fields(value)}


def check_types(hint: Any, value: Any, path: str = "") -> None:
    """Raises UserError where ``value``, named ``path``, is not of type ``hint`` (an int may stand for a float)."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        holds = type(value) in arguments or (float in arguments and type(value) is int)
    elif origin is Literal:
        holds = type(value) is str and value in arguments
    elif origin is tuple:
        holds = type(value) is tuple and all(type(item) is arguments[0] for item in value)
    else:
        holds = type(value) is hint or (hint is float and type(value) is int)
    if not holds:
        raise UserError(f"{path or 'the config'} must be {describe(hint)}, but is {value!r}")
    if dataclasses.is_dataclass(value):
        for name, (inner, item) in described(value).items():
            check_types(inner, item, f"{path}.{name}".lstrip("."))


def describe(hint: Any) -> str:
    """A type as one would say it: ``int or None``, ``SGD or Adam``, ``'SAME' or 'VALID'``."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return f"a tuple of {describe(arguments[0])}"
    if arguments:
        return " or ".join(repr(each) if isinstance(each, str) else describe(each) for each in arguments)
    return "None" if hint is type(None) else hint.__name__


def to_json(value: Any, hint: Any = None) -> Any:
    """``value`` as plain dicts, lists and scalars; where ``hint`` is a union, a dataclass carries its kind."""
    if isinstance(value, tuple):
        return list(value)
    if not dataclasses.is_dataclass(value):
        return value
    kind = {"kind": type(value).__name__} if members(hint) else {}
    return kind | {name: to_json(item, inner) for name, (inner, item) in described(value).items()}


def from_json(values: Any, hint: Any, path: str = "") -> Any:
    """The ``hint`` that ``to_json`` made ``values`` of. Raises UserError for anything it could not have made."""
    kinds = members(hint)
    if not (kinds or dataclasses.is_dataclass(hint)):
        return tuple(values) if isinstance(values, list) else values
    if not isinstance(values, Mapping):
        raise UserError(f"{path or 'the config'} must be an object, but is {values!r}")
    values = dict(values)
    kind: Any = hint
    if kinds:
        named = values.pop("kind", None)
        kind = next((each for each in kinds if each.__name__ == named), None)
        if kind is None:
            raise UserError(f"{path}.kind must be one of {', '.join(k.__name__ for k in kinds)}, but is {named!r}")
    hints: dict[str, Any] = typing.get_type_hints(kind)
    names = [item.name for item in dataclasses.fields(kind)]
    if odd := sorted(set(values) ^ set(names)):
        raise UserError(f"{path or 'the config'} has {'unknown' if odd[0] in values else 'no'} field {odd[0]!r}")
    return kind(**{name: from_json(values[name], hints[name], f"{path}.{name}".lstrip(".")) for name in names})


def is_off(value: Any) -> bool:
    """Whether ``value`` is the number 0. What a traced one will be is not known, so it counts as on."""
    return isinstance(value, int | float) and value == 0


def get(value: Any, name: str) -> Any:
    """The field of dotted ``name``. Raises UserError, with the names there are, where there is none."""
    for part in name.split("."):
        if not dataclasses.is_dataclass(value) or part not in described(value):
            known = ", ".join(described(value)) if dataclasses.is_dataclass(value) else "none"
            raise UserError(f"there is no field {name}: {type(value).__name__} has no {part!r}, but {known}")
        value = getattr(value, part)
    return value


def put(value: Any, name: str, new: Any, *, check: bool = True) -> Any:
    """``value`` with the field of dotted ``name`` set to ``new``; without ``check``, ``new`` may be traced.

    Where a tuple is wanted, a list stands for one, and so does its only item.
    """
    first, _, rest = name.partition(".")
    inner = put(getattr(value, first), rest, new, check=check) if rest else new
    if not rest and isinstance(getattr(value, first), tuple):
        inner = tuple(new) if isinstance(new, tuple | list) else (new,)
    if check:
        return dataclasses.replace(value, **{first: inner})
    changed = copy.copy(value)
    object.__setattr__(changed, first, inner)
    return changed


def flatten(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Every value of nested dicts under its dotted name, ``{"optimizer.learning_rate": 0.1, …}``."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{path}{name}.") if isinstance(value, Mapping) else {path + name: value}
    return flat
