"""What each stepper does, as a table of weights made in float64 on the host.

Every stepper here is linear in images that it has: one step from (alpha, sigma) to (alpha', sigma') is

    next = weighted sum of x, the clean image just predicted, those predicted before, and fresh noise

with weights that depend on the schedule alone. In this form pure noise (alpha = 0, zero terminal SNR, the start of
a rectified flow) and the clean image (sigma' = 0) are levels like any other: no weight divides by alpha, and no
logarithm of the SNR reaches the device. The weights are functions of the two levels, whatever the schedule they are
from: all steppers but `heun` take every schedule.

Levels keep the schedule's own scale. diffusers' Euler schedulers and Karras et al. (2022, arXiv:2206.00364) write
x / alpha and sigma / alpha for x and sigma; it is the same step.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from m2m_jax.core.errors import UserError
from m2m_jax.core.registry import Registry
from m2m_jax.diffusion.schedule import NoiseSchedule

# What the weights of a row belong to, in the order of their columns: the current image; an image that the rows before
# put by; the clean image predicted at this row, at the one before and at the one before that; new unit-variance noise.
TERMS = ("x", "kept", "clean", "previous", "before_previous", "noise")


class StepTable(NamedTuple):
    """S rows, each with one evaluation of the network; float32.

    Attributes:
      start: [], weight of the initial noise.
      timestep: [S], what the network is told; not always an integer.
      alpha, sigma: [S], the level at which its output is turned into a clean image.
      x: [S, TERMS], the weights that make the next image. Clean images of before the first row weigh 0.
      kept: [S, TERMS], the weights that make the image to put by. All 0 in most tables.
    """

    start: np.ndarray
    timestep: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    x: np.ndarray
    kept: np.ndarray


class Levels(NamedTuple):
    """The levels that a sampler visits, float64.

    Attributes:
      timestep: [S], what the network is told.
      alpha, sigma: [S + 1], the last being the clean image.
    """

    timestep: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray


# (schedule, number of steps) -> the steps; UserError where the schedule is none for this stepper. Any file of this
# package may register one.
STEPPERS = Registry[Callable[[NoiseSchedule, int], StepTable]]("stepper", "m2m_jax.diffusion")


@STEPPERS.register("ddim")
def ddim(schedule: NoiseSchedule, num_steps: int) -> StepTable:
    """DDIM with eta = 0: Song et al. 2021, arXiv:2010.02502, eq. 12. Values: diffusers' `DDIMScheduler`.

    Two differences. diffusers steps down by num_train_timesteps // num_steps whatever the grid, so under "linspace",
    and under "trailing" where that division leaves a remainder, it lands beside the timestep at which the network is
    evaluated next; here a step ends where the next begins. And where set_alpha_to_one is false, as in published Stable
    Diffusion folders, diffusers leaves the noise of the first timestep in; here the last step ends at the clean image.
    """
    levels = _levels(schedule, schedule.inference_timesteps(num_steps))
    x, clean = _deterministic(levels)
    return _table(levels, x=x, clean=clean)


@STEPPERS.register("ddpm")
def ddpm(schedule: NoiseSchedule, num_steps: int) -> StepTable:
    """Ancestral sampling: Ho et al. 2020, arXiv:2006.11239, eq. 7, which is a draw of the next image given this one
    and the clean one. Values: diffusers' `DDPMScheduler` with variance_type "fixed_small" and without clipping.
    """
    levels = _levels(schedule, schedule.inference_timesteps(num_steps))
    x, clean, noise = _posterior(levels)
    return _table(levels, x=x, clean=clean, noise=noise)


@STEPPERS.register("euler")
def euler(schedule: NoiseSchedule, num_steps: int) -> StepTable:
    """Euler steps of the probability flow in sigma / alpha: Karras et al., Algorithm 1 without its second order.

    Values: diffusers' `EulerDiscreteScheduler`. The step is that of `ddim`; what differs is the grid of "linspace",
    which is not rounded, and the initial noise, which is what belongs to the first level (of "leading": unit noise).
    On a rectified flow: `FlowMatchEulerDiscreteScheduler`, and no different from `ddim`.
    """
    levels = _euler_levels(schedule, num_steps)
    x, clean = _deterministic(levels)
    return _table(levels, start=_euler_start(schedule, levels), x=x, clean=clean)


@STEPPERS.register("euler_ancestral")
def euler_ancestral(schedule: NoiseSchedule, num_steps: int) -> StepTable:
    """Take an Euler step to less noise than the next level has, then noise up to it: `sample_euler_ancestral` of
    k-diffusion (Crowson). Values: diffusers' `EulerAncestralDiscreteScheduler`.

    The step is that of `ddpm`; the grid and the initial noise are those of `euler`.
    """
    levels = _euler_levels(schedule, num_steps)
    x, clean, noise = _posterior(levels)
    return _table(levels, start=_euler_start(schedule, levels), x=x, clean=clean, noise=noise)


@STEPPERS.register("dpmpp_2m")
def dpmpp_2m(schedule: NoiseSchedule, num_steps: int) -> StepTable:
    """DPM-Solver++(2M): Lu et al. 2022, arXiv:2211.01095, Algorithm 2.

    Values: diffusers' `DPMSolverMultistepScheduler` with its defaults (solver_order 2, midpoint, lower_order_final,
    final sigma zero). With fewer than 15 steps its lower_order_final says of the last step what is so in any case.

    From pure noise diffusers puts alphas_cumprod = 2**-24 for 0, and so differs in the fourth digit.
    """
    levels = _levels(schedule, schedule.inference_timesteps(num_steps, drop_zero=True))
    x, clean = _deterministic(levels)
    return _table(levels, x=x, **_extrapolated(levels, clean))


@STEPPERS.register("dpmpp_2m_sde")
def dpmpp_2m_sde(schedule: NoiseSchedule, num_steps: int) -> StepTable:
    """SDE-DPM-Solver++(2M): Lu et al. 2022, arXiv:2211.01095.

    Values: diffusers' `DPMSolverMultistepScheduler` with algorithm_type "sde-dpmsolver++" and else its defaults. Its
    first-order step is that of `ddpm`.
    """
    levels = _levels(schedule, schedule.inference_timesteps(num_steps, drop_zero=True))
    x, clean, noise = _posterior(levels)
    return _table(levels, x=x, noise=noise, **_extrapolated(levels, clean))


@STEPPERS.register("unipc")
def unipc(schedule: NoiseSchedule, num_steps: int) -> StepTable:
    """UniPC-2 with B_2(h) = e^h - 1: Zhao et al. 2023, arXiv:2302.04867, predicting the clean image.

    Values: diffusers' `UniPCMultistepScheduler` with its defaults (solver_order 2, bh2, predict_x0,
    lower_order_final, no corrector disabled).

    Its predictor is the step of `dpmpp_2m`. Once the network has been evaluated at the predicted image, the step that
    led there is taken again with the new clean image, from the image put by; the network is not asked again at the
    corrected image, from which the next step starts.

    From pure noise the same limits as in `dpmpp_2m` hold: a slope over an infinite interval is 0.
    """
    levels = _levels(schedule, schedule.inference_timesteps(num_steps, drop_zero=True))
    x, gain = _deterministic(levels)
    predictor = _extrapolated(levels, gain)
    h = np.diff(_half_log_snr(levels))

    # Row i corrects step i - 1, from the image kept then; row 0 has nothing to correct.
    weight_new, weight_old = np.full(num_steps - 1, 0.5), np.zeros(num_steps - 1)  # order 1: diffusers' rho = 1/2
    if num_steps > 2:
        # rho_1 + rho_2 = b_1 and r rho_1 + rho_2 = b_2, with r < 0 the place of the clean image before the last.
        # The solution is written out: r = -infinity after a step from pure noise.
        r, negative_h = -h[:-2] / h[1:-1], -h[1:-1]
        phi_1 = np.expm1(negative_h) / negative_h - 1
        phi_2 = phi_1 / negative_h - 0.5
        b_1, b_2 = phi_1 / np.expm1(negative_h), 2 * phi_2 / np.expm1(negative_h)
        rho_1 = (b_1 - b_2) / (1 - r)
        weight_new[1:], weight_old[1:] = b_1 - rho_1, rho_1 / r
    corrector = _weights(
        num_steps,
        x=np.arange(num_steps) == 0,
        kept=np.append(0.0, x[:-1]),
        clean=np.append(0.0, gain[:-1] * weight_new),
        previous=np.append(0.0, gain[:-1] * (1 - weight_new - weight_old)),
        before_previous=np.append(0.0, gain[:-1] * weight_old),
    )
    # The corrected image is kept, and the predictor's x is the corrected image.
    next_x = x[:, None] * corrector + _weights(num_steps, **predictor)
    return _round(levels.timestep, levels.alpha[:-1], levels.sigma[:-1], next_x, corrector)


@STEPPERS.register("heun")
def heun(schedule: NoiseSchedule, num_steps: int) -> StepTable:
    """Take Heun's steps on a rectified flow: an Euler step, and the step again with the mean of the slopes at its ends.

    Values: diffusers' `FlowMatchHeunDiscreteScheduler`. The last step is Euler's: 2 * num_steps - 1 evaluations.
    """
    if not schedule.is_flow:
        raise UserError(
            'stepper "heun" follows the straight lines of beta_schedule="rectified_flow", not '
            f'"{schedule.beta_schedule}": use stepper "dpmpp_2m" or "unipc", of second order on every schedule'
        )
    levels = _levels(schedule, schedule.inference_timesteps(num_steps))
    ratio, gain = _deterministic(levels)  # sigma' / sigma, and 1 minus that
    at = np.repeat(np.arange(num_steps), 2)[1:]  # the level of each row: 0, 1 1, 2 2, ...
    rows = len(at)
    first = _weights(num_steps, x=ratio, clean=gain)
    # With dt = sigma' - sigma, next = kept + dt/2 * ((kept - previous) / sigma + (x - clean) / sigma').
    back = 0.5 - 0.5 / ratio[:-1]
    second = _weights(num_steps - 1, x=back, kept=0.5 + 0.5 * ratio[:-1], clean=-back, previous=0.5 * gain[:-1])
    next_x, kept = np.zeros((rows, len(TERMS))), np.zeros((rows, len(TERMS)))
    next_x[0::2], next_x[1::2] = first, second
    kept[0::2] = _weights(num_steps, x=1.0)
    return _round(levels.timestep[at], levels.alpha[at], levels.sigma[at], next_x, kept)


def _levels(schedule: NoiseSchedule, timestep: np.ndarray) -> Levels:
    """Return the levels at `schedule.inference_timesteps`."""
    if schedule.is_flow:
        sigma = timestep / schedule.num_train_timesteps
        return _and_clean(timestep, 1.0 - sigma, sigma)
    alpha, sigma = schedule.levels
    return _and_clean(timestep, alpha[timestep], sigma[timestep])


def _euler_levels(schedule: NoiseSchedule, num_steps: int) -> Levels:
    """Return the levels of `EulerDiscreteScheduler`: under "linspace" between timesteps, sigma / alpha interpolated."""
    timestep = schedule.inference_timesteps(num_steps)
    if schedule.is_flow or schedule.timestep_spacing != "linspace":
        return _levels(schedule, timestep)
    total = schedule.num_train_timesteps
    timestep = np.linspace(0, total - 1, num_steps)[::-1]
    alpha, sigma = schedule.levels
    with np.errstate(divide="ignore"):
        ratio = np.interp(timestep, np.arange(total), sigma / alpha)  # infinite at pure noise
    alpha = 1 / np.sqrt(ratio**2 + 1)
    return _and_clean(timestep, alpha, np.sqrt(1 - alpha**2))


def _euler_start(schedule: NoiseSchedule, levels: Levels) -> float:
    """Return `init_noise_sigma` times the first alpha: sigma / alpha, or sqrt((sigma / alpha)**2 + 1) for "leading"."""
    return 1.0 if schedule.timestep_spacing == "leading" else levels.sigma[0]


def _and_clean(timestep: np.ndarray, alpha: np.ndarray, sigma: np.ndarray) -> Levels:
    return Levels(timestep, np.append(alpha, 1.0), np.append(sigma, 0.0))


def _deterministic(levels: Levels) -> tuple[np.ndarray, np.ndarray]:
    """Return weights of x and of the clean image, each [S]: alpha' * clean + sigma' * noise, the noise that of x.

    The second is DPM-Solver++'s alpha' * (1 - exp(-h)), with exp(-h) = alpha * sigma' / (sigma * alpha') written out,
    so that neither end of the schedule needs a logarithm.
    """
    keep = levels.sigma[1:] / levels.sigma[:-1]
    return keep, levels.alpha[1:] - keep * levels.alpha[:-1]


def _posterior(levels: Levels) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return weights of x, the clean image and fresh noise, each [S]: a draw from q(next | x, clean), exp(-h) as above.

    DDPM's eq. 7, k-diffusion's ancestral step and the first order of SDE-DPM-Solver++ are all this.
    """
    keep = levels.sigma[1:] / levels.sigma[:-1]
    exp_minus_h = keep * levels.alpha[:-1] / levels.alpha[1:]
    variance = 1 - exp_minus_h**2
    return keep * exp_minus_h, levels.alpha[1:] * variance, levels.sigma[1:] * np.sqrt(variance)


