"""Steppers against diffusers' trajectories, the exact flow of Gaussian images, and from pure noise."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2m_jax.core.errors import UserError
from m2m_jax.diffusion.schedule import NoiseSchedule
from m2m_jax.diffusion.step_tables import STEPPERS, TERMS
from m2m_jax.diffusion.steppers import advance, begin

NOISE = np.random.default_rng(0).standard_normal((2, 3, 4, 4, 2)).astype(np.float32)
FRESH = np.random.default_rng(1).standard_normal((100, *NOISE.shape)).astype(np.float32)  # of each evaluation

IN_DIFFUSERS = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
WITH_BETAS = list(IN_DIFFUSERS)
STOCHASTIC = {"ddpm", "euler_ancestral", "dpmpp_2m_sde"}

BETAS = {"scaled_linear": {"beta_start": 0.00085, "beta_end": 0.012}}
# Every pair of a beta schedule, a spacing and a prediction type; with the offset that Stable Diffusion has.
SCHEDULES = [
    ("scaled_linear", "leading", "epsilon"),  # Stable Diffusion 1.x
    ("scaled_linear", "trailing", "sample"),
    ("scaled_linear", "linspace", "v_prediction"),
    ("linear", "leading", "v_prediction"),
    ("linear", "trailing", "epsilon"),
    ("linear", "linspace", "sample"),
    ("squaredcos_cap_v2", "leading", "sample"),
    ("squaredcos_cap_v2", "trailing", "v_prediction"),
    ("squaredcos_cap_v2", "linspace", "epsilon"),
    ("scaled_linear", "leading", "v_prediction"),  # Stable Diffusion 2.1
]


def make_schedule(beta_schedule="scaled_linear", **fields) -> NoiseSchedule:
    return NoiseSchedule(beta_schedule=beta_schedule, **BETAS.get(beta_schedule, {}), **fields)


def from_pure_noise(beta_schedule="scaled_linear", prediction_type="v_prediction") -> NoiseSchedule:
    return make_schedule(
        beta_schedule,
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        prediction_type=prediction_type,
    )


def rectified_flow(**fields) -> NoiseSchedule:
    return NoiseSchedule(beta_schedule="rectified_flow", prediction_type="flow", **fields)


def some_schedule(stepper: str) -> NoiseSchedule:
    return rectified_flow() if stepper == "heun" else make_schedule(prediction_type="v_prediction")


def network(x, timestep, math=np):
    """A fixed nonlinear function of image and timestep, in numpy, torch or jax.numpy."""
    return math.tanh(0.7 * x + 0.3) * (0.5 + 0.0005 * timestep)


def sample(stepper: str, schedule: NoiseSchedule, num_steps: int, denoise, noise, fresh_noise):
    """The whole walk."""
    table = STEPPERS[stepper](schedule, num_steps)
    return advance(schedule, table, denoise, begin(table, noise), fresh_noise, 0, len(table.timestep))["x"]


def ours(stepper: str, schedule: NoiseSchedule, num_steps: int) -> np.ndarray:
    def denoise(x, timestep, number):
        return network(x, timestep, jnp)

    fresh = jnp.asarray(FRESH)
    return np.asarray(sample(stepper, schedule, num_steps, denoise, jnp.asarray(NOISE), lambda number: fresh[number]))


def theirs(scheduler) -> np.ndarray:
    """The trajectory's end for a diffusers scheduler whose timesteps are set, with the noise that `ours` has."""
    import torch

    x = torch.from_numpy(NOISE) * getattr(scheduler, "init_noise_sigma", 1.0)
    with pytest.MonkeyPatch.context() as patch:
        for number, timestep in enumerate(scheduler.timesteps):
            noise = torch.from_numpy(FRESH[number])
            module = sys.modules[type(scheduler).__module__]
            patch.setattr(module, "randn_tensor", lambda *_, noise=noise, **__: noise, raising=False)
            seen = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
            x = scheduler.step(network(seen, float(timestep), torch), timestep, x).prev_sample
    return x.numpy()


def their_scheduler(diffusers, stepper: str, schedule: NoiseSchedule, **fields):
    name, options = IN_DIFFUSERS[stepper]
    config = {k: v for k, v in schedule.to_config().items() if k != "_class_name"}
    return getattr(diffusers, name).from_config(config, **options, **fields)


