"""BERT (Devlin et al., arXiv 1810.04805) as an encoder of captions; MiniLM is one.

Names follow transformers' BertModel. Its pooled state, which a text-to-image model has no use for, is left out.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from m2m_jax.core.errors import UserError
from m2m_jax.models.layers import Embed, LayerNorm, Linear, gelu
from m2m_jax.models.limits import CHANNELS, LAYERS, require_between


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Architecture of the text encoder, in transformers' words. Defaults are those of MiniLM-L6.

    Attributes:
      pad_token_id: of what fills up a row; no token sees it.
    """

    vocab_size: int = 30522
    hidden_size: int = 384
    intermediate_size: int = 1536
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0

    def __post_init__(self):
        counts = ("hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings")
        require_between(self, **dict.fromkeys(counts, CHANNELS), num_hidden_layers=LAYERS, layer_norm_eps=(0, 1))
        require_between(self, vocab_size=(1, 2**24), type_vocab_size=CHANNELS, pad_token_id=(0, self.vocab_size - 1))
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size={self.hidden_size} must be a multiple of num_attention_heads={self.num_attention_heads}"
            )


class Embeddings(nnx.Module):
    """Token ids [b, s] to the norm [b, s, c] of what each token, its position and the first segment are worth."""

    def __init__(self, c: BertConfig, *, rngs: nnx.Rngs):
        self.word_embeddings = Embed(c.vocab_size, c.hidden_size, rngs=rngs)
        self.position_embeddings = Embed(c.max_position_embeddings, c.hidden_size, rngs=rngs)
        self.token_type_embeddings = Embed(c.type_vocab_size, c.hidden_size, rngs=rngs)
        self.norm = LayerNorm(c.hidden_size, epsilon=c.layer_norm_eps, rngs=rngs)

    def __call__(self, token_ids_bs: jax.Array) -> jax.Array:
        first_segment_bs = jnp.zeros_like(token_ids_bs)
        positions_sc = self.position_embeddings(jnp.arange(token_ids_bs.shape[1]))
        tokens_bsc = self.word_embeddings(token_ids_bs) + self.token_type_embeddings(first_segment_bs)
        return self.norm(tokens_bsc + positions_sc[None])


class Attention(nnx.Module):
    """Multi-head self-attention with biases to the tokens that `sees_bs` marks."""

    def __init__(self, channels: int, num_heads: int, *, rngs: nnx.Rngs):
        def project() -> nnx.Linear:
            return Linear(channels, channels, rngs=rngs)

        self.num_heads = num_heads
        self.query, self.key, self.value, self.out = project(), project(), project(), project()

    def __call__(self, x_bsc: jax.Array, sees_bs: jax.Array) -> jax.Array:
        heads = (*x_bsc.shape[:2], self.num_heads, -1)
        q_bshd, k_bshd, v_bshd = (f(x_bsc).reshape(heads) for f in (self.query, self.key, self.value))
        out_bshd = jax.nn.dot_product_attention(q_bshd, k_bshd, v_bshd, mask=sees_bs[:, None, None, :])
        return self.out(out_bshd.reshape(x_bsc.shape))


class Layer(nnx.Module):
    """Attention and perceptron, each added to its input and normalised after."""

    def __init__(self, c: BertConfig, *, rngs: nnx.Rngs):
        def norm() -> nnx.LayerNorm:
            return LayerNorm(c.hidden_size, epsilon=c.layer_norm_eps, rngs=rngs)

        self.attention = Attention(c.hidden_size, c.num_attention_heads, rngs=rngs)
        self.attention_norm = norm()
        self.up = Linear(c.hidden_size, c.intermediate_size, rngs=rngs)
        self.down = Linear(c.intermediate_size, c.hidden_size, rngs=rngs)
        self.output_norm = norm()

    def __call__(self, x_bsc: jax.Array, sees_bs: jax.Array) -> jax.Array:
        x_bsc = self.attention_norm(x_bsc + self.attention(x_bsc, sees_bs))
        return self.output_norm(x_bsc + self.down(gelu(self.up(x_bsc))))


class BertEncoder(nnx.Module):
    """Token ids to the states of the tokens."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embeddings = Embeddings(config, rngs=rngs)
        self.layers = nnx.List([Layer(config, rngs=rngs) for _ in range(config.num_hidden_layers)])

    def __call__(self, token_ids_bs: jax.Array) -> jax.Array:
        """Return the states [b, s, c] of ids int [b, s]; those of padding are zeros, and nothing saw it.

        Raises UserError for more tokens than there are positions.
        """
        positions = self.config.max_position_embeddings
        if token_ids_bs.shape[1] > positions:
            raise UserError(f"text of {token_ids_bs.shape[1]} tokens: this encoder has {positions} positions; cut it")
        sees_bs = token_ids_bs != self.config.pad_token_id
        x_bsc = self.embeddings(token_ids_bs)
        for layer in self.layers:
            x_bsc = layer(x_bsc, sees_bs)
        return jnp.where(sees_bs[..., None], x_bsc, jnp.zeros_like(x_bsc))
