"""Types, bounds, JSON form and dotted names of the fields of dataclasses."""

import copy
import json
import math
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import pytest
from conftest import user_error

from flaxmnist import fields
from flaxmnist.fields import In


@dataclass(frozen=True)
class Circle:
    radius: Annotated[float, In(0, math.inf, "()")] = 1.0


@dataclass(frozen=True)
class SquareConfig:
    side: int = 2
    tilted: bool = False


@dataclass(frozen=True)
class Label:
    text: str
    size: Annotated[int, In(1, 9)] | None = None


@dataclass(frozen=True)
class Drawing:
    name: str = "empty"
    shape: Circle | SquareConfig = Circle()
    title: Label | None = None
    labels: tuple[Label, ...] = ()
    history: tuple[Circle | SquareConfig, ...] = ()
    corner: tuple[int, int] = (0, 0)
    weights: tuple[Annotated[float, In(0, 1)], ...] | None = None
    style: Literal["solid", "dotted"] = "solid"
    notes: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, Annotated[int, In(0)]] = field(default_factory=dict)

    def __post_init__(self):
        fields.check_fields(self)


FULL = Drawing(
    name="full",
    shape=SquareConfig(3, True),
    title=Label("title", 3),
    labels=(Label("a"), Label("b", 9)),
    history=(Circle(2.0), SquareConfig()),
    corner=(1, -2),
    weights=(0.0, 1, 0.5),
    style="dotted",
    notes={"any": [1, None, {"thing": "x"}]},
    counts={"red": 0, "blue": 7},
)


@pytest.mark.parametrize(
    ("bounds", "inside", "outside", "text", "words"),
    [
        (In(0, 1), [0, 0.5, 1], [-1e-9, 1.1, math.nan], "[0, 1]", "in [0, 1]"),
        (In(0, 1, "[)"), [0, 0.99], [-1, 1, math.nan], "[0, 1)", "in [0, 1)"),
        (In(0, 1, "(]"), [1e-9, 1], [0, 1.1], "(0, 1]", "in (0, 1]"),
        (In(0, 1, "()"), [0.5], [0, 1], "(0, 1)", "in (0, 1)"),
        (In(1), [1, math.inf], [0.9, -math.inf, math.nan], "[1, inf]", "at least 1"),
        (In(0, math.inf, "()"), [1e-300, 1e300], [0, math.inf], "(0, inf)", "above 0"),
        (In(-math.inf, math.inf, "()"), [-1e300, 0], [math.inf, -math.inf, math.nan], "(-inf, inf)", "finite"),
    ],
    ids=str,
)
def test_bounds(bounds, inside, outside, text, words):
    assert all(value in bounds for value in inside)
    assert not any(value in bounds for value in outside)
    assert str(bounds) == text
    assert bounds.describe() == words


def test_bounds_of_an_annotation():
    assert fields.bounds(int) == []
    assert fields.bounds(Annotated[int, In(1), "another"]) == [In(1)]
    assert fields.bounds(Annotated[int, In(1)] | None) == [In(1)]
    assert fields.bounds(tuple[Annotated[float, In(0, 1)], ...] | None) == [In(0, 1)]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("name", 3, "name must be str, but is 3"),
        ("shape", None, "shape must be Circle or Square, but is None"),
        ("shape", Label("x"), "shape must be Circle or Square, but is Label(text='x', size=None)"),
        ("shape.side", 2.0, "shape.side must be int, but is 2.0"),
        ("shape.side", True, "shape.side must be int, but is True"),
        ("shape.tilted", 1, "shape.tilted must be bool, but is 1"),
        ("title", Circle(), "title must be Label or None, but is Circle(radius=1.0)"),
        ("title.size", "3", "title.size must be int or None, but is '3'"),
        ("title.size", 0, "title.size must lie in [1, 9], but is 0"),
        ("title.size", 10, "title.size must lie in [1, 9], but is 10"),
        ("labels", ("a",), "labels[0] must be Label, but is 'a'"),
        ("labels", (Label("a"), Label("b", 0)), "labels[1].size must lie in [1, 9], but is 0"),
        ("history", (Circle(), Label("x")), "history[1] must be Circle or Square, but is Label(text='x', size=None)"),
        ("history", (Circle(math.inf),), "history[0].radius must lie in (0, inf), but is inf"),
        ("corner", (1, 2, 3), "corner must be a tuple of 2 int, but is (1, 2, 3)"),
        ("corner", (1, None), "corner[1] must be int, but is None"),
        ("weights", (0.5, 1.5), "weights[1] must lie in [0, 1], but is 1.5"),
        ("weights", (math.nan,), "weights[0] must lie in [0, 1], but is nan"),
        ("weights", ("1",), "weights[0] must be float, but is '1'"),
        ("weights", 0.5j, "weights[0] must be float, but is 0.5j"),
        ("style", "dashed", "style must be 'solid' or 'dotted', but is 'dashed'"),
        ("style", None, "style must be 'solid' or 'dotted', but is None"),
        ("notes", [1], "notes must be an object, but is [1]"),
        ("counts", {"red": 1, "blue": -1}, "counts[blue] must lie in [0, inf], but is -1"),
        ("counts", {"red": 1.0}, "counts[red] must be int, but is 1.0"),
    ],
)
def test_wrong_value_is_named(name, value, message):
    with user_error(message):
        fields.replace(FULL, name, value)


def test_numbers_of_either_type_are_floats():
    assert Drawing(shape=Circle(3)) == Drawing(shape=Circle(3.0))
    assert Drawing(weights=(1, 0.5)).weights == (1, 0.5)


