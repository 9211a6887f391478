"""The Stable Diffusion U-Net over sets of images. Structure and names follow diffusers' UNet2DConditionModel."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from m2m_jax.attention.backends import BACKENDS
from m2m_jax.attention.layout import CLEAN_SEES, SetLayout
from m2m_jax.core.errors import UserError
from m2m_jax.core.parameters import abstract
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
from m2m_jax.models.limits import BLOCKS, CHANNELS, LAYERS, require_between, require_levels, require_one_of
from m2m_jax.models.precision import PRECISIONS, products_in
from m2m_jax.models.remat import REMAT
from m2m_jax.models.transformer import CrossAttention, ImageSetAttention, ImageSets, KeptImages, SpatialTransformer

ATTN2 = ("image_set", "text", "none")
# Modules that compute in float32 whatever `UNetConfig.dtype` is: what bfloat16 rounds off the output at a high noise
# level is many times as much of the clean image, and of a difference of guidance.
IN_FLOAT32 = ("time_embedding.", "conv_norm_out.", "conv_out.")
BLOCK_TYPES = ("CrossAttnDownBlock2D", "DownBlock2D")  # with transformer blocks, without


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Architecture of the U-Net. Defaults are Stable Diffusion 2.x's.

    Attributes:
      down_block_types: per level, outermost first; "CrossAttnDownBlock2D" has transformer blocks. The way up
        mirrors it.
      num_attention_heads: per level (what diffusers' config.json calls attention_head_dim).
      attn2: "image_set" (M2M), "text" (Stable Diffusion) or "none" (a single-image model without text).
      cross_attention_dim: width of the tokens that attn2 attends to: those of the text or of an image encoder
        (M2M-DINO). None: attn2 attends to this network's own features (M2M-Self), or there is none.
      order_embedding: whether Image-Set Attention is told the positions of the images in their set.
      clean_sees: see `SetLayout`.
      attention_backend: of attn1 and of Image-Set Attention; see `attention.backends`.
      remat: what training computes again in the backward pass to save memory: "none", what is neither a convolution,
        nor a dot with a kernel, nor the output of attention ("dots"), or all of each residual and transformer block
        ("blocks").
      dtype: what is computed in, but for the modules of `IN_FLOAT32`; parameters are float32.
      precision: what products of float32 are computed in: "default", as the platform has it, or "highest"; see
        `models/precision.py`.
    """

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    layers_per_block: int = 2
    transformer_layers_per_block: int = 1
    num_attention_heads: tuple[int, ...] = (5, 10, 20, 20)
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    use_linear_projection: bool = True
    attn2: str = "image_set"
    cross_attention_dim: int | None = None
    order_embedding: bool = False
    clean_sees: str = "preceding"
    attention_backend: str = "prefix"
    remat: str = "none"
    dtype: str = "float32"
    precision: str = "default"

    def __post_init__(self):
        if self.attn2 not in ATTN2:
            raise UserError(f"attn2 must be one of {', '.join(ATTN2)}, not {self.attn2!r}")
        if self.attn2 == "text" and not self.cross_attention_dim:
            raise UserError("attn2='text' needs cross_attention_dim, the width of the text's tokens")
        counts = ("in_channels", "out_channels", "block_out_channels", "num_attention_heads", "norm_num_groups")
        require_between(self, **dict.fromkeys(counts, CHANNELS), norm_eps=(0, 1))
        require_between(self, **dict.fromkeys(("layers_per_block", "transformer_layers_per_block"), LAYERS))
        if self.cross_attention_dim is not None:
            require_between(self, cross_attention_dim=CHANNELS)
        require_levels(self, "down_block_types", "num_attention_heads")
        if len(self.block_out_channels) * self.layers_per_block * self.transformer_layers_per_block > BLOCKS:
            raise UserError(
                f"UNetConfig: {len(self.block_out_channels)} levels of layers_per_block={self.layers_per_block} and "
                f"transformer_layers_per_block={self.transformer_layers_per_block} are more than {BLOCKS} blocks"
            )
        require_one_of(self, down_block_types=BLOCK_TYPES, remat=tuple(REMAT), dtype=("float32", "bfloat16"))
        require_one_of(self, precision=PRECISIONS)
        require_one_of(self, clean_sees=CLEAN_SEES, attention_backend=tuple(BACKENDS))
        for channels, heads in zip(self.block_out_channels, self.num_attention_heads, strict=True):
            if channels % heads:
                raise UserError(f"num_attention_heads={self.num_attention_heads} must divide {self.block_out_channels}")

    @property
    def attends_to_encoded(self) -> bool:
        """M2M-DINO: the clean images enter as tokens of an image encoder and not as images of the stack."""
        return self.attn2 == "image_set" and self.cross_attention_dim is not None