def assert_close(actual: np.ndarray, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    """Relative to the largest value: where no noise is predicted as such, a trajectory can end at 1e4."""
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(actual / scale, expected / scale, rtol=0, atol=tolerance)


def test_every_stepper_is_compared_here():
    assert set(STEPPERS) == {*WITH_BETAS, "heun"}


@pytest.mark.parametrize("num_steps", [20, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("beta_schedule", "spacing", "prediction_type"), SCHEDULES)
@pytest.mark.parametrize("stepper", WITH_BETAS)
def test_trajectories_are_those_of_diffusers(diffusers, stepper, beta_schedule, spacing, prediction_type, num_steps):
    if (stepper, prediction_type) == ("euler_ancestral", "sample"):
        pytest.skip("not implemented in diffusers")
    schedule = make_schedule(
        beta_schedule,
        timestep_spacing=spacing,
        prediction_type=prediction_type,
        steps_offset=int(spacing == "leading"),
    )
    if (stepper, spacing) == ("ddim", "linspace"):
        # diffusers' DDIM steps down by 1000 // num_steps, beside this grid. Its DPM-Solver++ of order 1 is
        # DDIM too, and takes a grid of timesteps.
        scheduler = their_scheduler(diffusers, "dpmpp_2m", schedule, solver_order=1)
        scheduler.set_timesteps(timesteps=schedule.inference_timesteps(num_steps).tolist())
    else:
        scheduler = their_scheduler(diffusers, stepper, schedule)
        scheduler.set_timesteps(num_steps)
    tolerance = 1e-5
    if (stepper, beta_schedule, spacing) == ("euler", "squaredcos_cap_v2", "trailing"):
        # diffusers starts at x / alpha = 2e4, in float32. test_euler_is_karras_algorithm_1_in_float64 is exacter.
        tolerance = 5e-4
    elif stepper == "ddpm":
        # The cosine's first alpha is 5e-5, by which the rounding errors of epsilon are divided.
        tolerance = 2e-5
    assert_close(ours(stepper, schedule, num_steps), theirs(scheduler), tolerance)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 8])
