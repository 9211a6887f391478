"""FLOPs of a program that was traced, without lowering or compiling it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

# What XLA counts an operation for each element of the result, and of sums for each of the operand. Roots, exponentials
# and the like it counts apart.
_ELEMENTWISE = {
    *("add", "add_any", "sub", "mul", "div", "rem", "neg", "abs", "sign", "max", "min", "clamp", "square"),
    *("integer_pow", "floor", "ceil", "round", "is_finite", "nextafter", "convert_element_type", "select_n"),
    *("eq", "ne", "lt", "le", "gt", "ge", "and", "or", "xor", "not", "shift_left", "shift_right_logical"),
}
_SUMS = {"reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "argmax", "argmin"}
_CUDNN = "dot_product_attention_fwd_wrapper"  # of queries [b, t, h, d] and keys [b, s, h, d], two products


def sum_of_products(jaxpr: Any) -> float:
    """Return the FLOPs of the products and convolutions of a program, those in its loops as often as they run."""
    return _sum(jaxpr, _products)


def sum_of_flops(jaxpr: Any) -> float:
    """Return all FLOPs of a program, about as XLA counts them before it optimises anything."""
    return _sum(jaxpr, lambda equation: _products(equation) + _others(equation))


def _sum(jaxpr: Any, flops: Callable[[Any], float]) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        total += flops(equation)
        for inner in _inner(equation.params):
            total += _sum(inner, flops) * equation.params.get("length", 1)
    return total


def _others(equation: Any) -> float:
    name = equation.primitive.name
    if name in _ELEMENTWISE:
        return equation.outvars[0].aval.size
    return equation.invars[0].aval.size if name in _SUMS else 0.0


def _products(equation: Any) -> float:
    name = equation.primitive.name
    shapes: list[tuple[int, ...]] = [getattr(x.aval, "shape", ()) for x in equation.invars]
    if name == "dot_general":
        contracted = equation.params["dimension_numbers"][0][0]
        return 2 * math.prod(shapes[0][axis] for axis in contracted) * equation.outvars[0].aval.size
    if name == "conv_general_dilated":
        return _convolution(shapes[0], shapes[1], equation.outvars[0].aval.shape, equation.params)
    if name == _CUDNN:
        return 4 * math.prod(shapes[0]) * shapes[1][1]
    return 0.0


def _convolution(image: tuple, kernel: tuple, result: tuple, params: dict) -> float:
    """Return the FLOPs of a convolution, without the products with its padding: 4 % of a 3x3 kernel's at 32 pixels."""
    numbers = params["dimension_numbers"]
    flops = 2.0 * result[numbers.out_spec[0]] * result[numbers.out_spec[1]] * kernel[numbers.rhs_spec[1]]
    for i, (low, _) in enumerate(params["padding"]):
        sizes = (x[spec[i + 2]] for x, spec in zip((image, kernel, result), numbers, strict=True))
        dilations = params["lhs_dilation"][i], params["rhs_dilation"][i]
        flops *= _inside(*sizes, params["window_strides"][i], low, *dilations)
    return flops


@functools.cache
def _inside(image: int, kernel: int, result: int, stride: int, low: int, dilation: int, kernel_dilation: int) -> int:
    """Return how many pairs of a result's and a kernel's place meet a value of the image, along one axis."""
    at = stride * np.arange(result)[:, None] - low + kernel_dilation * np.arange(kernel)
    return int(((at >= 0) & (at <= (image - 1) * dilation) & (at % dilation == 0)).sum())


def _inner(params: dict) -> Iterator[Any]:
    """Yield the programs that an equation holds, which it runs."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(item, "eqns"):
                yield item
            elif hasattr(getattr(item, "jaxpr", None), "eqns"):
                yield item.jaxpr