def test_fields_of_a_named_value_have_its_name_in_front():
    with user_error("page.radius must lie in (0, inf), but is 0"):
        fields.check_fields(Circle(0), "page")


# --- JSON -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drawing", [Drawing(), FULL, replace(FULL, title=None, weights=None)])
def test_json_restores_the_value(drawing):
    values = json.loads(json.dumps(fields.to_json(drawing)))
    assert fields.from_json(values, Drawing) == drawing


def test_json_has_dicts_lists_and_scalars_and_a_kind_in_unions():
    assert fields.to_json(FULL) == {
        "name": "full",
        "shape": {"kind": "Square", "side": 3, "tilted": True},
        "title": {"text": "title", "size": 3},
        "labels": [{"text": "a", "size": None}, {"text": "b", "size": 9}],
        "history": [{"kind": "Circle", "radius": 2.0}, {"kind": "Square", "side": 2, "tilted": False}],
        "corner": [1, -2],
        "weights": [0.0, 1, 0.5],
        "style": "dotted",
        "notes": {"any": [1, None, {"thing": "x"}]},
        "counts": {"red": 0, "blue": 7},
    }


def test_values_of_plain_dicts_are_converted_too():
    assert fields.to_json({"sizes": (1, 2), "label": Label("a")}) == {
        "sizes": [1, 2],
        "label": {"text": "a", "size": None},
    }


def test_fields_of_later_versions_get_their_defaults_with_one_warning(caplog):
    values = fields.to_json(FULL)
    del values["name"], values["shape"]["tilted"]
    shape = replace(FULL.shape, tilted=False)  # pyright: ignore[reportArgumentType]
    assert fields.from_json(values, Drawing) == replace(FULL, name=Drawing().name, shape=shape)
    assert caplog.messages == ["an older version wrote no name, shape.tilted: using the default"]


MISSING = object()


@pytest.mark.parametrize(
    ("path", "new", "message"),
    [
        ([], 3, "the JSON must be an object, but is 3"),
        ([], [], "the JSON must be an object, but is []"),
        (["colour"], 1, "the JSON has unknown field 'colour'"),
        (["name"], None, "name must be str, but is None"),
        (["shape"], None, "shape must be an object, but is None"),
        (["shape", "kind"], "SquareConfig", "shape.kind must be one of Circle, Square, but is 'SquareConfig'"),
        (["shape", "kind"], ["Circle"], "shape.kind must be one of Circle, Square, but is ['Circle']"),
        (["shape", "kind"], MISSING, "shape.kind must be one of Circle, Square, but is None"),
        (["shape", "kind"], "Circle", "shape has unknown field 'side'"),
        (["shape", "side"], "2", "shape.side must be int, but is '2'"),
        (["title"], [], "title must be an object, but is []"),
        (["title", "kind"], "Label", "title has unknown field 'kind'"),
        (["title", "size"], 10, "title.size must lie in [1, 9], but is 10"),
        (["labels"], {"text": "a"}, "labels must be a tuple of Label, but is {'text': 'a'}"),
        (["labels", 1, "text"], MISSING, "labels[1] has no field 'text'"),
        (["labels", 0], "a", "labels[0] must be an object, but is 'a'"),
        (["history", 0, "kind"], "Label", "history[0].kind must be one of Circle, Square, but is 'Label'"),
        (["corner"], [1], "corner must be a tuple of 2 int, but is (1,)"),
        (["weights", 2], 2, "weights[2] must lie in [0, 1], but is 2"),
        (["counts", "red"], 1.5, "counts[red] must be int, but is 1.5"),
        (["notes"], None, "notes must be an object, but is None"),
    ],
)
def test_json_that_cannot_have_been_written_is_rejected(path, new, message):
    values = {"": copy.deepcopy(fields.to_json(FULL))}
    *parents, last = ["", *path]
    parent: Any = values
    for key in parents:
        parent = parent[key]
    if new is MISSING:
        del parent[last]
    else:
        parent[last] = new
    with user_error(message):
        fields.from_json(values[""], Drawing)


# --- Dotted names ---------------------------------------------------------------------------------------------------


def test_get():
    assert fields.get(FULL, "name") == "full"
    assert fields.get(FULL, "shape.side") == 3
    with user_error("there is no field shape.radius: SquareConfig has no 'radius' (fields: side, tilted)"):
        fields.get(FULL, "shape.radius")
    with user_error("there is no field name.first: str has no 'first' (fields: none)"):
        fields.get(FULL, "name.first")


def test_replace_returns_a_changed_copy():
    changed = fields.replace(FULL, "shape.side", 8)
    assert changed == replace(FULL, shape=SquareConfig(8, True))
    assert FULL.shape == SquareConfig(3, True)


def test_replace_makes_a_tuple_of_a_list_or_a_single_item():
    assert fields.replace(FULL, "weights", [0.5, 1]).weights == (0.5, 1)
    assert fields.replace(FULL, "weights", 0.25).weights == (0.25,)


def test_replace_without_check_accepts_any_value():
    changed = fields.replace(FULL, "shape.side", "unknown", check=False)
    assert fields.get(changed, "shape.side") == "unknown"
    assert FULL.shape == SquareConfig(3, True)


def test_only_a_known_zero_is_zero():
    assert fields.is_zero(0) and fields.is_zero(0.0)
    assert not fields.is_zero(1e-300)
    assert not fields.is_zero(None)


def test_flatten_names_every_value():
    flat = fields.flatten(fields.to_json(FULL))
    assert flat["shape.kind"] == "Square"
    assert flat["title.size"] == 3
    assert flat["counts.blue"] == 7
    assert flat["weights"] == [0.0, 1, 0.5]
    assert not any(isinstance(value, dict) for value in flat.values())
