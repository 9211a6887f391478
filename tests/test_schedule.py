"""The noise schedule against diffusers, and the identities that training relies on."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2m_jax.core.errors import UserError
from m2m_jax.diffusion.schedule import BETA_SCHEDULES, PREDICTION_TYPES, TIMESTEP_SPACINGS, NoiseSchedule

STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
ZERO_SNR = NoiseSchedule(**STABLE_DIFFUSION, rescale_betas_zero_snr=True, prediction_type="v_prediction")
WITH_BETAS = [name for name in BETA_SCHEDULES if name != "rectified_flow"]
OF_BETAS = [name for name in PREDICTION_TYPES if name != "flow"]
FLOW_CLASSES = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")


def images(seed: int, shape=(2, 3, 4, 4, 2), dtype=np.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def timesteps_bn(last: int = 999) -> jax.Array:
    return jnp.asarray([[0, 1, 10], [500, 998, last]], jnp.int32)


def rectified_flow(**fields) -> NoiseSchedule:
    return NoiseSchedule(beta_schedule="rectified_flow", prediction_type="flow", **fields)


def predicting(prediction_type: str) -> NoiseSchedule:
    if prediction_type == "flow":
        return rectified_flow(shift=3.0)
    return NoiseSchedule(**STABLE_DIFFUSION, prediction_type=prediction_type)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("beta_schedule", WITH_BETAS)
def test_noise_levels_are_those_of_diffusers(diffusers, beta_schedule, zero_snr):
    schedule = NoiseSchedule(
        beta_schedule=beta_schedule, rescale_betas_zero_snr=zero_snr, prediction_type="v_prediction"
    )
    reference = diffusers.DDIMScheduler.from_config(schedule.to_config())
    np.testing.assert_allclose(schedule.alphas_cumprod, reference.alphas_cumprod.numpy(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("prediction_type", OF_BETAS)
def test_training_quantities_are_those_of_diffusers(diffusers, prediction_type):
    import torch

    schedule = NoiseSchedule(**STABLE_DIFFUSION, prediction_type=prediction_type)
    reference = diffusers.DDIMScheduler.from_config(schedule.to_config())
    clean, noise, timestep = images(0), images(1), timesteps_bn()
    flat = [torch.from_numpy(np.array(x).reshape(6, 4, 4, 2)) for x in (clean, noise)]
    flat.append(torch.from_numpy(np.array(timestep).reshape(6)))
    noised = reference.add_noise(*flat).numpy().reshape(clean.shape)
    np.testing.assert_allclose(schedule.add_noise(clean, noise, timestep), noised, rtol=0, atol=1e-5)
    velocity = reference.get_velocity(*flat).numpy().reshape(clean.shape)
    target = {"epsilon": noise, "sample": clean, "v_prediction": velocity}[prediction_type]
    np.testing.assert_allclose(schedule.target(clean, noise, timestep), target, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_perfect_output_gives_back_image_and_noise(prediction_type):
    schedule = predicting(prediction_type)
    clean, noise, timestep = images(0), images(1), timesteps_bn()
    noised = schedule.add_noise(clean, noise, timestep)
    output = schedule.target(clean, noise, timestep)
    np.testing.assert_allclose(schedule.to_clean(output, noised, timestep), clean, rtol=0, atol=2e-5)
    np.testing.assert_allclose(schedule.to_noise(output, noised, timestep), noise, rtol=0, atol=2e-5)


def test_one_timestep_for_all_images_and_compiled():
    clean, noise = images(0), images(1)
    add_noise = jax.jit(NoiseSchedule.add_noise, static_argnums=0)
    one = add_noise(NoiseSchedule(), clean, noise, jnp.int32(300))
    each = NoiseSchedule().add_noise(clean, noise, jnp.full((2, 3), 300, jnp.int32))
    np.testing.assert_allclose(one, each, rtol=0, atol=1e-6)


def test_keeps_the_dtype_of_the_images():
    clean, noise = images(0, dtype=jnp.bfloat16), images(1, dtype=jnp.bfloat16)
    assert ZERO_SNR.add_noise(clean, noise, timesteps_bn()).dtype == jnp.bfloat16
    assert ZERO_SNR.to_clean(clean, images(1), timesteps_bn()).dtype == jnp.float32


def test_refuses_timesteps_of_other_images():
    with pytest.raises(ValueError, match=r"timestep \(3,\) lacks the leading dimensions of the images \(2, 3"):
        NoiseSchedule().add_noise(images(0), images(1), jnp.zeros(3, jnp.int32))


@pytest.mark.parametrize("beta_schedule", WITH_BETAS)
def test_zero_terminal_snr_ends_in_pure_noise(beta_schedule):
    plain = NoiseSchedule(beta_schedule=beta_schedule, prediction_type="v_prediction")
    schedule = NoiseSchedule(beta_schedule=beta_schedule, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert schedule.alphas_cumprod[-1] == 0.0
    np.testing.assert_allclose(schedule.alphas_cumprod[0], plain.alphas_cumprod[0], rtol=1e-12)
    assert np.all(np.diff(schedule.alphas_cumprod) < 0)
    clean, noise = images(0), images(1)
    np.testing.assert_array_equal(schedule.add_noise(clean, noise, jnp.int32(999)), noise)
    np.testing.assert_array_equal(schedule.target(clean, noise, jnp.int32(999)), -clean)
    np.testing.assert_array_equal(schedule.to_clean(-clean, noise, jnp.int32(999)), clean)
    assert schedule.snr(jnp.int32(999)) == 0.0


def test_snr_is_signal_over_noise():
    alphas_cumprod = ZERO_SNR.alphas_cumprod[[0, 500, 999]]
    snr = ZERO_SNR.snr(jnp.asarray([0, 500, 999]))
    np.testing.assert_allclose(snr, alphas_cumprod / (1 - alphas_cumprod), rtol=1e-6)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_min_snr_weighs_the_same_error_of_the_clean_image_whatever_is_predicted(prediction_type):
    """A wrong output's weighted loss is min(snr, gamma) times the squared error of its clean image."""
    schedule = predicting(prediction_type)
    clean, noise, error, timestep = (
        images(0),
        images(1),
        images(2),
        jnp.asarray([[20, 100, 200], [300, 500, 900]]),
    )
    noised = schedule.add_noise(clean, noise, timestep)
    target = schedule.target(clean, noise, timestep)
    output = target + error
    loss_bn = schedule.loss_weight(timestep, "min_snr", 5.0) * jnp.mean((output - target) ** 2, (2, 3, 4))
    clean_error_bn = jnp.mean((schedule.to_clean(output, noised, timestep) - clean) ** 2, (2, 3, 4))
    expected = jnp.minimum(schedule.snr(timestep), jnp.float32(5.0)) * clean_error_bn
    assert loss_bn.shape == (2, 3)
    np.testing.assert_allclose(loss_bn, expected, rtol=1e-3)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_min_snr_is_finite_at_zero_terminal_snr(prediction_type):
    schedule = NoiseSchedule(rescale_betas_zero_snr=True, prediction_type=prediction_type)
    weight = schedule.loss_weight(jnp.arange(1000), "min_snr", 5.0)
    assert np.all(np.isfinite(weight)) and weight[-1] == 0.0 and np.all(weight[:-1] > 0)


