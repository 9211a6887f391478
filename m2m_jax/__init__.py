"""Many-to-many image generation with auto-regressive diffusion models (M2M), in JAX and Flax.

import m2m_jax
sampler = m2m_jax.Sampler.from_checkpoint("runs/demo")
images = sampler(["a.png", "b.png"], num_images=4, seed=0)   # uint8 [4, size, size, 3]
"""

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "AutoencoderKL": "m2m_jax.models.autoencoder",
    "NoiseSchedule": "m2m_jax.diffusion.schedule",
    "Sampler": "m2m_jax.sampling.sampler",
    "SetLayout": "m2m_jax.attention.layout",
    "UNet": "m2m_jax.models.unet",
    "UserError": "m2m_jax.core.errors",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    # Imported on first use: `python -m m2m_jax.sample --help` should not wait for Flax.
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'm2m_jax' has no attribute {name!r}")