@pytest.mark.parametrize("stepper", WITH_BETAS)
def test_few_steps_are_those_of_diffusers(diffusers, stepper, num_steps):
    """Below 15 steps diffusers' lower_order_final takes effect."""
    schedule = make_schedule(
        num_train_timesteps=960,  # divisible: elsewhere diffusers' DDIM lands beside the grid
        timestep_spacing="trailing",
        prediction_type="v_prediction",
    )
    scheduler = their_scheduler(diffusers, stepper, schedule)
    scheduler.set_timesteps(num_steps)
    assert_close(ours(stepper, schedule, num_steps), theirs(scheduler))


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("beta_schedule", ["scaled_linear", "linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("stepper", WITH_BETAS)
def test_from_pure_noise_diffusers_is_near(diffusers, stepper, beta_schedule, prediction_type):
    if (stepper, prediction_type) == ("euler_ancestral", "sample"):
        pytest.skip("not implemented in diffusers")
    # All but two of diffusers' schedulers take alphas_cumprod = 2**-24 for 0: alpha = 2e-4 at the first step.
    tolerance = 1e-5 if stepper in ("ddim", "ddpm") else 2e-3
    schedule = from_pure_noise(beta_schedule, prediction_type)
    scheduler = their_scheduler(diffusers, stepper, schedule)
    scheduler.set_timesteps(20)
    assert_close(ours(stepper, schedule, 20), theirs(scheduler), tolerance)


@pytest.mark.parametrize("num_steps", [20, 50])
def test_euler_is_karras_algorithm_1_in_float64(num_steps):
    """In x / alpha and sigma / alpha, where this schedule starts at 2e4: too much for diffusers' float32."""
    schedule = make_schedule("squaredcos_cap_v2", timestep_spacing="trailing", prediction_type="v_prediction")
    timesteps = schedule.inference_timesteps(num_steps)
    alphas_cumprod = schedule.alphas_cumprod[timesteps]
    sigma = np.append(np.sqrt(1 / alphas_cumprod - 1), 0.0)
    x = NOISE.astype(np.float64) * sigma[0]
    for i, timestep in enumerate(timesteps):
        alpha = np.sqrt(alphas_cumprod[i])
        clean = alpha * (alpha * x) - alpha * sigma[i] * network(alpha * x, float(timestep))
        x = x + (x - clean) / sigma[i] * (sigma[i + 1] - sigma[i])
    assert_close(ours("euler", schedule, num_steps), x)


@pytest.mark.parametrize("num_steps", [1, 2, 20, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("stepper", ["euler", "heun"])
def test_trajectories_of_a_rectified_flow_are_those_of_diffusers(diffusers, stepper, shift, num_steps):
    name = {"euler": "FlowMatchEulerDiscreteScheduler", "heun": "FlowMatchHeunDiscreteScheduler"}[stepper]
    scheduler = getattr(diffusers, name)(shift=shift)
    scheduler.set_timesteps(num_steps)
    schedule = rectified_flow(shift=shift)
    assert len(STEPPERS[stepper](schedule, num_steps).timestep) == len(scheduler.timesteps)
    # Two steps take Heun's from sigma = 1 to 1e-3, where its last slope is a difference divided by 1e-3.
    assert_close(ours(stepper, schedule, num_steps), theirs(scheduler), 1e-4 if num_steps == 2 else 1e-5)


@pytest.mark.parametrize("num_steps", [20, 50])
@pytest.mark.parametrize("stepper", ["dpmpp_2m", "dpmpp_2m_sde", "unipc"])
def test_multistep_on_a_rectified_flow_is_that_of_diffusers(diffusers, stepper, num_steps):
    import torch

    schedule = rectified_flow(shift=3.0)
    name, options = IN_DIFFUSERS[stepper]
    options = options | {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
    scheduler = getattr(diffusers, name)(**options)
    scheduler.set_timesteps(num_steps)
    # diffusers rounds these timesteps, and its DPM-Solver has another grid; 1 - 1e-6 is its UniPC's for 1.
    timesteps = schedule.inference_timesteps(num_steps, drop_zero=True)
    scheduler.timesteps = torch.from_numpy(timesteps)
    if stepper != "unipc":
        scheduler.sigmas = torch.from_numpy(np.append(timesteps / 1000, 0.0))
    assert_close(ours(stepper, schedule, num_steps), theirs(scheduler))


@pytest.mark.parametrize("num_steps", [1, 2, 3, 20])
def test_dpmpp_from_pure_noise_is_the_limit(num_steps):
    """The paper's Algorithm 2 as it is printed, in float64, with log SNR infinite at both ends."""
    schedule = from_pure_noise()
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


@pytest.mark.parametrize("stepper", WITH_BETAS)
def test_weights_from_pure_noise_are_finite_and_end_at_the_clean_image(stepper):
    for schedule in (from_pure_noise(), rectified_flow()):
        table = STEPPERS[stepper](schedule, 20)
        assert all(np.all(np.isfinite(column)) for column in table)
        np.testing.assert_array_equal(table.x[-1], [term == "clean" for term in TERMS])
        alpha, _ = schedule.levels
        if not schedule.is_flow:
            assert table.x[0, TERMS.index("clean")] == np.float32(alpha[int(table.timestep[1])])


@pytest.mark.parametrize("stepper", ["dpmpp_2m", "dpmpp_2m_sde"])
def test_second_step_from_pure_noise_is_of_first_order(stepper):
    previous = STEPPERS[stepper](from_pure_noise(), 20).x[:, TERMS.index("previous")]
    np.testing.assert_array_equal(previous == 0.0, [True, True] + 17 * [False] + [True])


def gaussian_network(schedule: NoiseSchedule, mean: float, deviation: float):
    """The exact network of images that are normal, everywhere alike: E[clean | x] is linear."""
    levels = [jnp.asarray(level, jnp.float32) for level in schedule.levels]

    def denoise(x, timestep, number):
        if schedule.is_flow:
            sigma = timestep / schedule.num_train_timesteps
            alpha = 1 - sigma
        else:
            alpha, sigma = (level[timestep.astype(jnp.int32)] for level in levels)
        variance = (alpha * deviation) ** 2 + sigma**2
        clean = mean + alpha * deviation**2 / variance * (x - alpha * mean)
        noise = sigma / variance * (x - alpha * mean)
        return schedule.target(clean, noise, timestep.astype(jnp.int32))

    return denoise


def gaussian_error(stepper: str, prediction_type: str, num_steps: int) -> float:
    """Error of sampling images of mean 0.3 and deviation 0.5 with the exact network, from pure noise.

    The probability flow (Song et al. 2021, arXiv:2011.13456) carries noise z to mean + deviation * z.
    """
    mean, deviation = 0.3, 0.5
    schedule = from_pure_noise(prediction_type=prediction_type)
    denoise = gaussian_network(schedule, mean, deviation)
    out = sample(stepper, schedule, num_steps, denoise, jnp.asarray(NOISE), None)
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


def noise_coefficients(stepper: str, num_steps: int, deviation: float) -> np.ndarray:
    """How much of the initial noise, and of each fresh one, an image of mean 0 ends with: all of it is linear."""
    schedule, basis = rectified_flow(), jnp.eye(2 * num_steps + 1)
    denoise = gaussian_network(schedule, 0.0, deviation)
    return np.asarray(sample(stepper, schedule, num_steps, denoise, basis[0], lambda number: basis[1 + number]))


@pytest.mark.parametrize(
    ("stepper", "order"),
    [
        ("ddim", 1),
        ("ddpm", 1),
        ("euler", 1),
        ("euler_ancestral", 1),
        ("dpmpp_2m", 2),
        ("dpmpp_2m_sde", 2),
        ("unipc", 2),
        ("heun", 2),
    ],
)
def test_order_of_convergence_to_the_deviation_of_gaussian_images(stepper, order):
    """Twice the steps: half the error for order 1, a quarter for order 2, from the noise that each stepper adds too.

    On a rectified flow, whose last step is too short to matter.
    """
    coefficients = [noise_coefficients(stepper, num_steps, 0.5) for num_steps in (80, 160)]
    for weights in coefficients:
        assert (np.linalg.norm(weights[1:]) > 0.4) == (stepper in STOCHASTIC)
        assert np.any(weights[1:]) == (stepper in STOCHASTIC)
    error, error_of_twice = (abs(np.linalg.norm(weights) - 0.5) for weights in coefficients)
    assert 1.8 < error / error_of_twice < 2.2 if order == 1 else error / error_of_twice > 3.3
    assert error_of_twice < (0.011 if order == 1 else 0.0011)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
@pytest.mark.parametrize("stepper", STEPPERS)
def test_any_shape_compiled(stepper, shape):
    schedule = some_schedule(stepper)
    noise = jnp.full(shape, 0.5)
    out = jax.jit(lambda x: sample(stepper, schedule, 5, lambda x, *_: jnp.tanh(x), x, lambda number: -x))(noise)
    assert out.shape == shape and np.all(np.isfinite(out))


@pytest.mark.parametrize("stepper", STEPPERS)
def test_a_walk_in_parts_is_the_walk(stepper):
    schedule = some_schedule(stepper)
    table = STEPPERS[stepper](schedule, 6)

    @jax.jit
    def part(carry, first, end):
        return advance(schedule, table, lambda x, t, _: network(x, t, jnp), carry, lambda n: fresh[n], first, end)

    fresh, begun, rows = jnp.asarray(FRESH), begin(table, jnp.asarray(NOISE)), len(table.timestep)
    whole, parts = part(begun, 0, rows), part(begun, 0, 2)
    for first in range(2, rows):
        parts = part(parts, first, first + 1)
    assert part._cache_size() == 1
    jax.tree.map(np.testing.assert_array_equal, parts, whole)
    np.testing.assert_array_equal(whole["x"], whole["previous"])  # ends at the clean image it predicted last


@pytest.mark.parametrize("stepper", STEPPERS)
def test_the_network_is_traced_once_and_noise_only_where_it_is_used(stepper):
    networks, noises = [], []

    def denoise(x, timestep, number):
        networks.append((timestep.dtype, timestep.shape))
        return x

    def fresh_noise(number):
        noises.append((number.dtype, number.shape))
        return jnp.zeros(2)

    sample(stepper, some_schedule(stepper), 10, denoise, jnp.zeros(2), fresh_noise)
    assert networks == [(jnp.float32, ())]
    assert noises == ([(jnp.int32, ())] if stepper in STOCHASTIC else [])


@pytest.mark.parametrize("stepper", WITH_BETAS)
def test_the_network_sees_the_timesteps_of_the_table(stepper):
    """The last step returns the last prediction, here the timestep of the last evaluation."""
    schedule = make_schedule(prediction_type="sample", timestep_spacing="trailing")
    zeros = jnp.zeros(2)
    told = sample(stepper, schedule, 10, lambda x, t, _: t * jnp.ones_like(x), zeros, lambda number: zeros)
    np.testing.assert_array_equal(told, [99.0, 99.0])


@pytest.mark.parametrize("stepper", STEPPERS)
def test_bfloat16_network_keeps_a_float32_image(stepper):
    noise = jnp.asarray(NOISE)
    out = sample(
        stepper, some_schedule(stepper), 5, lambda x, t, _: x.astype(jnp.bfloat16), noise, lambda number: noise
    )
    assert out.dtype == jnp.float32


@pytest.mark.parametrize("stepper", WITH_BETAS)
def test_refuses_more_steps_than_timesteps(stepper):
    with pytest.raises(UserError, match="sampling steps"):
        ours(stepper, make_schedule(num_train_timesteps=10), 11)


def test_heun_refuses_schedules_that_are_no_straight_line():
    with pytest.raises(UserError, match=r'"heun" follows .*"rectified_flow", not "scaled_linear": use .*"unipc"'):
        STEPPERS["heun"](make_schedule(), 10)
    with pytest.raises(UserError, match="sampling steps"):
        STEPPERS["heun"](rectified_flow(num_train_timesteps=10), 11)
