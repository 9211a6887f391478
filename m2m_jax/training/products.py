"""FLOPs of the matrix products and convolutions of a program that was traced: exact, and without compiling it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

_CUDNN = "dot_product_attention_fwd_wrapper"  # of queries [b, t, h, d] and keys [b, s, h, d], two products


def sum_of_products(jaxpr: Any) -> float:
    """Return the FLOPs of the products and convolutions of a program, those in its loops as often as they run."""
    total = 0.0
    for equation in jaxpr.eqns:
        total += _of_equation(equation)
        for inner in _inner(equation.params):
            total += sum_of_products(inner) * equation.params.get("length", 1)
    return total


def _of_equation(equation: Any) -> float:
    name = equation.primitive.name
    shapes: list[tuple[int, ...]] = [getattr(x.aval, "shape", ()) for x in equation.invars]
    if name == "dot_general":
        contracted = equation.params["dimension_numbers"][0][0]
        return 2 * math.prod(shapes[0][axis] for axis in contracted) * equation.outvars[0].aval.size
    if name == "conv_general_dilated":
        of_output = shapes[1][equation.params["dimension_numbers"].rhs_spec[0]]
        return 2 * equation.outvars[0].aval.size * math.prod(shapes[1]) / of_output
    if name == _CUDNN:
        return 4 * math.prod(shapes[0]) * shapes[1][1]
    return 0.0


def _inner(params: dict) -> Iterator[Any]:
    """Yield the programs that an equation holds, which it runs."""
    for name, value in params.items():
        if name in ("jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd"):
            continue
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(item, "eqns"):
                yield item
            elif hasattr(getattr(item, "jaxpr", None), "eqns"):
                yield item.jaxpr
