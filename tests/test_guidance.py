"""Guidance as tables of branches and weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2m_jax.core.errors import UserError
from m2m_jax.diffusion.guidance import (
    ALL,
    COMBINATIONS,
    EVERYTHING,
    GUIDANCES,
    NONE,
    NOTHING,
    SCHEDULES,
    Branch,
    GuidanceTable,
    fade,
    guide,
    make_table,
)
from m2m_jax.diffusion.schedule import NoiseSchedule
from m2m_jax.sampling.settings import SamplingSettings

CONDITIONAL, UNCONDITIONAL, NOISED = np.random.default_rng(0).standard_normal((3, 2, 4, 4, 4)).astype(np.float32)
OUTPUTS = {EVERYTHING: CONDITIONAL, NOTHING: UNCONDITIONAL}
SCHEDULE = NoiseSchedule(beta_schedule="squaredcos_cap_v2", rescale_betas_zero_snr=True, prediction_type="v_prediction")
CFG = GUIDANCES["cfg"]


def apply(table, outputs=None, row=0, rescale=0.0, seen=None):
    """The guided output at a row; `seen` gets the branches that are traced."""

    def evaluate(branches):
        if seen is not None:
            seen.append(branches)
        return jnp.stack([jnp.asarray((outputs or OUTPUTS)[branch]) for branch in branches], axis=1)

    return guide(table, evaluate, jnp.int32(row), rescale=rescale)


def cfg(*, noise=0.4, outputs=None, rescale=0.0, **options):
    return apply(CFG(np.array([noise]), **options), outputs, rescale=rescale)


def test_its_ends():
    np.testing.assert_array_equal(cfg(scale=0.0), UNCONDITIONAL)
    np.testing.assert_array_equal(cfg(scale=1.0), CONDITIONAL)


def test_what_weighs_nothing_is_not_computed():
    for scale, needed in ((1.0, (EVERYTHING,)), (0.0, (NOTHING,)), (3.0, (EVERYTHING, NOTHING))):
        seen = []
        apply(CFG(np.array([0.5]), scale=scale), seen=seen)
        assert seen == [needed]


def test_it_commutes_with_the_parametrisation():
    t = jnp.int32(400)
    noised, *ends = map(jnp.asarray, (NOISED, CONDITIONAL, UNCONDITIONAL))
    guided = SCHEDULE.to_clean(cfg(scale=3.0), noised, t)
    clean = dict(zip(OUTPUTS, (SCHEDULE.to_clean(x, noised, t) for x in ends), strict=True))
    np.testing.assert_allclose(guided, cfg(scale=3.0, outputs=clean), rtol=0, atol=1e-5)


def test_outside_of_its_interval_it_does_nothing():
    noise_s = np.array([0.7, 0.6, 0.4, 0.1])
    table, seen = CFG(noise_s, scale=3.0, interval=(0.2, 0.6)), []
    for row, guides in enumerate((False, True, True, False)):
        expected = UNCONDITIONAL + (3.0 if guides else 1.0) * (CONDITIONAL - UNCONDITIONAL)
        seen.clear()
        np.testing.assert_allclose(apply(table, row=row, seen=seen), expected, rtol=0, atol=1e-5)
    assert sorted(seen, key=len) == [(EVERYTHING,), (EVERYTHING, NOTHING)]  # two copies of the network, one is run


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_end_at_the_scale(schedule):
    scales = CFG(np.array([1.0, 0.5, 0.0]), scale=5.0, schedule=schedule).weights_sg[:, 0]
    assert scales[2] == 5.0
    expected = {"constant": [5.0, 5.0], "linear": [1.0, 3.0], "cosine": [1.0, 3.0]}[schedule]
    np.testing.assert_allclose(scales[:2], expected, rtol=1e-6)


def test_rescaling_gives_back_the_deviation_of_each_image():
    """As diffusers' rescale_noise_cfg."""
    plain, rescaled = cfg(scale=7.0), cfg(scale=7.0, rescale=1.0)
    axes = (1, 2, 3)
    np.testing.assert_allclose(np.std(rescaled, axes), np.std(CONDITIONAL, axes), rtol=1e-5)
    half = cfg(scale=7.0, rescale=0.5)
    np.testing.assert_allclose(half, (plain + rescaled) / 2, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        np.std(cfg(scale=0.0, rescale=1.0), axes), np.std(CONDITIONAL, axes), rtol=1e-5
    )  # though it weighs nothing


def test_two_scales_over_three_branches():
    """InstructPix2Pix (arXiv:2211.09800), eq. 3, and what is left of it for models that read less."""
    images_only = Branch(text=False)
    outputs = OUTPUTS | {images_only: NOISED}
    table = GuidanceTable(
        (EVERYTHING, images_only, NOTHING), fade(np.array([0.5]), (7.0, 1.5 - 7.0, 1 - 1.5), (0.0, 1.0), "constant")
    )
    expected = UNCONDITIONAL + 1.5 * (NOISED - UNCONDITIONAL) + 7.0 * (CONDITIONAL - NOISED)
    np.testing.assert_allclose(apply(table, outputs), expected, rtol=1e-5, atol=1e-5)

    without_text = table.reduce(reads_images=True, reads_text=False)
    assert without_text.branches == (Branch(), Branch(images=NONE))
    np.testing.assert_allclose(without_text.weights_sg, [[1.5, -0.5]])
    without_images = table.reduce(reads_images=False, reads_text=True)
    assert without_images.branches == (Branch(), Branch(text=False))
    np.testing.assert_allclose(without_images.weights_sg, [[7.0, -6.0]])
    assert table.reduce(reads_images=False, reads_text=False).branches == (Branch(),)


