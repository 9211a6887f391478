"""Tiny models at random weights, and how the tests compile them."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from m2m_jax.attention.backends import BACKENDS, Backend
from m2m_jax.attention.splash import splash

# The kernel for TPUs as plain XLA, which computes the same on any platform.
BACKENDS.register("splash_interpreted")(Backend(functools.partial(splash, interpret=True)))
RUN_HERE = ("dense", "prefix", "splash_interpreted")

# Test programs are compiled once and run on next to nothing.
COMPILER_OPTIONS = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
quick_jit = functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)


def random_params(shapes, seed: int = 0) -> dict[str, jax.Array]:
    """Parameters without a zero, also where training starts from zeros; strong enough that the context matters."""
    rng = np.random.default_rng(seed)
    params = {}
    for name, x in shapes.items():
        kernel = (0, 1.5 / math.prod(x.shape[:-1]) ** 0.5)
        mean, std = {"bias": (0, 0.2), "scale": (1, 0.2)}.get(name.rpartition(".")[2], kernel)
        params[name] = jnp.asarray(mean + std * rng.standard_normal(x.shape), jnp.float32)
    return params


def drawn_from(params: dict[str, jax.Array]):
    """What `from_pretrained` draws by: these in the place of fresh ones."""
    return lambda names: {name: params[name] for name in names}
