"""Choose how images are drawn: stepper, guidance, and what is kept of the context."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from m2m_jax.core.errors import UserError
from m2m_jax.diffusion.guidance import GuidanceTable, make_table
from m2m_jax.diffusion.schedule import NoiseSchedule
from m2m_jax.diffusion.step_tables import STEPPERS, StepTable
from m2m_jax.models.folder import config_from

CACHE_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """How images are drawn; static and hashable.

    Attributes:
      steps: steps of the stepper, an image.
      stepper: a name in `STEPPERS`.
      guidance: a name in `GUIDANCES`.
      guidance_scale: how far the context, or a caption, is exaggerated; 1 is not at all.
      guidance_interval: fractions of the noise levels between which there is guidance; 0 is clean, 1 noise.
      guidance_schedule: a name in `diffusion.guidance.SCHEDULES`, how the scale goes over the noise levels.
      guidance_options: further numbers of the guidance, "NAME=NUMBER" each.
      guidance_rescale: 0 to 1, how far a guided output is brought back to the deviation of the conditional one.
      cache_size: context images of a set that can be kept, given and generated together.
      cache_dtype: what their keys and values are kept in; None: what the model computes in, which is exact.
        "bfloat16" halves the memory of a float32 model, and is not exact.
      slide: in a set that outgrows the cache, the oldest image makes room: an approximation. Without it such a set is
        refused.

    Example:
        SamplingSettings(steps=50, stepper="unipc", guidance_scale=1.5, guidance_interval=(0.2, 0.8))
    """

    steps: int = 25
    stepper: str = "dpmpp_2m"
    guidance: str = "cfg"
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_rescale: float = 0.0
    guidance_schedule: str = "constant"
    guidance_options: tuple[str, ...] = ()
    cache_size: int = 25
    cache_dtype: str | None = None
    slide: bool = False

    def __post_init__(self):
        if self.steps < 1:
            raise UserError(f"sampling needs at least one step, not {self.steps}")
        STEPPERS.choose(self.stepper)
        interval = self.guidance_interval
        if not (len(interval) == 2 and 0.0 <= interval[0] <= interval[1] <= 1.0):
            raise UserError(f"guidance_interval must be two fractions, the smaller first, not {interval}")
        if not 0.0 <= self.guidance_rescale <= 1.0:
            raise UserError(f"guidance_rescale must be between 0 and 1, not {self.guidance_rescale}")
        if self.cache_size < 1:
            raise UserError(f"cache_size must be at least 1, not {self.cache_size}")
        if self.cache_dtype not in (None, *CACHE_DTYPES):
            raise UserError(f"cache_dtype must be one of {', '.join(CACHE_DTYPES)}, not {self.cache_dtype!r}")
        self.guidance_table(np.array([1.0, 0.5]))  # which refuses bad options

    @classmethod
    def chosen(cls, config: Mapping[str, Any], given: Mapping[str, Any]) -> SamplingSettings:
        """Return the settings of a run's config, where `given` says nothing else.

        Raises:
          UserError: a name is no setting, or a value is none for it.
        """
        fields = [field.name for field in dataclasses.fields(cls)]
        for name in given:
            if name not in fields:
                raise UserError(f"{name} is no setting of sampling; there are {', '.join(fields)}")
        return config_from(cls, {**config, **given}, {})

    def step_table(self, schedule: NoiseSchedule) -> StepTable:
        """Return the steps of one image.

        Raises:
          UserError: the stepper is none for this schedule, or there are too many steps for it.
        """
        return STEPPERS[self.stepper](schedule, self.steps)

    def guidance_table(self, noise_s: np.ndarray) -> GuidanceTable:
        """Return branches and weights. noise_s: fractions of the noise levels, one a step."""
        options = {
            "scale": (self.guidance_scale, 1.0),
            "interval": (tuple(self.guidance_interval), (0.0, 1.0)),
            "schedule": (self.guidance_schedule, "constant"),
        }
        return make_table(self.guidance, noise_s, options, dict(map(_option, self.guidance_options)))


def _option(text: str) -> tuple[str, float]:
    """Read NAME=NUMBER."""
    name, _, number = text.partition("=")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"guidance_options takes NAME=NUMBER, not {text!r:.60}")
    return name.strip(), value
