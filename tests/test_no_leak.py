"""No leak: what an image must not see changes neither its output nor a gradient, to the last bit.

A tiny U-Net at random weights (also where training starts from zeros), in every attention form. One jitted function per
form gives the outputs of all images of the stack, and the gradients of one of them with respect to all images and to
the attention's parameters (those of the convolutions would take half as long again to compile).
"""

import functools

import jax
import numpy as np
import pytest
from flax import nnx
from model_fixtures import quick_jit, random_params

from m2m_jax.attention.layout import CLEAN_SEES, SetLayout
from m2m_jax.core.parameters import abstract, merge
from m2m_jax.models.unet import UNet, UNetConfig, denoise_sets

NUM_IMAGES = 3
FORMS = [(backend, clean_sees) for backend in ("dense", "prefix") for clean_sees in CLEAN_SEES]
FORMS.append(("splash_interpreted", "preceding"))


@functools.cache
def random_unet(backend: str, clean_sees: str):
    """(graphdef, params) of a U-Net with attention on two levels, without a zero among its parameters."""
    config = UNetConfig(
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        layers_per_block=1,
        num_attention_heads=(2, 2),
        norm_num_groups=8,
        clean_sees=clean_sees,
        attention_backend=backend,
    )
    graphdef, shapes = abstract(lambda: UNet(config, rngs=nnx.Rngs(0)))
    return graphdef, random_params(shapes)


@functools.cache
def probe(backend: str, clean_sees: str):
    """`(inputs, keep_context_b, cotangents) -> (outputs, gradients)`, compiled.

    `inputs` and `outputs` hold latents: clean [b, m, h, w, c] and noised [b, n, h, w, c]; inputs hold timestep_bn, too.
    Gradients are those of the product of outputs and cotangents, with respect to clean, noised and attention weights.
    """
    graphdef, params = random_unet(backend, clean_sees)
    layout = SetLayout.training(NUM_IMAGES, clean_sees)

    @quick_jit
    def run(params, inputs, keep_context_b, cotangents):
        def forward(attention_params, clean, noised):
            stacks = []

            def spy(*args):
                out, keys_values = merge(graphdef, params | attention_params)(*args)
                stacks.append(out)
                return out, keys_values

            out = denoise_sets(
                spy,
                clean,
                noised,
                inputs["timestep"],
                layout,
                clean_timestep=0,
                keep_context_b=keep_context_b,
            )
            stack_bqhwc = stacks[0].reshape(clean.shape[0], layout.num_images, *clean.shape[2:])
            return {"clean": stack_bqhwc[:, : len(layout.clean)], "noised": out}

        attention_params = {name: x for name, x in params.items() if ".attn" in name}
        outputs, vjp = jax.vjp(forward, attention_params, inputs["clean"], inputs["noised"])
        return outputs, dict(zip(("params", "clean", "noised"), vjp(cotangents), strict=True))

    return functools.partial(run, params)


def random_inputs(seed: int) -> dict[str, np.ndarray]:
    """Latents and timesteps of two sets of different images."""
    rng = np.random.default_rng(seed)
    shape = (2, NUM_IMAGES, 4, 4, 4)
    clean, noised = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    timestep = rng.integers(0, 1000, shape[:2], np.int32)
    return {"clean": clean[:, :-1], "noised": noised, "timestep": timestep}


def with_image_replaced(inputs, other, j: int, names=("clean", "noised", "timestep")):
    """`inputs` with everything there is of image j (or what `names` names of it) taken from `other`."""
    replaced = {name: x.copy() for name, x in inputs.items()}
    for name in names:
        replaced[name][:, j : j + 1] = other[name][:, j : j + 1]  # the last image has no clean copy
    return replaced


def cotangents_of(branch: str, i: int) -> dict[str, np.ndarray]:
    """Random ones for one image of the stack, zeros for the rest: the gradient is then that image's alone."""
    inputs = random_inputs(7)
    cotangents = {name: np.zeros_like(inputs[name]) for name in ("clean", "noised")}
    cotangents[branch][:, i] = inputs[branch][:, i]
    return cotangents


KEEP = np.ones(2, bool)


