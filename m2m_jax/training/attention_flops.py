"""FLOPs of attention: of what its mask allows, and of what a backend computes. XLA sees none of a kernel's."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from m2m_jax.attention.backends import BACKENDS
from m2m_jax.attention.layout import SetLayout
from m2m_jax.attention.mesh import WITHIN_IMAGES, axes_of_heads_and_tokens
from m2m_jax.attention.splash import visited_pairs
from m2m_jax.models.attentions import ONE_IMAGE
from m2m_jax.models.unet import UNetConfig
from m2m_jax.training.products import sum_of_products


@dataclasses.dataclass(frozen=True)
class AttentionFlops:
    """FLOPs of the two matrix products of attention, forward, for one set, on all devices that share the set.

    Attributes:
      allowed: of Image-Set Attention, for the pairs of images that the mask allows.
      executed: of Image-Set Attention, for the pairs that the backend computes.
      within_images: of self-attention, for the pairs that the backend computes.
      calls: how many attentions of both kinds the network has.
    """

    allowed: float = 0.0
    executed: float = 0.0
    within_images: float = 0.0
    calls: int = 0


def attention_flops(
    config: UNetConfig, num_images: int, side: int, tokens: int | None, mesh: AbstractMesh
) -> AttentionFlops:
    """Return the FLOPs of attention for a set of images in training.

    Args:
      side: height and width of the latents.
      tokens: how many an image encoder makes of an image; None: the network's own features are attended to.
      mesh: devices; its axes may split a set, see `attention/mesh.py`.
    """
    layout = SetLayout.training(num_images, config.clean_sees, config.attends_to_encoded)
    has_sets = "set" in config.attentions
    total = AttentionFlops()
    for count, t, channels, num_heads in attentions(config, side):
        s = tokens or t
        split = axes_of_heads_and_tokens(mesh, num_heads, t)
        heads, rows = (math.prod(mesh.shape[axis] for axis in axes) for axes in split)
        devices = math.prod(mesh.shape[axis] for axis in WITHIN_IMAGES) // heads  # that compute a head
        a_pair = count * 4 * channels  # of tokens: two products of two FLOPs a channel
        total = AttentionFlops(
            total.allowed + has_sets * a_pair * int(layout.mask_qk().sum()) * t * s,
            total.executed + has_sets * a_pair * devices * _computed_pairs(config, layout, t // rows, s),
            total.within_images
            + a_pair * devices * layout.num_images * _computed_pairs(config, ONE_IMAGE, t // rows, t),
            total.calls + count * (1 + has_sets),
        )
    return total


def attentions(config: UNetConfig, side: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (transformer blocks, tokens of an image, channels, heads) of each level that has any."""
    last = len(config.block_out_channels) - 1
    for level, channels in enumerate(config.block_out_channels):
        attends = config.down_block_types[level] == "CrossAttnDownBlock2D"
        blocks = attends * (2 * config.layers_per_block + 1) + (level == last)  # down and up; the middle's is the last
        if blocks:
            count = blocks * config.transformer_layers_per_block
            yield count, (side // 2**level) ** 2, channels, config.num_attention_heads[level]


def _computed_pairs(config: UNetConfig, layout: SetLayout, t: int, s: int) -> float:
    """Return how many pairs of a query's and a key's token the backend multiplies, for one head."""
    if config.attention_backend == "splash":
        return visited_pairs(layout, t, s)
    # cuDNN computes all of the slices that it is given, which are those of plain XLA.
    backend = BACKENDS["prefix" if config.attention_backend == "prefix_cudnn" else config.attention_backend]
    shapes = [
        jax.ShapeDtypeStruct((1, images, n, 1, 1), jnp.float32)
        for images, n in ((layout.num_images, t), (len(layout.clean), s), (len(layout.clean), s))
    ]
    return sum_of_products(jax.make_jaxpr(lambda q, k, v: backend(q, k, v, layout))(*shapes).jaxpr) / 4
