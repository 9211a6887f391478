"""The attentions that a transformer block may hold, each registered under the name that `model.attentions` gives it.

A new one is a class in a file of its own in this package:

    @ATTENTIONS.register("pose")
    class PoseAttention(Attention):
        def __init__(self, channels, num_heads, config, *, dtype, rngs): ...

        def __call__(self, x_btc, conditioning, address):
            ...
            return self.output(out_bthd, x_btc.shape), (k_bshd, v_bshd)

Its parameters (kernel, bias, scale, embedding or tokens by their last name, which `training/sharding.py` has
rules for) are `attn_pose.*` and `norm_pose.*` of every block.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from m2m_jax.attention.backends import BACKENDS
from m2m_jax.attention.cached import CACHED_BACKENDS
from m2m_jax.attention.layout import SetLayout
from m2m_jax.attention.plain import attend
from m2m_jax.attention.splash import CHECKPOINT_NAME
from m2m_jax.core.errors import UserError
from m2m_jax.core.registry import Registry
from m2m_jax.models.conditioning import Address, CachedContext, Conditioning, ImageSets, KeysValues, join
from m2m_jax.models.layers import Linear, timestep_features, zeros

if TYPE_CHECKING:
    from m2m_jax.models.unet_config import UNetConfig

ORDER_CHANNELS = 64  # of the sinusoidal features of an image's position in its set
ONE_IMAGE = SetLayout((0,), (), "itself")  # attention within an image, to the backends


class Attention(nnx.Module):
    """Projections that all attentions share: to_q, to_k, to_v without bias, to_out with one.

    A subclass is called with the tokens of each row, after their norm, the `Conditioning` of all rows and its own
    address. It returns what is added to the tokens, and the keys and values that it made, None where it made none.
    """

    def __init__(self, channels: int, num_heads: int, *, key_channels: int | None = None, dtype, rngs: nnx.Rngs):
        """key_channels: width of what is attended to, where it is another than `channels`."""
        key_channels = key_channels or channels
        project = functools.partial(Linear, out_features=channels, use_bias=False, dtype=dtype, rngs=rngs)
        self.num_heads = num_heads
        self.to_q, self.to_k, self.to_v = project(channels), project(key_channels), project(key_channels)
        self.to_out = Linear(channels, channels, dtype=dtype, rngs=rngs)

    def __call__(
        self, x_btc: Float[jax.Array, "b t c"], conditioning: Conditioning, address: Address
    ) -> tuple[Float[jax.Array, "b t c"], KeysValues | None]:
        raise NotImplementedError

    def heads(self, x: Float[jax.Array, "*rows t c"]) -> Float[jax.Array, "*rows t h d"]:
        """Return [..., t, c] as [..., t, h, d]."""
        return x.reshape(*x.shape[:-1], self.num_heads, -1)

    def output(self, out: Float[jax.Array, "..."], shape: tuple[int, ...]) -> Float[jax.Array, "b t c"]:
        """Project what the heads found, [..., t, h, d], to tokens of `shape`."""
        return self.to_out(checkpoint_name(out, CHECKPOINT_NAME).reshape(shape))


# Made of (channels, num_heads, config, dtype=..., rngs=...).
ATTENTIONS = Registry[Callable[..., Attention]]("attention of a transformer block", package="m2m_jax.models")
# Diffusers' names of an attention and of the norm before it, where another kind has not taken them.
_PARAMETERS = {"self": ("attn1", "norm1"), "set": ("attn2", "norm2"), "text": ("attn2", "norm2")}


def parameter_names(kinds: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Return {kind: (name of the attention, name of the norm before it)} of a block that holds these, in order.

    They are diffusers' names: attn1 and norm1 within images, attn2 and norm2 to text. To sets, which stand in the place
    of text, they are attn2 and norm2, too; text beside sets is attn_text and norm_text, as in models.
    """
    names, taken = {}, set()
    for kind in [*_PARAMETERS, *kinds]:
        if kind in kinds and kind not in names:
            own = _PARAMETERS.get(kind)
            names[kind] = own if own and own not in taken else (f"attn_{kind}", f"norm_{kind}")
            taken.add(names[kind])
    return {kind: names[kind] for kind in kinds}


