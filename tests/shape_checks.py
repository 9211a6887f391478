"""Checks of the shapes in signatures, while tests run. M2M_CHECK_SHAPES=0 goes without, to time them."""

import functools
import importlib
import importlib.abc
import operator
import os
import sys
from collections.abc import Callable
from types import UnionType
from typing import Any, Union, get_args, get_origin

import beartype
import jax
import jaxtyping
import numpy as np

# The modules whose signatures name axes.
MODULES = (
    "m2m_jax.attention.backends",
    "m2m_jax.attention.cached",
    "m2m_jax.attention.layout",
    "m2m_jax.attention.plain",
    "m2m_jax.diffusion.guidance",
    "m2m_jax.diffusion.steppers",
    "m2m_jax.models.attentions",
    "m2m_jax.models.context_cache",
    "m2m_jax.models.frozen",
    "m2m_jax.models.unet",
    "m2m_jax.tasks.objective",
)

# What they import in turn. jaxtyping would compile it anew, too, in every process, without the bytecode that is there.
LIBRARIES = ("flax.nnx", "jax.experimental.pallas.ops.tpu.splash_attention")


def install() -> None:
    """Have every call of a function in these modules checked. Before they are imported."""
    if os.environ.get("M2M_CHECK_SHAPES", "1") != "0":
        jaxtyping.install_import_hook(MODULES, "shape_checks.check")
        sys.meta_path.insert(0, _LibrariesFirst())


class _LibrariesFirst(importlib.abc.MetaPathFinder):
    """Imports libraries before the first of the modules. It stays in the list of finders, which is being walked."""

    def __init__(self) -> None:
        self._imported = False

    def find_spec(self, name: str, path: object, target: object = None) -> None:
        if name in MODULES and not self._imported:
            self._imported = True
            for library in LIBRARIES:
                importlib.import_module(library)


def check(function: Callable) -> Callable:
    """Return `function` with those of its arguments and results checked whose annotations name axes.

    Not other types: tests put doubles in the place of networks. And not constructors: JAX calls those of its trees with
    shapes and shardings in the place of arrays.
    """
    hints = {name: _of_any_array(hint) for name, hint in function.__annotations__.items() if _names_axes(hint)}
    if not hints or function.__name__ == "__init__":
        return function
    function.__annotations__ = hints
    return beartype.beartype(function)


def _names_axes(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(map(_names_axes, get_args(hint)))


def _of_any_array(hint: Any) -> Any:
    """Return a hint that takes NumPy's arrays and scalars where JAX's arrays are named: JAX does, too."""
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return hint.dtype[jax.Array | np.ndarray | np.generic, hint.dim_str]
    if not _names_axes(hint):
        return hint
    arguments = tuple(map(_of_any_array, get_args(hint)))
    if get_origin(hint) in (Union, UnionType):
        return functools.reduce(operator.or_, arguments)
    return get_origin(hint)[arguments]
