"""Guidances and steppers that a test file adds, through sampling of a small model; and what devices send for them."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fuzz_targets import _small_sampler
from jax.sharding import Mesh
from model_fixtures import random_params
from run_fixtures import run, train_tiny

from m2m_jax.attention.layout import SetLayout
from m2m_jax.core.errors import UserError
from m2m_jax.core.parameters import merge
from m2m_jax.diffusion.guidance import EVERYTHING, GUIDANCES, NOTHING, Branch, GuidanceTable, fade
from m2m_jax.diffusion.step_tables import STEPPERS, StepTable
from m2m_jax.diffusion.steppers import advance
from m2m_jax.models.context_cache import Text, denoise_next
from m2m_jax.models.unet import denoise_sets, unet_structure
from m2m_jax.sampling.programs import CONTEXT, _keys, _part, compiled

LAST, NOISED = Branch(images=(-1, None)), Branch(level=0.5)


def two_scales(noise_s, *, scale=1.0, interval=(0.0, 1.0), schedule="constant", last=2.0):
    """All context over none, and the last image alone over none."""
    weights_sg = fade(noise_s, (scale, last, 1 - scale - last), interval, schedule)
    return GuidanceTable((EVERYTHING, LAST, NOTHING), weights_sg)


def history(noise_s, *, scale=1.0):
    """Fractional history guidance (arXiv:2502.06764): over the context, noised."""
    return GuidanceTable((EVERYTHING, NOISED, NOTHING), np.tile([1.0, scale, -scale], (len(noise_s), 1)))


def turns(noise_s, *, scale=3.0):
    """Guide over the text at even steps and over the images at odd ones."""
    weights = np.tile([scale, 1 - scale, 0.0], (len(noise_s), 1))
    weights[1::2] = [scale, 0.0, 1 - scale]
    return GuidanceTable((EVERYTHING, Branch(text=False), NOTHING), weights)


def half_steps(schedule, num_steps):
    """DDIM's table, each image moved half as far."""
    table: StepTable = STEPPERS["ddim"](schedule, num_steps)
    x = table.x.copy()
    x[:, 2] *= 0.5
    return table._replace(x=x)


@pytest.fixture(scope="module", autouse=True)
def registered():
    """What this file registers is gone after it."""
    with pytest.MonkeyPatch.context() as patch:
        for registry in (GUIDANCES, STEPPERS):
            patch.setattr(registry, "_registered", dict(registry))
        for name, guidance in {"mine": two_scales, "my_history": history, "my_turns": turns}.items():
            GUIDANCES.register(name)(guidance)
        STEPPERS.register("my_stepper")(half_steps)
        yield


@pytest.fixture(scope="module")
def sampler(tmp_path_factory):
    """Of random weights; clean images see themselves alone, so a part of the context is a context of its own."""
    made = _small_sampler(tmp_path_factory.mktemp("model"))
    config = dataclasses.replace(made.unet_config, clean_sees="itself")
    settings = dataclasses.replace(made.settings, steps=3, stepper="ddim", cache_size=4)
    schedule = dataclasses.replace(made.schedule, prediction_type="sample")  # others magnify what is rounded
    params = random_params(unet_structure(config)[1])
    return dataclasses.replace(made, unet_config=config, unet_params=params, settings=settings, schedule=schedule)


def with_settings(sampler, **settings):
    return dataclasses.replace(sampler, settings=dataclasses.replace(sampler.settings, **settings))


CONTEXT_IMAGES = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)


def sampled(sampler):
    """(latents of the next image, its cache, what it was begun with)."""
    run, seed_b = sampler.programs, jnp.asarray([5], jnp.uint32)
    cache = sampler.empty_cache(sampler.place(seed_b), 3)
    for image in CONTEXT_IMAGES:
        cache = run["append"](cache, seed_b, run["encode"](image[None]), jnp.ones(1, bool))
    carry = run["begin"](cache, seed_b)
    return run["denoise"](cache, seed_b, carry, np.int32(0), np.int32(sampler.num_steps))["x"], cache, carry