@pytest.mark.parametrize(("backend", "clean_sees"), FORMS)
def test_changing_an_image_changes_nothing_for_images_before_it(backend, clean_sees):
    run, before, other = probe(backend, clean_sees), random_inputs(1), random_inputs(2)
    for j in range(1, NUM_IMAGES):
        after = with_image_replaced(before, other, j)
        for i in range(j):
            cotangents = cotangents_of("noised", i)
            outputs, gradients = run(before, KEEP, cotangents)
            new_outputs, new_gradients = run(after, KEEP, cotangents)
            np.testing.assert_array_equal(new_outputs["noised"][:, i], outputs["noised"][:, i])
            np.testing.assert_array_equal(new_outputs["clean"][:, i], outputs["clean"][:, i])
            jax.tree.map(np.testing.assert_array_equal, new_gradients, gradients)
            assert any(np.any(x) for x in gradients["params"].values())
        assert np.any(new_outputs["noised"][:, j] != outputs["noised"][:, j])


@pytest.mark.parametrize(("backend", "clean_sees"), FORMS)
def test_a_noised_image_depends_on_itself_and_on_clean_images_before_it_alone(backend, clean_sees):
    run, inputs = probe(backend, clean_sees), random_inputs(1)
    for i in range(NUM_IMAGES):
        _, gradients = run(inputs, KEEP, cotangents_of("noised", i))
        for j in range(NUM_IMAGES):
            assert np.any(gradients["noised"][:, j]) == (j == i), f"noised {j} to noised {i}"
        for j in range(NUM_IMAGES - 1):
            assert np.any(gradients["clean"][:, j]) == (j < i), f"clean {j} to noised {i}"


@pytest.mark.parametrize(("backend", "clean_sees"), FORMS)
def test_a_clean_image_depends_on_nothing_noised(backend, clean_sees):
    run, inputs, other = probe(backend, clean_sees), random_inputs(1), random_inputs(2)
    outputs, _ = run(inputs, KEEP, cotangents_of("clean", 0))
    noised_replaced = inputs | {name: other[name] for name in ("noised", "timestep")}
    new_outputs, _ = run(noised_replaced, KEEP, cotangents_of("clean", 0))
    np.testing.assert_array_equal(new_outputs["clean"], outputs["clean"])
    for i in range(NUM_IMAGES - 1):
        _, gradients = run(inputs, KEEP, cotangents_of("clean", i))
        assert not np.any(gradients["noised"])
        for j in range(NUM_IMAGES - 1):
            sees = j <= i if clean_sees == "preceding" else j == i
            assert np.any(gradients["clean"][:, j]) == sees, f"clean {j} to clean {i}"


@pytest.mark.parametrize(("backend", "clean_sees"), FORMS)
def test_the_clean_copy_of_an_image_does_not_reach_the_image(backend, clean_sees):
    run, inputs, other = probe(backend, clean_sees), random_inputs(1), random_inputs(2)
    for i in range(NUM_IMAGES - 1):
        cotangents = cotangents_of("noised", i)
        outputs, gradients = run(inputs, KEEP, cotangents)
        new_outputs, new_gradients = run(with_image_replaced(inputs, other, i, ["clean"]), KEEP, cotangents)
        np.testing.assert_array_equal(new_outputs["noised"][:, : i + 1], outputs["noised"][:, : i + 1])
        jax.tree.map(np.testing.assert_array_equal, new_gradients, gradients)


@pytest.fixture(scope="module")
def without_context():
    """Outputs and gradients of the noised images of `random_inputs(1)` when no clean image is there."""
    inputs = random_inputs(1)
    layout = SetLayout((), tuple(range(NUM_IMAGES)))
    graphdef, params = random_unet("dense", "preceding")

    @quick_jit
    def run(params, noised, timestep):
        return denoise_sets(merge(graphdef, params), None, noised, timestep, layout, clean_timestep=0)

    return run(params, inputs["noised"], inputs["timestep"])


@pytest.mark.parametrize(("backend", "clean_sees"), FORMS)
def test_context_dropout_is_no_context_at_all(backend, clean_sees, without_context):
    run, inputs = probe(backend, clean_sees), random_inputs(1)
    kept, _ = run(inputs, KEEP, cotangents_of("noised", 1))
    for keep_context_b in ([False, False], [True, False]):
        dropped, gradients = run(inputs, np.asarray(keep_context_b), cotangents_of("noised", NUM_IMAGES - 1))
        for b, keep in enumerate(keep_context_b):
            expected = kept["noised"][b] if keep else without_context[b]
            np.testing.assert_allclose(dropped["noised"][b], expected, rtol=1e-5, atol=1e-5)
            assert np.any(gradients["clean"][b]) == keep
        # The clean branch goes on as before: what it computes is thrown away with its outputs.
        np.testing.assert_array_equal(dropped["clean"], kept["clean"])
    assert np.abs(kept["noised"][:, 1:] - without_context[:, 1:]).max() > 0.1
    np.testing.assert_allclose(kept["noised"][:, 0], without_context[:, 0], rtol=1e-5, atol=1e-5)
