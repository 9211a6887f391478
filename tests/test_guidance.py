"""Guidance over the context."""

import jax.numpy as jnp
import numpy as np
import pytest

from m2m_jax.core.errors import UserError
from m2m_jax.diffusion.guidance import SCHEDULES, Guidance
from m2m_jax.diffusion.schedule import NoiseSchedule

CONDITIONAL, UNCONDITIONAL, NOISED = np.random.default_rng(0).standard_normal((3, 2, 4, 4, 4)).astype(np.float32)
SCHEDULE = NoiseSchedule(beta_schedule="squaredcos_cap_v2", rescale_betas_zero_snr=True, prediction_type="v_prediction")


def guide(guidance, conditional=CONDITIONAL, unconditional=UNCONDITIONAL, fraction=0.4):
    return guidance(jnp.asarray(conditional), jnp.asarray(unconditional), fraction)


def test_its_ends():
    np.testing.assert_array_equal(guide(Guidance(0.0)), UNCONDITIONAL)
    np.testing.assert_allclose(guide(Guidance(1.0)), CONDITIONAL, rtol=0, atol=1e-6)
    assert not Guidance(1.0).guides and Guidance(0.0).guides


def test_it_commutes_with_the_parametrisation():
    t = jnp.int32(400)
    noised, conditional, unconditional = map(jnp.asarray, (NOISED, CONDITIONAL, UNCONDITIONAL))
    guided = SCHEDULE.to_clean(guide(Guidance(3.0)), noised, t)
    ends = (SCHEDULE.to_clean(x, noised, t) for x in (conditional, unconditional))
    np.testing.assert_allclose(guided, guide(Guidance(3.0), *ends), rtol=0, atol=1e-5)


def test_outside_of_its_interval_it_does_nothing():
    guidance = Guidance(3.0, interval=(0.2, 0.6))
    for fraction, guides in ((0.1, False), (0.2, True), (0.4, True), (0.7, False)):
        expected = UNCONDITIONAL + (3.0 if guides else 1.0) * (CONDITIONAL - UNCONDITIONAL)
        np.testing.assert_allclose(guide(guidance, fraction=fraction), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_end_at_the_scale(schedule):
    scales = [float(Guidance(5.0, schedule=schedule).scale_at(f)) for f in (1.0, 0.5, 0.0)]
    assert scales[2] == 5.0
    expected = {"constant": [5.0, 5.0], "linear": [1.0, 3.0], "cosine": [1.0, 3.0]}[schedule]
    np.testing.assert_allclose(scales[:2], expected, rtol=1e-6)


def test_rescaling_gives_back_the_deviation_of_each_image():
    """As diffusers' rescale_noise_cfg."""
    plain, rescaled = guide(Guidance(7.0)), guide(Guidance(7.0, rescale=1.0))
    axes = (1, 2, 3)
    np.testing.assert_allclose(np.std(rescaled, axes), np.std(CONDITIONAL, axes), rtol=1e-5)
    half = guide(Guidance(7.0, rescale=0.5))
    np.testing.assert_allclose(half, (plain + rescaled) / 2, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scale": -1.0}, "guidance_scale must be a number of at least 0, not -1"),
        ({"scale": float("inf")}, "guidance_scale"),
        ({"interval": (0.6, 0.2)}, "guidance_interval must be two fractions, the smaller first"),
        ({"interval": (0.0, 1.5)}, "guidance_interval"),
        ({"rescale": 2.0}, "guidance_rescale must be between 0 and 1"),
        ({"schedule": "none"}, "guidance_schedule must be one of constant, linear, cosine"),
    ],
)
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        Guidance(**fields)
