"""The training objective, and the evaluation that says whether the context is used."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_fixtures import quick_jit, random_params

from m2m_jax.attention.layout import SetLayout
from m2m_jax.configuration import default_config
from m2m_jax.core.parameters import abstract, merge
from m2m_jax.diffusion.schedule import NoiseSchedule
from m2m_jax.models.unet import UNet, UNetConfig
from m2m_jax.tasks.evaluation import another, context_errors, stratified_timesteps
from m2m_jax.tasks.objective import Told, draw, squared_error, weighted_loss
from m2m_jax.tasks.set_diffusion import SetDiffusion

CONFIG = UNetConfig(
    block_out_channels=(16,),  # one level has four transformers: down, middle and two up
    down_block_types=("CrossAttnDownBlock2D",),
    layers_per_block=1,
    num_attention_heads=(2,),
    norm_num_groups=8,
)
SCHEDULE = NoiseSchedule(beta_schedule="squaredcos_cap_v2", rescale_betas_zero_snr=True, prediction_type="v_prediction")
NUM_IMAGES = 3
LATENTS = np.random.default_rng(0).standard_normal((3, NUM_IMAGES, 4, 4, 4)).astype(np.float32)
RECORDS = np.arange(len(LATENTS), dtype=np.int32)


@functools.cache
def random_unet():
    """(graphdef, params) without a zero among the parameters; strong enough that the context matters."""
    graphdef, shapes = abstract(lambda: UNet(CONFIG, rngs=nnx.Rngs(0)))
    return graphdef, random_params(shapes)


def errors_of_sets(unet, latents, context, draws, config):
    """The error of every image of whole sets, as in training."""
    told = Told(SetLayout.training(NUM_IMAGES), context, keep_context_b=draws.keep_context_b)
    noised = latents, draws.noise_bnhwc, draws.timestep_bn
    return squared_error(unet, SCHEDULE, told, *noised, clean_timestep=config.clean_timestep)


@functools.cache
def loss_and_gradients(context_dropout: float):
    """`(latents, seed, step) -> (loss, parts), gradients`."""
    graphdef, params = random_unet()
    config = default_config().diffusion
    config.context_dropout = context_dropout

    @quick_jit
    def run(params, latents, seed, step):
        def loss(params):
            unet, context = merge(graphdef, params), latents[:, :-1]
            draws = draw(SCHEDULE, latents.shape, seed=seed, step=step, config=config)
            error_bn = errors_of_sets(unet, latents, context, draws, config)
            loss = weighted_loss(SCHEDULE, error_bn, draws.timestep_bn, config)
            return loss, SetDiffusion.parts(error_bn)

        return jax.value_and_grad(loss, has_aux=True)(params)

    return functools.partial(run, params)


def test_the_loss_is_finite_and_depends_on_seed_and_step_alone():
    run = loss_and_gradients(0.1)
    (loss, parts), gradients = run(LATENTS, 5, 7)
    assert np.isfinite(loss) and loss > 0
    assert parts.keys() == {"loss_first", "loss_last"}
    assert all(np.isfinite(x).all() for x in gradients.values())
    (again, _), gradients_again = run(LATENTS, 5, 7)
    assert again == loss
    jax.tree.map(np.testing.assert_array_equal, gradients_again, gradients)
    assert run(LATENTS, 5, 8)[0][0] != loss
    assert run(LATENTS, 6, 7)[0][0] != loss


def test_the_gradient_reaches_every_parameter_of_the_set_attention():
    _, gradients = loss_and_gradients(0.1)(LATENTS, 5, 7)
    names = [name for name in gradients if ".attn2." in name or ".transformer_blocks.0.norm2." in name]
    assert len(names) == 4 * (5 + 2)
    for name in names:
        assert np.any(gradients[name]), name
    assert all(np.any(x) for x in gradients.values())


def test_sets_without_context_teach_nothing_about_keys_and_values():
    """All context dropped: only the output's bias is left of the set attention."""
    _, gradients = loss_and_gradients(1.0)(LATENTS, 5, 7)
    for name, x in gradients.items():
        if ".attn2." in name:
            assert np.any(x) == name.endswith(".to_out.bias"), name


@functools.cache
def evaluate():
    """`(latents, batch_index) -> context_errors`, their means."""
    graphdef, params = random_unet()

    @quick_jit
    def run(params, latents, batch_index, record_b=RECORDS):
        unet = merge(graphdef, params)
        config = default_config().diffusion
        context = latents[:, :-1]
        errors = context_errors(
            unet,
            SCHEDULE,
            latents,
            context,
            record_b=record_b,
            seed=1,
            batch_index=batch_index,
            clean_timestep=config.clean_timestep,
        )
        return jax.tree.map(jnp.mean, errors)

    return functools.partial(run, params)


def test_context_errors_are_named_and_hang_together():
    losses = evaluate()(LATENTS, 0)
    by_size = [losses[f"loss_by_context_size/{k}"] for k in range(NUM_IMAGES)]
    assert losses.keys() == {
        "loss_own_context",
        "loss_other_context",
        *(f"loss_by_context_size/{k}" for k in range(NUM_IMAGES)),
    }
    assert all(x.shape == () and np.isfinite(x) for x in losses.values())
    assert losses["loss_own_context"] == by_size[-1]
    assert len({float(x) for x in by_size}) == NUM_IMAGES
    assert losses["loss_other_context"] != losses["loss_own_context"]
    jax.tree.map(np.testing.assert_array_equal, evaluate()(LATENTS, 0), losses)
    assert evaluate()(LATENTS, 1)["loss_own_context"] != losses["loss_own_context"]


def test_own_and_other_context_are_one_where_all_sets_are_one():
    losses = evaluate()(LATENTS[:1].repeat(3, 0), 0)
    assert losses["loss_own_context"] == losses["loss_other_context"]


