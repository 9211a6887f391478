"""Steppers against diffusers' trajectories, the exact flow of Gaussian images, and from pure noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2m_jax.diffusion.schedule import BETA_SCHEDULES, PREDICTION_TYPES, TIMESTEP_SPACINGS, NoiseSchedule
from m2m_jax.diffusion.steppers import STEPPERS
from m2m_jax.errors import UserError

NOISE = np.random.default_rng(0).standard_normal((2, 3, 4, 4, 2)).astype(np.float32)
BETAS = {"scaled_linear": {"beta_start": 0.00085, "beta_end": 0.012}}
IN_DIFFUSERS = {"ddim": "DDIMScheduler", "dpmpp_2m": "DPMSolverMultistepScheduler"}


@pytest.fixture
def diffusers():
    pytest.importorskip("torch", reason="parity with diffusers runs on torch, a test-only dependency")
    return pytest.importorskip("diffusers", reason="the reference of the parity tests, test-only")


def make_schedule(beta_schedule="scaled_linear", **fields) -> NoiseSchedule:
    return NoiseSchedule(beta_schedule=beta_schedule, **BETAS.get(beta_schedule, {}), **fields)


def network(x, timestep, math=np):
    """A fixed nonlinear function of image and timestep, in numpy, torch or jax.numpy."""
    return math.tanh(0.7 * x + 0.3) * (0.5 + 0.0005 * timestep)


def ours(stepper: str, schedule: NoiseSchedule, num_steps: int) -> np.ndarray:
    def denoise(x, timestep):
        return network(x, timestep.astype(x.dtype), jnp)

    return np.asarray(STEPPERS[stepper].sample(schedule, num_steps, denoise, jnp.asarray(NOISE)))


def theirs(scheduler) -> np.ndarray:
    """The trajectory's end for a diffusers scheduler whose timesteps are set."""
    import torch

    x = torch.from_numpy(NOISE)
    for timestep in scheduler.timesteps:
        x = scheduler.step(network(x, float(timestep), torch), timestep, x).prev_sample
    return x.numpy()


def assert_close(actual: np.ndarray, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    """Relative to the largest value: where no noise is predicted as such, a trajectory can end at 1e4."""
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(actual / scale, expected / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("num_steps", [20, 50])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("stepper", STEPPERS)
def test_trajectories_are_those_of_diffusers(diffusers, stepper, beta_schedule, spacing, prediction_type, num_steps):
    schedule = make_schedule(beta_schedule, timestep_spacing=spacing, prediction_type=prediction_type)
    config = {k: v for k, v in schedule.to_config().items() if k != "_class_name"}
    if (stepper, spacing) == ("ddim", "linspace"):
        # diffusers' DDIM steps down by 1000 // num_steps, beside this grid. Its DPM-Solver++ of order 1 is
        # DDIM too, and takes a grid of timesteps.
        scheduler = diffusers.DPMSolverMultistepScheduler.from_config(config, solver_order=1)
        scheduler.set_timesteps(timesteps=schedule.inference_timesteps(num_steps).tolist())
    else:
        scheduler = getattr(diffusers, IN_DIFFUSERS[stepper]).from_config(config)
        scheduler.set_timesteps(num_steps)
    assert_close(ours(stepper, schedule, num_steps), theirs(scheduler))


@pytest.mark.parametrize("num_steps", [1, 2, 3, 8])
@pytest.mark.parametrize("stepper", STEPPERS)
def test_few_steps_are_those_of_diffusers(diffusers, stepper, num_steps):
    """Below 15 steps diffusers' lower_order_final takes effect."""
    schedule = make_schedule(
        num_train_timesteps=960,  # divisible: elsewhere diffusers' DDIM lands beside the grid
        timestep_spacing="trailing",
        prediction_type="v_prediction",
    )
    config = {k: v for k, v in schedule.to_config().items() if k != "_class_name"}
    scheduler = getattr(diffusers, IN_DIFFUSERS[stepper]).from_config(config)
    scheduler.set_timesteps(num_steps)
    assert_close(ours(stepper, schedule, num_steps), theirs(scheduler))


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
@pytest.mark.parametrize(
    ("stepper", "tolerance"),
    # diffusers' DPM-Solver takes alphas_cumprod = 2**-24 for 0: alpha = 2e-4 at the first step.
    [("ddim", 1e-5), ("dpmpp_2m", 2e-3)],
)
def test_from_pure_noise_diffusers_is_near(diffusers, stepper, tolerance, beta_schedule, prediction_type):
    schedule = make_schedule(
        beta_schedule,
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        prediction_type=prediction_type,
    )
    config = {k: v for k, v in schedule.to_config().items() if k != "_class_name"}
    scheduler = getattr(diffusers, IN_DIFFUSERS[stepper]).from_config(config)
    scheduler.set_timesteps(20)
    assert_close(ours(stepper, schedule, 20), theirs(scheduler), tolerance)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 20])
