"""The Stable Diffusion U-Net over sets of images. Structure and names follow diffusers' UNet2DConditionModel."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Bool, Float, Real

from m2m_jax.attention.layout import SetLayout
from m2m_jax.core.parameters import abstract
from m2m_jax.models.attentions import Attention
from m2m_jax.models.conditioning import Address, Conditioning, ImageSets, KeysValues
from m2m_jax.models.embedders import EMBEDDERS, Embedder, embed_globals
from m2m_jax.models.layers import (
    Conv3x3,
    Downsample,
    GroupNorm,
    ResnetBlock,
    TimestepEmbedding,
    Upsample,
    timestep_features,
    zeros,
)
from m2m_jax.models.precision import products_in
from m2m_jax.models.remat import REMAT
from m2m_jax.models.transformer import SpatialTransformer, TransformerBlock
from m2m_jax.models.unet_config import UNetConfig

# Modules that compute in float32 whatever `UNetConfig.dtype` is: what bfloat16 rounds off the output at a high noise
# level is many times as much of the clean image, and of a difference of guidance.
IN_FLOAT32 = ("time_embedding.", "global_embedders.", "conv_norm_out.", "conv_out.")
NOTHING = Conditioning()


class UNetLevel(nnx.Module):
    """The residual and transformer blocks of one resolution on the way down, in the middle or on the way up.

    attends: of each residual block, whether a transformer follows. Where no block of the level has one, there is none.
    """

    def __init__(self, in_channels: list[int], out_channels: int, attends: list[bool], *, resnet, transformer):
        self.resnets = nnx.List([resnet(channels, out_channels) for channels in in_channels])
        self.attentions = nnx.List([transformer() for attend in attends if attend])
        self.downsamplers: nnx.List[Downsample] = nnx.List([])
        self.upsamplers: nnx.List[Upsample] = nnx.List([])


class UNet(nnx.Module):
    """Predicts the schedule's target for noised latents, in the context of the clean images of their sets, or of text.

    The conditioning channels stay apart: image sets, token sequences and references enter attentions of their own, and
    what is global (the timestep, and `config.global_embeddings`) enters the residual blocks as one embedding.

    Example:
        unet = UNet(UNetConfig(attentions=("self", "text"), cross_attention_dim=1024), rngs=nnx.Rngs(0))
        prediction_bhwc, _ = unet(latents_bhwc, timestep_b, Conditioning(text_bsc=tokens_bsc))
    """

    def __init__(self, config: UNetConfig, *, rngs: nnx.Rngs):
        c, dtype = config, jnp.dtype(config.dtype)
        time_embed_dim = c.block_out_channels[0] * 4
        resnet = functools.partial(
            ResnetBlock,
            norm_num_groups=c.norm_num_groups,
            norm_eps=c.norm_eps,
            time_embed_dim=time_embed_dim,
            dtype=dtype,
            rngs=rngs,
        )

        def level(in_channels: list[int], index: int, attends: list[bool]) -> UNetLevel:
            channels, heads = c.block_out_channels[index], c.num_attention_heads[index]
            transformer = functools.partial(SpatialTransformer, channels, heads, c, dtype=dtype, rngs=rngs)
            return UNetLevel(in_channels, channels, attends, resnet=resnet, transformer=transformer)

        self.config = config
        self.conv_in = Conv3x3(c.in_channels, c.block_out_channels[0], dtype=dtype, rngs=rngs)
        self.time_embedding = TimestepEmbedding(c.block_out_channels[0], time_embed_dim, dtype=jnp.float32, rngs=rngs)

        skips = [c.block_out_channels[0]]
        down_blocks, last = [], len(c.block_out_channels) - 1
        for i, channels in enumerate(c.block_out_channels):
            attends = [c.down_block_types[i] == "CrossAttnDownBlock2D"] * c.layers_per_block
            block = level([skips[-1]] + [channels] * (c.layers_per_block - 1), i, attends)
            skips += [channels] * c.layers_per_block
            if i < last:
                block.downsamplers = nnx.List([Downsample(channels, padding=1, dtype=dtype, rngs=rngs)])
                skips.append(channels)
            down_blocks.append(block)
        self.down_blocks = nnx.List(down_blocks)

        self.mid_block = level([c.block_out_channels[-1]] * 2, last, [True])

        up_blocks, previous = [], c.block_out_channels[-1]
        for i in reversed(range(len(c.block_out_channels))):
            channels = c.block_out_channels[i]
            attends = [c.down_block_types[i] == "CrossAttnDownBlock2D"] * (c.layers_per_block + 1)
            inputs = [x + skips.pop() for x in [previous] + [channels] * c.layers_per_block]
            block = level(inputs, i, attends)
            if i > 0:
                block.upsamplers = nnx.List([Upsample(channels, dtype=dtype, rngs=rngs)])
            previous = channels
            up_blocks.append(block)
        self.up_blocks = nnx.List(up_blocks)

        in_float32: dict[str, Any] = {"dtype": jnp.float32, "rngs": rngs}
        self.conv_norm_out = GroupNorm(previous, c.norm_num_groups, epsilon=c.norm_eps, **in_float32)
        self.conv_out = Conv3x3(previous, c.out_channels, kernel_init=zeros, **in_float32)
        embedders = {name: EMBEDDERS.choose(name)(time_embed_dim, rngs=rngs) for name in c.global_embeddings}
        self.global_embedders: nnx.Dict[Embedder] = nnx.Dict(embedders)

    def attentions(self, kind: str) -> dict[Address, Attention]:
        """Return {address: attention} of one kind, in the order in which a pass meets them."""
        levels = {f"down_blocks.{i}": level for i, level in enumerate(self.down_blocks)}
        levels["mid_block"] = self.mid_block
        levels |= {f"up_blocks.{i}": level for i, level in enumerate(self.up_blocks)}
        blocks: dict[Address, TransformerBlock] = {}
        for path, level in levels.items():
            for i, transformer in enumerate(level.attentions):
                blocks |= transformer.blocks(f"{path}.attentions.{i}")
        found = {address: block.attentions() for address, block in blocks.items()}
        return {f"{address}.{kind}": of_block[kind] for address, of_block in found.items() if kind in of_block}

    def __call__(
        self,
        x_bhwc: Float[jax.Array, "b h w c"],
        timestep_b: Real[jax.Array, " b"],
        conditioning: Conditioning = NOTHING,
        *,
        return_keys_values: bool = False,
    ) -> tuple[Float[jax.Array, "b h w c_out"], dict[Address, KeysValues]]:
        """Run one pass over a flat batch of latents.

        Args:
          x_bhwc: latents, [b, h, w, in_channels].
          timestep_b: numbers [b].
          conditioning: what is told beside them; its text, globals and references have one of each a row.
          return_keys_values: whether those of every attention are returned, too; static.

        Returns:
          The prediction [b, h, w, out_channels], float32; and {address: keys and values}, empty unless asked for.

        Raises:
          UserError: the conditioning lacks what the network attends to or embeds.
        """
        with products_in(self.config.precision):
            return self._pass(x_bhwc, timestep_b, conditioning, return_keys_values)

    def _pass(
        self, x_bhwc: jax.Array, timestep_b: jax.Array, conditioning: Conditioning, return_keys_values: bool
    ) -> tuple[jax.Array, dict[Address, KeysValues]]:
        embedding_bc = self.time_embedding(timestep_features(timestep_b, self.config.block_out_channels[0]))
        embedding_bc = embedding_bc + embed_globals(self.global_embedders, conditioning.globals)
        keys_values: dict[Address, KeysValues] = {}

        def convolve(block: ResnetBlock, h_bhwc: jax.Array) -> jax.Array:
            return self._run(lambda block, h_bhwc: block(h_bhwc, embedding_bc), block, h_bhwc, conditioning)

        def attend(level: UNetLevel, i: int, path: str, h_bhwc: jax.Array) -> jax.Array:
            if not len(level.attentions):
                return h_bhwc

            def run(block: SpatialTransformer, h_bhwc: jax.Array) -> tuple[jax.Array, dict[Address, KeysValues]]:
                h_bhwc, made = block(h_bhwc, conditioning, f"{path}.attentions.{i}")
                return h_bhwc, made if return_keys_values else {}

            h_bhwc, made = self._run(run, level.attentions[i], h_bhwc, conditioning)
            keys_values.update(made)
            return h_bhwc

        h = self.conv_in(x_bhwc.astype(self.config.dtype))
        skips = [h]
        for index, level in enumerate(self.down_blocks):
            for i, resnet in enumerate(level.resnets):
                h = attend(level, i, f"down_blocks.{index}", convolve(resnet, h))
                skips.append(h)
            for downsample in level.downsamplers:
                h = downsample(h)
                skips.append(h)

        first, second = self.mid_block.resnets
        h = convolve(second, attend(self.mid_block, 0, "mid_block", convolve(first, h)))

        for index, level in enumerate(self.up_blocks):
            for i, resnet in enumerate(level.resnets):
                h = convolve(resnet, jnp.concatenate([h, skips.pop()], axis=-1))
                h = attend(level, i, f"up_blocks.{index}", h)
            for upsample in level.upsamplers:
                height, width = skips[-1].shape[1:3]
                h = upsample(h, size=(height, width))

        return self.conv_out(jax.nn.silu(self.conv_norm_out(h))), keys_values

    def _run(self, run, block: nnx.Module, h_bhwc: jax.Array, conditioning: Conditioning):
        """Return `run(block, h_bhwc)`, of a residual or transformer block, under `config.remat`."""
        # Sampling differentiates nothing.
        if self.config.remat != "none" and conditioning.cached is None:
            run = nnx.remat(run, policy=REMAT[self.config.remat])
        return run(block, h_bhwc)


@functools.cache
def unet_structure(config: UNetConfig) -> tuple[nnx.GraphDef[UNet], dict[str, jax.ShapeDtypeStruct]]:
    """Return what `parameters.abstract` says of it: structure and shapes. Found once a process."""
    return abstract(lambda: UNet(config, rngs=nnx.Rngs(0)))


def denoise_sets(
    unet: UNet,
    context: Float[jax.Array, "b m ..."] | None,
    noised_bnhwc: Float[jax.Array, "b n h w c"],
    timestep_bn: Real[jax.Array, "b n"],
    layout: SetLayout,
    *,
    clean_timestep: jax.Array | int,
    keep_context_b: Bool[jax.Array, " b"] | None = None,
    keep_bm: Bool[jax.Array, "b m"] | None = None,
    text_bsc: Float[jax.Array, "b s c_text"] | None = None,
    globals_bq: Mapping[str, Real[jax.Array, "b q ..."]] | None = None,
) -> Float[jax.Array, "b n h w c_out"]:
    """Run the M2M forward pass: all images of all sets in one call of the U-Net.

    Args:
      context: the clean images, m = len(layout.clean): latents [b, m, h, w, c], which stand in the stack before the
        noised ones (M2M-Self), or, where `layout.encoded`, tokens [b, m, s, c] (M2M-DINO). None if m is 0.
      noised_bnhwc: latents of the noised images, n = len(layout.noised).
      timestep_bn: timesteps of the noised images, independent of one another.
      clean_timestep: what the U-Net is told about the clean images of the stack: one number, or one an image [b, m].
        Nothing else may depend on the image being made, so that their keys and values do not.
      keep_context_b, keep_bm: see `ImageSets`.
      text_bsc: tokens of each set's text, which all of its images attend to.
      globals_bq: {name: values [b, q, ...]} of the images of the stack, clean ones first; see `Conditioning.globals`.

    Returns:
      Predictions for the noised images, [b, n, h, w, c].
    """
    b, q, m = noised_bnhwc.shape[0], layout.num_images, len(layout.stacked_clean)
    stack_bqhwc, timestep_bq = noised_bnhwc, timestep_bn
    if m:
        if context is None:
            raise ValueError(f"the layout has {m} clean images, and the context is None")
        stack_bqhwc = jnp.concatenate([context, noised_bnhwc], axis=1)
        clean_timestep_bm = jnp.broadcast_to(jnp.asarray(clean_timestep, timestep_bn.dtype), (b, m))
        timestep_bq = jnp.concatenate([clean_timestep_bm, timestep_bn], axis=1)
    conditioning = Conditioning(
        sets=ImageSets(layout, context if layout.encoded else None, keep_context_b, keep_bm),
        text_bsc=None if text_bsc is None else jnp.repeat(text_bsc, q, axis=0),
        globals={name: jax.lax.collapse(value, 0, 2) for name, value in (globals_bq or {}).items()},
    )
    out_bhwc, _ = unet(jax.lax.collapse(stack_bqhwc, 0, 2), timestep_bq.reshape(-1), conditioning)
    return out_bhwc.reshape(b, q, *out_bhwc.shape[1:])[:, m:]
