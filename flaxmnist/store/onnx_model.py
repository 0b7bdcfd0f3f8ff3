"""A model as an ONNX file, which ONNX Runtime and many other programs run."""

import math
import string
from collections.abc import Sequence
from typing import Any

import numpy as np
from flax import nnx

from flaxmnist.core.trace import Node, Operation, trace
from flaxmnist.errors import UserError, one_line

OPSET, IR_VERSION = 18, 8  # of 2022, so that older programs read the file too

SAME = {
    "add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "max": "Max", "min": "Min", "pow": "Pow", "neg": "Neg",
    "abs": "Abs", "sign": "Sign", "sqrt": "Sqrt", "exp": "Exp", "log": "Log", "tanh": "Tanh", "logistic": "Sigmoid",
    "erf": "Erf", "eq": "Equal", "gt": "Greater", "ge": "GreaterOrEqual", "lt": "Less", "le": "LessOrEqual",
}  # fmt: skip
REDUCTIONS = {"reduce_max": "ReduceMax", "reduce_min": "ReduceMin", "reduce_sum": "ReduceSum"}
TYPES = {"float32": 1, "uint8": 2, "int32": 6, "bool": 9}
# ONNX has the channels before the pixels.
CHANNELS_FIRST, CHANNELS_LAST, KERNEL = [0, 3, 1, 2], [0, 2, 3, 1], [3, 2, 0, 1]


def onnx_model(model: nnx.Module, shape: Sequence[int], classes: int) -> bytes:
    """Return the ONNX model that maps ``images``, uint8 [n, *shape], to ``logits``, float32 [n, classes], for any n.

    Raise UserError if an operation of the model is not supported.
    """
    try:
        return make_model(model, shape, classes)
    except UserError:
        raise
    except Exception as error:  # the checker raises several types
        raise UserError(f"the model cannot be written as ONNX ({one_line(error)[:200]})") from error


def make_model(model: nnx.Module, shape: Sequence[int], classes: int) -> bytes:
    """Return the ONNX model, checked. Raise various exceptions if it is not valid."""
    from onnx import TensorProto, checker, helper

    writer = Writer([merge(*pair) for pair in zip(trace(model, shape, 2), trace(model, shape, 3), strict=True)])
    writer.add("Identity", writer.names[-1], output="logits")
    graph = helper.make_graph(
        writer.operations,
        "flaxmnist",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", *shape])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", classes])],
        writer.constants,
    )
    opset = helper.make_opsetid("", OPSET)
    file = helper.make_model(graph, producer_name="flaxmnist", opset_imports=[opset], ir_version=IR_VERSION)
    checker.check_model(file, full_check=True)
    return file.SerializeToString(deterministic=True)


def merge(two: Any, three: Any) -> Any:
    """Return a part of the traces of two and of three images, with a word for each size that depends on the number."""
    if isinstance(two, np.ndarray):
        if two.shape != three.shape:
            raise UserError(f"the model has a constant that depends on the number of images: {two.shape}")
        return two
    if isinstance(two, Operation):
        return Operation(*map(merge, two, three))
    if isinstance(two, dict):
        return {name: merge(two[name], three[name]) for name in two}
    if isinstance(two, list | tuple):
        return list(map(merge, two, three))
    return two if two == three else "n" if (two, three) == (2, 3) else "a multiple of n"


