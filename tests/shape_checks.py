"""Checks of the shapes in signatures, while tests run. M2M_CHECK_SHAPES=0 goes without, to time them."""

import importlib
import importlib.abc
import os
import sys
from collections.abc import Callable

import beartype
import jaxtyping

# The modules whose signatures name axes. Those of the others would be checked too, as far as types go.
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

_beartype = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))  # an int is a float, too


def install() -> None:
    """Have every call of a function in these modules checked. Before they are imported."""
    if os.environ.get("M2M_CHECK_SHAPES", "1") != "0":
        jaxtyping.install_import_hook(MODULES, "shape_checks.check")
        sys.meta_path.insert(0, _LibrariesFirst())


class _LibrariesFirst(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: object, target: object = None) -> None:
        if name in MODULES:
            sys.meta_path.remove(self)
            for library in LIBRARIES:
                importlib.import_module(library)


def check(function: Callable) -> Callable:
    """Return `function` with its arguments and result checked.

    Not constructors: JAX calls those of its trees with shapes and shardings in the place of arrays, and those of
    networks name a type that only a type checker imports.
    """
    return function if function.__name__ == "__init__" else _beartype(function)
