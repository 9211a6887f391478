"""The image encoder of M2M-DINO: DINOv2 (arXiv 2304.07193), also with registers (arXiv 2309.16588).

Structure and names follow transformers' Dinov2Model and Dinov2WithRegistersModel, but for two: the perceptron of the
giant model keeps the fused `weights_in` and `weights_out` of the published weights, and the output projection of
attention is `out_proj`. `transformers_folder.py` reads and writes the names of the published weights.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from m2m_jax.core import initializers
from m2m_jax.core.errors import UserError
from m2m_jax.models.clip_text import MLP, Attention
from m2m_jax.models.layers import Conv, LayerNorm, Linear
from m2m_jax.models.limits import CHANNELS, LAYERS, require_between, require_one_of

# Of ImageNet's RGB in [0, 1], as transformers' preprocessor_config.json has them.
PIXEL_MEAN = np.asarray((0.485, 0.456, 0.406), np.float32)
PIXEL_STD = np.asarray((0.229, 0.224, 0.225), np.float32)


@dataclasses.dataclass(frozen=True)
class DINOv2Config:
    """Architecture of the encoder, in transformers' words and with its defaults; `SIZES` has the published ones.

    Attributes:
      mlp_ratio: width of the perceptron's middle, in widths of the model.
      use_swiglu_ffn: a gated perceptron, with a middle of two thirds of that (giant).
      image_size: pixels a side that the position embeddings were made for. Other sizes interpolate them.
      num_register_tokens: 0: Dinov2Model; more: Dinov2WithRegistersModel.
      layer: how many blocks run; their output comes without the final norm, as `hidden_states[layer]` of transformers
        does. -1: all blocks, then the norm.
      dtype: what is computed in; parameters are float32.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    mlp_ratio: float = 4
    use_swiglu_ffn: bool = False
    image_size: int = 224
    patch_size: int = 14
    layer_norm_eps: float = 1e-6
    num_register_tokens: int = 0
    layer: int = -1
    dtype: str = "float32"

    def __post_init__(self):
        for name in ("image_size", "patch_size"):
            if not isinstance(getattr(self, name), int):
                raise UserError(f"{name} must be one number (images and patches are square), not {getattr(self, name)}")
        counts = ("hidden_size", "num_attention_heads", "image_size", "patch_size")
        require_between(self, **dict.fromkeys(counts, CHANNELS), num_hidden_layers=LAYERS, mlp_ratio=(0.01, 64))
        require_between(self, num_register_tokens=(0, 1024), layer_norm_eps=(0, 1))
        require_one_of(self, dtype=("float32", "bfloat16"))
        if self.patch_size > self.image_size:
            raise UserError(f"patch_size={self.patch_size} is more than image_size={self.image_size}")
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size={self.hidden_size} must be a multiple of num_attention_heads={self.num_attention_heads}"
            )
        if not -1 <= self.layer <= self.num_hidden_layers:
            raise UserError(f"layer={self.layer}: this encoder has {self.num_hidden_layers} blocks; -1 runs them all")

    @property
    def grid(self) -> int:
        """Patches along each side that there are position embeddings for."""
        return self.image_size // self.patch_size

    @property
    def mlp_channels(self) -> int:
        """Width of the perceptron's middle."""
        channels = int(self.hidden_size * self.mlp_ratio)
        return (int(channels * 2 / 3) + 7) // 8 * 8 if self.use_swiglu_ffn else channels


_PUBLISHED = DINOv2Config(image_size=518)
# With registers: dataclasses.replace(SIZES[...], num_register_tokens=4).
SIZES = {
    "small": dataclasses.replace(_PUBLISHED, hidden_size=384, num_attention_heads=6),
    "base": _PUBLISHED,
    "large": dataclasses.replace(_PUBLISHED, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16),
    "giant": dataclasses.replace(
        _PUBLISHED, hidden_size=1536, num_hidden_layers=40, num_attention_heads=24, use_swiglu_ffn=True
    ),
}


