"""All that the U-Net is told beside its latents and their timesteps, as one value.

A channel is a field of `Conditioning`; each is read by attentions (`models/attentions.py`) or embedders
(`models/embedders.py`), which choose it by name. Every array has a leading axis of rows or of sets, so the value passes
through `jax.jit`, `jax.checkpoint` and `jax.lax.scan` like any other.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from m2m_jax.attention.layout import SetLayout

# Keys and values of one attention, [..., s, h, d] each.
KeysValues = tuple[jax.Array, jax.Array]
# An address names one attention of a network: the path of its block, and what kind it is there, as in
# "down_blocks.0.attentions.1.transformer_blocks.0.set".
Address = str


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens_bmsc", "keep_context_b", "keep_bm"],
    meta_fields=["layout"],
)
@dataclasses.dataclass(frozen=True)
class ImageSets:
    """How the rows of a flat batch form sets, and which images of the sets are context.

    Attributes:
      layout: the images of every set, static; row `b * layout.num_images + i` of the flat batch is image i of set b.
      tokens_bmsc: tokens of the clean images by an image encoder, where the layout says `encoded` (M2M-DINO).
      keep_context_b: bool; the noised images of a set marked False see no context (dropout for guidance). The clean
        images go on as before. Any backend takes it.
      keep_bm: bool; no image of the set sees a clean one marked False, as if it were not in the set.
    """

    layout: SetLayout
    tokens_bmsc: jax.Array | None = None
    keep_context_b: jax.Array | None = None
    keep_bm: jax.Array | None = None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["k_bmshd", "v_bmshd", "sees_bgm", "position_b"],
    meta_fields=["backend"],
)
@dataclasses.dataclass(frozen=True)
class CachedContext:
    """Finished images of b sets by their keys and values; the rows are images that see some of these.

    There are g rows a set, one after another: row `b * rows + g` belongs to set b.

    Attributes:
      k_bmshd, v_bmshd: by address; m images a set, s tokens each. Empty where there are none yet.
      sees_bgm: bool, which finished images the first g rows of each set see. Rows beyond them see none, at no cost.
      position_b: int32; given where the rows are clean images, one a set, at these positions of their sets. They see
        themselves, too, and what of the finished ones their network lets clean images see.
      backend: a name in `attention.cached.CACHED_BACKENDS`, static.
    """

    k_bmshd: dict[Address, jax.Array]
    v_bmshd: dict[Address, jax.Array]
    sees_bgm: jax.Array
    position_b: jax.Array | None = None
    backend: str = "plain"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Conditioning:
    """What a U-Net is told of each row. Every part is optional; what is None or empty is not there.

    Attributes:
      sets: context that stands in the batch or is encoded, for the attention "set".
      cached: context that is kept from before, for the same; one of both.
      text_bsc: tokens of each row's text, for the attention "text".
      globals: {name in `EMBEDDERS`: one value a row, [b, ...]}, for the residual blocks.
      references: {address of a self-attention: keys and values [b, s, h, d] that its rows see beside their own}.

    Example:
        Conditioning(text_bsc=tokens, globals={"camera": camera_b3})
    """

    sets: ImageSets | None = None
    cached: CachedContext | None = None
    text_bsc: jax.Array | None = None
    globals: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)
    references: Mapping[Address, KeysValues] = dataclasses.field(default_factory=dict)


def join(own: KeysValues, reference: KeysValues) -> KeysValues:
    """Return keys and values [..., s + s', h, d] of which a query sees all.

    Args:
      own, reference: [..., s, h, d] and [..., s', h, d]; the reference is cast to the dtype of the own.
    """
    k, v = (jnp.concatenate([x, y.astype(x.dtype)], axis=-3) for x, y in zip(own, reference, strict=True))
    return k, v