class UNetLevel(nnx.Module):
    """The residual and transformer blocks of one resolution on the way down, in the middle or on the way up."""

    def __init__(self, in_channels: list[int], out_channels: int, attends: list[bool], *, resnet, transformer):
        self.resnets = nnx.List([resnet(channels, out_channels) for channels in in_channels])
        self.attentions = nnx.List([transformer() for attend in attends if attend])


class UNet(nnx.Module):
    """Predicts the schedule's target for noised latents, in the context of the clean images of their sets, or of text.

    The three conditioning channels stay apart: image sets and token sequences enter attentions of their own (of which
    Stable Diffusion and M2M have one or the other, both under the name attn2), and what is global (here the
    timestep) enters the residual blocks as one embedding.
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
            channels = c.block_out_channels[index]
            transformer = functools.partial(
                SpatialTransformer,
                channels,
                c.num_attention_heads[index],
                num_layers=c.transformer_layers_per_block,
                norm_num_groups=c.norm_num_groups,
                use_linear_projection=c.use_linear_projection,
                backend=c.attention_backend,
                make_attn2=_attn2(c),
                dtype=dtype,
                rngs=rngs,
            )
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

        in_float32 = {"dtype": jnp.float32, "rngs": rngs}
        self.conv_norm_out = GroupNorm(previous, c.norm_num_groups, epsilon=c.norm_eps, **in_float32)
        self.conv_out = Conv3x3(previous, c.out_channels, kernel_init=zeros, **in_float32)
        for i, attn2 in enumerate(self.set_attentions()):
            attn2.layer = i

    def set_attentions(self) -> list[ImageSetAttention]:
        """The Image-Set Attentions in the order in which a pass meets them."""
        if self.config.attn2 != "image_set":
            return []
        levels = [*self.down_blocks, self.mid_block, *self.up_blocks]
        transformers = [transformer for level in levels for transformer in level.attentions]
        return [block.attn2 for transformer in transformers for block in transformer.transformer_blocks]

    def __call__(
        self, x_bhwc: jax.Array, timestep_b: jax.Array, condition: ImageSets | KeptImages | jax.Array | None = None
    ) -> jax.Array:
        """One pass over a flat batch of latents.

        Args:
          x_bhwc: latents, [b, h, w, in_channels].
          timestep_b: numbers [b].
          condition: what attn2 attends to. "image_set": how the rows form sets, or the finished images of each row's;
            "text": tokens [b, s, cross_attention_dim]; "none": None.

        Returns:
          [b, h, w, out_channels], float32.
        """
        with products_in(self.config.precision):
            return self._predict(x_bhwc, timestep_b, condition)

    def _predict(self, x_bhwc: jax.Array, timestep_b: jax.Array, condition) -> jax.Array:
        dtype = jnp.dtype(self.config.dtype)
        features_bc = timestep_features(timestep_b, self.config.block_out_channels[0])
        embedding_bc = self.time_embedding(features_bc)

        h = self.conv_in(x_bhwc.astype(dtype))
        skips = [h]
        for block in self.down_blocks:
            for i, resnet in enumerate(block.resnets):
                h = self._run(resnet, h, embedding_bc)
                if len(block.attentions):
                    h = self._run(block.attentions[i], h, condition)
                skips.append(h)
            if hasattr(block, "downsamplers"):
                h = block.downsamplers[0](h)
                skips.append(h)

        h = self._run(self.mid_block.resnets[0], h, embedding_bc)
        h = self._run(self.mid_block.attentions[0], h, condition)
        h = self._run(self.mid_block.resnets[1], h, embedding_bc)

        for block in self.up_blocks:
            for i, resnet in enumerate(block.resnets):
                h = self._run(resnet, jnp.concatenate([h, skips.pop()], axis=-1), embedding_bc)
                if len(block.attentions):
                    h = self._run(block.attentions[i], h, condition)
            if hasattr(block, "upsamplers"):
                h = block.upsamplers[0](h, size=skips[-1].shape[1:3])

        return self.conv_out(jax.nn.silu(self.conv_norm_out(h)))

    def _run(self, block: nnx.Module, h_bhwc: jax.Array, condition) -> jax.Array:
        """A residual or transformer block, under `config.remat`."""
        if self.config.remat == "none" or isinstance(condition, KeptImages):  # sampling differentiates nothing
            return block(h_bhwc, condition)
        run = nnx.remat(lambda block, h_bhwc: block(h_bhwc, condition), policy=REMAT[self.config.remat])
        return run(block, h_bhwc)


def _attn2(c: UNetConfig):
    """What makes the second attention of a transformer block; see `TransformerBlock`."""
    if c.attn2 == "none":
        return None
    if c.attn2 == "text":
        return functools.partial(CrossAttention, key_channels=c.cross_attention_dim)
    return functools.partial(
        ImageSetAttention,
        key_channels=c.cross_attention_dim,
        order_embedding=c.order_embedding,
        clean_sees=c.clean_sees,
        backend=c.attention_backend,
    )


@functools.cache
def unet_structure(config: UNetConfig) -> tuple[nnx.GraphDef, dict[str, jax.ShapeDtypeStruct]]:
    """What `parameters.abstract` says of it: structure and shapes. Kept, for at full size it takes seconds."""
    return abstract(lambda: UNet(config, rngs=nnx.Rngs(0)))


def denoise_sets(
    unet: UNet,
    context: jax.Array | None,
    noised_bnhwc: jax.Array,
    timestep_bn: jax.Array,
    layout: SetLayout,
    *,
    clean_timestep: int,
    keep_context_b: jax.Array | None = None,
) -> jax.Array:
    """The M2M forward pass: all images of all sets in one call of the U-Net.

    Args:
      context: the clean images, m = len(layout.clean): latents [b, m, h, w, c], which stand in the stack before the
        noised ones (M2M-Self), or, where `layout.encoded`, tokens [b, m, s, c] (M2M-DINO). None if m is 0.
      noised_bnhwc: latents of the noised images, n = len(layout.noised).
      timestep_bn: timesteps of the noised images, independent of one another.
      clean_timestep: what the U-Net is told about the clean images of the stack, one value always: it makes their
        keys and values independent of the image being made.
      keep_context_b: see `ImageSets`.

    Returns:
      Predictions for the noised images, [b, n, h, w, c].
    """
    b = noised_bnhwc.shape[0]
    m = len(layout.stacked_clean)
    stack_bqhwc, timestep_bq = noised_bnhwc, timestep_bn
    if m:
        stack_bqhwc = jnp.concatenate([context, noised_bnhwc], axis=1)
        clean_timestep_bm = jnp.full((b, m), clean_timestep, timestep_bn.dtype)
        timestep_bq = jnp.concatenate([clean_timestep_bm, timestep_bn], axis=1)
    sets = ImageSets(layout, context if layout.encoded else None, keep_context_b)
    out_bhwc = unet(jax.lax.collapse(stack_bqhwc, 0, 2), timestep_bq.reshape(-1), sets)
    return out_bhwc.reshape(b, layout.num_images, *out_bhwc.shape[1:])[:, m:]