def test_min_snr_of_a_rectified_flow_is_finite():
    weight = rectified_flow().loss_weight(jnp.arange(1000), "min_snr", 5.0)
    assert np.all(np.isfinite(weight)) and weight[-1] == 0.0 and np.all(weight[:-1] > 0)


def test_uniform_weight_is_one():
    np.testing.assert_array_equal(NoiseSchedule().loss_weight(timesteps_bn()), np.ones((2, 3), np.float32))


@pytest.mark.parametrize("num_steps", [1, 7, 20, 30, 50, 333])
@pytest.mark.parametrize("steps_offset", [0, 1])
@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
def test_inference_timesteps_are_those_of_diffusers(diffusers, spacing, steps_offset, num_steps):
    schedule = NoiseSchedule(timestep_spacing=spacing, steps_offset=steps_offset)
    for name, drop_zero in (("DDIMScheduler", False), ("DPMSolverMultistepScheduler", True)):
        reference = getattr(diffusers, name)(timestep_spacing=spacing, steps_offset=steps_offset)
        reference.set_timesteps(num_steps)
        timesteps = schedule.inference_timesteps(num_steps, drop_zero=drop_zero)
        assert timesteps.dtype == np.int32
        np.testing.assert_array_equal(timesteps, reference.timesteps.numpy())


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", FLOW_CLASSES)
def test_a_rectified_flow_is_that_of_diffusers(diffusers, name, shift):
    import torch

    reference = getattr(diffusers, name)(shift=shift)
    schedule = NoiseSchedule.from_config(json.loads(reference.to_json_string()))
    assert schedule == rectified_flow(shift=shift)
    alpha, sigma = schedule.levels  # from little noise to much, diffusers' the other way
    np.testing.assert_allclose(sigma[::-1], reference.sigmas[:1000].numpy(), rtol=0, atol=1e-6)
    assert (alpha[-1], sigma[-1]) == (0.0, 1.0)
    told = schedule.network_timestep(jnp.arange(1000))
    assert told.dtype == jnp.float32
    np.testing.assert_allclose(told[::-1], reference.timesteps.numpy(), rtol=0, atol=1e-3)

    clean, noise = images(0), images(1)
    reference.set_begin_index(999 - 300)
    if name == "FlowMatchEulerDiscreteScheduler":  # the other's scale_noise finds no level that repeats
        noised = reference.scale_noise(
            torch.from_numpy(np.array(clean)), reference.timesteps[699:700], torch.from_numpy(np.array(noise))
        )
        np.testing.assert_allclose(schedule.add_noise(clean, noise, jnp.int32(300)), noised, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(schedule.target(clean, noise, jnp.int32(300)), noise - clean)


@pytest.mark.parametrize("num_steps", [1, 2, 20, 50, 333])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_grids_of_a_rectified_flow_are_those_of_diffusers(diffusers, shift, num_steps):
    schedule = rectified_flow(shift=shift)
    for name in FLOW_CLASSES:
        reference = getattr(diffusers, name)(shift=shift)
        reference.set_timesteps(num_steps)
        expected = reference.timesteps.numpy()
        expected = expected if name == FLOW_CLASSES[0] else np.append(expected[:1], expected[1::2])
        timesteps = schedule.inference_timesteps(num_steps)
        np.testing.assert_allclose(timesteps, expected, rtol=0, atol=1e-3)
        assert timesteps.shape == (num_steps,) and timesteps[0] == 1000.0
    reference = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=shift)
    reference.set_timesteps(num_steps)  # keeps off 1 by 1e-6
    timesteps = schedule.inference_timesteps(num_steps, drop_zero=True)
    np.testing.assert_allclose(timesteps / 1000, reference.sigmas.numpy()[:-1], rtol=0, atol=2e-6)