def test_other_context_is_that_of_another_set_for_every_set():
    turned = np.concatenate([np.roll(LATENTS[:, :-1], 1, axis=0), LATENTS[:, -1:]], axis=1)
    other, own = evaluate()(LATENTS, 0)["loss_other_context"], evaluate()(turned, 0)["loss_own_context"]
    np.testing.assert_allclose(other, own, rtol=1e-6)


def test_a_row_after_one_of_its_own_set_is_under_the_context_of_the_nearest_other():
    """Of rows 1 and 2, both of one set, the second is not under the context of the first but of row 0."""
    turned = np.concatenate([LATENTS[[2, 0, 0], :-1], LATENTS[:, -1:]], axis=1)
    other = evaluate()(LATENTS, 0, np.array([5, 7, 7], np.int32))["loss_other_context"]
    np.testing.assert_allclose(other, evaluate()(turned, 0)["loss_own_context"], rtol=1e-6)
    # Where there is no other, under its own.
    alone = evaluate()(LATENTS, 0, np.array([7, 7, 7], np.int32))
    assert alone["loss_other_context"] == alone["loss_own_context"]


@pytest.mark.parametrize("count", [1, 3, 64])
def test_no_timestep_is_beyond_the_last(monkeypatch, count):
    """The largest fraction that can be drawn rounds to 1 in the last of many strata."""
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape: jnp.full(shape, 1 - 2**-24, jnp.float32))
    timestep_k = stratified_timesteps(SCHEDULE, jax.random.key(0), count)
    assert timestep_k.max() == SCHEDULE.num_train_timesteps - 1


def test_which_row_is_anothers():
    np.testing.assert_array_equal(another(jnp.array([5, 6, 7, 8])), [3, 0, 1, 2])
    np.testing.assert_array_equal(another(jnp.array([5, 5, 7, 7])), [3, 3, 1, 1])
    np.testing.assert_array_equal(another(jnp.array([5, 5, 5])), [0, 1, 2])
    np.testing.assert_array_equal(another(jnp.array([[[1, 2]], [[1, 2]], [[1, 3]]])), [2, 2, 1])


class Spy:
    """Stands in for the U-Net: keeps what it is called with, answers zeros."""

    config = CONFIG

    def __call__(self, x_bhwc, timestep_b, conditioning):
        self.x_bhwc, self.timestep_b, self.sets = x_bhwc, timestep_b, conditioning.sets
        return jnp.zeros_like(x_bhwc), {}


def test_the_error_is_that_of_each_image_against_the_target_of_the_schedule():
    rng = np.random.default_rng(3)
    noise = jnp.asarray(rng.standard_normal(LATENTS.shape), jnp.float32)
    timestep = jnp.asarray(rng.integers(0, 1000, LATENTS.shape[:2]), jnp.int32)
    layout = SetLayout.training(NUM_IMAGES)
    error_bn = squared_error(
        Spy(), SCHEDULE, Told(layout, LATENTS[:, :-1]), jnp.asarray(LATENTS), noise, timestep, clean_timestep=0
    )
    target = np.asarray(SCHEDULE.target(jnp.asarray(LATENTS), noise, timestep))
    np.testing.assert_allclose(error_bn, (target**2).mean((2, 3, 4)), rtol=1e-5)


def test_what_the_network_is_given_in_training():
    """Clean images as they are, at one timestep; noised ones each at its own; some sets without context."""
    spy, config, b = Spy(), default_config().diffusion, 64
    config.context_dropout, config.clean_timestep = 0.25, 3
    latents = jnp.asarray(np.random.default_rng(4).standard_normal((b, NUM_IMAGES, 1, 1, 4)), jnp.float32)
    draws = draw(SCHEDULE, latents.shape, seed=0, step=0, config=config)
    errors_of_sets(spy, latents, latents[:, :-1], draws, config)
    assert spy.sets.layout == SetLayout.training(NUM_IMAGES)

    stack_bqhwc = spy.x_bhwc.reshape(b, -1, 1, 1, 4)
    np.testing.assert_array_equal(stack_bqhwc[:, : NUM_IMAGES - 1], latents[:, :-1])
    timestep_bq = np.asarray(spy.timestep_b).reshape(b, -1)
    assert (timestep_bq[:, : NUM_IMAGES - 1] == 3).all()
    timestep_bn = timestep_bq[:, NUM_IMAGES - 1 :]
    assert timestep_bn.min() >= 0 and timestep_bn.max() < 1000
    assert len(np.unique(timestep_bn)) > 0.8 * timestep_bn.size
    assert 0.1 < 1 - np.mean(spy.sets.keep_context_b) < 0.4


def test_a_rectified_flow_tells_the_network_the_level_and_wants_the_direction_of_the_line():
    schedule = NoiseSchedule(beta_schedule="rectified_flow", prediction_type="flow", shift=3.0)
    spy, latents, noise = Spy(), jnp.asarray(LATENTS), jnp.ones(LATENTS.shape)
    timestep = jnp.asarray([[0, 499, 999]] * len(LATENTS), jnp.int32)
    layout = SetLayout.training(NUM_IMAGES)
    error_bn = squared_error(spy, schedule, Told(layout, latents[:, :-1]), latents, noise, timestep, clean_timestep=0)
    np.testing.assert_allclose(error_bn, ((1 - LATENTS) ** 2).mean((2, 3, 4)), rtol=1e-5)
    timestep_bq = np.asarray(spy.timestep_b).reshape(len(LATENTS), -1)
    np.testing.assert_allclose(timestep_bq, [[0, 0, 3 / 1.002, 750, 1000]] * len(LATENTS), rtol=1e-6)
