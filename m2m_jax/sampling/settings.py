"""Choose how images are drawn: stepper, guidance, and what is kept of the context."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from m2m_jax.core.errors import UserError
from m2m_jax.core.options import Options, option

if TYPE_CHECKING:  # at run time within functions: these are options, and --help need not wait for JAX
    import numpy as np

    from m2m_jax.diffusion.guidance import GuidanceTable
    from m2m_jax.diffusion.schedule import NoiseSchedule
    from m2m_jax.diffusion.step_tables import StepTable


@dataclasses.dataclass(frozen=True)
class SamplingSettings(Options):
    """Say how images are drawn; static and hashable.

    Example:
        SamplingSettings(steps=50, stepper="unipc", guidance_scale=1.5, guidance_interval=(0.2, 0.8))
    """

    steps: int = option("Steps of the stepper, an image.", 25, low=1)
    stepper: str = option("Name of the stepper; a wrong one is answered with all there are.", "dpmpp_2m")
    guidance: str = option("Name of the guidance; a wrong one is answered with all there are.", "cfg")
    guidance_scale: float = option("How far the context, or a caption, is exaggerated; 1 is not at all.", 1.0, low=0)
    guidance_interval: tuple[float, ...] = option(
        "Fractions of the noise levels between which there is guidance, 0 clean and 1 noise: 0.2,0.8.",
        (0.0, 1.0),
        low=0,
        high=1,
    )
    guidance_rescale: float = option(
        "How far a guided output is brought back to the deviation of the conditional one.", 0.0, low=0, high=1
    )
    guidance_schedule: str = option(
        "How the scale goes over the noise levels; a wrong name is answered with all there are.", "constant"
    )
    guidance_options: tuple[str, ...] = option("Further numbers of a guidance: NAME=NUMBER,NAME=NUMBER.", ())
    cache_size: int = option("Context images of a set that are kept at most, given and generated together.", 25, low=1)
    cache_dtype: str | None = option(
        "What they are kept in, if not in the model's own, which is exact: bfloat16 halves the memory of float32.",
        None,
        choices=("float32", "bfloat16"),
    )
    slide: bool = option(
        "In a set that outgrows the cache, forget the oldest image: an approximation. Without, it is refused.", False
    )

    def __post_init__(self):
        import numpy as np

        from m2m_jax.diffusion.step_tables import STEPPERS

        super().__post_init__()
        STEPPERS.choose(self.stepper)
        if len(self.guidance_interval) != 2 or self.guidance_interval[0] > self.guidance_interval[1]:
            raise UserError(
                f"--guidance_interval must be two fractions, the smaller first, not {self.guidance_interval}"
            )
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
        return cls(**{name: value for name, value in {**config, **given}.items() if name in fields})

    def step_table(self, schedule: NoiseSchedule) -> StepTable:
        """Return the steps of one image.

        Raises:
          UserError: the stepper is none for this schedule, or there are too many steps for it.
        """
        from m2m_jax.diffusion.step_tables import STEPPERS

        return STEPPERS[self.stepper](schedule, self.steps)

    def guidance_table(self, noise_s: np.ndarray) -> GuidanceTable:
        """Return branches and weights. noise_s: fractions of the noise levels, one a step."""
        from m2m_jax.diffusion.guidance import make_table

        options = {
            "scale": (self.guidance_scale, 1.0),
            "interval": (self.guidance_interval, (0.0, 1.0)),
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
