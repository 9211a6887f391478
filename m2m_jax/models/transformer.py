"""The transformer blocks of Stable Diffusion's U-Net, with the attentions that the model's config names."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from m2m_jax.models.attentions import ATTENTIONS, Attention, parameter_names
from m2m_jax.models.conditioning import Address, Conditioning, KeysValues
from m2m_jax.models.layers import Conv, GroupNorm, LayerNorm, Linear, gelu, zeros

if TYPE_CHECKING:
    from m2m_jax.models.unet_config import UNetConfig


class FeedForward(nnx.Module):
    """GEGLU with the exact (erf) gelu; four times the width."""

    def __init__(self, channels: int, *, dtype, rngs: nnx.Rngs):
        self.up = Linear(channels, channels * 8, dtype=dtype, rngs=rngs)
        self.down = Linear(channels * 4, channels, dtype=dtype, rngs=rngs)

    def __call__(self, x_btc: jax.Array) -> jax.Array:
        hidden, gate = jnp.split(self.up(x_btc), 2, axis=-1)
        return self.down(hidden * gelu(gate))


class TransformerBlock(nnx.Module):
    """Attentions in the order of `config.attentions`, and a feed-forward, each after a norm and added to its input."""

    def __init__(self, channels: int, num_heads: int, config: UNetConfig, *, dtype, rngs: nnx.Rngs):
        norm = functools.partial(LayerNorm, channels, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.names = tuple((kind, *names) for kind, names in parameter_names(config.attentions).items())
        for kind, attention_name, norm_name in self.names:
            setattr(self, norm_name, norm())
            attention = ATTENTIONS.choose(kind)(channels, num_heads, config, dtype=dtype, rngs=rngs)
            setattr(self, attention_name, attention)
        self.norm3 = norm()
        self.ff = FeedForward(channels, dtype=dtype, rngs=rngs)

    def attentions(self) -> dict[str, Attention]:
        """Return {kind: attention}, in order."""
        return {kind: getattr(self, name) for kind, name, _ in self.names}

    def __call__(
        self, x_btc: jax.Array, conditioning: Conditioning, address: Address
    ) -> tuple[jax.Array, dict[Address, KeysValues]]:
        """Return the tokens, and the keys and values that each attention made. address: of the block."""
        keys_values = {}
        for kind, attention_name, norm_name in self.names:
            normed_btc, own_address = getattr(self, norm_name)(x_btc), f"{address}.{kind}"
            out_btc, made = getattr(self, attention_name)(normed_btc, conditioning, own_address)
            x_btc = x_btc + out_btc
            if made is not None:
                keys_values[own_address] = made
        return x_btc + self.ff(self.norm3(x_btc)), keys_values


class SpatialTransformer(nnx.Module):
    """Transformer blocks over the pixels of a feature map: diffusers' Transformer2DModel."""

    def __init__(self, channels: int, num_heads: int, config: UNetConfig, *, dtype, rngs: nnx.Rngs):
        self.norm = GroupNorm(channels, config.norm_num_groups, epsilon=1e-6, dtype=dtype, rngs=rngs)
        project: Callable[..., nnx.Linear | nnx.Conv] = functools.partial(Linear, channels, channels)
        if not config.use_linear_projection:
            project = functools.partial(Conv, channels, channels, (1, 1))
        self.proj_in = project(dtype=dtype, rngs=rngs)
        blocks = range(config.transformer_layers_per_block)
        self.transformer_blocks = nnx.List(
            [TransformerBlock(channels, num_heads, config, dtype=dtype, rngs=rngs) for _ in blocks]
        )
        self.proj_out = project(kernel_init=zeros, dtype=dtype, rngs=rngs)

    def blocks(self, address: Address) -> dict[Address, TransformerBlock]:
        """Return {address: transformer block}. address: of this module."""
        return {f"{address}.transformer_blocks.{i}": block for i, block in enumerate(self.transformer_blocks)}

    def __call__(
        self, x_bhwc: jax.Array, conditioning: Conditioning, address: Address
    ) -> tuple[jax.Array, dict[Address, KeysValues]]:
        """Return the feature map, and the keys and values that each attention made. address: of this module."""
        h = self.proj_in(self.norm(x_bhwc))
        h_btc = h.reshape(h.shape[0], -1, h.shape[-1])
        keys_values: dict[Address, KeysValues] = {}
        for block_address, block in self.blocks(address).items():
            h_btc, made = block(h_btc, conditioning, block_address)
            keys_values |= made
        return x_bhwc + self.proj_out(h_btc.reshape(x_bhwc.shape)), keys_values
