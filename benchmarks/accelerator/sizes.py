"""What is measured: the networks of Stable Diffusion 2.1 at 512 px, and as small ones as a test has time for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from configs.mis_sd21_self import get_config
from m2m_jax.configuration import Config
from m2m_jax.models.autoencoder import AutoencoderConfig
from m2m_jax.models.clip_text import CLIPTextConfig


@dataclasses.dataclass(frozen=True)
class Size:
    """One set of measurements; what comes first in a list is worth most.

    Attributes:
      overrides: of configs/mis_sd21_self.py.
      autoencoder, text_encoder: what they would be; of the latter nothing but its width matters.
      text_steps: (images, whether there is an EMA).
      set_steps: (sets, attention backend, remat).
      images_per_set: in training.
      sampled_sets: how many at once.
      context: images that each has.
      guidance: scales; 1 is none.
      decoded: images that the autoencoder encodes and decodes at once.
      read_pixels: a side of images that the input pipeline reads.
      read_sets: of four images each.
      patience: times the limits of parts: a test's machine has other work.
    """

    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    autoencoder: AutoencoderConfig = AutoencoderConfig()  # noqa: RUF009 (frozen)
    text_encoder: CLIPTextConfig = CLIPTextConfig()  # noqa: RUF009 (frozen)
    text_steps: tuple[tuple[int, bool], ...] = ((32, False), (32, True), (16, False), (16, True), (8, False), (8, True))
    # Compiled for an H100 (docs/accelerators.md): these fit beside the state, the larger ones with remat.
    set_steps: tuple[tuple[int, str, str], ...] = (
        (4, "auto", "none"),
        (8, "auto", "blocks"),
        (4, "auto", "dots"),
        (2, "auto", "none"),
        (8, "auto", "dots"),
        (16, "auto", "blocks"),
        (1, "prefix", "blocks"),
    )
    images_per_set: int = 5
    sampled_sets: tuple[int, ...] = (1, 8)
    context: tuple[int, ...] = (0, 1, 4, 24)
    guidance: tuple[float, ...] = (1.0, 2.0)
    decoded: int = 8
    read_pixels: tuple[int, ...] = (64, 512)
    read_sets: int = 256
    patience: float = 1.0

    def config(self, **fields: Any) -> Config:
        """Return the config of a run, which reads no folder. fields: others, "data__batch_size" for two words."""
        config = get_config()
        ours = {"init.path": "", "data.path": "none", "data.images_per_set": self.images_per_set}
        config.update(ours | dict(self.overrides) | {name.replace("__", "."): x for name, x in fields.items()})
        return config


SIZES: dict[str, Size] = {
    "full": Size(),
    "tiny": Size(
        overrides={
            "data.image_size": 32,
            "model.block_out_channels": (8,),
            "model.down_block_types": ("CrossAttnDownBlock2D",),
            "model.num_attention_heads": (1,),
            "model.layers_per_block": 1,
            "model.norm_num_groups": 4,
            "model.dtype": "float32",
        },
        autoencoder=AutoencoderConfig(block_out_channels=(4, 4), layers_per_block=1, norm_num_groups=4),
        text_encoder=CLIPTextConfig(hidden_size=16, num_attention_heads=2, max_position_embeddings=8),
        text_steps=((2, False),),
        set_steps=((1, "auto", "none"),),
        images_per_set=2,
        sampled_sets=(1,),
        context=(0, 2),
        guidance=(2.0,),
        decoded=1,
        read_pixels=(32,),
        read_sets=16,
        patience=20.0,
    ),
}