def test_alternating_branches_are_computed_in_turn():
    """Instruct-Imagen's (arXiv:2401.01952): each step guides by one of two conditions."""
    no_text, no_images = Branch(text=False), Branch(images=NONE)
    turns = np.tile([[3.0, -2.0, 0.0], [2.0, 0.0, -1.0]], (2, 1))
    table, seen = GuidanceTable((EVERYTHING, no_text, no_images), turns), []
    outputs = {EVERYTHING: CONDITIONAL, no_text: UNCONDITIONAL, no_images: NOISED}
    for row in range(4):
        seen.clear()
        second, scale = ((UNCONDITIONAL, 3.0), (NOISED, 2.0))[row % 2]
        expected = second + scale * (CONDITIONAL - second)
        np.testing.assert_allclose(apply(table, outputs, row, seen=seen), expected, rtol=1e-5, atol=1e-5)
    assert sorted(map(len, seen)) == [2, 2] and len(set(seen)) == 2


def test_levels_without_images_are_one_branch():
    table = GuidanceTable((Branch(), Branch(NONE, 0.4, False), Branch(NONE, 0.0, False)), np.array([[3.0, -1.0, -1.0]]))
    assert table.reduce(reads_images=True, reads_text=True).branches == (EVERYTHING, NOTHING)
    assert EVERYTHING.images == ALL


@pytest.fixture
def registered(monkeypatch):
    """What a test registers is gone after it."""
    for registry in (GUIDANCES, COMBINATIONS):
        monkeypatch.setattr(registry, "_registered", dict(registry))


def test_a_combination_of_outputs_is_one_function(registered):
    """Projected guidance (arXiv:2410.02416) in its first part: without what is parallel to the conditional output."""

    @COMBINATIONS.register("projected")
    def projected(outputs, weights):
        conditional, unconditional = outputs
        axes = tuple(range(1, conditional.ndim))
        difference = conditional - unconditional
        share = (difference * conditional).sum(axes, keepdims=True) / (conditional**2).sum(axes, keepdims=True)
        return conditional + (weights[0] - 1) * (difference - share * conditional)

    table = GuidanceTable((EVERYTHING, NOTHING), np.array([[4.0, -3.0]]), "projected")
    added = np.asarray(jax.jit(lambda: apply(table))() - CONDITIONAL)
    np.testing.assert_allclose((added * CONDITIONAL).sum((1, 2, 3)), 0, atol=1e-3)
    assert np.abs(added).max() > 1


def test_options_of_a_guidance(registered):
    @GUIDANCES.register("mine")
    def mine(noise_s, *, scale=1.0, history=2.0):
        return GuidanceTable((EVERYTHING, NOTHING), np.tile([scale * history, 1 - scale * history], (len(noise_s), 1)))

    settings = SamplingSettings(guidance="mine", guidance_scale=1.5, guidance_options=("history=4",))
    np.testing.assert_array_equal(settings.guidance_table(np.array([1.0, 0.5])).weights_sg, [[6.0, -5.0]] * 2)
    assert SamplingSettings(guidance="mine").guidance_table(np.ones(1)).weights_sg[0, 0] == 2.0
    for fields, message in (
        ({"guidance_options": ("histery=4",)}, "has no option 'histery'; did you mean history"),
        ({"guidance_options": ("scale=4",)}, "guidance 'mine' has no option 'scale'"),
        ({"guidance_options": ("history=four",)}, "guidance_options takes NAME=NUMBER, not 'history=four'"),
        ({"guidance_options": ("history",)}, "guidance_options takes NAME=NUMBER"),
        ({"guidance_options": ("history=nan",)}, "guidance_options takes NAME=NUMBER"),
        ({"guidance_schedule": "linear"}, "guidance 'mine' takes no guidance_schedule: leave it at 'constant'"),
    ):
        with pytest.raises(UserError, match=message):
            SamplingSettings(guidance="mine", **fields)


def test_weights_that_do_not_sum_to_one_are_a_mistake():
    with pytest.raises(ValueError, match="must sum to 1"):
        GuidanceTable((EVERYTHING, NOTHING), np.array([[1.0, 0.5]]))
    with pytest.raises(ValueError, match="2 branches"):
        GuidanceTable((EVERYTHING, NOTHING), np.array([[1.0]]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"guidance": "cgf"}, "unknown guidance 'cgf'; did you mean cfg"),
        ({"guidance_scale": -1.0}, "--guidance_scale is -1.0; it must be at least 0"),
        ({"guidance_scale": float("inf")}, "guidance_scale"),
        ({"guidance_interval": (0.6, 0.2)}, "guidance_interval must be two fractions, the smaller first"),
        ({"guidance_interval": (0.0, 1.5)}, "guidance_interval"),
        ({"guidance_rescale": 2.0}, "--guidance_rescale is 2.0; it must be between 0 and 1"),
        ({"guidance_schedule": "none"}, "unknown guidance_schedule 'none'; .* there are constant, linear, cosine"),
    ],
)
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        SamplingSettings(**fields)


def test_the_table_is_what_make_table_gives_by_name():
    noise_s = np.array([1.0, 0.0])
    options = {"scale": (3.0, 1.0), "interval": ((0.0, 1.0), (0.0, 1.0)), "schedule": ("linear", "constant")}
    np.testing.assert_array_equal(make_table("cfg", noise_s, options, {}).weights_sg, [[1.0, 0.0], [3.0, -2.0]])
