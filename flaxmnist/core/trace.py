"""A model as a list of operations on arrays, from which exports and pages compute it without JAX."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from flaxmnist.core.convolution import LAYOUT, set_form
from flaxmnist.core.layers import normalise
from flaxmnist.errors import UserError


class Operation(NamedTuple):
    """An operation with the name and the meaning of JAX's primitive; its result has ``shape``.

    ``inputs`` are the indices of earlier nodes. Elementwise operations broadcast as NumPy does. ``options`` are JSON.
    """

    name: str
    inputs: tuple[int, ...]
    shape: list[int]
    options: dict[str, Any]


Node = Operation | np.ndarray  # an array is a constant

ELEMENTWISE = {
    *("add", "sub", "mul", "div", "max", "min", "pow", "neg", "abs", "sign", "square", "sqrt", "rsqrt", "exp", "expm1"),
    *("log", "log1p", "tanh", "logistic", "erf", "erfc", "eq", "ne", "gt", "ge", "lt", "le", "select_n"),
}
IDENTITIES = {"copy", "stop_gradient", "optimization_barrier"}
INLINED = {"jit", "closed_call", "custom_jvp_call", "custom_vjp_call", "checkpoint"}


def trace(model: nnx.Module, shape: Sequence[int], count: int = 1) -> list[Node]:
    """Return the operations that turn ``count`` images, uint8 [count, *shape], into logits.

    The first node stands for the images; the last one is the logits. Whatever does not depend on the images is a
    constant, such as the factors of a normalisation. Raise UserError if an operation of the model is not supported.
    """
    set_form(model, "direct")
    images = jax.ShapeDtypeStruct((count, *shape), np.uint8)
    jaxpr = jax.make_jaxpr(lambda images: model(normalise(images)))(images)  # pyright: ignore[reportCallIssue]
    nodes: list[Node] = [Operation("images", (), [count, *shape], {})]
    (logits,) = run(jaxpr.jaxpr, jaxpr.consts, [0], nodes)
    return needed(nodes, index_of(logits, nodes))


def run(jaxpr: Any, constants: Sequence[Any], inputs: Sequence[Any], nodes: list[Node]) -> list[Any]:
    """Append the operations of ``jaxpr`` to ``nodes``. Return its results: the index of a node, or a constant."""
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *inputs), strict=True))

    def value(atom: Any) -> Any:
        return np.asarray(atom.val, atom.aval.dtype) if hasattr(atom, "val") else values[atom]

    for equation in jaxpr.eqns:
        name, options = equation.primitive.name, equation.params
        arguments = list(map(value, equation.invars))
        if name in INLINED:
            inner = options.get("jaxpr") or options["call_jaxpr"]
            results = run(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), arguments, nodes)
        elif name in IDENTITIES or (name == "pad" and not np.any(options["padding_config"])):
            results = arguments[:1]
        elif is_constant(equation, arguments):
            results = equation.primitive.bind(*arguments, **options)
            results = results if equation.primitive.multiple_results else [results]
        else:
            operands = tuple(index_of(argument, nodes) for argument in arguments)
            chosen = {key: plain(value) for key, value in options_of(name, options).items()}
            nodes.append(Operation(name, operands, plain(equation.outvars[0].aval.shape), chosen))
            results = [len(nodes) - 1]
        values |= zip(equation.outvars, results, strict=True)
    return list(map(value, jaxpr.outvars))


def is_constant(equation: Any, arguments: list[Any]) -> bool:
    """Return True if the results do not depend on the images, unless they only repeat a smaller constant."""
    if any(isinstance(argument, int) for argument in arguments):
        return False
    shape = equation.outvars[0].aval.shape
    return equation.primitive.name != "broadcast_in_dim" or math.prod(shape) == arguments[0].size


def index_of(value: Any, nodes: list[Node]) -> int:
    """Return the index of a node: ``value`` itself, or that of a constant, which is appended unless it is there."""
    if isinstance(value, int):
        return value
    if not any(node is value for node in nodes):
        nodes.append(value)
    return next(index for index, node in enumerate(nodes) if node is value)


def needed(nodes: list[Node], last: int) -> list[Node]:
    """Return the images and the nodes that node ``last`` depends on, in order, with constants as NumPy arrays."""
    kept, pending = {0}, [last]
    while pending:
        node = nodes[index := pending.pop()]
        if index not in kept and isinstance(node, Operation):
            pending += node.inputs
        kept.add(index)
    position = {index: place for place, index in enumerate(sorted(kept))}
    return [
        node._replace(inputs=tuple(position[index] for index in node.inputs))
        if isinstance(node, Operation)
        else np.asarray(node)
        for node in map(nodes.__getitem__, position)
    ]


def options_of(name: str, params: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters of a primitive that its result depends on. Raise UserError if it is not supported."""
    match name:
        case "reshape" | "squeeze" | "expand_dims":
            return {}
        case "convert_element_type":
            return {"dtype": params["new_dtype"].name}
        case "integer_pow":
            return {"power": params["y"]}
        case "transpose":
            return {"permutation": params["permutation"]}
        case "broadcast_in_dim":
            return {"axes": params["broadcast_dimensions"]}
        case "reduce_max" | "reduce_min" | "reduce_sum":
            return {"axes": params["axes"]}
        case "concatenate":
            return {"axis": params["dimension"]}
        case "stack":
            return {"axis": params["axis"]}
        case "slice":
            starts, limits = params["start_indices"], params["limit_indices"]
            return {"starts": starts, "limits": limits, "strides": params["strides"] or (1,) * len(starts)}
        case "pad" if all(interior == 0 for _, _, interior in params["padding_config"]):
            return {"padding": [pair[:2] for pair in params["padding_config"]]}
        case "dot_general":
            contracted, batch = params["dimension_numbers"]
            return {"contracted": contracted, "batch": batch}
        case "conv_general_dilated" if is_usual_convolution(params):
            options = {"strides": params["window_strides"], "padding": params["padding"]}
            return options | {"groups": params["feature_group_count"]}
        case "reduce_window_max" | "reduce_window_sum" if is_usual_pooling(params):
            options = {"window": params["window_dimensions"], "strides": params["window_strides"]}
            return {name: sizes[1:3] for name, sizes in (options | {"padding": params["padding"]}).items()}
        case _ if name in ELEMENTWISE:
            return {}
    raise UserError(f"the model has an operation that only JAX can compute: {name}")


