"""Parameters as one flat dict, `{"down_blocks.0.resnets.1.conv1.kernel": array}`.

Flat string keys are what checkpoints, sharding rules, weight folders and exported programs all want, and a plain dict
is all that `jax.jit`, optax and Orbax need to know of Flax.
"""

import hashlib
from collections.abc import Callable, Collection
from typing import TypeVar

import jax
import numpy as np
from flax import nnx

from m2m_jax.core.initializers import Fresh, described, draw_params
from m2m_jax.core.keys import Domain, Stream, stream_key

Params = dict[str, jax.Array]
HostParams = dict[str, np.ndarray]
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
    graphdef, fresh = _described(build)
    return graphdef, {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in fresh.items()}


def initial(build: Callable[[nnx.Rngs], nnx.Module], seed: int, names: Collection[str] | None = None) -> HostParams:
    """Return parameters of a fresh model, in the host's memory: see `initializers.draw_params`.

    Args:
      build: the model. Parameters with initializers of another kind are drawn while it is built, of the keys that it is
        given.
      names: of those that are wanted; None: all.
    """
    fresh = _described(lambda: build(nnx.Rngs(stream_key(Domain.INITIALIZE, seed, 0, Stream.PARAMS))))[1]
    return draw_params(fresh, fresh if names is None else names, seed)


def _described(build: Callable[[], M]) -> tuple[nnx.GraphDef[M], dict[str, Fresh | jax.Array]]:
    """Return the static structure of a model, and how its parameters are distributed."""
    with described():
        graphdef, state = nnx.split(build(), nnx.Param)
    return graphdef, {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


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
