"""Steppers: from noise to an image by a fixed number of network evaluations. Deterministic, without clipping.

In terms of the predicted clean image, one step from (alpha, sigma) to (alpha', sigma') of each of them is

    next = keep * x + clean_weight * clean + previous_weight * previous_clean

with weights that depend on the schedule alone. So a stepper is a choice of timesteps and a table of weights,
made in float64 on the host, and all share one scan. In this form pure noise (alpha = 0, zero terminal SNR)
and the clean image (sigma' = 0) are levels like any other: no weight divides by alpha, and no logarithm of
the SNR reaches the device.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from m2m_jax.diffusion.schedule import NoiseSchedule


class StepTable(NamedTuple):
    """What each of S steps does; all [S].

    Attributes:
      timestep: int32, where the network is evaluated.
      keep: float32, weight of the current image.
      clean_weight: float32, weight of the clean image predicted at this step.
      previous_weight: float32, weight of the one predicted at the step before; 0 at the first step.
    """

    timestep: np.ndarray
    keep: np.ndarray
    clean_weight: np.ndarray
    previous_weight: np.ndarray


class Stepper(abc.ABC):
    """A table of steps, and the scan that walks it."""

    @abc.abstractmethod
    def table(self, schedule: NoiseSchedule, num_steps: int) -> StepTable:
        """The steps for a schedule, all [num_steps]."""

    def sample(
        self,
        schedule: NoiseSchedule,
        num_steps: int,
        denoise: Callable[[jax.Array, jax.Array], jax.Array],
        noise: jax.Array,
    ) -> jax.Array:
        """Walks from noise to a clean image.

        Args:
          schedule: noise levels, and what the output of `denoise` means.
          num_steps: evaluations of `denoise`; static.
          denoise: (image, timestep int32 scalar) -> network output of the same shape, guidance included.
          noise: standard normal, of any shape.

        Returns:
          The image, with the shape and dtype of `noise`.
        """

        def update(carry: tuple[jax.Array, jax.Array], step: StepTable):
            x, previous_clean = carry
            clean = schedule.to_clean(denoise(x, step.timestep), x, step.timestep)
            keep, clean_weight, previous_weight = (weight.astype(x.dtype) for weight in step[1:])
            x = keep * x + clean_weight * clean + previous_weight * previous_clean
            return (x, clean), None

        # The first step gives the previous prediction no weight: any finite value serves to start the carry.
        steps = jax.tree.map(jnp.asarray, self.table(schedule, num_steps))
        (x, _), _ = jax.lax.scan(update, (noise, jnp.zeros_like(noise)), steps)
        return x


@dataclasses.dataclass(frozen=True)
class DDIM(Stepper):
    """DDIM with eta = 0: Song et al. 2021, arXiv:2010.02502, eq. 12. Values: diffusers' `DDIMScheduler`.

    One difference: diffusers steps down by num_train_timesteps // num_steps whatever the grid, so under
    "linspace", and under "trailing" where that division leaves a remainder, it lands beside the timestep at
    which the network is evaluated next. Here a step ends where the next begins.
    """

    def table(self, schedule: NoiseSchedule, num_steps: int) -> StepTable:
        """alpha' * clean + sigma' * noise, with noise = (x - alpha * clean) / sigma; [num_steps]."""
        timestep = schedule.inference_timesteps(num_steps)
        keep, gain = _first_order(*_levels(schedule, timestep))
        return _step_table(timestep, keep, gain, np.zeros(num_steps))


@dataclasses.dataclass(frozen=True)
class DPMSolverPlusPlus2M(Stepper):
    """DPM-Solver++(2M): Lu et al. 2022, arXiv:2211.01095, Algorithm 2.

    Values: diffusers' `DPMSolverMultistepScheduler` with its defaults (solver_order 2, midpoint,
    lower_order_final, final sigma zero).

    The first step knows no previous prediction and the last ends at log SNR = infinity: both are of first
    order. With fewer than 15 steps diffusers' lower_order_final says the same of the last step, so it needs
    no case here. Under zero terminal SNR the second step too is of first order, as the limit says: the first
    starts at log SNR = -infinity, and the slope of the prediction over an infinite interval is 0. (diffusers
    puts alphas_cumprod = 2**-24 there instead, and so differs in the fourth digit.)
    """

    def table(self, schedule: NoiseSchedule, num_steps: int) -> StepTable:
        """First order, plus gain * (clean - previous_clean) / (2 r) with r = h_previous / h; [num_steps]."""
        timestep = schedule.inference_timesteps(num_steps, drop_zero=True)
        alpha, sigma = _levels(schedule, timestep)
        keep, gain = _first_order(alpha, sigma)
        with np.errstate(divide="ignore"):
            half_log_snr = np.log(alpha) - np.log(sigma)  # lambda: -inf at pure noise, +inf at the end
        h = np.diff(half_log_snr)
        extrapolation = np.zeros(num_steps)  # 1 / (2 r)
        if num_steps > 2:
            extrapolation[1:-1] = h[1:-1] / (2 * h[:-2])  # finite / inf = 0 under zero terminal SNR
        return _step_table(timestep, keep, gain * (1 + extrapolation), -gain * extrapolation)


STEPPERS: dict[str, Stepper] = {"ddim": DDIM(), "dpmpp_2m": DPMSolverPlusPlus2M()}


def _levels(schedule: NoiseSchedule, timestep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """alpha and sigma at the timesteps and, last, of the clean image: two float64 [S + 1]."""
    alphas_cumprod = np.append(schedule.alphas_cumprod[timestep], 1.0)
    return np.sqrt(alphas_cumprod), np.sqrt(1.0 - alphas_cumprod)


def _first_order(alpha: np.ndarray, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights of x and of the clean image in a DDIM step, each [S], for levels [S + 1].

    `gain` is DPM-Solver++'s alpha' * (1 - exp(-h)), with exp(-h) = alpha * sigma' / (sigma * alpha') written
    out, so that neither end of the schedule needs a logarithm.
    """
    keep = sigma[1:] / sigma[:-1]
    gain = alpha[1:] - keep * alpha[:-1]
    return keep, gain


def _step_table(timestep, keep, clean_weight, previous_weight) -> StepTable:
    """Rounds float64 weights, all [S], once."""
    return StepTable(timestep, *(np.asarray(w, np.float32) for w in (keep, clean_weight, previous_weight)))