def _half_log_snr(levels: Levels) -> np.ndarray:
    """Return lambda, [S + 1]: -infinity at pure noise, +infinity at the end."""
    with np.errstate(divide="ignore"):
        return np.log(levels.alpha) - np.log(levels.sigma)


def _extrapolated(levels: Levels, gain: np.ndarray) -> dict[str, np.ndarray]:
    """Return gain * (clean + (clean - previous) / (2 r)) with r = h_previous / h: the second order of DPM-Solver++.

    The first step knows no previous clean image and the last ends at lambda = infinity: both are of first order. From
    pure noise the second is too, as the limit says: the slope over the infinite interval of the first is 0.
    """
    h = np.diff(_half_log_snr(levels))
    extrapolation = np.zeros(len(gain))  # 1 / (2 r)
    if len(gain) > 2:
        extrapolation[1:-1] = h[1:-1] / (2 * h[:-2])  # finite / infinite = 0
    return {"clean": gain * (1 + extrapolation), "previous": -gain * extrapolation}


def _weights(rows: int, **columns: np.ndarray | float) -> np.ndarray:
    """Return a table of weights [rows, TERMS], 0 where no column is given."""
    weights = np.zeros((rows, len(TERMS)))
    for term, column in columns.items():
        weights[:, TERMS.index(term)] = column
    return weights


def _table(levels: Levels, start: np.ndarray | float = 1.0, **columns: np.ndarray) -> StepTable:
    """Return the table of a stepper that keeps nothing but clean images."""
    rows = len(levels.timestep)
    return _round(
        levels.timestep, levels.alpha[:-1], levels.sigma[:-1], _weights(rows, **columns), _weights(rows), start
    )


def _round(timestep, alpha, sigma, x, kept, start=1.0) -> StepTable:
    """Round float64 once."""
    return StepTable(*(np.asarray(column, np.float32) for column in (start, timestep, alpha, sigma, x, kept)))
