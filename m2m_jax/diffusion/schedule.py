"""The noise schedule: one object that training and sampling share.

Every schedule is a table of levels, one for each timestep:

    noised = alpha * clean + sigma * noise

Schedules with betas are those of DDPM (Ho et al. 2020, arXiv:2006.11239): with `alphas_cumprod[t]` the product
of 1 - beta up to t,

    alpha = sqrt(alphas_cumprod[t]),   sigma = sqrt(1 - alphas_cumprod[t]),   so alpha^2 + sigma^2 = 1.

A rectified flow (Liu et al. 2023, arXiv:2209.03003; Esser et al. 2024, arXiv:2403.03206) is the straight line

    alpha = 1 - sigma,   sigma = shift * s / (1 + (shift - 1) * s),   s = (t + 1) / num_train_timesteps.

Field names, defaults and values are those of diffusers' `DDIMScheduler` and `FlowMatchEulerDiscreteScheduler`;
tables are computed in float64 (diffusers: float32) and rounded once, on use.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m2m_jax.core.errors import UserError
from m2m_jax.core.registry import Registry

# schedule.beta_schedule -> float64 [num_train_timesteps], before any rescaling.
BETA_SCHEDULES: Registry[Callable[[NoiseSchedule], np.ndarray]] = Registry("beta_schedule")
# diffusion.loss_weight -> float64 [num_train_timesteps], of a schedule and diffusion.min_snr_gamma.
LOSS_WEIGHTS: Registry[Callable[[NoiseSchedule, float], np.ndarray]] = Registry("loss weight")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow")
TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")

# The fields that a rectified flow reads; the schedules with betas read all but `shift`.
_FLOW_FIELDS = ("num_train_timesteps", "beta_schedule", "prediction_type", "shift")

# diffusers' schedulers of rectified flows: a schedule each, and a stepper that is chosen apart from it here.
_FLOW_CLASSES = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")

# Fields of a scheduler_config.json that change the noise levels or the samples in ways not implemented here.
_UNSUPPORTED_WHEN_SET = (
    "trained_betas",
    "thresholding",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
    "use_flow_sigmas",
    "use_dynamic_shifting",
    "shift_terminal",
    "invert_sigmas",
    "stochastic_sampling",
)


class UnsupportedSchedule(UserError):
    """A scheduler of diffusers that is none of this project's schedules."""


