"""The exact context cache: keys and values of finished images, computed once and kept.

The clean branch sees nothing noised and always at one timestep, so what Image-Set Attention reads of a finished image
never changes while further ones are made (`attention.layout.allowed`). Each image passes through the clean branch once
(M2M-Self) or through the projections of its tokens (M2M-DINO); every denoising step then is a pass over the image being
made alone. Guidance may want the same images noised as well (`diffusion.guidance.Branch`): these are kept beside the
clean ones, each noise level as if it were alone.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Real

from m2m_jax.diffusion.guidance import EVERYTHING, NONE, Branch
from m2m_jax.models.conditioning import Address, CachedContext, Conditioning, KeysValues
from m2m_jax.models.unet import NOTHING, UNet


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Text:
    """What captions are to the network.

    Attributes:
      caption_bsc: tokens of each row's caption.
      empty_1sc: tokens of the empty text.
    """

    caption_bsc: Float[jax.Array, "b s c"]
    empty_1sc: Float[jax.Array, "1 s c"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["k_bmshd", "v_bmshd", "count_b", "position_b"],
    meta_fields=["levels"],
)
@dataclasses.dataclass(frozen=True)
class ContextCache:
    """Finished images of b sets, as every Image-Set Attention sees them. Shapes do not change as it fills.

    Attributes:
      k_bmshd, v_bmshd: by the attention's address; m slots, s tokens each. Image i stands at noise level l in slot
        `i * levels + l`.
      count_b: int32, how many images of each set are in it.
      position_b: int32, how many images each set has: more than `count_b` where old ones were dropped.
      levels: at how many noise levels each image is kept; static.
    """

    k_bmshd: dict[Address, jax.Array]
    v_bmshd: dict[Address, jax.Array]
    count_b: jax.Array
    position_b: jax.Array
    levels: int = 1

    @property
    def size(self) -> int:
        """Return how many images of a set fit in; 0 where the network has no Image-Set Attention to read them."""
        return next((x.shape[1] // self.levels for x in self.k_bmshd.values()), 0)

    def sees_bm(self, branch: Branch, level: int) -> Bool[jax.Array, "b m"]:
        """Return which slots a branch sees: bool. level: number of the branch's noise level."""
        slot_m, count_b1 = jnp.arange(self.size * self.levels), self.count_b[:, None]

        def bound(given: int | None, default: jax.Array | int) -> jax.Array | int:
            return default if given is None else jnp.maximum(count_b1 + given, 0) if given < 0 else given

        first, end = bound(branch.images[0], 0), jnp.minimum(bound(branch.images[1], count_b1), count_b1)
        image_1m = slot_m[None] // self.levels
        return (first <= image_1m) & (image_1m < end) & (slot_m[None] % self.levels == level)


def empty_cache(
    unet: UNet,
    image: jax.ShapeDtypeStruct,
    size: int,
    dtype=None,
    conditioning: Conditioning = NOTHING,
    levels: int = 1,
) -> ContextCache:
    """Return a cache without images.

    Args:
      image: shape of what `append_image` will be given.
      size: images of a set that fit in.
      dtype: what keys and values are kept in; None: the network's, in which they are computed.
      conditioning: shapes of what `append_image` will be given.
      levels: at how many noise levels each image is kept.
    """
    b, count_b = image.shape[0], jnp.zeros(image.shape[0], jnp.int32)
    # Shapes do not depend on what is kept: any will do to find them.
    nothing = ContextCache({}, {}, count_b, count_b)
    shapes = jax.eval_shape(lambda *told: _keys_and_values(unet, nothing, told[0], 0, 0, told[1]), image, conditioning)
    k_bmshd, v_bmshd = (
        {
            address: jnp.zeros((b, size * levels, *pair[i].shape[1:]), dtype or pair[i].dtype)
            for address, pair in shapes.items()
        }
        for i in (0, 1)
    )
    return ContextCache(k_bmshd, v_bmshd, count_b, count_b, levels)