@ATTENTIONS.register("self")
class SelfAttention(Attention):
    """Attention of the tokens of one image to one another, and to those of its references.

    At 64x64 tokens the weights of one image and layer take 0.3 GB: without a kernel they are most of what moves.
    """

    def __init__(self, channels: int, num_heads: int, config: "UNetConfig", *, dtype, rngs: nnx.Rngs):
        super().__init__(channels, num_heads, dtype=dtype, rngs=rngs)
        self.backend = config.attention_backend

    def __call__(
        self, x_btc: Float[jax.Array, "b t c"], conditioning: Conditioning, address: Address
    ) -> tuple[Float[jax.Array, "b t c"], KeysValues]:
        q_bthd = self.heads(self.to_q(x_btc))
        own = self.heads(self.to_k(x_btc)), self.heads(self.to_v(x_btc))
        k_bshd, v_bshd = join(own, conditioning.references[address]) if address in conditioning.references else own
        # A set of one image, whose keys may be more than its queries.
        backend = BACKENDS.choose(self.backend)
        out_b1thd = backend(q_bthd[:, None], k_bshd[:, None], v_bshd[:, None], ONE_IMAGE)
        return self.output(out_b1thd, x_btc.shape), own


@ATTENTIONS.register("text")
class CrossAttention(Attention):
    """Attention of the tokens of an image to those of its text, as in Stable Diffusion."""

    def __init__(self, channels: int, num_heads: int, config: "UNetConfig", *, dtype, rngs: nnx.Rngs):
        super().__init__(channels, num_heads, key_channels=config.cross_attention_dim, dtype=dtype, rngs=rngs)

    def __call__(
        self, x_btc: Float[jax.Array, "b t c"], conditioning: Conditioning, address: Address
    ) -> tuple[Float[jax.Array, "b t c"], KeysValues]:
        text_bsc = conditioning.text_bsc
        if text_bsc is None:
            raise UserError(f"{address} attends to text, and Conditioning.text_bsc is None; give the tokens of a text")
        q_bthd, k_bshd, v_bshd = self.heads(self.to_q(x_btc)), *self.keys_and_values(text_bsc)
        return self.output(attend(q_bthd, k_bshd, v_bshd), x_btc.shape), (k_bshd, v_bshd)

    def keys_and_values(self, text_bsc: Float[jax.Array, "b s c"]) -> KeysValues:
        """Return those of tokens of a text encoder, [b, s, h, d]."""
        return self.heads(self.to_k(text_bsc)), self.heads(self.to_v(text_bsc))