def test_the_network_is_told_the_timestep_or_of_a_rectified_flow_the_level():
    timestep = timesteps_bn()
    assert NoiseSchedule().network_timestep(timestep) is timestep
    np.testing.assert_array_equal(rectified_flow().network_timestep(timestep), timestep + 1)
    told = rectified_flow(num_train_timesteps=10, shift=3.0).network_timestep(jnp.asarray([4, 9]))
    np.testing.assert_allclose(told, [7.5, 10.0])


@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
@pytest.mark.parametrize("drop_zero", [False, True])
def test_any_number_of_steps_gives_that_many_or_is_refused(spacing, drop_zero):
    schedule = NoiseSchedule(num_train_timesteps=100, timestep_spacing=spacing)
    for num_steps in range(1, 100):
        timesteps = schedule.inference_timesteps(num_steps, drop_zero)
        assert timesteps.shape == (num_steps,) and timesteps[0] < 100 and timesteps[-1] >= 0
        assert np.all(np.diff(timesteps) < 0)
    for num_steps in (0, 101):
        with pytest.raises(UserError, match=r"sampling steps must be in \[1, 100\]"):
            schedule.inference_timesteps(num_steps, drop_zero)


def test_refuses_steps_that_do_not_fit():
    with pytest.raises(UserError, match="use fewer steps"):
        NoiseSchedule(steps_offset=1).inference_timesteps(1000)
    with pytest.raises(UserError, match="use fewer steps"):
        NoiseSchedule(timestep_spacing="linspace").inference_timesteps(1000, drop_zero=True)


def test_config_round_trip():
    config = json.loads(json.dumps(ZERO_SNR.to_config()))
    assert NoiseSchedule.from_config(config) == ZERO_SNR
    assert hash(NoiseSchedule.from_config(config)) == hash(ZERO_SNR)


