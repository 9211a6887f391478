"""Latents are bound to the autoencoder that made them, whichever data set holds them."""

from __future__ import annotations

from m2m_jax.configuration import Data, reads_latents
from m2m_jax.core.errors import UserError
from m2m_jax.core.parameters import Params
from m2m_jax.data import precomputed
from m2m_jax.data.source import SOURCES
from m2m_jax.models.autoencoder import AutoencoderConfig


def require_autoencoder(data: Data, folder: str, config: AutoencoderConfig, params: Params) -> None:
    """Raise UserError if `config.data` names latents that were not made by the autoencoder in `folder`."""
    if not reads_latents(data):
        return
    used = precomputed.describe_autoencoder(config, params)
    for split in (data.train_split, data.eval_split):
        made_with = SOURCES[data.name].autoencoder(data, split)
        if made_with != used:
            hashes = " and ".join(str(one.get("sha256"))[:12] for one in (made_with, used))
            raise UserError(
                f"config.autoencoder.path={folder} is not the autoencoder of the latents in {data.path} ({split}): "
                f"weights {hashes}; name that one, or make the latents again"
            )
