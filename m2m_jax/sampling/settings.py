"""How images are drawn."""

import dataclasses

from m2m_jax.diffusion.guidance import Guidance
from m2m_jax.diffusion.steppers import STEPPERS
from m2m_jax.errors import UserError

CACHE_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """Static and hashable.

    Attributes:
      steps: of the stepper, an image.
      stepper: a name in `STEPPERS`.
      guidance_scale, guidance_interval, guidance_rescale, guidance_schedule: over the context; see `Guidance`.
      cache_size: context images of a set that can be kept, given and generated together.
      cache_dtype: what their keys and values are kept in: "float32" is exact, "bfloat16" half the memory.
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
    cache_dtype: str = "float32"
    slide: bool = False

    def __post_init__(self):
        if self.steps < 1:
            raise UserError(f"sampling needs at least one step, not {self.steps}")
        if self.stepper not in STEPPERS:
            raise UserError(f"stepper must be one of {', '.join(STEPPERS)}, not {self.stepper!r}")
        if self.cache_size < 1:
            raise UserError(f"cache_size must be at least 1, not {self.cache_size}")
        if self.cache_dtype not in CACHE_DTYPES:
            raise UserError(f"cache_dtype must be one of {', '.join(CACHE_DTYPES)}, not {self.cache_dtype!r}")
        self.guidance  # noqa: B018 (refuses bad ones)

    @property
    def guidance(self) -> Guidance:
        """Over the context."""
        return Guidance(
            self.guidance_scale, tuple(self.guidance_interval), self.guidance_rescale, self.guidance_schedule
        )
