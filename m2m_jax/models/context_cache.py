"""The exact context cache: keys and values of finished images, computed once and kept.

The clean branch sees nothing noised and always at one timestep, so what Image-Set Attention reads of a finished image
never changes while further ones are made (`attention.layout.allowed`). Each image passes through the clean branch once
(M2M-Self) or through the projections of its tokens (M2M-DINO); every denoising step then is a pass over the image being
made alone.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from m2m_jax.models.transformer import KeptImages
from m2m_jax.models.unet import UNet


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ContextCache:
    """Finished images of b sets, as every Image-Set Attention sees them. Shapes do not change as it fills.

    Attributes:
      k_bmshd, v_bmshd: one array for each attention, in the order of `UNet.set_attentions`; m images fit in, s tokens
        each.
      count_b: int32, how many images of each set are in it.
      position_b: int32, how many images each set has: more than `count_b` where old ones were dropped.
    """

    k_bmshd: tuple[jax.Array, ...]
    v_bmshd: tuple[jax.Array, ...]
    count_b: jax.Array
    position_b: jax.Array

    @property
    def size(self) -> int:
        """How many images of a set fit in; 0 where the network has no Image-Set Attention to read them."""
        return self.k_bmshd[0].shape[1] if self.k_bmshd else 0


def empty_cache(unet: UNet, image: jax.ShapeDtypeStruct, size: int, dtype) -> ContextCache:
    """A cache without images.

    Args:
      image: shape of what `append_image` will be given.
      size: images of a set that fit in.
      dtype: what keys and values are kept in.
    """
    b, count_b = image.shape[0], jnp.zeros(image.shape[0], jnp.int32)
    # Shapes do not depend on what is kept: any will do to find them.
    nothing = ContextCache((), (), count_b, count_b)
    shapes = jax.eval_shape(lambda image: _keys_and_values(unet, nothing, image, 0), image)
    k_bmshd, v_bmshd = (tuple(jnp.zeros((b, size, *pair[i].shape[1:]), dtype) for pair in shapes) for i in (0, 1))
    return ContextCache(k_bmshd, v_bmshd, count_b, count_b)


def append_image(
    unet: UNet, cache: ContextCache, image: jax.Array, *, clean_timestep: int, append_b: jax.Array, slide: bool = False
) -> ContextCache:
    """The cache with one more image of each set.

    Args:
      image: latents [b, h, w, c] (M2M-Self) or tokens [b, s, c] of the image encoder (M2M-DINO).
      append_b: bool; sets marked False stay as they are.
      slide: a set whose part of the cache is full drops its oldest image. In M2M-Self, where clean images see those
        before them, the images that stay were computed in the presence of the dropped one: an approximation.
        Without it a full cache must not be appended to.
    """
    if slide:
        full_b = append_b & (cache.count_b == cache.size)

        def drop_oldest(x_bmshd):
            return jnp.where(full_b[:, None, None, None, None], jnp.roll(x_bmshd, -1, axis=1), x_bmshd)

        k_bmshd, v_bmshd = (tuple(map(drop_oldest, arrays)) for arrays in (cache.k_bmshd, cache.v_bmshd))
        cache = ContextCache(k_bmshd, v_bmshd, cache.count_b - full_b.astype(jnp.int32), cache.position_b)
    keys_and_values = _keys_and_values(unet, cache, image, clean_timestep)
    # Out of bounds, where nothing is appended: dropped.
    index_b = jnp.where(append_b, cache.count_b, cache.size)

    def write(kept_bmshd, new_bshd):
        rows_b = jnp.arange(index_b.shape[0])
        return kept_bmshd.at[rows_b, index_b].set(new_bshd.astype(kept_bmshd.dtype), mode="drop")

    new_k, new_v = ([pair[i] for pair in keys_and_values] for i in (0, 1))
    one_b = append_b.astype(jnp.int32)
    return ContextCache(
        tuple(map(write, cache.k_bmshd, new_k)),
        tuple(map(write, cache.v_bmshd, new_v)),
        cache.count_b + one_b,
        cache.position_b + one_b,
    )


def denoise_next(
    unet: UNet, cache: ContextCache, noised_bhwc: jax.Array, timestep: jax.Array, *, guided: bool
) -> tuple[jax.Array, jax.Array | None]:
    """Outputs of the U-Net for the next image of each set: in its context and, where `guided`, in none.

    Both stand in one batch, and the second pays for no context.

    Args:
      timestep: a scalar, what the network is told.
    """
    b = noised_bhwc.shape[0]
    rows_bhwc = jnp.concatenate([noised_bhwc, noised_bhwc]) if guided else noised_bhwc
    kept = KeptImages(cache.k_bmshd, cache.v_bmshd, cache.count_b)
    out_bhwc = unet(rows_bhwc, jnp.full(rows_bhwc.shape[0], timestep), kept)
    return out_bhwc[:b], out_bhwc[b:] if guided else None


def _keys_and_values(
    unet: UNet, cache: ContextCache, image: jax.Array, clean_timestep: int
) -> list[tuple[jax.Array, jax.Array]]:
    """Keys and values [b, s, h, d] of one more image of each set, for every Image-Set Attention."""
    position_b = cache.position_b
    if unet.config.attends_to_encoded:
        pairs = (attn2.keys_and_values(image[:, None], position_b[:, None]) for attn2 in unet.set_attentions())
        return [(k_b1shd[:, 0], v_b1shd[:, 0]) for k_b1shd, v_b1shd in pairs]
    new: list[tuple[jax.Array, jax.Array]] = []
    kept = KeptImages(cache.k_bmshd, cache.v_bmshd, cache.count_b, position_b, new)
    unet(image, jnp.full(image.shape[0], clean_timestep, jnp.float32), kept)
    return new
