"""The first stage: Stable Diffusion's KL autoencoder. Structure and names follow diffusers' AutoencoderKL."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from m2m_jax.attention.plain import attend
from m2m_jax.core.parameters import abstract
from m2m_jax.models.layers import Conv, Conv3x3, Downsample, GroupNorm, Linear, ResnetBlock, Upsample
from m2m_jax.models.limits import CHANNELS, LAYERS, require_between, require_levels

NORM_EPS = 1e-6  # fixed in diffusers' encoder and decoder


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Architecture of the autoencoder. Defaults are Stable Diffusion's.

    Attributes:
      scaling_factor: latents are multiplied by it, so that they have unit variance over the training data.
      use_quant_conv, use_post_quant_conv: whether a 1x1 convolution follows the encoder, and one precedes the decoder.
      mid_block_add_attention: whether the middle of both attends; it is residual blocks alone otherwise.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self):
        counts = ("in_channels", "out_channels", "latent_channels", "block_out_channels", "norm_num_groups")
        require_between(self, **dict.fromkeys(counts, CHANNELS), layers_per_block=LAYERS, scaling_factor=(1e-6, 1e6))
        require_levels(self)

    @property
    def downsampling(self) -> int:
        """Pixels per latent, along each side."""
        return 2 ** (len(self.block_out_channels) - 1)


class SpatialSelfAttention(nnx.Module):
    """Single-head self-attention over pixels, in the middle of the encoder and of the decoder."""

    def __init__(self, channels: int, norm_num_groups: int, *, rngs: nnx.Rngs):
        self.group_norm = GroupNorm(channels, norm_num_groups, epsilon=NORM_EPS, rngs=rngs)
        project = functools.partial(Linear, channels, channels, rngs=rngs)
        self.to_q, self.to_k, self.to_v, self.to_out = project(), project(), project(), project()

    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        b, h, w, c = x_bhwc.shape
        x_bt1c = self.group_norm(x_bhwc).reshape(b, h * w, 1, c)
        out_bt1c = attend(self.to_q(x_bt1c), self.to_k(x_bt1c), self.to_v(x_bt1c))
        return x_bhwc + self.to_out(out_bt1c).reshape(x_bhwc.shape)


class Level(nnx.Module):
    """Residual blocks of one resolution."""

    def __init__(self, in_channels: int, out_channels: int, num_layers: int, resnet):
        inputs = [in_channels] + [out_channels] * (num_layers - 1)
        self.resnets = nnx.List([resnet(channels, out_channels) for channels in inputs])
        self.downsamplers: nnx.List[Downsample] = nnx.List([])
        self.upsamplers: nnx.List[Upsample] = nnx.List([])


class MidBlock(nnx.Module):
    """Residual block, attention where the config has it, residual block."""

    def __init__(self, channels: int, c: AutoencoderConfig, resnet, *, rngs: nnx.Rngs):
        self.resnets = nnx.List([resnet(channels, channels), resnet(channels, channels)])
        attends = range(c.mid_block_add_attention)
        self.attentions = nnx.List([SpatialSelfAttention(channels, c.norm_num_groups, rngs=rngs) for _ in attends])

    def __call__(self, h: jax.Array) -> jax.Array:
        h = self.resnets[0](h)
        for attention in self.attentions:
            h = attention(h)
        return self.resnets[1](h)


class Encoder(nnx.Module):
    """Pixels to the mean and log variance of the latents."""

    def __init__(self, c: AutoencoderConfig, *, rngs: nnx.Rngs):
        resnet = _resnet(c, rngs)
        channels = c.block_out_channels
        self.conv_in = Conv3x3(c.in_channels, channels[0], rngs=rngs)
        blocks = []
        for i, width in enumerate(channels):
            block = Level(channels[max(i - 1, 0)], width, c.layers_per_block, resnet)
            if i < len(channels) - 1:
                padding = ((0, 1), (0, 1))
                block.downsamplers = nnx.List([Downsample(width, padding=padding, dtype=None, rngs=rngs)])
            blocks.append(block)
        self.down_blocks = nnx.List(blocks)
        self.mid_block = MidBlock(channels[-1], c, resnet, rngs=rngs)
        self.conv_norm_out = GroupNorm(channels[-1], c.norm_num_groups, epsilon=NORM_EPS, rngs=rngs)
        self.conv_out = Conv3x3(channels[-1], 2 * c.latent_channels, rngs=rngs)

    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        h = self.conv_in(x_bhwc)
        for block in self.down_blocks:
            for resnet in block.resnets:
                h = resnet(h)
            for downsample in block.downsamplers:
                h = downsample(h)
        h = self.mid_block(h)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(h)))


class Decoder(nnx.Module):
    """Latents to pixels."""

    def __init__(self, c: AutoencoderConfig, *, rngs: nnx.Rngs):
        resnet = _resnet(c, rngs)
        channels = c.block_out_channels[::-1]
        self.conv_in = Conv3x3(c.latent_channels, channels[0], rngs=rngs)
        self.mid_block = MidBlock(channels[0], c, resnet, rngs=rngs)
        blocks = []
        for i, width in enumerate(channels):
            block = Level(channels[max(i - 1, 0)], width, c.layers_per_block + 1, resnet)
            if i < len(channels) - 1:
                block.upsamplers = nnx.List([Upsample(width, dtype=None, rngs=rngs)])
            blocks.append(block)
        self.up_blocks = nnx.List(blocks)
        self.conv_norm_out = GroupNorm(channels[-1], c.norm_num_groups, epsilon=NORM_EPS, rngs=rngs)
        self.conv_out = Conv3x3(channels[-1], c.out_channels, rngs=rngs)

    def __call__(self, z_bhwc: jax.Array) -> jax.Array:
        h = self.mid_block(self.conv_in(z_bhwc))
        for block in self.up_blocks:
            for resnet in block.resnets:
                h = resnet(h)
            for upsample in block.upsamplers:
                h = upsample(h)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(h)))


def _resnet(c: AutoencoderConfig, rngs: nnx.Rngs):
    return functools.partial(ResnetBlock, norm_num_groups=c.norm_num_groups, norm_eps=NORM_EPS, dtype=None, rngs=rngs)


class AutoencoderKL(nnx.Module):
    """Images in [-1, 1] to scaled latents and back. Leading axes of the images are free: `[..., h, w, c]`.

    Example:
        autoencoder = AutoencoderKL(AutoencoderConfig(), rngs=nnx.Rngs(0))
        latents_bhwc = autoencoder.encode(pixels_to_float(images_bhwc))
        images_bhwc = pixels_to_uint8(autoencoder.decode(latents_bhwc))
    """

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        moments, latents = 2 * config.latent_channels, config.latent_channels
        if config.use_quant_conv:
            self.quant_conv = Conv(moments, moments, (1, 1), rngs=rngs)
        if config.use_post_quant_conv:
            self.post_quant_conv = Conv(latents, latents, (1, 1), rngs=rngs)

    def posterior(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return mean and log variance of the unscaled latents, each `[..., h / f, w / f, latent_channels]`."""
        flat_bhwc = images.reshape(-1, *images.shape[-3:])
        moments = self.encoder(flat_bhwc)
        if self.config.use_quant_conv:
            moments = self.quant_conv(moments)
        mean, log_variance = jnp.split(moments.reshape(*images.shape[:-3], *moments.shape[1:]), 2, axis=-1)
        return mean, jnp.clip(log_variance, -30.0, 20.0)

    def encode(self, images: jax.Array) -> jax.Array:
        """Return the posterior's mean, scaled: training and sampling then see the same latents of the same image."""
        return self.posterior(images)[0] * self.config.scaling_factor

    def decode(self, latents: jax.Array) -> jax.Array:
        """Return scaled latents as images, not clipped."""
        flat_bhwc = latents.reshape(-1, *latents.shape[-3:]) / self.config.scaling_factor
        if self.config.use_post_quant_conv:
            flat_bhwc = self.post_quant_conv(flat_bhwc)
        images = self.decoder(flat_bhwc)
        return images.reshape(*latents.shape[:-3], *images.shape[1:])


@functools.cache
def autoencoder_structure(
    config: AutoencoderConfig,
) -> tuple[nnx.GraphDef[AutoencoderKL], dict[str, jax.ShapeDtypeStruct]]:
    """Return what `parameters.abstract` says of it: structure and shapes. Found once a process."""
    return abstract(lambda: AutoencoderKL(config, rngs=nnx.Rngs(0)))


def pixels_to_float(images_uint8: jax.Array) -> jax.Array:
    """Return uint8 images [0, 255] as float32 [-1, 1]."""
    return images_uint8.astype(jnp.float32) / 127.5 - 1.0


def pixels_to_uint8(images: jax.Array) -> jax.Array:
    """Return float32 images [-1, 1], clipped, as uint8 [0, 255]."""
    return jnp.round((jnp.clip(images, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)
