"""The exact context cache: keys and values of finished images, computed once and kept.

The clean branch sees nothing noised and always at one timestep, so what Image-Set Attention reads of a finished image
never changes while further ones are made (`attention.layout.allowed`). Each image passes through the clean branch once
(M2M-Self) or through the projections of its tokens (M2M-DINO); every denoising step then is a pass over the image being
made alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from m2m_jax.models.conditioning import Address, CachedContext, Conditioning, KeysValues
from m2m_jax.models.unet import NOTHING, UNet


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ContextCache:
    """Finished images of b sets, as every Image-Set Attention sees them. Shapes do not change as it fills.

    Attributes:
      k_bmshd, v_bmshd: by the attention's address; m images fit in, s tokens each.
      count_b: int32, how many images of each set are in it.
      position_b: int32, how many images each set has: more than `count_b` where old ones were dropped.
    """

    k_bmshd: dict[Address, jax.Array]
    v_bmshd: dict[Address, jax.Array]
    count_b: jax.Array
    position_b: jax.Array

    @property
    def size(self) -> int:
        """How many images of a set fit in; 0 where the network has no Image-Set Attention to read them."""
        return next((x.shape[1] for x in self.k_bmshd.values()), 0)

    @property
    def holds_bm(self) -> jax.Array:
        """Where an image is: bool, the first `count_b` of each set."""
        return jnp.arange(self.size)[None] < self.count_b[:, None]

    def seen_by(self, sees_bgm: jax.Array | None = None) -> CachedContext:
        """Return what the U-Net is told of it.

        Args:
          sees_bgm: bool, which of the images the rows of each set see, of those that are there; see `CachedContext`.
            None: one row a set sees all.
        """
        holds_b1m = self.holds_bm[:, None]
        return CachedContext(self.k_bmshd, self.v_bmshd, holds_b1m if sees_bgm is None else holds_b1m & sees_bgm)


def empty_cache(
    unet: UNet,
    image: jax.ShapeDtypeStruct,
    size: int,
    dtype=None,
    conditioning: Conditioning = NOTHING,
) -> ContextCache:
    """Return a cache without images.

    Args:
      image: shape of what `append_image` will be given.
      size: images of a set that fit in.
      dtype: what keys and values are kept in; None: the network's, in which they are computed.
      conditioning: shapes of what `append_image` will be given.
    """
    b, count_b = image.shape[0], jnp.zeros(image.shape[0], jnp.int32)
    # Shapes do not depend on what is kept: any will do to find them.
    nothing = ContextCache({}, {}, count_b, count_b)
    shapes = jax.eval_shape(lambda *told: _keys_and_values(unet, nothing, told[0], 0, told[1]), image, conditioning)
    k_bmshd, v_bmshd = (
        {address: jnp.zeros((b, size, *pair[i].shape[1:]), dtype or pair[i].dtype) for address, pair in shapes.items()}
        for i in (0, 1)
    )
    return ContextCache(k_bmshd, v_bmshd, count_b, count_b)


def append_image(
    unet: UNet,
    cache: ContextCache,
    image: jax.Array,
    *,
    clean_timestep: jax.Array | int,
    append_b: jax.Array,
    slide: bool = False,
    conditioning: Conditioning = NOTHING,
) -> ContextCache:
    """Return the cache with one more image of each set.

    Args:
      image: latents [b, h, w, c] (M2M-Self) or tokens [b, s, c] of the image encoder (M2M-DINO).
      clean_timestep: what the U-Net is told about the images: one number, or one a set [b].
      append_b: bool; sets marked False stay as they are.
      slide: a set whose part of the cache is full drops its oldest image. In M2M-Self, where clean images see those
        before them, the images that stay were computed in the presence of the dropped one: an approximation.
        Without it a full cache must not be appended to.
      conditioning: text, globals and references of the images, one row a set; its context is this cache.
    """
    if slide:
        full_b = append_b & (cache.count_b == cache.size)

        def drop_oldest(x_bmshd):
            return jnp.where(full_b[:, None, None, None, None], jnp.roll(x_bmshd, -1, axis=1), x_bmshd)

        k_bmshd, v_bmshd = (jax.tree.map(drop_oldest, arrays) for arrays in (cache.k_bmshd, cache.v_bmshd))
        cache = ContextCache(k_bmshd, v_bmshd, cache.count_b - full_b.astype(jnp.int32), cache.position_b)
    made = _keys_and_values(unet, cache, image, clean_timestep, conditioning)
    # Out of bounds, where nothing is appended: dropped.
    index_b = jnp.where(append_b, cache.count_b, cache.size)

    def write(kept_bmshd, new_bshd):
        rows_b = jnp.arange(index_b.shape[0])
        return kept_bmshd.at[rows_b, index_b].set(new_bshd.astype(kept_bmshd.dtype), mode="drop")

    one_b = append_b.astype(jnp.int32)
    return ContextCache(
        {address: write(kept, made[address][0]) for address, kept in cache.k_bmshd.items()},
        {address: write(kept, made[address][1]) for address, kept in cache.v_bmshd.items()},
        cache.count_b + one_b,
        cache.position_b + one_b,
    )


def denoise_next(
    unet: UNet, cache: ContextCache, noised_bhwc: jax.Array, timestep: jax.Array, *, guided: bool
) -> tuple[jax.Array, jax.Array | None]:
    """Return what the U-Net gives for the next image of each set: in its context and, where `guided`, in none.

    Both stand in one batch, one after the other for each set, and the second pays for no context.

    Args:
      timestep: a scalar, what the network is told.
    """
    rows = 2 if guided else 1
    rows_bhwc = jnp.repeat(noised_bhwc, rows, axis=0)
    conditioning = Conditioning(cached=cache.seen_by())
    out_bhwc, _ = unet(rows_bhwc, jnp.full(rows_bhwc.shape[0], timestep), conditioning)
    out_bghwc = out_bhwc.reshape(-1, rows, *out_bhwc.shape[1:])
    return out_bghwc[:, 0], out_bghwc[:, 1] if guided else None


def _keys_and_values(
    unet: UNet, cache: ContextCache, image: jax.Array, clean_timestep: jax.Array | int, conditioning: Conditioning
) -> Mapping[Address, KeysValues]:
    """Keys and values [b, s, h, d] of one more image of each set, of every Image-Set Attention."""
    attentions, position_b = unet.attentions("set"), cache.position_b
    if unet.config.attends_to_encoded:
        pairs = {
            address: attention.keys_and_values(image[:, None], position_b[:, None])
            for address, attention in attentions.items()
        }
        return {address: (k_b1shd[:, 0], v_b1shd[:, 0]) for address, (k_b1shd, v_b1shd) in pairs.items()}
    seen = dataclasses.replace(cache.seen_by(), position_b=position_b)
    timestep_b = jnp.broadcast_to(jnp.asarray(clean_timestep, jnp.float32), image.shape[:1])
    conditioning = dataclasses.replace(conditioning, cached=seen)
    made = unet(image, timestep_b, conditioning, return_keys_values=True)[1]
    return {address: made[address] for address in attentions}
