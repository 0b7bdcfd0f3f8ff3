"""Parser for the settings of a sweep on the command line: FIELD=V1,V2,… or FIELD=LOW..HIGH[,log]."""

import ast
import itertools
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from flaxmnist.errors import UserError

MAX_SETTINGS = 100_000
MAX_NUMBER = 1e300  # of a range, whose width must not overflow


def distinct(values: Iterable[Any]) -> list[Any]:
    """Return ``values``, which may be lists or dicts, without those that occurred before."""
    return list({json.dumps(value, default=repr): value for value in values}.values())


def parse_settings(over: Sequence[str], random: int | None = None) -> list[dict[str, Any]]:
    """Return all combinations of the values or, if ``random`` is given, that many samples from a fixed seed.

    Raise UserError for invalid options.
    """
    fields = {}
    for option in over:
        name, _, values = option.partition("=")
        if not (name and values):
            raise UserError(f"--over {option} must be FIELD=V1,V2,… or FIELD=LOW..HIGH[,log]")
        if random is None and ".." in values:
            raise UserError(f"--over {option} is a range: pass --random N to sample N settings from it")
        name = name.replace("-", "_")
        if name in fields:
            raise UserError(f"--over {name} is given twice: pass all its values at once, {name}=V1,V2,…")
        fields[name] = values
    if random is None:
        lists = [parse_values(values) for values in fields.values()]
        if math.prod(map(len, lists)) > MAX_SETTINGS:
            raise UserError(
                f"these are over {MAX_SETTINGS:,} combinations: pass fewer values, or --random N to sample N of them"
            )
        return [dict(zip(fields, values, strict=True)) for values in itertools.product(*lists)]
    if not 1 <= random <= MAX_SETTINGS or not fields:
        raise UserError(f"--random samples 1 to {MAX_SETTINGS:,} settings, from the values of at least one --over")
    generator = np.random.default_rng(0)
    return [{name: sample(name, values, generator) for name, values in fields.items()} for _ in range(random)]


def parse_values(values: str) -> list[Any]:
    """Return values that are separated by commas, such as "0.1,0.3", "relu,gelu" or "(8,8),(16,)"."""
    literals = parse_value(f"[{values}]")
    return literals if isinstance(literals, list) else [parse_value(word) for word in values.split(",")]


def parse_value(word: str) -> Any:
    """Return ``word`` as a Python literal, or as a string if it is none."""
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return word


def sample(name: str, values: str, generator: np.random.Generator) -> Any:
    """Return a random value from a list, or from a range: uniform or, with ``log``, uniform in its logarithm."""
    if ".." not in values:
        choices = parse_values(values)
        return choices[int(generator.integers(len(choices)))]
    span, _, scale = values.partition(",")
    low, high = (parse_value(word) for word in span.split("..", 1))
    numbers = all(isinstance(end, int | float) and abs(end) < MAX_NUMBER for end in (low, high))
    if not numbers or not low < high or scale not in ("", "log") or (scale == "log" and low <= 0):
        raise UserError(f"--over {name}={values} must be LOW..HIGH[,log], with LOW below HIGH (and above 0 for log)")
    if scale == "log":
        value = math.exp(generator.uniform(math.log(low), math.log(high)))
    else:
        value = generator.uniform(low, high)
    # Four digits are precise enough for a search.
    return round(value) if isinstance(low, int) and isinstance(high, int) else float(f"{value:.4g}")