@ATTENTIONS.register("set")
class ImageSetAttention(Attention):
    """Attention of tokens to the clean images of their set, under `SetLayout`'s mask.

    Queries come from all images of the stack. Keys and values come from the features of the clean ones at this layer
    (M2M-Self) or from the tokens that an image encoder made of them (M2M-DINO). With `order_embedding` they are told
    the image's position in its set: its sinusoidal features through a projection that starts at zero. Not the
    paper's choice, which is not known.

    When sampling, the keys and values of finished images are kept (`Conditioning.cached`). Without any context what is
    added is the bias of the output.
    """

    def __init__(self, channels: int, num_heads: int, config: "UNetConfig", *, dtype, rngs: nnx.Rngs):
        super().__init__(channels, num_heads, key_channels=config.context_dim, dtype=dtype, rngs=rngs)
        self.clean_sees = config.clean_sees
        self.backend = config.attention_backend
        order = functools.partial(Linear, use_bias=False, kernel_init=zeros, dtype=dtype, rngs=rngs)
        width = config.context_dim or channels
        self.order = order(ORDER_CHANNELS, width) if config.order_embedding else None

    def __call__(
        self, x_btc: Float[jax.Array, "b t c"], conditioning: Conditioning, address: Address
    ) -> tuple[Float[jax.Array, "b t c"], KeysValues | None]:
        if conditioning.cached is not None:
            out, keys_values = self._to_cached(x_btc, conditioning.cached, address)
        elif conditioning.sets is not None and conditioning.sets.layout.clean:
            out, keys_values = self._within_sets(x_btc, conditioning.sets)
        else:
            out, keys_values = jnp.zeros_like(x_btc), None
        return self.output(out, x_btc.shape), keys_values

    def keys_and_values(
        self, source_bksc: Float[jax.Array, "b k s c"], position_bk: Int[jax.Array, "b k"]
    ) -> KeysValues:
        """Return [b, k, s, h, d] of clean images: of their features at this layer, or of an image encoder's tokens."""
        source_bksc = source_bksc.astype(self.to_k.dtype)
        if self.order is not None:
            features_kc = timestep_features(position_bk.reshape(-1), ORDER_CHANNELS).astype(source_bksc.dtype)
            source_bksc = source_bksc + self.order(features_kc).reshape(*position_bk.shape, 1, -1)
        return self.heads(self.to_k(source_bksc)), self.heads(self.to_v(source_bksc))

    def _within_sets(
        self, x_btc: Float[jax.Array, "r t c"], sets: ImageSets
    ) -> tuple[Float[jax.Array, "b q t h d"], KeysValues]:
        layout = sets.layout
        x_bqtc = x_btc.reshape(-1, layout.num_images, *x_btc.shape[1:])
        source_bksc = x_bqtc[:, : len(layout.clean)]
        if layout.encoded:
            if sets.tokens_bmsc is None:
                raise ValueError("the layout says that images are encoded, and ImageSets.tokens_bmsc is None")
            source_bksc = sets.tokens_bmsc
        position_bk = jnp.broadcast_to(jnp.asarray(layout.clean)[None], source_bksc.shape[:2])
        keys_values = self.keys_and_values(source_bksc, position_bk)
        backend = BACKENDS.choose(self.backend)
        out_bqthd = backend(self.heads(self.to_q(x_bqtc)), *keys_values, layout, sets.keep_bm)
        if sets.keep_context_b is not None:
            is_clean_q = jnp.arange(layout.num_images) < len(layout.stacked_clean)
            keep_bq = is_clean_q[None, :] | sets.keep_context_b[:, None]
            out_bqthd = jnp.where(keep_bq[:, :, None, None, None], out_bqthd, jnp.zeros_like(out_bqthd))
        return out_bqthd, keys_values

    def _to_cached(
        self, x_btc: Float[jax.Array, "r t c"], cached: CachedContext, address: Address
    ) -> tuple[Float[jax.Array, "*rows t h d"], KeysValues | None]:
        q_bthd = self.heads(self.to_q(x_btc))
        b, seeing = cached.sees_bgm.shape[:2]
        own = None
        if cached.position_b is not None:
            k_b1shd, v_b1shd = self.keys_and_values(x_btc[:, None], cached.position_b[:, None])
            own = k_b1shd[:, 0], v_b1shd[:, 0]
            if self.clean_sees == "itself" or address not in cached.k_bmshd:
                return attend(q_bthd, *own), own
        q_bgthd = q_bthd.reshape(b, -1, *q_bthd.shape[1:])
        attention = CACHED_BACKENDS.choose(cached.backend)
        kept = cached.k_bmshd[address], cached.v_bmshd[address]
        out_bgthd = attention(q_bgthd[:, :seeing], *kept, cached.sees_bgm, own)
        blind = jnp.zeros_like(q_bgthd[:, seeing:])
        return jnp.concatenate([out_bgthd, blind], axis=1), own
