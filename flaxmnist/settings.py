"""The settings of a sweep, from what a person writes: FIELD=V1,V2,… or FIELD=LOW..HIGH[,log]."""

import ast
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from flaxmnist.errors import UserError

MOST = 100_000  # settings


def read(over: Sequence[str], random: int | None = None) -> list[dict[str, Any]]:
    """All combinations of the values; with ``random``, so many settings drawn, always the same ones.

    Raises UserError for what cannot be read.
    """
    named = [each.partition("=") for each in over]
    for name, equals, values in named:
        if not (name and equals and values):
            raise UserError(f"--over {name}{equals}{values} must be FIELD=V1,V2,… or FIELD=LOW..HIGH[,log]")
        if random is None and ".." in values:
            raise UserError(
                f"--over {name}={values} is a range: give --random N, the number of settings to draw from it"
            )
    fields = {name.replace("-", "_"): values for name, _, values in named}
    if random is None:
        lists = [listed(values) for values in fields.values()]
        if math.prod(map(len, lists)) > MOST:
            raise UserError(f"these are over {MOST:,} combinations: give fewer values, or --random N to draw from them")
        return [dict(zip(fields, values, strict=True)) for values in itertools.product(*lists)]
    if not 1 <= random <= MOST or not fields:
        raise UserError(f"--random draws 1 to {MOST:,} settings, from the ranges of at least one --over")
    generator = np.random.default_rng(0)
    return [{name: draw(name, values, generator) for name, values in fields.items()} for _ in range(random)]


def listed(values: str) -> list[Any]:
    """V1,V2,… as numbers and words."""
    return [literal(word) for word in values.split(",")]


def literal(word: str) -> Any:
    """A word as Python would read it; what it could not is a string."""
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return word


def draw(name: str, values: str, generator: np.random.Generator) -> Any:
    """One value: of a range, uniform or, with ``log``, uniform in its logarithm; of a list, any."""
    if ".." not in values:
        choices = listed(values)
        return choices[int(generator.integers(len(choices)))]
    span, _, scale = values.partition(",")
    low, high = (literal(word) for word in span.split("..", 1))
    numbers = all(isinstance(end, int | float) for end in (low, high))
    if not numbers or not low < high or scale not in ("", "log") or (scale == "log" and low <= 0):
        raise UserError(f"--over {name}={values} must be LOW..HIGH[,log], with LOW below HIGH (and above 0 for log)")
    if scale == "log":
        drawn = math.exp(generator.uniform(math.log(low), math.log(high)))
    else:
        drawn = generator.uniform(low, high)
    # Four digits are all that a search is about.
    return round(drawn) if isinstance(low, int) and isinstance(high, int) else float(f"{drawn:.4g}")
