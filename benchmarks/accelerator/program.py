"""A program that is measured: what it computes, of which arguments, and how these are filled. Nothing runs here.

A program takes and gives flat lists of arrays, so that its description can be written as JSON beside the executable
and nothing of the model has to be traced where it is loaded.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

NOTHING: Mapping[str, Any] = MappingProxyType({})
NOISE = np.random.default_rng(0).standard_normal(1 << 22, np.float32)  # repeated: 13 GB of draws would take a minute


@dataclasses.dataclass(frozen=True)
class Argument:
    """One array that a program is called with.

    Attributes:
      path: where it stands among the arguments, "0.params.conv_in.kernel".
      value: of every element; None: random.
      deviation: of random numbers.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    value: float | None
    deviation: float = 1.0

    def make(self, value: float | None = None) -> np.ndarray:
        """Return the array on the host. value: instead of this argument's own."""
        value = self.value if value is None else value
        if value is not None:
            return np.full(self.shape, value, self.dtype)
        if self.dtype == "uint8":
            return np.resize((NOISE * 64 + 128).clip(0, 255).astype(np.uint8), self.shape)
        return np.resize(NOISE * self.deviation, self.shape).astype(self.dtype)


@dataclasses.dataclass(frozen=True)
class Description:
    """What is known of a program without its code; can be written as JSON.

    Attributes:
      name: unique among all programs.
      carried: so many first results are the first arguments of the next call, whose memory they take.
      items: images, sets or steps that a call computes; `unit` says which.
      flops: of the model itself, without what is computed twice; 0: not counted.
      cases: {name: {path of an argument: its value}}: calls that are timed apart, with the same program.
      results: how many arrays it returns.
      loss: number of the result that must be finite; None: there is no such.
    """

    name: str
    arguments: tuple[Argument, ...]
    carried: int
    results: int
    items: int
    unit: str
    flops: float = 0.0
    cases: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    loss: int | None = None

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Description:
        """Return what `dataclasses.asdict` made JSON of."""
        arguments = tuple(Argument(**{**one, "shape": tuple(one["shape"])}) for one in values["arguments"])
        return cls(**{**values, "arguments": arguments})


@dataclasses.dataclass(frozen=True)
class Program:
    """A description and what it describes, traced: lists of arrays in, a list of arrays out."""

    description: Description
    traced: Any  # jax.stages.Traced
    trace_seconds: float


def flat(
    name: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    *,
    items: int,
    unit: str,
    flops: float = 0.0,
    carries: bool = False,
    values: Mapping[str, float] = NOTHING,
    cases: Mapping[str, Mapping[str, float]] = NOTHING,
) -> Program:
    """Return a program of a function of trees.

    Args:
      arguments: trees of ShapeDtypeStructs, with shardings.
      carries: the first result, or the result where it is no tuple, is the next call's first argument.
      values: {end of an argument's path: value of all its elements}, where that is not random.
      cases: likewise, for each case.
    """
    started = time.monotonic()
    leaves, tree = jax.tree_util.tree_flatten_with_path(arguments)
    described = tuple(_argument(_path(path), leaf, values) for path, leaf in leaves)
    carried = len(jax.tree.leaves(arguments[0])) if carries else 0
    paths: list[str] = []

    def run(*given: jax.Array) -> list[jax.Array]:
        results = function(*jax.tree.unflatten(tree, given))
        found = jax.tree_util.tree_flatten_with_path(results)[0]
        paths[:] = [_path(path) for path, _ in found]
        return [leaf for _, leaf in found]

    def of_case(ends: Mapping[str, float]) -> dict[str, float]:
        return {one.path: value for one in described for end, value in ends.items() if one.path.endswith(end)}

    traced = jax.jit(run, donate_argnums=tuple(range(carried))).trace(*(leaf for _, leaf in leaves))
    description = Description(
        name=name,
        arguments=described,
        carried=carried,
        results=len(paths),
        items=items,
        unit=unit,
        flops=flops,
        cases={case: of_case(ends) for case, ends in cases.items()},
        loss=next((i for i, path in enumerate(paths) if path.endswith(".loss")), None),
    )
    return Program(description, traced, time.monotonic() - started)


def _path(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _argument(path: str, leaf: jax.ShapeDtypeStruct, values: Mapping[str, float]) -> Argument:
    """Say how an array is filled: kernels so that activations neither grow nor vanish, moments with zeros."""
    shape, dtype = tuple(leaf.shape), str(leaf.dtype)
    value = next((value for end, value in values.items() if path.endswith(end)), None)
    deviation = 1.0
    if value is None and not (dtype.startswith(("float", "bfloat")) or dtype == "uint8"):
        value = 1.0 if dtype == "bool" else 0.0
    elif "opt_state" in path or path.endswith(".bias"):
        value = 0.0
    elif path.endswith(".scale"):
        value = 1.0
    elif path.endswith(".kernel"):
        deviation = math.prod(shape[:-1]) ** -0.5
    return Argument(path, shape, dtype, value, deviation)