def test_dpmpp_from_pure_noise_is_the_limit(num_steps):
    """The paper's Algorithm 2 as it is printed, in float64, with log SNR infinite at both ends."""
    schedule = make_schedule(rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction")
    timesteps = schedule.inference_timesteps(num_steps)
    alphas_cumprod = np.append(schedule.alphas_cumprod[timesteps], 1.0)
    alpha, sigma = np.sqrt(alphas_cumprod), np.sqrt(1.0 - alphas_cumprod)
    with np.errstate(divide="ignore"):
        h = np.diff(np.log(alpha) - np.log(sigma))
    x, previous = NOISE.astype(np.float64), None
    for i, timestep in enumerate(timesteps):
        clean = alpha[i] * x - sigma[i] * network(x, float(timestep))
        blend = clean
        if 0 < i < num_steps - 1:
            r = h[i - 1] / h[i]
            blend = (1 + 1 / (2 * r)) * clean - 1 / (2 * r) * previous
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * np.expm1(-h[i]) * blend
        previous = clean
    assert_close(ours("dpmpp_2m", schedule, num_steps), x)


@pytest.mark.parametrize("stepper", STEPPERS)
def test_second_step_from_pure_noise_is_of_first_order(stepper):
    schedule = make_schedule(rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction")
    table = STEPPERS[stepper].table(schedule, 20)
    assert all(np.all(np.isfinite(column)) for column in table)
    np.testing.assert_array_equal(table.previous_weight[:2], 0.0)
    np.testing.assert_array_equal(table.previous_weight[-1], 0.0)
    assert (table.keep[-1], table.clean_weight[-1]) == (0.0, 1.0)  # ends at the predicted clean image
    assert table.clean_weight[0] == np.float32(np.sqrt(schedule.alphas_cumprod[table.timestep[1]]))


def gaussian_error(stepper: str, prediction_type: str, num_steps: int) -> float:
    """Error of sampling images of mean 0.3 and deviation 0.5 with the exact network, from pure noise.

    E[clean | x] is linear, and the probability flow (Song et al. 2021, arXiv:2011.13456) carries noise z to
    mean + deviation * z.
    """
    mean, deviation = 0.3, 0.5
    schedule = make_schedule(rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type=prediction_type)
    alphas_cumprod = jnp.asarray(schedule.alphas_cumprod, jnp.float32)

    def denoise(x, timestep):
        alpha, sigma = jnp.sqrt(alphas_cumprod[timestep]), jnp.sqrt(1.0 - alphas_cumprod[timestep])
        variance = (alpha * deviation) ** 2 + sigma**2
        clean = mean + alpha * deviation**2 / variance * (x - alpha * mean)
        noise = sigma / variance * (x - alpha * mean)
        return schedule.target(clean, noise, timestep)

    out = STEPPERS[stepper].sample(schedule, num_steps, denoise, jnp.asarray(NOISE))
    return float(np.abs(out - (mean + deviation * NOISE)).max())


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_exact_networks_sample_the_exact_image_as_steps_grow(prediction_type):
    ddim = [gaussian_error("ddim", prediction_type, n) for n in (20, 100, 500)]
    dpmpp = [gaussian_error("dpmpp_2m", prediction_type, n) for n in (20, 100, 500)]
    # The last step, from timestep 1000 / n to the clean image, is of first order in both, and most of the
    # error that DPM-Solver++ has left.
    for errors in (ddim, dpmpp):
        assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert all(two < one for one, two in zip(ddim, dpmpp, strict=True))
    assert ddim[2] < 0.02 and dpmpp[2] < 0.01


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
@pytest.mark.parametrize("stepper", STEPPERS)
def test_any_shape_compiled(stepper, shape):
    schedule = make_schedule(prediction_type="v_prediction")
    noise = jnp.full(shape, 0.5)
    sample = jax.jit(lambda x: STEPPERS[stepper].sample(schedule, 5, lambda x, t: jnp.tanh(x), x))
    assert sample(noise).shape == shape and np.all(np.isfinite(sample(noise)))


@pytest.mark.parametrize("stepper", STEPPERS)
def test_the_network_is_traced_once_and_sees_the_timesteps_of_the_table(stepper):
    schedule = make_schedule(prediction_type="sample", timestep_spacing="trailing")
    traces = []

    def denoise(x, timestep):
        traces.append((timestep.dtype, timestep.shape))
        return timestep.astype(x.dtype) * jnp.ones_like(x)

    out = STEPPERS[stepper].sample(schedule, 10, denoise, jnp.zeros(2))
    assert traces == [(jnp.int32, ())]
    # The last step returns the last prediction, here the timestep of the last evaluation.
    np.testing.assert_array_equal(out, [99.0, 99.0])


@pytest.mark.parametrize("stepper", STEPPERS)
def test_bfloat16_network_keeps_a_float32_image(stepper):
    schedule = make_schedule(prediction_type="v_prediction")
    out = STEPPERS[stepper].sample(schedule, 5, lambda x, t: x.astype(jnp.bfloat16), jnp.asarray(NOISE))
    assert out.dtype == jnp.float32


@pytest.mark.parametrize("stepper", STEPPERS)
def test_refuses_more_steps_than_timesteps(stepper):
    with pytest.raises(UserError, match="sampling steps"):
        ours(stepper, make_schedule(num_train_timesteps=10), 11)