def uncached(sampler, carry, guided):
    """The same image by passes over context and image together. guided: (one pass over a context, step) -> output."""
    static = sampler.static
    latents_1mhwc = jnp.stack([static.encode(sampler.params, image[None])[0] for image in CONTEXT_IMAGES])[None]

    def once(context, noised_bhwc, timestep, told=None):
        unet = merge(unet_structure(static.unet_config)[0], sampler.unet_params)
        layout = SetLayout.sampling(0 if context is None else context.shape[1], "itself", False)
        clean = static.clean_timestep if told is None else told
        timestep_b1 = jnp.full((1, 1), timestep)
        return denoise_sets(unet, context, noised_bhwc[:, None], timestep_b1, layout, clean_timestep=clean)[:, 0]

    def network(noised_bhwc, timestep, row):
        return guided(functools.partial(once, noised_bhwc=noised_bhwc, timestep=timestep), latents_1mhwc, row)

    steps = sampler.num_steps
    return jax.jit(lambda carry: advance(static.schedule, static.table, network, carry, None, 0, steps)["x"])(carry)


def test_two_scales_over_parts_of_the_context(sampler):
    mine = with_settings(sampler, guidance="mine", guidance_scale=1.5, guidance_options=("last=0.75",))

    def guided(once, latents_bmhwc, row):
        everything, last, nothing = once(latents_bmhwc), once(latents_bmhwc[:, -1:]), once(None)
        return nothing + 1.5 * (everything - nothing) + 0.75 * (last - nothing)

    found, _, carry = sampled(mine)
    np.testing.assert_allclose(found, uncached(mine, carry, guided), rtol=1e-4, atol=1e-4)
    plain = sampled(sampler)[0]
    assert np.abs(found - plain).max() > 1e-2


def test_the_context_at_a_noise_level_of_its_own(sampler):
    mine = with_settings(sampler, guidance="my_history", guidance_scale=2.0)
    static = mine.static
    assert static.levels == (0.0, 0.5)
    found, cache, carry = sampled(mine)
    assert (cache.size, cache.levels) == (4, 2)
    # The noise of an image is that of its set and its position.
    timestep, noises = static.schedule.num_train_timesteps // 2, []
    for position in range(2):
        before = dataclasses.replace(cache, position_b=jnp.asarray([position]))
        key_b = _part(_keys(before, jnp.asarray([5], jnp.uint32)), CONTEXT)
        noises.append(static._noise(jax.vmap(lambda key: jax.random.fold_in(key, 0))(key_b))[0])

    def guided(once, latents_bmhwc, row):
        noised = static.schedule.add_noise(latents_bmhwc, jnp.stack(noises)[None], jnp.full((1, 2), timestep))
        return once(latents_bmhwc) + 2.0 * (once(noised, told=timestep) - once(None))

    np.testing.assert_allclose(found, uncached(mine, carry, guided), rtol=1e-4, atol=1e-4)


def test_branches_in_turn(sampler):
    """Without text the first of the two is plain sampling."""
    mine = with_settings(sampler, guidance="my_turns", guidance_scale=3.0)
    assert mine.static.guidance.branches == (EVERYTHING, dataclasses.replace(NOTHING, text=True))

    def guided(once, latents_bmhwc, row):
        everything, nothing = once(latents_bmhwc), once(None)
        return jnp.where(row % 2 == 0, everything, nothing + 3.0 * (everything - nothing))

    found, _, carry = sampled(mine)
    np.testing.assert_allclose(found, uncached(mine, carry, guided), rtol=1e-4, atol=1e-4)


def test_a_stepper_by_name(sampler):
    whole, half = (with_settings(sampler, stepper=name)(CONTEXT_IMAGES, 1, 0) for name in ("ddim", "my_stepper"))
    assert np.any(whole != half)


def test_the_program_takes_them_by_name(tmp_path_factory, tmp_path):
    checkpoint = train_tiny(tmp_path_factory).workdir
    flags = ("--guidance=mine", "--guidance_options=last=0.5", "--stepper=my_stepper", "--steps=2", "--num_images=1")
    result = run("sample", f"--checkpoint={checkpoint}", f"--output={tmp_path / 'out'}", *flags)
    assert result.code == 0, result.err
    settings = json.loads((tmp_path / "out" / "sample.json").read_text())["settings"]
    assert settings["guidance"] == "mine" and settings["guidance_options"] == ["last=0.5"]
    wrong = run("sample", f"--checkpoint={checkpoint}", f"--output={tmp_path / 'no'}", "--guidance=mien")
    assert wrong.code == 2 and "unknown guidance 'mien'; did you mean mine? there are cfg" in wrong.err