class Writer:
    """The operations and constants of an ONNX graph, translated from a trace; ``names`` are those of its nodes."""

    def __init__(self, nodes: list[Node]):
        self.operations: list[Any] = []
        self.constants: list[Any] = []
        self.nodes, self.names = nodes, ["images"]
        for node in nodes[1:]:
            self.names.append(self.translate(node) if isinstance(node, Operation) else self.constant(node))

    def constant(self, value: Any) -> str:
        """Add a constant, and return its name."""
        from onnx import numpy_helper

        self.constants.append(numpy_helper.from_array(np.asarray(value), f"constant_{len(self.constants)}"))
        return self.constants[-1].name

    def add(self, kind: str, *inputs: Any, output: str = "", **attributes: Any) -> str:
        """Add an operation on names and constants, and return the name of its result."""
        from onnx import helper

        names = [value if isinstance(value, str) else self.constant(value) for value in inputs]
        output = output or f"{kind}_{len(self.operations)}"
        self.operations.append(helper.make_node(kind, names, [output], **attributes))
        return output

    def translate(self, operation: Operation) -> str:
        """Add an operation of the trace, and return the name of its result."""
        inputs, options, shape = [self.names[index] for index in operation.inputs], operation.options, operation.shape
        match operation.name:
            case name if name in SAME:
                return self.add(SAME[name], *inputs)
            case name if name in REDUCTIONS:
                return self.add(REDUCTIONS[name], *inputs, options["axes"], keepdims=0)
            case "square":
                return self.add("Mul", *inputs, *inputs)
            case "integer_pow":
                return self.add("Pow", *inputs, np.float32(options["power"]))
            case "rsqrt":
                return self.add("Reciprocal", self.add("Sqrt", *inputs))
            case "expm1":
                return self.add("Sub", self.add("Exp", *inputs), np.float32(1))
            case "log1p":
                return self.add("Log", self.add("Add", *inputs, np.float32(1)))
            case "erfc":
                return self.add("Sub", np.float32(1), self.add("Erf", *inputs))
            case "ne":
                return self.add("Not", self.add("Equal", *inputs))
            case "select_n":
                return self.add("Where", inputs[0], inputs[2], inputs[1])
            case "convert_element_type":
                if options["dtype"] not in TYPES:
                    raise UserError(f"the model has a type that is not supported in ONNX: {options['dtype']}")
                return self.add("Cast", *inputs, to=TYPES[options["dtype"]])
            case "reshape" | "squeeze" | "expand_dims":
                return self.reshape(inputs[0], shape)
            case "broadcast_in_dim":
                axes = dict(zip(options["axes"], self.nodes[operation.inputs[0]].shape, strict=True))
                column = self.reshape(inputs[0], [axes.get(axis, 1) for axis in range(len(shape))])
                return self.add("Expand", column, self.sizes(shape))
            case "transpose":
                return self.add("Transpose", *inputs, perm=options["permutation"])
            case "concatenate":
                return self.add("Concat", *inputs, axis=options["axis"])
            case "stack":
                inputs = [self.add("Unsqueeze", name, [options["axis"]]) for name in inputs]
                return self.add("Concat", *inputs, axis=options["axis"])
            case "slice":
                ends = [size if isinstance(size, int) else 2**31 for size in options["limits"]]
                return self.add("Slice", *inputs, options["starts"], ends, list(range(len(ends))), options["strides"])
            case "pad":
                low, high = zip(*options["padding"], strict=True)
                return self.add("Pad", inputs[0], [*low, *high], inputs[1])
            case "dot_general":
                return self.product(operation, inputs)
            case "conv_general_dilated":
                kernel = self.add("Transpose", inputs[1], perm=KERNEL)
                return self.of_images("Conv", inputs[0], kernel, group=options["groups"], **windows(options))
            case "reduce_window_max":
                return self.of_images("MaxPool", *inputs, kernel_shape=options["window"], **windows(options))
            case "reduce_window_sum":
                pooling = windows(options) | {"kernel_shape": options["window"], "count_include_pad": 1}
                mean = self.of_images("AveragePool", *inputs, **pooling)
                return self.add("Mul", mean, np.float32(math.prod(options["window"])))
        raise UserError(f"the model has an operation that is not supported in ONNX: {operation.name}")

    def of_images(self, kind: str, images: str, *inputs: str, **attributes: Any) -> str:
        """Add an operation on images whose channels come first in ONNX."""
        first = self.add("Transpose", images, perm=CHANNELS_FIRST)
        return self.add("Transpose", self.add(kind, first, *inputs, **attributes), perm=CHANNELS_LAST)

    def reshape(self, name: str, shape: Sequence[int | str]) -> str:
        unknown = [size for size in shape if isinstance(size, str)]
        if len(unknown) > 1:
            raise UserError(f"the model has a shape that is not supported in ONNX: {list(shape)}")
        return self.add("Reshape", name, [size if isinstance(size, int) else -1 for size in shape])

    def sizes(self, shape: Sequence[int | str]) -> str:
        """Return the name of a shape, of which the number of images may be a part."""
        if any(isinstance(size, str) and size != "n" for size in shape):
            raise UserError(f"the model has a shape that is not supported in ONNX: {list(shape)}")
        count = self.add("Shape", "images", start=0, end=1)
        sizes = [count if size == "n" else [size] for size in shape]
        return self.add("Concat", *sizes, axis=0)

    def product(self, operation: Operation, inputs: list[str]) -> str:
        """Add a product of arrays: a sum over the contracted axes, at each index of the batch axes."""
        letters = iter(string.ascii_letters)
        left, right = ([next(letters) for _ in self.nodes[index].shape] for index in operation.inputs)
        batch, contracted = operation.options["batch"], operation.options["contracted"]
        for i, j in zip(batch[0] + contracted[0], batch[1] + contracted[1], strict=True):
            right[j] = left[i]
        first, summed = [left[axis] for axis in batch[0]], [left[axis] for axis in contracted[0]]
        result = first + [letter for letter in left + right if letter not in first + summed]
        equation = f"{''.join(left)},{''.join(right)}->{''.join(result)}"
        if equation == "ab,bd->ad":  # some programs have no Einsum
            return self.add("MatMul", *inputs)
        return self.add("Einsum", *inputs, equation=equation)


def windows(options: dict[str, Any]) -> dict[str, Any]:
    """Return the attributes of a convolution or pooling."""
    low, high = zip(*options["padding"], strict=True)
    return {"strides": options["strides"], "pads": [*low, *high]}
