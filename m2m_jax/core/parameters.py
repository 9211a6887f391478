"""Parameters as one flat dict, `{"down_blocks.0.resnets.1.conv1.kernel": array}`.

Flat string keys are what checkpoints, sharding rules, weight folders and exported programs all want, and a plain dict
is all that `jax.jit`, optax and Orbax need to know of Flax.
"""

import hashlib
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from flax import nnx

Params = dict[str, jax.Array]
M = TypeVar("M", bound=nnx.Module)


def split(model: M) -> tuple[nnx.GraphDef[M], Params]:
    """Return the static structure of a model, and its parameters."""
    graphdef, state = nnx.split(model, nnx.Param)
    return graphdef, {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(state)}


def merge(graphdef: nnx.GraphDef[M], params: Params) -> M:
    """Return the model of `split`, holding `params`; inside `jax.jit` too."""
    flat = [(_path(name), nnx.Param(value)) for name, value in params.items()]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def abstract(build: Callable[[], M]) -> tuple[nnx.GraphDef[M], dict[str, jax.ShapeDtypeStruct]]:
    """Return `split(build())` without computing anything: shapes and dtypes in the place of arrays."""
    graphdef, state = nnx.split(nnx.eval_shape(build), nnx.Param)
    leaves = ((path, leaf.get_value()) for path, leaf in nnx.to_flat_state(state))
    return graphdef, {".".join(map(str, path)): jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in leaves}


def count(params: Params) -> int:
    """Return the number of scalars."""
    return sum(x.size for x in params.values())


def fingerprint(params: Params) -> str:
    """Return the sha256 of all names, shapes and values, as float32."""
    digest = hashlib.sha256()
    for name in sorted(params):
        value = np.ascontiguousarray(params[name], "<f4")
        digest.update(f"{name} {value.shape}\n".encode())
        digest.update(value.data)
    return digest.hexdigest()


def _path(name: str) -> tuple[str | int, ...]:
    """List indices are integers to Flax."""
    return tuple(int(part) if part.isdigit() else part for part in name.split("."))
