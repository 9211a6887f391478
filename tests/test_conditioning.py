"""What a network is told and how: an attention and a global embedding of one's own, both defined here, keys and values
by address, references, single images left out of the context, and attention to sets and text in one block."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_fixtures import drawn_from, quick_jit, random_params
from test_extensions import Memory

from m2m_jax.attention.layout import SetLayout
from m2m_jax.core.errors import UserError
from m2m_jax.core.parameters import abstract, merge
from m2m_jax.diffusion.guidance import EVERYTHING
from m2m_jax.models.attentions import ATTENTIONS, parameter_names
from m2m_jax.models.conditioning import CachedContext, Conditioning
from m2m_jax.models.context_cache import append_image, empty_cache
from m2m_jax.models.embedders import EMBEDDERS, CameraEmbedder, Perceptron
from m2m_jax.models.initialization import from_pretrained, is_attention, is_set_attention
from m2m_jax.models.unet import UNet, UNetConfig, denoise_sets
from m2m_jax.models.unet_config import with_todays_names

CONFIG = UNetConfig(
    block_out_channels=(16,),
    down_block_types=("DownBlock2D",),  # one transformer, in the middle
    layers_per_block=1,
    num_attention_heads=(2,),
    norm_num_groups=8,
)
BLOCK = "mid_block.attentions.0.transformer_blocks.0"
SETS, IMAGES, WIDTH = 2, 3, 12
RNG = np.random.default_rng(0)
CLEAN, NOISED = (RNG.standard_normal((SETS, n, 4, 4, 4)).astype(np.float32) for n in (IMAGES - 1, IMAGES))
TIMESTEP = RNG.integers(0, 1000, (SETS, IMAGES), np.int32)
TEXT = RNG.standard_normal((SETS, 5, WIDTH)).astype(np.float32)
LAYOUT = SetLayout.training(IMAGES)


ATTENTIONS.register("memory")(Memory)


@EMBEDDERS.register("pose")
class PoseEmbedder(Perceptron):
    """Five joints in the plane, [b, 5, 2]: an embedding of its own."""

    def __init__(self, time_embed_dim, *, rngs):
        super().__init__(10, time_embed_dim, rngs=rngs)

    def __call__(self, pose_bj2):
        return super().__call__(pose_bj2.reshape(pose_bj2.shape[0], -1))


@functools.cache
def network(**changes):
    """(graphdef, params without a zero) of the tiny network with these fields."""
    config = dataclasses.replace(CONFIG, **changes)
    graphdef, shapes = abstract(lambda: UNet(config, rngs=nnx.Rngs(0)))
    return graphdef, random_params(shapes)


WHOLE = {
    "attentions": ("self", "set", "memory", "text"),
    "cross_attention_dim": WIDTH,
    "global_embeddings": ("camera", "pose"),
}
ROWS = LAYOUT.num_images
GLOBALS = {
    "camera": RNG.standard_normal((SETS, ROWS, 3)).astype(np.float32),
    "pose": RNG.standard_normal((SETS, ROWS, 5, 2)).astype(np.float32),
}


@functools.cache
def whole(remat: str = "none"):
    """`(params, text, globals) -> (predictions, gradients of all three)`, of a network with everything."""
    graphdef, _ = network(**WHOLE, remat=remat)

    @quick_jit
    def run(params, text_bsc, globals_bq):
        def forward(params, text_bsc, globals_bq):
            inputs = CLEAN, NOISED, TIMESTEP, LAYOUT
            told = {"text_bsc": text_bsc, "globals_bq": globals_bq}
            return denoise_sets(merge(graphdef, params), *inputs, clean_timestep=0, **told)

        out, vjp = jax.vjp(forward, params, text_bsc, globals_bq)
        return out, vjp(NOISED)

    return run


def test_sets_text_and_what_is_registered_here_stand_in_one_block():
    params = network(**WHOLE)[1]
    parts = {name.removeprefix(BLOCK + ".").partition(".")[0] for name in params if name.startswith(BLOCK)}
    names = {"attn1", "norm1", "attn2", "norm2", "attn_memory", "norm_memory", "attn_text", "norm_text"}
    assert parts == names | {"norm3", "ff"}
    out, (of_params, of_text, of_globals) = whole()(params, TEXT, GLOBALS)
    assert np.isfinite(out).all()
    for name, x in [*of_params.items(), ("text", of_text), *of_globals.items()]:
        assert np.any(x), name
    for text, values in ((-TEXT, GLOBALS), (TEXT, {**GLOBALS, "pose": -GLOBALS["pose"]})):
        assert np.abs(whole()(params, text, values)[0] - out).max() > 0.01


def test_recomputation_changes_nothing_of_it():
    params = network(**WHOLE)[1]
    expected, found = whole()(params, TEXT, GLOBALS), whole("blocks")(params, TEXT, GLOBALS)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


def test_the_cache_is_exact_for_it():
    """The first two images of each set are kept, and the third is the one being made."""
    graphdef, params = network(**WHOLE)
    clean_rows, last = slice(0, 2), ROWS - 1

    @quick_jit
    def cached(params):
        unet = merge(graphdef, params)

        def told(row):
            return Conditioning(
                text_bsc=jnp.asarray(TEXT), globals={k: jnp.asarray(v[:, row]) for k, v in GLOBALS.items()}
            )

        image = jax.ShapeDtypeStruct(CLEAN[:, 0].shape, jnp.float32)
        cache = empty_cache(unet, image, 4, conditioning=told(0))
        for i in range(2):
            every = jnp.ones(SETS, bool)
            timestep_b = jnp.full(SETS, 3)
            cache = append_image(
                unet, cache, CLEAN[:, i], clean_timestep=timestep_b, append_b=every, conditioning=told(i)
            )
        seen = CachedContext(cache.k_bmshd, cache.v_bmshd, cache.sees_bm(EVERYTHING, 0)[:, None])
        conditioning = dataclasses.replace(told(last), cached=seen)
        return unet(NOISED[:, 2], TIMESTEP[:, 2], conditioning)[0], cache

    @quick_jit
    def together(params):
        rows = np.r_[clean_rows, last]
        told = {"text_bsc": jnp.asarray(TEXT), "globals_bq": {k: v[:, rows] for k, v in GLOBALS.items()}}
        inputs = CLEAN, NOISED[:, 2:], TIMESTEP[:, 2:], SetLayout.sampling(2)
        return denoise_sets(merge(graphdef, params), *inputs, clean_timestep=3, **told)[:, 0]

    out, cache = cached(params)
    assert list(cache.k_bmshd) == [BLOCK + ".set"]
    np.testing.assert_allclose(out, together(params), rtol=1e-5, atol=1e-5)


def test_globals_begin_at_nothing_and_are_those_that_the_network_embeds():
    embedder, camera_b3 = CameraEmbedder(8, rngs=nnx.Rngs(0)), jnp.asarray([[0.3, 1.0, 2.0]])
    assert not np.any(embedder(camera_b3))
    embedder.linear_2.kernel[...] = jnp.eye(8)
    turned = camera_b3 + jnp.asarray([[0.0, 2 * np.pi, 0.0]])
    np.testing.assert_allclose(embedder(turned), embedder(camera_b3), atol=1e-5)
    assert np.any(embedder(camera_b3 + 0.1) != embedder(camera_b3))
    unet = merge(*network(global_embeddings=("camera",)))
    with pytest.raises(UserError, match=r"embeds these global values: camera; Conditioning.globals holds: none"):
        jax.eval_shape(lambda x: unet(x, jnp.zeros(1)), jax.ShapeDtypeStruct((1, 4, 4, 4), jnp.float32))
    with pytest.raises(UserError, match=r"unknown global embedding 'cameras'; did you mean camera?"):
        dataclasses.replace(CONFIG, global_embeddings=("cameras",))


@functools.cache
def with_references(backend: str):
    """`(params, latents, references) -> (prediction, keys and values)`."""
    graphdef, _ = network(attentions=("self",), attention_backend=backend)

    @quick_jit
    def run(params, x_bhwc, references):
        conditioning = Conditioning(references=references)
        timestep_b = jnp.full(x_bhwc.shape[0], 7)
        return merge(graphdef, params)(x_bhwc, timestep_b, conditioning, return_keys_values=True)

    return run


@pytest.mark.parametrize("backend", ["dense", "prefix", "splash_interpreted"])
def test_references_are_seen_beside_an_image_itself(backend):
    run, params, address = with_references(backend), network(attentions=("self",))[1], BLOCK + ".self"
    alone, made = run(params, NOISED[:, 0], {})
    assert list(made) == [address] and made[address][0].shape == (SETS, 16, 2, 8)
    # Its own keys and values once more change nothing; those of another image do.
    again, _ = run(params, NOISED[:, 0], made)
    np.testing.assert_allclose(again, alone, rtol=1e-5, atol=1e-5)
    other, _ = run(params, NOISED[:, 0], run(params, NOISED[:, 1], {})[1])
    assert np.abs(other - alone).max() > 0.01
    by_dense, _ = with_references("dense")(params, NOISED[:, 0], run(params, NOISED[:, 1], {})[1])
    np.testing.assert_allclose(other, by_dense, rtol=1e-5, atol=1e-5)


def test_keys_and_values_cross_a_scan():
    graphdef, params = network(**WHOLE, remat="blocks")

    def step(x_bhwc, timestep):
        told = Conditioning(text_bsc=TEXT, globals={name: value[:, 0] for name, value in GLOBALS.items()})
        timestep_b = jnp.broadcast_to(timestep, x_bhwc.shape[:1])
        return merge(graphdef, params)(x_bhwc, timestep_b, told, return_keys_values=True)

    x_bhwc, made = jax.eval_shape(lambda x: jax.lax.scan(step, x, jnp.arange(4)), NOISED[:, 0])
    assert x_bhwc.shape == NOISED[:, 0].shape
    assert sorted(made) == [f"{BLOCK}.{kind}" for kind in ("memory", "self", "text")]  # no context: no "set"
    assert {x.shape[:2] for pair in made.values() for x in pair} == {(4, SETS)}


def test_without_a_text_attention_to_text_is_refused():
    unet = merge(*network(**WHOLE))
    told = Conditioning(globals={name: value[:, 0] for name, value in GLOBALS.items()})
    with pytest.raises(
        UserError, match=r"transformer_blocks.0.text attends to text, and Conditioning.text_bsc is None"
    ):
        jax.eval_shape(lambda x: unet(x, jnp.zeros(SETS), told), NOISED[:, 0])


# --- Names ----------------------------------------------------------------------------------------------------------


def test_parameters_bear_the_names_of_diffusers_where_these_are_free():
    assert parameter_names(("self",)) == {"self": ("attn1", "norm1")}
    assert parameter_names(("self", "set"))["set"] == parameter_names(("self", "text"))["text"] == ("attn2", "norm2")
    both = parameter_names(("self", "text", "set", "memory"))
    assert list(both) == ["self", "text", "set", "memory"]
    assert (both["set"], both["text"]) == (("attn2", "norm2"), ("attn_text", "norm_text"))
    assert both["memory"] == ("attn_memory", "norm_memory")
    names = [name for name in network(**WHOLE)[1] if name.startswith(BLOCK)]
    outside = {name for name in names if not is_attention(name)}
    assert outside == {name for name in names if ".ff." in name or ".norm3." in name}
    assert {name for name in names if is_set_attention(name)} == {
        name for name in names if ".attn2." in name or ".norm2." in name
    }


def test_sets_and_text_start_from_a_network_that_attends_to_text():
    """At step 0 the context changes nothing, and the text is attended to as before."""
    text = {"attentions": ("self", "text"), "cross_attention_dim": WIDTH}
    both = text | {"attentions": ("self", "set", "text")}
    (graphdef, fresh), (text_graphdef, pretrained) = network(**both), network(**text)
    configs = [dataclasses.replace(CONFIG, **fields) for fields in (both, text)]
    started = from_pretrained(fresh, drawn_from(fresh), configs[0], pretrained, configs[1], "somewhere")
    assert started.keys() == fresh.keys()
    np.testing.assert_array_equal(started[BLOCK + ".attn_text.to_k.kernel"], pretrained[BLOCK + ".attn2.to_k.kernel"])
    assert not np.any(started[BLOCK + ".attn2.to_out.bias"])
    inputs, told = (CLEAN, NOISED, TIMESTEP, LAYOUT), {"clean_timestep": 0, "text_bsc": TEXT}
    out = quick_jit(lambda p: denoise_sets(merge(graphdef, p), *inputs, **told))(started)
    expected = quick_jit(lambda p: denoise_sets(merge(text_graphdef, p), *inputs, **told))(pretrained)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_what_was_saved_before_attentions_had_names_is_read():
    before = {"attn2": "image_set", "cross_attention_dim": 384, "order_embedding": True}
    assert with_todays_names(before) == {"attentions": ["self", "set"], "context_dim": 384, "order_embedding": True}
    assert with_todays_names({"attn2": "text", "cross_attention_dim": 8}) == {
        "attentions": ["self", "text"],
        "cross_attention_dim": 8,
    }
    assert with_todays_names({"attn2": "none"})["attentions"] == ["self"]
    today = dataclasses.asdict(CONFIG)
    assert with_todays_names(today) == today
    with pytest.raises(UserError, match="attn2 is 'sets'; it must be one of image_set, text, none"):
        with_todays_names({"attn2": "sets"})