COLLECTIVE = re.compile(r" (all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all)(?:-start)?\(")


@pytest.mark.parametrize("guidance", ["cfg", "mine", "my_history"])
def test_devices_send_nothing_to_one_another(guidance, sampler):
    mine = with_settings(sampler, guidance=guidance, guidance_scale=1.5)
    static, mesh = mine.static, Mesh(np.array(jax.devices()[:4]), ("data",))
    seed_b, number = jax.ShapeDtypeStruct((8,), jnp.uint32), jax.ShapeDtypeStruct((), jnp.int32)
    cache = jax.eval_shape(static.empty_cache, mine.params, seed_b)
    carry = jax.eval_shape(static.begin, mine.params, cache, seed_b)
    lowered = compiled(static, mesh)["denoise"].lower(mine.params, cache, seed_b, carry, number, number)
    text = lowered.compile().as_text()
    assert "num_partitions=4" in text and not COLLECTIVE.findall(text)


def test_caches_are_as_small_as_they_can_be(sampler):
    large = with_settings(sampler, cache_size=40)
    seed_b = large.place(np.zeros(1, np.uint32))
    for needed, slots in ((0, 4), (4, 4), (5, 8), (16, 16), (25, 25), (26, 40), (99, 40)):
        assert large.empty_cache(seed_b, needed).size == slots
    assert with_settings(sampler, cache_size=3).empty_cache(seed_b, 2).size == 3


def test_noise_of_the_context_goes_with_images_alone(sampler):
    encoded = dataclasses.replace(sampler.unet_config, context_dim=8)
    with pytest.raises(UserError, match="guidance 'my_history' adds noise to context images"):
        with_settings(dataclasses.replace(sampler, unet_config=encoded), guidance="my_history")


def test_text_and_images_at_once():
    """A network that attends to both is told both by one branch, and by others one or none."""
    from fuzz_targets import SMALL_UNET

    from m2m_jax.models.context_cache import append_image, empty_cache

    config = dataclasses.replace(SMALL_UNET, attentions=("self", "set", "text"), cross_attention_dim=6)
    rng = np.random.default_rng(0)
    image, noised = rng.standard_normal((2, 3, 4, 4, 4)).astype(np.float32)
    caption_bsc = rng.standard_normal((3, 5, 6)).astype(np.float32)
    text, other = Text(caption_bsc, caption_bsc[:1] * 0), Text(caption_bsc[::-1], caption_bsc[:1] * 0)

    @jax.jit
    def outputs(text, count_b):
        params = random_params(unet_structure(config)[1])
        unet = merge(unet_structure(config)[0], params)
        cache = empty_cache(unet, jax.ShapeDtypeStruct(image.shape, jnp.float32), 2, conditioning=told(text))
        cache = append_image(unet, cache, image, clean_timestep=0, append_b=count_b > 0, conditioning=told(text))
        branches = (NOTHING, EVERYTHING, Branch(text=False), Branch(images=(0, 0)))
        return denoise_next(unet, noised, jnp.float32(500), branches, cache=cache, text=text)

    def told(text):
        from m2m_jax.models.conditioning import Conditioning

        return Conditioning(text_bsc=text.caption_bsc)

    everyone = jnp.ones(3, jnp.int32)
    a, b = outputs(text, everyone), outputs(other, everyone)
    nobody = outputs(text, 0 * everyone)
    changed_by_text = np.abs(a - b).max((0, 2, 3, 4)) > 1e-3
    changed_by_images = np.abs(a - nobody).max((0, 2, 3, 4)) > 1e-3
    assert changed_by_images.tolist() == [False, True, True, False]
    assert changed_by_text[0] == False and changed_by_text[1] and changed_by_text[3]  # noqa: E712
