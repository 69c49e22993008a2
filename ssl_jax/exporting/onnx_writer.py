"""A pure function as an ONNX graph, written from its jaxpr; what its inputs do not change is computed beforehand.

Axes of the inputs may be symbolic (`jax.export.symbolic_shape`). Source of the operators: https://onnx.ai/onnx/operators
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from ssl_jax.errors import UserError

OLDEST = 18  # the first opset in which ReduceMax takes its axes as an input
CALLS = ("jaxpr", "call_jaxpr", "fun_jaxpr")  # parameters that hold what a primitive calls

# Primitives with an operator of the same meaning, also for inputs that are broadcast.
ELEMENTWISE = {
    **{"add": "Add", "add_any": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "max": "Max", "min": "Min"},
    **{"exp": "Exp", "log": "Log", "neg": "Neg", "abs": "Abs", "sign": "Sign", "sqrt": "Sqrt", "erf": "Erf"},
    **{"tanh": "Tanh", "logistic": "Sigmoid", "floor": "Floor", "ceil": "Ceil", "sin": "Sin", "cos": "Cos"},
    **{"pow": "Pow", "gt": "Greater", "ge": "GreaterOrEqual", "lt": "Less", "le": "LessOrEqual", "eq": "Equal"},
    **{"and": "And", "or": "Or", "not": "Not", "stop_gradient": "Identity", "copy": "Identity", "copy_p": "Identity"},
}


class Value(NamedTuple):
    """An array of the graph by its name, or a constant; or something smaller that is still to be broadcast to it.

    shape: its own; the variable of the jaxpr says what it is broadcast to
    """

    data: Any  # str or np.ndarray
    shape: tuple[Any, ...]


def write(function: Callable[[Any], Mapping[str, jax.Array]], image: Any, opset: int, facts: Mapping[str, str]) -> Any:
    """An onnx.ModelProto of function: images -> arrays by name.

    image: shape and dtype of the images, whose axes may be symbolic; facts: stored in the file's metadata.
    Raises UserError for an opset that is too old or unknown, and for an operation that this writer does not know.
    """
    import onnx
    from onnx import helper

    newest = onnx.defs.onnx_opset_version()
    if not OLDEST <= opset <= newest:
        raise UserError(f"--opset={opset}: allowed: {OLDEST} to {newest} (the newest that this onnx knows)")
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(image)
    names = sorted(shapes)  # the order of the leaves of a dict
    graph = _Graph({str(dim): axis for axis, dim in enumerate(image.shape) if not isinstance(dim, int)})
    constants = [Value(np.asarray(c), np.shape(c)) for c in closed.consts]
    results = graph.run(closed.jaxpr, constants, [Value("images", image.shape)])
    for name, value, variable in zip(names, results, closed.jaxpr.outvars, strict=True):
        graph.add("Identity", [graph.full(value, variable.aval.shape)], (), output=name)

    def declared(name, aval):
        dims = [dim if isinstance(dim, int) else str(dim) for dim in aval.shape]
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(aval.dtype)), dims)

    outputs = [declared(name, shapes[name]) for name in names]
    made = helper.make_graph(graph.nodes, "ssl_jax", [declared("images", image)], outputs, graph.initializers)
    opsets = [helper.make_opsetid("", opset)]
    version = helper.find_min_ir_version_for(opsets)
    model = helper.make_model(made, producer_name="ssl_jax", opset_imports=opsets, ir_version=version)
    helper.set_model_props(model, dict(facts))
    return model


class _Graph:
    """symbols: name of a symbolic dimension -> the axis of "images" that has it."""

    def __init__(self, symbols: Mapping[str, int]):
        self.nodes, self.initializers = list[Any](), list[Any]()
        self.symbols, self.known, self.stored = symbols, dict[str, Value](), dict[tuple, str]()

    def run(self, jaxpr: Jaxpr, constants: Sequence[Value], inputs: Sequence[Value]) -> list[Value]:
        env = dict(zip(jaxpr.constvars, constants, strict=True)) | dict(zip(jaxpr.invars, inputs, strict=True))

        def value_of(atom):
            return Value(np.asarray(atom.val), np.shape(atom.val)) if isinstance(atom, Literal) else env[atom]

        for equation in jaxpr.eqns:
            results = self.convert(equation, [value_of(atom) for atom in equation.invars])
            env.update(zip(equation.outvars, results, strict=True))
        return [value_of(atom) for atom in jaxpr.outvars]

    def convert(self, equation: Any, inputs: list[Value]) -> list[Value]:
        name, params = equation.primitive.name, equation.params
        for key in CALLS:
            if isinstance(called := params.get(key), ClosedJaxpr):
                return self.run(called.jaxpr, [Value(np.asarray(c), np.shape(c)) for c in called.consts], inputs)
            if isinstance(called, Jaxpr) and name not in ("scan", "while"):
                return self.run(called, [], inputs)
        if name == "platform_index":  # `jax.lax.platform_dependent`: one function in several ways, of which any will do
            return [Value(np.asarray(0), ())]
        if name == "cond" and isinstance(inputs[0].data, np.ndarray):
            branch = params["branches"][int(inputs[0].data)]
            return self.run(branch.jaxpr, [Value(np.asarray(c), np.shape(c)) for c in branch.consts], inputs[1:])
        shape = equation.outvars[0].aval.shape
        static = all(_static(variable.aval.shape) for variable in equation.outvars)
        constant = all(isinstance(v.data, np.ndarray) for v in inputs) and (inputs or name == "iota")
        if static and constant and name != "broadcast_in_dim":
            return self._computed(equation, inputs)
        if name in ELEMENTWISE:
            return [self.add(ELEMENTWISE[name], inputs, _broadcast(inputs))]
        method = getattr(self, f"_{name}", None)
        if method is None:
            hint = "use --format=stablehlo"
            raise UserError(f"--format=onnx: {name}: an operation that the ONNX writer does not know; {hint}")
        avals = [atom.aval for atom in equation.invars]
        if name not in ("broadcast_in_dim", "convert_element_type", "select_n", *UNARY):
            inputs = [self.full(value, aval.shape) for value, aval in zip(inputs, avals, strict=True)]
        return [method(*inputs, **{**params, "shape": shape, "out": equation.outvars[0].aval.dtype})]

    def _computed(self, equation, inputs):
        arrays = [np.broadcast_to(v.data, atom.aval.shape) for v, atom in zip(inputs, equation.invars, strict=True)]
        found = equation.primitive.bind(*map(jax.numpy.asarray, arrays), **equation.params)
        found = found if equation.primitive.multiple_results else [found]
        return [Value(np.asarray(each), each.shape) for each in found]

    # Building blocks.

    def add(self, op: str, inputs: Sequence[Value], shape: tuple, output: str = "", **attributes: Any) -> Value:
        from onnx import helper

        output = output or f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, [self.name(v) for v in inputs], [output], **attributes))
        return Value(output, shape)

    def name(self, value: Value) -> str:
        """The name of a value in the graph; a constant is stored once."""
        from onnx import numpy_helper

        if isinstance(value.data, str):
            return value.data
        array = np.ascontiguousarray(value.data).reshape(value.data.shape)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self.stored:
            self.stored[key] = f"c{len(self.initializers)}"
            self.initializers.append(numpy_helper.from_array(array, self.stored[key]))
        return self.stored[key]

    def numbers(self, values: Sequence[int]) -> Value:
        return Value(np.array(values, np.int64), (len(values),))

    def dims(self, shape: tuple) -> Value:
        """A shape as an int64 [rank], known only at run time if it is symbolic."""
        if _static(shape):
            return self.numbers(shape)
        parts = [self.numbers([dim]) if isinstance(dim, int) else self.dim(dim) for dim in shape]
        return self.add("Concat", parts, (len(shape),), axis=0)

    def dim(self, dim: Any) -> Value:
        """A symbolic dimension, int64 [1]."""
        name = str(dim)
        if name not in self.symbols:
            raise UserError(f"--format=onnx: a dimension {name}, which the ONNX writer cannot compute")
        if name not in self.known:
            axis = self.symbols[name]
            images = Value("images", ())
            self.known[name] = self.add("Shape", [images], (1,), start=axis, end=axis + 1)
        return self.known[name]

    def full(self, value: Value, shape: tuple) -> Value:
        """The value at its whole shape."""
        if _same(value.shape, shape):
            return value
        if isinstance(value.data, np.ndarray) and _static(shape):
            return Value(np.broadcast_to(value.data, shape), shape)
        return self.add("Expand", [value, self.dims(shape)], shape)

    def reshape(self, value: Value, shape: tuple) -> Value:
        if _same(value.shape, shape):
            return value
        if isinstance(value.data, np.ndarray):
            return Value(value.data.reshape(shape), shape)
        unknown = [dim for dim in shape if not isinstance(dim, int)]
        if len(unknown) > 1:
            return self.add("Reshape", [value, self.dims(shape)], shape)
        target = self.numbers([dim if isinstance(dim, int) else -1 for dim in shape])
        return self.add("Reshape", [value, target], shape)

    def transpose(self, value: Value, order: Sequence[int]) -> Value:
        order = [int(axis) for axis in order]
        shape = tuple(value.shape[axis] for axis in order)
        if order == sorted(order):
            return value
        if isinstance(value.data, np.ndarray):
            return Value(value.data.transpose(order), shape)
        return self.add("Transpose", [value], shape, perm=order)

    # Primitives, named as in JAX. shape: of the result; out: its dtype.

    def _dim_as_value(self, *, shape, out, dim):
        return self._convert_element_type(self.reshape(self.dim(dim), ()), shape=shape, out=out)

    def _convert_element_type(self, x, *, shape, out, **_):
        from onnx import helper

        return self.add("Cast", [x], x.shape, to=helper.np_dtype_to_tensor_dtype(np.dtype(out)))

    def _iota(self, *, shape, out, dimension, **_):
        size = self.reshape(self.dim(shape[dimension]), ())
        zero, one = (Value(np.array(i, np.int64), ()) for i in (0, 1))
        counted = self.add("Range", [zero, size, one], (shape[dimension],))
        cast = self._convert_element_type(counted, shape=shape, out=out)
        return self.reshape(cast, tuple(n if axis == dimension else 1 for axis, n in enumerate(shape)))

    def _broadcast_in_dim(self, x, *_, shape, out, broadcast_dimensions, **__):
        own = [1] * len(shape)
        lacking = len(broadcast_dimensions) - len(x.shape)  # a scalar that stands for an array
        for axis, dim in zip(broadcast_dimensions[lacking:], x.shape, strict=True):
            own[int(axis)] = dim
        return self.reshape(x, tuple(own))

    def _reshape(self, x, *_, shape, out, **__):
        return self.reshape(x, shape)

    _squeeze = _expand_dims = _reshape

    def _transpose(self, x, *, shape, out, permutation):
        return self.transpose(x, permutation)

    def _concatenate(self, *inputs, shape, out, dimension):
        return self.add("Concat", inputs, shape, axis=dimension)

    def _slice(self, x, *, shape, out, start_indices, limit_indices, strides):
        sides = zip(start_indices, limit_indices, x.shape, strict=True)
        axes = [axis for axis, (start, stop, side) in enumerate(sides) if start or str(stop) != str(side)]
        steps = strides or [1] * len(x.shape)
        axes = sorted({*axes, *(axis for axis, step in enumerate(steps) if step != 1)})
        parts = [[part[axis] for axis in axes] for part in (start_indices, limit_indices)]
        inputs = [*map(self.numbers, parts), self.numbers(axes), self.numbers([steps[axis] for axis in axes])]
        return self.add("Slice", [x, *inputs], shape)

    def _gather(self, x, start, *, shape, out, dimension_numbers, slice_sizes, **params):
        """Slices, which JAX writes so where another side is symbolic: x[:, 1:] and x[:, ::2]."""
        del params
        numbers, sides = dimension_numbers, range(len(x.shape))
        known = isinstance(start.data, np.ndarray) and not numbers.operand_batching_dims
        if known and not numbers.collapsed_slice_dims:
            first = dict(zip(numbers.start_index_map, start.data.ravel().tolist(), strict=True))
            starts = [first.get(axis, 0) for axis in sides]
            limits = [begin + side if begin else side for begin, side in zip(starts, slice_sizes, strict=True)]
            return self._slice(x, shape=shape, out=out, start_indices=starts, limit_indices=limits, strides=None)
        axis = numbers.collapsed_slice_dims[0]
        whole = all(str(slice_sizes[i]) == str(x.shape[i]) for i in sides if i != axis)
        one = numbers.start_index_map == numbers.collapsed_slice_dims == (axis,)
        if known and whole and one and numbers.offset_dims == tuple(i for i in sides if i != axis):
            return self.add("Gather", [x, self.numbers(start.data.ravel().tolist())], shape, axis=axis)
        raise UserError("--format=onnx: gather: an operation that the ONNX writer does not know")

    def _pad(self, x, value, *, shape, out, padding_config):
        if any(inner for _, _, inner in padding_config) or any(min(p[:2]) < 0 for p in padding_config):
            raise UserError("--format=onnx: pad between or within: an operation that the ONNX writer does not know")
        pads = self.numbers([p[0] for p in padding_config] + [p[1] for p in padding_config])
        return self.add("Pad", [x, pads, value], shape)

    def _rsqrt(self, x, *, shape, out, **_):
        return self.add("Reciprocal", [self.add("Sqrt", [x], x.shape)], x.shape)

    def _square(self, x, *, shape, out, **_):
        return self.add("Mul", [x, x], x.shape)

    def _erfc(self, x, *, shape, out, **_):
        one = Value(np.ones((), out), ())
        return self.add("Sub", [one, self.add("Erf", [x], x.shape)], x.shape)

    def _integer_pow(self, x, *, shape, out, y):
        return self.add("Pow", [x, Value(np.array(y, out), ())], x.shape)

    def _ne(self, a, b, *, shape, out):
        return self.add("Not", [self.add("Equal", [a, b], shape)], shape)

    def _select_n(self, which, *cases, shape, out):
        if len(cases) != 2:
            raise UserError("--format=onnx: a choice among more than two arrays, which the ONNX writer does not know")
        return self.add("Where", [which, cases[1], cases[0]], _broadcast([which, *cases]))

    def _argmax(self, x, *, shape, out, axes, index_dtype):
        found = self.add("ArgMax", [x], shape, axis=axes[0], keepdims=0)
        return self._convert_element_type(found, shape=shape, out=index_dtype)

    def _dot_general(self, a, b, *, shape, out, dimension_numbers, **_):
        (sum_a, sum_b), (both_a, both_b) = dimension_numbers
        if not both_a and (sum_a, sum_b) == ((len(a.shape) - 1,), (0,)) and len(b.shape) == 2:
            return self.add("MatMul", [a, b], shape)
        free_a = [axis for axis in range(len(a.shape)) if axis not in (*sum_a, *both_a)]
        free_b = [axis for axis in range(len(b.shape)) if axis not in (*sum_b, *both_b)]
        batch = tuple(a.shape[axis] for axis in both_a)
        rows, inner, columns = (
            _product(x.shape[axis] for axis in axes) for x, axes in ((a, free_a), (a, sum_a), (b, free_b))
        )
        left = self.reshape(self.transpose(a, [*both_a, *free_a, *sum_a]), (*batch, rows, inner))
        right = self.reshape(self.transpose(b, [*both_b, *sum_b, *free_b]), (*batch, inner, columns))
        return self.reshape(self.add("MatMul", [left, right], (*batch, rows, columns)), shape)

    def _conv_general_dilated(self, x, kernel, *, shape, out, dimension_numbers, **params):
        if set(params["lhs_dilation"]) != {1} or params["batch_group_count"] != 1:
            raise UserError("--format=onnx: a transposed convolution: an operation that the ONNX writer does not know")
        x_order, kernel_order, y_order = dimension_numbers
        pads = [int(low) for low, _ in params["padding"]] + [int(high) for _, high in params["padding"]]
        y = self.add(
            "Conv",
            [self.transpose(x, x_order), self.transpose(kernel, kernel_order)],
            tuple(shape[axis] for axis in y_order),
            pads=pads,
            strides=list(params["window_strides"]),
            dilations=list(params["rhs_dilation"]),
            group=params["feature_group_count"],
        )
        return self.transpose(y, np.argsort(y_order).tolist())

    def _reduce_window_max(self, x, *, shape, out, window_dimensions, window_strides, padding, **dilations):
        if {*dilations["base_dilation"], *dilations["window_dilation"]} != {1}:
            raise UserError("--format=onnx: a dilated pooling: an operation that the ONNX writer does not know")
        pooled = [axis for axis, side in enumerate(window_dimensions) if side > 1]
        others = [axis for axis in range(len(x.shape)) if axis not in pooled]
        order = [*others, *pooled]
        y = self.transpose(x, order)
        first = _product(x.shape[axis] for axis in others[:-1])
        y = self.reshape(y, (first, x.shape[others[-1]], *(x.shape[axis] for axis in pooled)))
        pads = [int(padding[axis][side]) for side in (0, 1) for axis in pooled]
        kernel, strides = ([int(each[axis]) for axis in pooled] for each in (window_dimensions, window_strides))
        small = (*y.shape[:2], *(shape[axis] for axis in pooled))
        y = self.add("MaxPool", [y], small, kernel_shape=kernel, strides=strides, pads=pads)
        return self.transpose(self.reshape(y, tuple(shape[axis] for axis in order)), np.argsort(order).tolist())

    def _reduce(self, op, x, shape, axes):
        return self.add(op, [x, self.numbers([int(axis) for axis in axes])], shape, keepdims=0)

    def _reduce_sum(self, x, *, shape, out, axes, **_):
        return self._reduce("ReduceSum", x, shape, axes)

    def _reduce_max(self, x, *, shape, out, axes, **_):
        return self._reduce("ReduceMax", x, shape, axes)

    def _reduce_min(self, x, *, shape, out, axes, **_):
        return self._reduce("ReduceMin", x, shape, axes)


UNARY = ("rsqrt", "square", "erfc", "integer_pow")  # these, too, may stay smaller than what they are broadcast to


def _static(shape: tuple) -> bool:
    return all(isinstance(dim, int | np.integer) for dim in shape)


def _same(a: tuple, b: tuple) -> bool:
    return len(a) == len(b) and all(str(x) == str(y) for x, y in zip(a, b))


def _broadcast(values: Sequence[Value]) -> tuple:
    """The shape of values that are broadcast to each other."""
    rank = max(len(value.shape) for value in values)
    padded = [(1,) * (rank - len(value.shape)) + tuple(value.shape) for value in values]
    return tuple(next((dim for dim in dims if str(dim) != "1"), 1) for dims in zip(*padded))


def _product(dims: Any) -> Any:
    total: Any = 1
    for dim in dims:
        total = dim if str(total) == "1" else total * dim if str(dim) != "1" else total
    return total
