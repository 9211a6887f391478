"""The architecture of the U-Net: its fields, their limits, and what its fields were called before."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from m2m_jax.attention.backends import BACKENDS
from m2m_jax.attention.layout import CLEAN_SEES
from m2m_jax.configuration import Model
from m2m_jax.core.errors import UserError
from m2m_jax.core.registry import Registry
from m2m_jax.models.attentions import ATTENTIONS
from m2m_jax.models.embedders import EMBEDDERS
from m2m_jax.models.limits import BLOCKS, CHANNELS, LAYERS, require_between, require_levels, require_one_of
from m2m_jax.models.precision import PRECISIONS
from m2m_jax.models.remat import REMAT

BLOCK_TYPES = ("CrossAttnDownBlock2D", "DownBlock2D")  # with transformer blocks, without


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Architecture of the U-Net. Defaults are Stable Diffusion 2.x's, with sets in the place of text.

    Attributes:
      down_block_types: per level, outermost first; "CrossAttnDownBlock2D" has transformer blocks. The way up
        mirrors it.
      num_attention_heads: per level (what diffusers' config.json calls attention_head_dim).
      attentions: of a transformer block, in order, names in `ATTENTIONS`: ("self", "set") is M2M, ("self", "text")
        Stable Diffusion, ("self",) a single-image model without text.
      cross_attention_dim: width of the text's tokens, where "text" is among the attentions.
      context_dim: width of the tokens that an image encoder makes of clean images (M2M-DINO). None: "set" attends to
        this network's own features (M2M-Self), or there is none.
      global_embeddings: names in `EMBEDDERS`, of what each row is told beside its timestep.
      order_embedding: whether Image-Set Attention is told the positions of the images in their set.
      clean_sees: see `SetLayout`.
      attention_backend: of the attentions within images and within sets; see `attention.backends`.
      remat: what training computes again in the backward pass to save memory: "none", what is neither a convolution,
        nor a dot with a kernel, nor the output of attention ("dots"), or all of each residual and transformer block
        ("blocks").
      dtype: what is computed in, but for the modules of `unet.IN_FLOAT32`; parameters are float32.
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
    attentions: tuple[str, ...] = ("self", "set")
    cross_attention_dim: int | None = None
    context_dim: int | None = None
    global_embeddings: tuple[str, ...] = ()
    order_embedding: bool = False
    clean_sees: str = "preceding"
    attention_backend: str = "prefix"
    remat: str = "none"
    dtype: str = "float32"
    precision: str = "default"

    def __post_init__(self):
        registries: dict[str, Registry[Any]] = {"attentions": ATTENTIONS, "global_embeddings": EMBEDDERS}
        for name, registry in registries.items():
            for item in getattr(self, name):
                registry.choose(item)
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise UserError(f"UNetConfig: {name} is {getattr(self, name)}; each may stand there once")
        if "text" in self.attentions and not self.cross_attention_dim:
            raise UserError("UNetConfig: attention to text needs cross_attention_dim, the width of the text's tokens")
        counts = ("in_channels", "out_channels", "block_out_channels", "num_attention_heads", "norm_num_groups")
        require_between(self, **dict.fromkeys(counts, CHANNELS), norm_eps=(0, 1))
        require_between(self, **dict.fromkeys(("layers_per_block", "transformer_layers_per_block"), LAYERS))
        for name in ("cross_attention_dim", "context_dim"):
            if getattr(self, name) is not None:
                require_between(self, **{name: CHANNELS})
        require_levels(self, "down_block_types", "num_attention_heads")
        if len(self.block_out_channels) * self.layers_per_block * self.transformer_layers_per_block > BLOCKS:
            raise UserError(
                f"UNetConfig: {len(self.block_out_channels)} levels of layers_per_block={self.layers_per_block} and "
                f"transformer_layers_per_block={self.transformer_layers_per_block} are more than {BLOCKS} blocks"
            )
        require_one_of(self, down_block_types=BLOCK_TYPES, remat=tuple(REMAT), dtype=("float32", "bfloat16"))
        require_one_of(self, clean_sees=CLEAN_SEES, attention_backend=tuple(BACKENDS), precision=PRECISIONS)
        for channels, heads in zip(self.block_out_channels, self.num_attention_heads, strict=True):
            if channels % heads:
                raise UserError(f"num_attention_heads={self.num_attention_heads} must divide {self.block_out_channels}")

    @property
    def attends_to_encoded(self) -> bool:
        """M2M-DINO: the clean images enter as tokens of an image encoder and not as images of the stack."""
        return "set" in self.attentions and self.context_dim is not None

    @property
    def global_widths(self) -> dict[str, int]:
        """Return {global embedding: numbers of a value}."""
        return {name: EMBEDDERS[name].width for name in self.global_embeddings}


def with_todays_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a saved `UNetConfig` under today's names.

    Checkpoints and folders of before have attn2 in the place of attentions, as configs had (`Model.formerly`), and
    cross_attention_dim also for the tokens of an image encoder.

    Raises:
      UserError: attn2 is none of the words that there were.
    """
    values = dict(values)
    if "attn2" in values:
        word = values.pop("attn2")
        name, attentions = Model.today("attn2", word)
        values[name] = list(attentions)
        if word != "text":
            values["context_dim"] = values.pop("cross_attention_dim", None)
    return values
