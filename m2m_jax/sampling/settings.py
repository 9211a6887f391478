"""How images are drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from m2m_jax.core.errors import UserError
from m2m_jax.diffusion.guidance import Guidance
from m2m_jax.diffusion.steppers import STEPPERS
from m2m_jax.models.folder import config_from

CACHE_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """Static and hashable.

    Attributes:
      steps: of the stepper, an image.
      stepper: a name in `STEPPERS`.
      guidance_scale, guidance_interval, guidance_rescale, guidance_schedule: over the context; see `Guidance`.
      cache_size: context images of a set that can be kept, given and generated together.
      cache_dtype: what their keys and values are kept in; None: the network's dtype, in which they are computed, so
        that nothing is lost. For a float32 network "bfloat16" is half the memory, not exact.
      slide: in a set that outgrows the cache, the oldest image makes room: an approximation. Without it such a set is
        refused.
    """

    steps: int = 25
    stepper: str = "dpmpp_2m"
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_rescale: float = 0.0
    guidance_schedule: str = "constant"
    cache_size: int = 25
    cache_dtype: str | None = None
    slide: bool = False

    def __post_init__(self):
        if self.steps < 1:
            raise UserError(f"sampling needs at least one step, not {self.steps}")
        if self.stepper not in STEPPERS:
            raise UserError(f"stepper must be one of {', '.join(STEPPERS)}, not {self.stepper!r}")
        if self.cache_size < 1:
            raise UserError(f"cache_size must be at least 1, not {self.cache_size}")
        if self.cache_dtype not in (None, *CACHE_DTYPES):
            raise UserError(f"cache_dtype must be one of {', '.join(CACHE_DTYPES)}, not {self.cache_dtype!r}")
        self.guidance  # noqa: B018 (refuses bad ones)

    @classmethod
    def chosen(cls, config: Mapping[str, Any], given: Mapping[str, Any]) -> SamplingSettings:
        """Those of a run's config, where `given` says nothing else. Raises UserError for what is no setting."""
        fields = [field.name for field in dataclasses.fields(cls)]
        for name in given:
            if name not in fields:
                raise UserError(f"{name} is no setting of sampling; there are {', '.join(fields)}")
        return config_from(cls, {**config, **given}, {})

    @property
    def guidance(self) -> Guidance:
        """Over the context."""
        return Guidance(
            self.guidance_scale, tuple(self.guidance_interval), self.guidance_rescale, self.guidance_schedule
        )