def append_image(
    unet: UNet,
    cache: ContextCache,
    image: Float[jax.Array, "b ..."],
    *,
    clean_timestep: jax.Array | int,
    append_b: Bool[jax.Array, " b"],
    slide: bool = False,
    conditioning: Conditioning = NOTHING,
    noised: Sequence[tuple[jax.Array, jax.Array | int]] = (),
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
      noised: the image at each further level of the cache, and what the U-Net is told about it there.
    """
    if slide:
        full_b = append_b & (cache.count_b == cache.size)

        def drop_oldest(x_bmshd):
            return jnp.where(full_b[:, None, None, None, None], jnp.roll(x_bmshd, -cache.levels, axis=1), x_bmshd)

        k_bmshd, v_bmshd = (jax.tree.map(drop_oldest, arrays) for arrays in (cache.k_bmshd, cache.v_bmshd))
        count_b = cache.count_b - full_b.astype(jnp.int32)
        cache = dataclasses.replace(cache, k_bmshd=k_bmshd, v_bmshd=v_bmshd, count_b=count_b)
    k_bmshd, v_bmshd, rows_b = dict(cache.k_bmshd), dict(cache.v_bmshd), jnp.arange(append_b.shape[0])
    for level, (at_level, timestep) in enumerate([(image, clean_timestep), *noised]):
        # Out of bounds, where nothing is appended: dropped.
        slot_b = jnp.where(append_b, cache.count_b, cache.size) * cache.levels + level
        made = _keys_and_values(unet, cache, at_level, level, timestep, conditioning)
        for address, pair in made.items():
            for kept, new_bshd in zip((k_bmshd, v_bmshd), pair, strict=True):
                new_bshd = new_bshd.astype(kept[address].dtype)
                kept[address] = kept[address].at[rows_b, slot_b].set(new_bshd, mode="drop")
    one_b = append_b.astype(jnp.int32)
    return dataclasses.replace(
        cache,
        k_bmshd=k_bmshd,
        v_bmshd=v_bmshd,
        count_b=cache.count_b + one_b,
        position_b=cache.position_b + one_b,
    )


def denoise_next(
    unet: UNet,
    noised_bhwc: Float[jax.Array, "b h w c"],
    timestep: Real[jax.Array, ""],
    branches: Sequence[Branch],
    *,
    cache: ContextCache | None = None,
    levels: Sequence[float] = (0.0,),
    text: Text | None = None,
    globals_bc: Mapping[str, jax.Array] = MappingProxyType({}),
) -> Float[jax.Array, "b g h w c"]:
    """Return what the U-Net gives for the next image of each set, under each branch: [b, g, h, w, c].

    All branches stand in one batch, those of a set one after another. Branches share the keys and values of a set, and
    those that see no image pay for none.

    Args:
      timestep: a scalar, what the network is told.
      branches: g of them.
      cache: finished images of each set, where the network attends to sets.
      levels: the noise level of the images in each of the cache's levels.
      text: where the network attends to text.
      globals_bc: {name: value of the next image of each set}, the same under each branch.
    """
    b, g = noised_bhwc.shape[0], len(branches)  # b may be a symbol, in an export
    seeing = [branch for branch in branches if cache is not None and branch.images != NONE]
    rows = [*seeing, *(branch for branch in branches if branch not in seeing)]  # those that see nothing come last
    cached = text_rsc = None
    if cache is not None and cache.size:
        sees_bm = [cache.sees_bm(branch, levels.index(branch.level)) for branch in seeing]
        nobody_bgm = jnp.zeros((b, 0, cache.size * cache.levels), bool)
        cached = CachedContext(cache.k_bmshd, cache.v_bmshd, jnp.stack(sees_bm, axis=1) if sees_bm else nobody_bgm)
    if text is not None:
        empty_bsc = jnp.broadcast_to(text.empty_1sc, text.caption_bsc.shape)
        text_bgsc = jnp.stack([text.caption_bsc if branch.text else empty_bsc for branch in rows], axis=1)
        text_rsc = jax.lax.collapse(text_bgsc, 0, 2)

    def in_each_branch(x: jax.Array) -> jax.Array:
        return jax.lax.collapse(jnp.stack([x] * g, axis=1), 0, 2)

    noised_rhwc = in_each_branch(noised_bhwc)
    timestep_r = jnp.full(noised_rhwc.shape[0], timestep)
    globals_rc = {name: in_each_branch(value_bc) for name, value_bc in globals_bc.items()}
    conditioning = Conditioning(cached=cached, text_bsc=text_rsc, globals=globals_rc)
    out_rhwc, _ = unet(noised_rhwc, timestep_r, conditioning)
    out_bghwc = out_rhwc.reshape(b, g, *out_rhwc.shape[1:])
    if rows == list(branches):
        return out_bghwc
    return out_bghwc[:, np.array([rows.index(branch) for branch in branches])]


def _keys_and_values(
    unet: UNet,
    cache: ContextCache,
    image: jax.Array,
    level: int,
    timestep: jax.Array | int,
    conditioning: Conditioning,
) -> Mapping[Address, KeysValues]:
    """Return keys and values [b, s, h, d] of one more image of each set at a level, of every Image-Set Attention."""
    attentions: dict[Address, Any] = unet.attentions("set")  # ImageSetAttention, or what is registered in its place
    position_b = cache.position_b
    if unet.config.attends_to_encoded:
        pairs = {
            address: attention.keys_and_values(image[:, None], position_b[:, None])
            for address, attention in attentions.items()
        }
        return {address: (k_b1shd[:, 0], v_b1shd[:, 0]) for address, (k_b1shd, v_b1shd) in pairs.items()}
    sees_b1m = cache.sees_bm(EVERYTHING, level)[:, None]
    seen = CachedContext(cache.k_bmshd, cache.v_bmshd, sees_b1m, position_b)
    timestep_b = jnp.broadcast_to(jnp.asarray(timestep, jnp.float32), image.shape[:1])
    conditioning = dataclasses.replace(conditioning, cached=seen)
    made = unet(image, timestep_b, conditioning, return_keys_values=True)[1]
    return {address: made[address] for address in attentions}
