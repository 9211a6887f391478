"""Command-line flags for fields of `SamplingSettings`, shared by the programs that take a checkpoint."""

from absl import flags

from m2m_jax.core.errors import UserError
from m2m_jax.diffusion.guidance import SCHEDULES
from m2m_jax.diffusion.steppers import STEPPERS
from m2m_jax.sampling.settings import CACHE_DTYPES, SamplingSettings

# The run's config where a flag is not given.
_FLAGS = {
    "steps": flags.DEFINE_integer("steps", None, "Steps of the stepper, an image."),
    "stepper": flags.DEFINE_string("stepper", None, f"One of {', '.join(STEPPERS)}."),
    "guidance_scale": flags.DEFINE_float("guidance_scale", None, "Over the context; 1 is none."),
    "guidance_interval": flags.DEFINE_list("guidance_interval", None, "Fractions of the noise levels: 0.2,0.8."),
    "guidance_rescale": flags.DEFINE_float("guidance_rescale", None, "0 to 1: how far contrast is brought back."),
    "guidance_schedule": flags.DEFINE_string("guidance_schedule", None, f"One of {', '.join(SCHEDULES)}."),
    "cache_size": flags.DEFINE_integer("cache_size", None, "Context images of a set that are kept."),
    "cache_dtype": flags.DEFINE_string(
        "cache_dtype", None, f"One of {', '.join(CACHE_DTYPES)}, if not the model's own: exact, or half the memory."
    ),
    "slide": flags.DEFINE_bool("slide", None, "In a set that outgrows the cache, forget the oldest image."),
}


def given_settings() -> dict:
    """Fields of `SamplingSettings` that flags set. Raises UserError for bad ones."""
    given = {name: flag.value for name, flag in _FLAGS.items() if flag.value is not None}
    if "guidance_interval" in given:
        try:
            given["guidance_interval"] = tuple(float(end) for end in given["guidance_interval"])
        except ValueError as error:
            raise UserError(f"--guidance_interval={','.join(given['guidance_interval'])}: {error}") from error
    SamplingSettings(**given)
    return given