def plain(value: Any) -> Any:
    """Return nested tuples of integers as lists, and NumPy's integers as Python's."""
    if isinstance(value, list | tuple):
        return list(map(plain, value))
    return value.item() if isinstance(value, np.generic) else value


def is_usual_convolution(params: dict[str, Any]) -> bool:
    """Return True for a convolution of images [n, h, w, c] that is neither dilated nor transposed."""
    numbers = tuple(params["dimension_numbers"]) == tuple(jax.lax.conv_dimension_numbers((1,) * 4, (1,) * 4, LAYOUT))
    undilated = params["lhs_dilation"] == params["rhs_dilation"] == (1, 1)
    return numbers and undilated and params["batch_group_count"] == 1


def is_usual_pooling(params: dict[str, Any]) -> bool:
    """Return True for pooling of images [n, h, w, c] over height and width."""
    outer = [(params[name][0], params[name][3]) for name in ("window_dimensions", "window_strides")]
    undilated = params["base_dilation"] == params["window_dilation"] == (1, 1, 1, 1)
    return undilated and len(params["padding"]) == 4 and outer == [(1, 1), (1, 1)]


def count_operations(operation: Operation, nodes: list[Node]) -> int:
    """Return the number of additions and multiplications; all other operations count as one for each value."""
    values = math.prod(operation.shape)
    if operation.name == "conv_general_dilated":
        return 2 * values * math.prod(nodes[operation.inputs[1]].shape[:-1])
    if operation.name == "dot_general":
        left, contracted = nodes[operation.inputs[0]].shape, operation.options["contracted"][0]
        return 2 * values * math.prod(left[axis] for axis in contracted)
    return values