@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
    """Noise levels, what the network predicts, and which timesteps a sampler visits.

    Static and hashable. Timesteps are integers in [0, num_train_timesteps); in every method `timestep` has
    the leading dimensions of the images ([B, N] for [B, N, H, W, C]) or none (one timestep for all).

    Attributes:
      num_train_timesteps: noise levels.
      beta_schedule: "linear", "scaled_linear" (linear in sqrt(beta): Stable Diffusion), "squaredcos_cap_v2"
        (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 17; ignores beta_start and beta_end) or
        "rectified_flow", which has no betas and reads no field below but prediction_type and shift.
      beta_start: beta at timestep 0.
      beta_end: beta at the last timestep.
      rescale_betas_zero_snr: make the last timestep pure noise (Lin et al. 2023, arXiv:2305.08891, Algorithm
        1). That of a rectified flow always is.
      prediction_type: the network predicts the noise ("epsilon"), v = alpha * noise - sigma * clean
        ("v_prediction"; Salimans & Ho 2022, arXiv:2202.00512), the clean image ("sample") or, of a rectified
        flow and nothing else, the direction of its line, noise - clean ("flow"; diffusers' solvers that take
        either kind of schedule call it "flow_prediction").
      timestep_spacing: Table 2 of Lin et al.; only "trailing" and "linspace" start at the last timestep.
      steps_offset: added to the timesteps of "leading".
      shift: of a rectified flow: above 1 there are more levels of much noise (Esser et al., eq. 23).
    """

    num_train_timesteps: int = 1000
    beta_schedule: str = "linear"
    beta_start: float = 0.0001
    beta_end: float = 0.02
    rescale_betas_zero_snr: bool = False
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    shift: float = 1.0

    def __post_init__(self):
        BETA_SCHEDULES.choose(self.beta_schedule)
        _check_choice("prediction_type", self.prediction_type, PREDICTION_TYPES)
        _check_choice("timestep_spacing", self.timestep_spacing, TIMESTEP_SPACINGS)
        if self.num_train_timesteps < 2:
            raise UserError(f"num_train_timesteps must be at least 2, not {self.num_train_timesteps}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise UserError(f"need 0 < beta_start <= beta_end < 1, not {self.beta_start} and {self.beta_end}")
        if self.steps_offset < 0:
            raise UserError(f"steps_offset must not be negative, not {self.steps_offset}")
        if not 0 < self.shift < math.inf:
            raise UserError(f"shift must be a positive number, not {self.shift}")
        if self.is_flow != (self.prediction_type == "flow"):
            raise UserError(
                f'beta_schedule="{self.beta_schedule}" and prediction_type="{self.prediction_type}" exclude one '
                'another: beta_schedule="rectified_flow" needs prediction_type="flow", and every other '
                'beta_schedule one of "epsilon", "v_prediction" and "sample"'
            )
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            # At alpha = 0 the noised image is the noise: predicting it says nothing about the clean image.
            raise UserError(
                'rescale_betas_zero_snr makes the last timestep pure noise, where prediction_type="epsilon" '
                'does not determine the clean image: use prediction_type="v_prediction" or "sample"'
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Read a diffusers scheduler_config.json, of any scheduler that has betas or is a rectified flow.

        Missing fields take the defaults of DDIMScheduler or FlowMatchEulerDiscreteScheduler. Fields that are a
        stepper's (solver_order, clip_sample, set_alpha_to_one, ...) are ignored: a stepper is chosen apart from
        the schedule, never clips, and ends at the clean image. Fields that the schedule does not read keep
        their defaults, so that equal schedules are equal.
        """
        for name in _UNSUPPORTED_WHEN_SET:
            if name in config and config[name] not in (None, False):
                raise UnsupportedSchedule(f"scheduler config sets {name}, which is not supported: remove it")
        values = {f.name: config[f.name] for f in dataclasses.fields(cls) if f.name in config}
        if config.get("_class_name") in _FLOW_CLASSES:
            values |= {"beta_schedule": "rectified_flow", "prediction_type": "flow"}
        elif "_class_name" in config and "beta_schedule" not in config:
            raise UnsupportedSchedule(
                f"scheduler {config['_class_name']} has no beta_schedule: only schedulers with betas "
                f"(DDPM, DDIM, PNDM, DPMSolverMultistep, ...) and {' and '.join(_FLOW_CLASSES)} are supported"
            )
        flow = values.get("beta_schedule") == "rectified_flow"
        return cls(**{name: x for name, x in values.items() if (name in _FLOW_FIELDS if flow else name != "shift")})

    def to_config(self) -> dict[str, Any]:
        """Return a diffusers scheduler_config.json, for a scheduler that samples as the stepper ddim does.

        It is a `DDIMScheduler`, or a `FlowMatchEulerDiscreteScheduler`: on a rectified flow the two are one.
        """
        if self.is_flow:
            return {
                "_class_name": "FlowMatchEulerDiscreteScheduler",
                "num_train_timesteps": self.num_train_timesteps,
                "shift": self.shift,
            }
        fields = dataclasses.asdict(self)
        del fields["shift"]
        return {"_class_name": "DDIMScheduler", **fields, "clip_sample": False, "set_alpha_to_one": True}

    @property
    def is_flow(self) -> bool:
        """Whether this is a rectified flow, and not a schedule with betas."""
        return self.beta_schedule == "rectified_flow"

    def differences(self, other: NoiseSchedule) -> list[str]:
        """Return what a network that was trained under this schedule finds changed under the other, field by field:
        `beta_end is 0.02, not 0.012`. Fields that only say which timesteps a sampler visits are left out."""
        free = {"timestep_spacing", "steps_offset"}
        if self.beta_schedule != other.beta_schedule or self.beta_schedule == "squaredcos_cap_v2":
            free |= {"beta_start", "beta_end"}  # not read by both, or not alike
        if self.is_flow != other.is_flow:
            free |= {"rescale_betas_zero_snr", "shift"}  # read by one of them
        names = [field.name for field in dataclasses.fields(self) if field.name not in free]
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in names]
        return [f"{name} is {mine}, not {theirs}" for name, mine, theirs in pairs if mine != theirs]

    @functools.cached_property
    def levels(self) -> tuple[np.ndarray, np.ndarray]:
        """alpha and sigma of every timestep, from little noise to much: two float64 [T], read-only."""
        if self.is_flow:
            sigma = self._shifted(np.arange(1, self.num_train_timesteps + 1) / self.num_train_timesteps)
            alpha = 1.0 - sigma
        else:
            alpha, sigma = np.sqrt(self.alphas_cumprod), np.sqrt(1.0 - self.alphas_cumprod)
        alpha.setflags(write=False)  # one array, handed to every caller
        sigma.setflags(write=False)
        return alpha, sigma

    @functools.cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """float64 [T], descending, read-only; ends at exactly 0 under zero terminal SNR. Needs betas."""
        alphas_cumprod = np.cumprod(1.0 - BETA_SCHEDULES[self.beta_schedule](self))
        if self.rescale_betas_zero_snr:
            # Algorithm 1 of Lin et al.: shift sqrt(alphas_cumprod) to end at 0, scale to keep its start.
            root = np.sqrt(alphas_cumprod)
            alphas_cumprod = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        alphas_cumprod.setflags(write=False)
        return alphas_cumprod

    def _shifted(self, sigma: np.ndarray) -> np.ndarray:
        """Return levels of a rectified flow: 1 stays 1, and with a large `shift` all but the least noise comes near."""
        return self.shift * sigma / (1.0 + (self.shift - 1.0) * sigma)

    def add_noise(self, clean: jax.Array, noise: jax.Array, timestep: jax.Array) -> jax.Array:
        """Return alpha * clean + sigma * noise, [..., H, W, C]; timestep int [...]."""
        alpha, sigma = self._alpha_sigma(timestep, clean)
        return alpha * clean + sigma * noise

    def target(self, clean: jax.Array, noise: jax.Array, timestep: jax.Array) -> jax.Array:
        """Return what the network should output for `add_noise(clean, noise, timestep)`; shape of `clean`."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return clean
        if self.prediction_type == "flow":
            return noise - clean
        alpha, sigma = self._alpha_sigma(timestep, clean)
        return alpha * noise - sigma * clean

    def to_clean(self, output: jax.Array, noised: jax.Array, timestep: jax.Array) -> jax.Array:
        """Return the clean image a network output stands for; shape and dtype of `noised`."""
        return self.clean_at(output, noised, *self._alpha_sigma(timestep, noised))

    def clean_at(self, output: jax.Array, noised: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
        """Return what `to_clean` gives, at any level; alpha and sigma broadcast against `noised` and have its dtype."""
        output = output.astype(noised.dtype)
        if self.prediction_type == "sample":
            return output
        if self.prediction_type == "epsilon":
            return (noised - sigma * output) / alpha  # alpha > 0: zero terminal SNR is refused for epsilon
        if self.prediction_type == "flow":
            return noised - sigma * output  # (1 - sigma) * clean + sigma * noise is clean + sigma * output
        return alpha * noised - sigma * output

    def to_noise(self, output: jax.Array, noised: jax.Array, timestep: jax.Array) -> jax.Array:
        """Return the noise a network output stands for; shape and dtype of `noised`."""
        output = output.astype(noised.dtype)
        if self.prediction_type == "epsilon":
            return output
        alpha, sigma = self._alpha_sigma(timestep, noised)
        if self.prediction_type == "sample":
            return (noised - alpha * output) / sigma  # sigma > 0: beta_start > 0
        if self.prediction_type == "flow":
            return noised + alpha * output
        return sigma * noised + alpha * output

    def network_timestep(self, timestep: jax.Array) -> jax.Array:
        """Return what the network is told in training, shape of `timestep`.

        The integer itself, or of a rectified flow num_train_timesteps * sigma, float32: in (0,
        num_train_timesteps], and without `shift` one more than the integer.
        """
        if not self.is_flow:
            return timestep
        return _look_up(self.num_train_timesteps * self.levels[1], timestep)

    def snr(self, timestep: jax.Array) -> jax.Array:
        """Signal-to-noise ratio alpha^2 / sigma^2, float32, shape of `timestep`."""
        alpha, sigma = self.levels
        return _look_up(alpha**2 / sigma**2, timestep)

    def loss_weight(self, timestep: jax.Array, kind: str = "uniform", gamma: float = 5.0) -> jax.Array:
        """Weight of the squared error of the network output, float32, shape of `timestep`.

        kind, gamma: a name in `LOSS_WEIGHTS`, and what `min_snr` reads.
        """
        return _look_up(LOSS_WEIGHTS.choose(kind)(self, gamma), timestep)

    def inference_timesteps(self, num_steps: int, drop_zero: bool = False) -> np.ndarray:
        """Return the timesteps a sampler visits, as the network is told them: [num_steps], descending.

        int32, or of a rectified flow, which has a spacing of its own, float64.

        Args:
          num_steps: network evaluations per image.
          drop_zero: False: the grid of diffusers' `DDIMScheduler`. True: that of
            `DPMSolverMultistepScheduler`, which, where the spacing reaches down to timestep 0, makes the grid
            one longer and leaves that last one out. Of a rectified flow those of
            `FlowMatchEulerDiscreteScheduler`, which goes down to the least sigma of training and shifts that
            once more, and of `UniPCMultistepScheduler` with use_flow_sigmas.
        """
        total = self.num_train_timesteps
        if not 1 <= num_steps <= total:
            raise UserError(f"the number of sampling steps must be in [1, {total}], not {num_steps}")
        if self.is_flow:
            least = 1 / total if drop_zero else self.levels[1][0]
            return total * self._shifted(np.linspace(1.0, least, num_steps + int(drop_zero))[:num_steps])
        if self.timestep_spacing == "trailing":
            # Cut to length: rounding in arange can yield one more.
            return np.round(np.arange(total, 0, -total / num_steps)[:num_steps]).astype(np.int32) - 1
        points = num_steps + int(drop_zero)
        if self.timestep_spacing == "leading":
            timesteps = np.arange(points) * (total // points) + self.steps_offset
        else:
            timesteps = np.round(np.linspace(0, total - 1, points))
        timesteps = timesteps[::-1][:num_steps].astype(np.int32)
        if timesteps[0] >= total or np.any(np.diff(timesteps) >= 0):
            raise UserError(
                f"{num_steps} sampling steps do not fit {total} timesteps with timestep_spacing="
                f"{self.timestep_spacing!r} and steps_offset={self.steps_offset}: use fewer steps"
            )
        return timesteps

    def _alpha_sigma(self, timestep: jax.Array, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return alpha and sigma in the dtype and rank of `images`: [..., 1, 1, 1] for timestep [...]."""
        shape = jnp.shape(timestep)
        if images.shape[: len(shape)] != shape:
            raise ValueError(f"timestep {shape} lacks the leading dimensions of the images {images.shape}")
        shape = shape + (1,) * (images.ndim - len(shape))
        alpha, sigma = (_look_up(level, timestep) for level in self.levels)
        return alpha.reshape(shape).astype(images.dtype), sigma.reshape(shape).astype(images.dtype)


@BETA_SCHEDULES.register("linear")
def _linear(schedule: NoiseSchedule) -> np.ndarray:
    """From beta_start to beta_end."""
    return np.linspace(schedule.beta_start, schedule.beta_end, schedule.num_train_timesteps)


@BETA_SCHEDULES.register("scaled_linear")
def _scaled_linear(schedule: NoiseSchedule) -> np.ndarray:
    """Linear in the square root of beta: Stable Diffusion's."""
    return np.linspace(schedule.beta_start**0.5, schedule.beta_end**0.5, schedule.num_train_timesteps) ** 2


@BETA_SCHEDULES.register("squaredcos_cap_v2")
def _squared_cosine(schedule: NoiseSchedule) -> np.ndarray:
    """Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 17; reads neither beta_start nor beta_end."""
    steps = schedule.num_train_timesteps
    alpha_bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


@BETA_SCHEDULES.register("rectified_flow")
def _no_betas(schedule: NoiseSchedule) -> np.ndarray:
    """Return a straight line from noise to image, which has no betas."""
    raise ValueError(f"{schedule.beta_schedule} has no betas")


@LOSS_WEIGHTS.register("uniform")
def _uniform(schedule: NoiseSchedule, gamma: float) -> np.ndarray:
    """1, at every noise level."""
    return np.ones(schedule.num_train_timesteps)


@LOSS_WEIGHTS.register("min_snr")
def _min_snr(schedule: NoiseSchedule, gamma: float) -> np.ndarray:
    """Hang et al. 2023, arXiv:2303.09556, section 3.4: min(snr, gamma) times the error of the clean image.

    That error is the output's times 1 for "sample", 1 / snr for "epsilon" and sigma^2 for "v_prediction" (where it is
    1 / (snr + 1)) and "flow"; here it is written without a division by the SNR, so every weight is finite. At zero
    terminal SNR the weight of all but "epsilon" is 0: the step from pure noise is learned from its neighbours alone.
    """
    if not gamma > 0:
        raise UserError(f"min_snr gamma must be positive, not {gamma}")
    signal, noise = (level**2 for level in schedule.levels)  # snr = signal / noise
    if schedule.prediction_type == "epsilon":
        return np.minimum(1.0, gamma * noise / signal)
    if schedule.prediction_type == "sample":
        return np.minimum(signal / noise, gamma)
    return np.minimum(signal, gamma * noise)


def _look_up(table: np.ndarray, timestep: jax.Array) -> jax.Array:
    """Return table[timestep] as float32, shape of `timestep`."""
    return jnp.asarray(table, jnp.float32)[jnp.asarray(timestep)]


def _check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"unknown {what} {value!r}: choose one of {', '.join(choices)}")