def num_tokens(config: DINOv2Config, size: int) -> int:
    """Return how many tokens an image of so many pixels a side has.

    Raises:
      UserError: the size is no multiple of the patches.
    """
    if size % config.patch_size:
        raise UserError(f"it must be a multiple of the encoder's patches, {config.patch_size} pixels")
    return 1 + config.num_register_tokens + (size // config.patch_size) ** 2


def preprocess(images_bhwc: jax.Array, size: int) -> jax.Array:
    """Return this project's pixels, float [-1, 1], as `size` by `size` pixels in ImageNet's normalisation.

    Bicubic with antialiasing, clipped to the range of pixels as an image file would be. The whole image is kept and an
    oblong one squeezed, where transformers' preprocessor crops the middle: what a context image shows at its border
    counts here.
    """
    b, _, _, c = images_bhwc.shape
    resized_bhwc = jnp.clip(jax.image.resize(images_bhwc, (b, size, size, c), "bicubic"), -1.0, 1.0)
    mean_c, std_c = (jnp.asarray(x, images_bhwc.dtype)[None, None, None] for x in (PIXEL_MEAN, PIXEL_STD))
    return (resized_bhwc * 0.5 + 0.5 - mean_c) / std_c


def bicubic_weights(size: int, new_size: int, *, antialias: bool) -> np.ndarray:
    """Return torch's bicubic interpolation along one axis (align_corners=False) as a matrix [new_size, size].

    torch takes the kernel of Keys with a = -0.75, and taps beyond the border from the border. With antialiasing it
    follows PIL instead: a = -0.5, the kernel as wide as the reduction, and taps beyond the border left out.
    """
    centre_n = (np.arange(new_size) + 0.5) * size / new_size - 0.5
    if antialias:
        offset_nk = (centre_n[:, None] - np.arange(size)) / max(size / new_size, 1)
        weights_nk = _keys(offset_nk, -0.5)
        return weights_nk / weights_nk.sum(1, keepdims=True)
    weights_nk = np.zeros((new_size, size))
    for tap in range(-1, 3):
        index_n = np.floor(centre_n).astype(int) + tap
        np.add.at(weights_nk, (np.arange(new_size), index_n.clip(0, size - 1)), _keys(centre_n - index_n, -0.75))
    return weights_nk


def _keys(x: np.ndarray, a: float) -> np.ndarray:
    """Return the cubic convolution kernel (Keys, 1981)."""
    x = np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


class PatchEmbeddings(nnx.Module):
    """Images [b, h, w, 3] to one vector a patch, [b, h / patch, w / patch, c]."""

    def __init__(self, c: DINOv2Config, *, dtype, rngs: nnx.Rngs):
        patch = (c.patch_size, c.patch_size)
        self.projection = Conv(3, c.hidden_size, patch, strides=patch, padding="VALID", dtype=dtype, rngs=rngs)

    def __call__(self, images_bhwc: jax.Array) -> jax.Array:
        return self.projection(images_bhwc)


class Embeddings(nnx.Module):
    """Images to tokens [b, 1 + registers + patches, c]; registers have no position."""

    def __init__(self, c: DINOv2Config, *, dtype, rngs: nnx.Rngs):
        def token(*shape: int) -> nnx.Param:
            return nnx.Param(initializers.token(rngs.params(), (*shape, c.hidden_size)))

        self.config, self.dtype = c, dtype
        self.patch_embeddings = PatchEmbeddings(c, dtype=dtype, rngs=rngs)
        self.cls_token = token(1, 1)
        self.position_embeddings = token(1, 1 + c.grid**2)
        if c.num_register_tokens:
            self.register_tokens = token(1, c.num_register_tokens)

    def __call__(self, images_bhwc: jax.Array) -> jax.Array:
        patches_bhwc = self.patch_embeddings(images_bhwc)
        b, height, width, c = patches_bhwc.shape
        cls_1c, positions_hwc = self._positions(height, width)
        tokens = [
            (self.cls_token[...] + cls_1c[None]).astype(self.dtype),
            (patches_bhwc + positions_hwc[None].astype(self.dtype)).reshape(b, height * width, c),
        ]
        if self.config.num_register_tokens:
            tokens.insert(1, self.register_tokens[...].astype(self.dtype))
        return jnp.concatenate([jnp.broadcast_to(x_btc, (b, *x_btc.shape[1:])) for x_btc in tokens], axis=1)

    def _positions(self, height: int, width: int) -> tuple[jax.Array, jax.Array]:
        """Return those of the class token [1, c] and of the patches [height, width, c], interpolated as torch would."""
        grid = self.config.grid
        cls_1c, positions_tc = jnp.split(self.position_embeddings[0], (1,))
        positions_hwc = positions_tc.reshape(grid, grid, -1)
        if (height, width) == (grid, grid):
            return cls_1c, positions_hwc
        # The two classes of transformers differ here.
        antialias = self.config.num_register_tokens > 0
        rows, columns = (bicubic_weights(grid, n, antialias=antialias).astype(np.float32) for n in (height, width))
        return cls_1c, jnp.einsum("yh,xw,hwc->yxc", rows, columns, positions_hwc, precision="highest")


class LayerScale(nnx.Module):
    """A factor for each channel."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.lambda1 = nnx.Param(initializers.ones(rngs.params(), (channels,)))

    def __call__(self, x_btc: jax.Array) -> jax.Array:
        return x_btc * self.lambda1[...].astype(x_btc.dtype)[None, None]


class SwiGLU(nnx.Module):
    """The gated perceptron of the giant model (arXiv 2002.05202)."""

    def __init__(self, channels: int, hidden_channels: int, *, dtype, rngs: nnx.Rngs):
        self.weights_in = Linear(channels, 2 * hidden_channels, dtype=dtype, rngs=rngs)
        self.weights_out = Linear(hidden_channels, channels, dtype=dtype, rngs=rngs)

    def __call__(self, x_btc: jax.Array) -> jax.Array:
        gate, hidden = jnp.split(self.weights_in(x_btc), 2, axis=-1)
        return self.weights_out(jax.nn.silu(gate) * hidden)


class Block(nnx.Module):
    """Pre-norm attention and perceptron, each scaled by channel and added to its input."""

    def __init__(self, c: DINOv2Config, *, dtype, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(c.hidden_size, epsilon=c.layer_norm_eps, dtype=dtype, rngs=rngs)
        self.attention = Attention(c.hidden_size, c.num_attention_heads, dtype=dtype, rngs=rngs)
        self.layer_scale1 = LayerScale(c.hidden_size, rngs=rngs)
        self.norm2 = LayerNorm(c.hidden_size, epsilon=c.layer_norm_eps, dtype=dtype, rngs=rngs)
        self.mlp: SwiGLU | MLP
        if c.use_swiglu_ffn:
            self.mlp = SwiGLU(c.hidden_size, c.mlp_channels, dtype=dtype, rngs=rngs)
        else:
            self.mlp = MLP(c.hidden_size, c.mlp_channels, "gelu", dtype=dtype, rngs=rngs)
        self.layer_scale2 = LayerScale(c.hidden_size, rngs=rngs)

    def __call__(self, x_btc: jax.Array) -> jax.Array:
        x_btc = x_btc + self.layer_scale1(self.attention(self.norm1(x_btc)))
        return x_btc + self.layer_scale2(self.mlp(self.norm2(x_btc)))


class Encoder(nnx.Module):
    """The blocks, under transformers' name."""

    def __init__(self, c: DINOv2Config, *, dtype, rngs: nnx.Rngs):
        self.num_run = c.num_hidden_layers if c.layer == -1 else c.layer
        self.layer = nnx.List([Block(c, dtype=dtype, rngs=rngs) for _ in range(c.num_hidden_layers)])

    def __call__(self, x_btc: jax.Array) -> jax.Array:
        for block in self.layer[: self.num_run]:
            x_btc = block(x_btc)
        return x_btc


class DINOv2(nnx.Module):
    """Images to tokens. All blocks are there whatever `config.layer`, so that the weights of a folder fit."""

    def __init__(self, config: DINOv2Config, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        self.config = config
        self.embeddings = Embeddings(config, dtype=dtype, rngs=rngs)
        self.encoder = Encoder(config, dtype=dtype, rngs=rngs)
        self.layernorm = LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, dtype=dtype, rngs=rngs)

    def __call__(self, images_bhwc: jax.Array) -> jax.Array:
        """Encode images as `preprocess` gives them, of any size that is a multiple of the patch.

        Returns:
          [b, 1 + registers + patches, c]: the class token, the registers, the patches row by row.

        Raises:
          UserError: the images are of another size.
        """
        height, width = images_bhwc.shape[1:3]
        if height % self.config.patch_size or width % self.config.patch_size:
            raise UserError(
                f"images of {height}x{width} pixels: DINOv2 needs a multiple of its patches of "
                f"{self.config.patch_size} pixels; see preprocess"
            )
        x_btc = self.encoder(self.embeddings(images_bhwc))
        return self.layernorm(x_btc) if self.config.layer == -1 else x_btc
