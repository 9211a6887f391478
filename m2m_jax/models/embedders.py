"""What is told of a row as a whole, beside its timestep: each embedder registers under the name of its value.

`UNetConfig.global_embeddings` names those that a network has, and `Conditioning.globals` holds their values. Their
sum with the timestep's embedding enters every residual block. The last layer of each begins at zero, so that a network
which gets one computes what it did before.

A new one is a class in a file of its own in this package:

    @EMBEDDERS.register("pose")
    class PoseEmbedder(Embedder):
        width = 34

        def __init__(self, time_embed_dim: int, *, rngs: nnx.Rngs): ...

        def __call__(self, pose_bkc: jax.Array) -> jax.Array: ...  # [b, time_embed_dim], float32

In a run whose `config.model.global_embeddings` names it, its values are those of the
data's attribute of that name (`RecordSource.attributes`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from m2m_jax.core.errors import UserError
from m2m_jax.core.registry import Registry
from m2m_jax.models.layers import Linear, zeros


class Embedder(nnx.Module):
    """Turns one value a row, [b, width], into the global embedding, [b, time_embed_dim].

    Attributes:
      width: numbers of a value.
    """

    width: ClassVar[int]

    def __init__(self, time_embed_dim: int, *, rngs: nnx.Rngs):
        raise NotImplementedError

    def __call__(self, value_bc: jax.Array) -> jax.Array:
        raise NotImplementedError


EMBEDDERS = Registry[type[Embedder]]("global embedding", package="m2m_jax.models")


class Perceptron(Embedder):
    """Two layers from features [b, in_channels] to the global embedding; the second begins at zero."""

    def __init__(self, in_channels: int, time_embed_dim: int, *, rngs: nnx.Rngs):
        self.linear_1 = Linear(in_channels, time_embed_dim, dtype=jnp.float32, rngs=rngs)
        self.linear_2 = Linear(time_embed_dim, time_embed_dim, kernel_init=zeros, dtype=jnp.float32, rngs=rngs)

    def __call__(self, features_bc: jax.Array) -> jax.Array:
        return self.linear_2(jax.nn.silu(self.linear_1(features_bc)))


@EMBEDDERS.register("camera")
class CameraEmbedder(Perceptron):
    """Camera on a sphere around the subject, [b, 3]: elevation and azimuth in radians, and distance.

    Features as in Zero-1-to-3 (Liu et al., arXiv 2303.11328): the azimuth enters by sine and cosine.
    """

    width = 3

    def __init__(self, time_embed_dim: int, *, rngs: nnx.Rngs):
        super().__init__(4, time_embed_dim, rngs=rngs)

    def __call__(self, camera_b3: jax.Array) -> jax.Array:
        elevation_b, azimuth_b, distance_b = camera_b3.astype(jnp.float32).T
        features = (elevation_b, jnp.sin(azimuth_b), jnp.cos(azimuth_b), distance_b)
        return super().__call__(jnp.stack(features, axis=-1))


def embed_globals(embedders: Mapping[str, Embedder], values: Mapping[str, jax.Array]) -> jax.Array | float:
    """Return the sum [b, time_embed_dim] of what each value is embedded as; 0 where there is none.

    Raises:
      UserError: the values are not those that the network embeds.
    """
    if embedders.keys() != values.keys():
        wanted, given = (", ".join(sorted(names)) or "none" for names in (embedders, values))
        raise UserError(f"the network embeds these global values: {wanted}; Conditioning.globals holds: {given}")
    return sum(embedders[name](values[name]) for name in sorted(embedders))
