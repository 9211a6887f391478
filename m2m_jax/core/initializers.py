"""How fresh parameters are distributed, and drawing them on the host: each by its name, without a compiled program."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
import os
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m2m_jax.core.keys import Domain, Stream, named_generator

_PIECE = 1 << 16  # numbers that are drawn at once: they stay in a cache while those beyond the cut are drawn again
_CUT = 2.0  # deviations beyond which a normal distribution is cut, as Flax's initializers have it
_DEVIATION_OF_CUT = 0.87962566103423978  # of the standard normal distribution, cut there

_described = contextvars.ContextVar("described", default=False)


@dataclasses.dataclass(frozen=True)
class Initializer:
    """A distribution of fresh parameters, wherever Flax wants an initializer.

    Called by a module it draws by JAX, as Flax's own. While a module is described it computes nothing and returns a
    `Fresh`, so that a network of any size is described in a second, and drawn later, by `draw_params`.

    Attributes:
      mean: of the numbers.
      scale: the deviation of a parameter of a shape, before the cut; None: all are the mean.
      cut: whether numbers further than twice the scale from the mean are drawn again.

    Example:
        nnx.Linear(3, 5, kernel_init=lecun_normal, bias_init=zeros, rngs=nnx.Rngs(0))
    """

    mean: float = 0.0
    scale: Callable[[tuple[int, ...]], float] | None = None
    cut: bool = True

    def __call__(self, key: Any, shape: tuple[int, ...], dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        """Return a parameter, as Flax asks for it. key: not used where all numbers are the mean."""
        if _described.get():
            return Fresh(shape, dtype, self)  # type: ignore[return-value]  # stands for one
        if self.scale is None:
            return jnp.full(shape, self.mean, dtype)
        draw = jax.random.truncated_normal(key, -_CUT, _CUT, shape) if self.cut else jax.random.normal(key, shape)
        return (self.mean + self.scale(shape) * draw).astype(dtype)

    def draw(self, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Return a parameter, float32, on the host."""
        if self.scale is None:
            return np.full(shape, self.mean, np.float32)
        flat = np.empty(math.prod(shape), np.float32)
        scale = np.float32(self.scale(shape))
        for begin in range(0, flat.size, _PIECE):
            piece = flat[begin : begin + _PIECE]
            generator.standard_normal(dtype=np.float32, out=piece)
            beyond = np.flatnonzero(np.abs(piece) > _CUT) if self.cut else np.empty(0, np.intp)
            while beyond.size:
                piece[beyond] = generator.standard_normal(beyond.size, np.float32)
                beyond = beyond[np.abs(piece[beyond]) > _CUT]
            piece *= scale
            if self.mean:
                piece += np.float32(self.mean)
        return flat.reshape(shape)


class Fresh(jax.ShapeDtypeStruct):
    """What a described module has in the place of a parameter: shape, dtype, and how it is distributed."""

    def __init__(self, shape: tuple[int, ...], dtype: jax.typing.DTypeLike, initializer: Initializer):
        super().__init__(shape, dtype)
        self.initializer = initializer


def _by_inputs(shape: tuple[int, ...]) -> float:
    """Return the scale of a kernel [..., in, out] at which outputs vary as much as inputs (LeCun et al., 1998)."""
    return math.prod(shape[:-1]) ** -0.5 / _DEVIATION_OF_CUT


zeros = Initializer()
ones = Initializer(mean=1.0)
lecun_normal = Initializer(scale=_by_inputs)
embedding = Initializer(scale=lambda shape: shape[-1] ** -0.5, cut=False)  # of a table [rows, channels]
token = Initializer(scale=lambda shape: 0.02)


@contextlib.contextmanager
def described() -> Iterator[None]:
    """Within it a module is made without its numbers: each `Initializer` returns what it would draw."""
    before = _described.set(True)
    try:
        yield
    finally:
        _described.reset(before)


def draw_params(fresh: dict[str, Fresh | jax.Array], names: Collection[str], seed: int) -> dict[str, np.ndarray]:
    """Return fresh parameters of these names, float32 in the host's memory.

    Each depends on the seed, its name and its shape, and on nothing else: not on what else is drawn, the platform or
    the number of devices.

    Args:
      fresh: {name: how it is distributed, or, of a module with initializers of another kind, what it drew}.
    """

    def draw(name: str) -> np.ndarray:
        value = fresh[name]
        if not isinstance(value, Fresh):
            return np.asarray(value)
        generator = named_generator(Domain.INITIALIZE, seed, Stream.PARAMS, name)
        return value.initializer.draw(generator, value.shape)

    # The largest first, or the last thread would be left with one.
    order = sorted(names, key=lambda name: -math.prod(fresh[name].shape))
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # NumPy draws without the interpreter's lock
        drawn = dict(zip(order, threads.map(draw, order), strict=True))
    return {name: drawn[name] for name in names}
