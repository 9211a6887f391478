"""The text encoder of Stable Diffusion: CLIP's (Radford et al., arXiv 2103.00020). Names follow transformers.

Structure and parameter names are those of transformers' CLIPTextModel: OpenAI's ViT-L/14 in Stable Diffusion 1.x,
OpenCLIP's ViT-H/14 without its last layer in 2.x.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from m2m_jax.attention.plain import attend
from m2m_jax.core.errors import UserError
from m2m_jax.models.layers import Embed, LayerNorm, Linear, gelu
from m2m_jax.models.limits import CHANNELS, LAYERS, require_between


def quick_gelu(x: jax.Array) -> jax.Array:
    """Return x times sigmoid(1.702 x), the approximation that OpenAI's CLIP was trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": gelu, "quick_gelu": quick_gelu}
# transformers wrote this end-of-text id, which is wrong, into every config.json before version 4.31, those of Stable
# Diffusion among them; it takes the highest id of a row for the end there, and so do we.
WRONG_EOS = 2


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """Architecture of the text encoder, in transformers' words. Defaults are Stable Diffusion 2.x's.

    Attributes:
      hidden_act: "gelu" (OpenCLIP, Stable Diffusion 2.x) or "quick_gelu" (OpenAI, Stable Diffusion 1.x).
      eos_token_id: whose first state is the pooled one; 2: the state of the highest id of each row, see WRONG_EOS.
    """

    vocab_size: int = 49408
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 23
    num_attention_heads: int = 16
    max_position_embeddings: int = 77
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = WRONG_EOS

    def __post_init__(self):
        if self.hidden_act not in ACTIVATIONS:
            raise UserError(f"hidden_act must be one of {', '.join(ACTIVATIONS)}, not {self.hidden_act!r}")
        if not isinstance(self.eos_token_id, int):
            raise UserError(f"eos_token_id must be one number, not {self.eos_token_id!r}")
        counts = ("hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings")
        require_between(self, **dict.fromkeys(counts, CHANNELS), num_hidden_layers=LAYERS, layer_norm_eps=(0, 1))
        require_between(self, vocab_size=(1, 2**24))
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size={self.hidden_size} must be a multiple of num_attention_heads={self.num_attention_heads}"
            )


class TowerConfig(Protocol):
    """What the layers of both towers need to know."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def hidden_act(self) -> str: ...
    @property
    def layer_norm_eps(self) -> float: ...


class Attention(nnx.Module):
    """Multi-head self-attention with biases. `mask_qk`: bool [t, t], which tokens may see which; None: all see all."""

    def __init__(self, channels: int, num_heads: int, *, dtype, rngs: nnx.Rngs):
        def project() -> nnx.Linear:
            return Linear(channels, channels, dtype=dtype, rngs=rngs)

        self.num_heads = num_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = project(), project(), project(), project()

    def __call__(self, x_btc: jax.Array, mask_qk: np.ndarray | None = None) -> jax.Array:
        heads = (*x_btc.shape[:2], self.num_heads, -1)
        q_bthd, k_bthd, v_bthd = (f(x_btc).reshape(heads) for f in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attend(q_bthd, k_bthd, v_bthd, mask_qk).reshape(x_btc.shape))


class MLP(nnx.Module):
    """Two linear layers with the activation of that name between them."""

    def __init__(self, channels: int, hidden_channels: int, activation: str, *, dtype, rngs: nnx.Rngs):
        self.activation = activation
        self.fc1 = Linear(channels, hidden_channels, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(hidden_channels, channels, dtype=dtype, rngs=rngs)

    def __call__(self, x_btc: jax.Array) -> jax.Array:
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x_btc)))


class Embeddings(nnx.Module):
    """Token ids [b, s] to the sum [b, s, c] of what each token and its position are worth."""

    def __init__(self, c: CLIPTextConfig, *, rngs: nnx.Rngs):
        self.token_embedding = Embed(c.vocab_size, c.hidden_size, rngs=rngs)
        self.position_embedding = Embed(c.max_position_embeddings, c.hidden_size, rngs=rngs)

    def __call__(self, token_ids_bs: jax.Array) -> jax.Array:
        positions_sc = self.position_embedding(jnp.arange(token_ids_bs.shape[1]))
        return self.token_embedding(token_ids_bs) + positions_sc[None]


class Layer(nnx.Module):
    """Pre-norm attention and perceptron, each added to its input. causal: tokens see those before them alone."""

    def __init__(self, c: TowerConfig, *, causal: bool, rngs: nnx.Rngs):
        self.causal = causal
        self.layer_norm1 = LayerNorm(c.hidden_size, epsilon=c.layer_norm_eps, rngs=rngs)
        self.self_attn = Attention(c.hidden_size, c.num_attention_heads, dtype=None, rngs=rngs)
        self.layer_norm2 = LayerNorm(c.hidden_size, epsilon=c.layer_norm_eps, rngs=rngs)
        self.mlp = MLP(c.hidden_size, c.intermediate_size, c.hidden_act, dtype=None, rngs=rngs)

    def __call__(self, x_bsc: jax.Array) -> jax.Array:
        mask_qk = np.tri(x_bsc.shape[1], dtype=bool) if self.causal else None
        x_bsc = x_bsc + self.self_attn(self.layer_norm1(x_bsc), mask_qk)
        return x_bsc + self.mlp(self.layer_norm2(x_bsc))


class Encoder(nnx.Module):
    """The layers, under transformers' name."""

    def __init__(self, c: TowerConfig, *, causal: bool, rngs: nnx.Rngs):
        self.layers = nnx.List([Layer(c, causal=causal, rngs=rngs) for _ in range(c.num_hidden_layers)])

    def __call__(self, x_bsc: jax.Array) -> jax.Array:
        for layer in self.layers:
            x_bsc = layer(x_bsc)
        return x_bsc


class CLIPTextEncoder(nnx.Module):
    """Token ids to the states that Stable Diffusion attends to, and one pooled state.

    Padding is seen like any other token, as in Stable Diffusion, which gives its text encoder no padding mask.
    """

    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embeddings = Embeddings(config, rngs=rngs)
        self.encoder = Encoder(config, causal=True, rngs=rngs)
        self.final_layer_norm = LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, rngs=rngs)

    def __call__(self, token_ids_bs: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Encode ids int [b, s], with s at most `max_position_embeddings`.

        Returns:
          The states [b, s, c] after the last norm, and of them the one [b, c] at the first end of text; a row without
          one gives its first state, as in transformers.

        Raises:
          UserError: more tokens than there are positions.
        """
        positions = self.config.max_position_embeddings
        if token_ids_bs.shape[1] > positions:
            raise UserError(f"text of {token_ids_bs.shape[1]} tokens: this encoder has {positions} positions; cut it")
        x_bsc = self.final_layer_norm(self.encoder(self.embeddings(token_ids_bs)))
        score_bs = token_ids_bs
        if self.config.eos_token_id != WRONG_EOS:
            score_bs = token_ids_bs == self.config.eos_token_id
        end_b = jnp.argmax(score_bs, axis=1)  # the first of several
        return x_bsc, jnp.take_along_axis(x_bsc, end_b[:, None, None], axis=1)[:, 0]