def test_config_round_trip_of_a_rectified_flow(diffusers):
    schedule = rectified_flow(num_train_timesteps=500, shift=3.0)
    config = json.loads(json.dumps(schedule.to_config()))
    assert NoiseSchedule.from_config(config) == schedule
    reference = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
    assert (reference.config.shift, len(reference)) == (3.0, 500)
    # Fields that only schedules with betas read, as a training config has them, make no difference, nor shift to those.
    ours = {"beta_schedule": "rectified_flow", "prediction_type": "flow", "num_train_timesteps": 500, "shift": 3.0}
    assert NoiseSchedule.from_config(ours | {"beta_end": 0.5, "rescale_betas_zero_snr": True}) == schedule
    assert NoiseSchedule.from_config(ZERO_SNR.to_config() | {"shift": 3.0}) == ZERO_SNR


def test_reads_the_config_of_any_diffusers_scheduler_with_betas(diffusers):
    for name in ("DDPMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"):
        scheduler = getattr(diffusers, name)(**STABLE_DIFFUSION, timestep_spacing="trailing")
        schedule = NoiseSchedule.from_config(json.loads(scheduler.to_json_string()))
        assert schedule == NoiseSchedule(**STABLE_DIFFUSION, timestep_spacing="trailing")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"beta_schedule": "cosine"}, "unknown beta_schedule 'cosine'; there are linear, scaled_linear, squ"),
        ({"prediction_type": "flow_prediction"}, "unknown prediction_type .*epsilon, v_prediction, sample, flow"),
        ({"prediction_type": "flow"}, '"linear" and prediction_type="flow" exclude.*needs prediction_type="flow"'),
        ({"beta_schedule": "rectified_flow"}, '"rectified_flow" and prediction_type="epsilon" exclude one another'),
        ({"beta_schedule": "rectified_flow", "prediction_type": "flow", "shift": 0.0}, "shift must be a positive"),
        (
            {"timestep_spacing": "even"},
            "unknown timestep_spacing 'even': choose one of leading, trailing, linsp",
        ),
        ({"rescale_betas_zero_snr": True}, 'use prediction_type="v_prediction" or "sample"'),
        (
            {"_class_name": "EDMEulerScheduler", "sigma_max": 80.0},
            "EDMEulerScheduler has no beta_schedule: .* FlowMatchHeunDiscreteScheduler are supported",
        ),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}, "use_dynamic_shifting"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift_terminal": 0.1}, "shift_terminal"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "stochastic_sampling": True}, "stochastic_sampling"),
        ({"beta_schedule": "linear", "use_karras_sigmas": True}, "use_karras_sigmas"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ({"beta_start": 0.02, "beta_end": 0.01}, "beta_start <= beta_end"),
        ({"num_train_timesteps": 1}, "num_train_timesteps"),
        ({"steps_offset": -1}, "steps_offset"),
    ],
)
def test_refuses_what_it_cannot_do(config, message):
    with pytest.raises(UserError, match=message):
        NoiseSchedule.from_config(config)


def test_what_a_network_finds_changed_under_another_schedule():
    ours = NoiseSchedule(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="trailing")
    stable_diffusion = {"_class_name": "PNDMScheduler", "steps_offset": 1, "skip_prk_steps": True} | {
        name: getattr(ours, name) for name in ("beta_schedule", "beta_start", "beta_end")
    }
    assert NoiseSchedule.from_config(stable_diffusion).differences(ours) == []
    other = NoiseSchedule.from_config(stable_diffusion | {"beta_end": 0.02, "prediction_type": "v_prediction"})
    assert other.differences(ours) == ["beta_end is 0.02, not 0.012", "prediction_type is v_prediction, not epsilon"]
    cosine = NoiseSchedule(beta_schedule="squaredcos_cap_v2")
    assert cosine.differences(dataclasses.replace(cosine, beta_end=0.5)) == []
    flow = NoiseSchedule(beta_schedule="rectified_flow", prediction_type="flow", shift=3.0)
    assert flow.differences(ours) == [
        *("beta_schedule is rectified_flow, not scaled_linear", "prediction_type is flow, not epsilon")
    ]
    assert flow.differences(dataclasses.replace(flow, shift=1.0)) == ["shift is 3.0, not 1.0"]


def test_refuses_unknown_loss_weights():
    with pytest.raises(UserError, match=r"unknown loss weight 'snr'; did you mean min_snr\? there are uniform"):
        NoiseSchedule().loss_weight(jnp.int32(3), "snr")
    with pytest.raises(UserError, match="gamma"):
        NoiseSchedule().loss_weight(jnp.int32(3), "min_snr", 0.0)
