"""DINOv2-L and SD 2.1's text encoder at full size, once against torch: `make test-full`, 8 GB of memory."""

import dataclasses
import resource

import jax
import numpy as np
import pytest
from flax import nnx
from parity_fixtures import random_model, to_torch

from m2m_jax.models.clip_text import CLIPTextConfig, CLIPTextEncoder
from m2m_jax.models.dinov2 import SIZES, DINOv2
from m2m_jax.models.parameters import abstract, count, merge
from m2m_jax.models.transformers_folder import save_clip_text, save_dinov2

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch", reason="parity with transformers runs on torch, a test-only dependency")
    return pytest.importorskip("transformers", reason="the reference of the parity tests, a test-only dependency")


def report(name: str, params, error: float) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\n{name}: {count(params):,} parameters, relative error {error:.1e}, peak memory {peak:.1f} GiB")


def relative_error(ours, theirs) -> float:
    return np.abs(np.asarray(ours) - theirs.numpy()).max() / np.abs(theirs.numpy()).max()


def test_full_size_parameter_counts():
    """Those of transformers' models."""
    sizes = {
        "DINOv2-B": (DINOv2, SIZES["base"], 86_580_480),
        "DINOv2-L": (DINOv2, SIZES["large"], 304_368_640),
        "DINOv2-L with registers": (DINOv2, dataclasses.replace(SIZES["large"], num_register_tokens=4), 304_372_736),
        "DINOv2-g": (DINOv2, SIZES["giant"], 1_136_480_768),
        "SD 2.1 text encoder": (CLIPTextEncoder, CLIPTextConfig(), 340_387_840),
    }
    for name, (cls, config, expected) in sizes.items():
        found = count(abstract(lambda cls=cls, config=config: cls(config, rngs=nnx.Rngs(0)))[1])
        print(f"\n{name}: {found:,} parameters")
        assert found == expected


def test_dinov2_large_parity(transformers, tmp_path):
    """At 224 pixels, for which the position embeddings of 518 are interpolated."""
    import torch

    config = SIZES["large"]
    graphdef, params = random_model.__wrapped__(DINOv2, config)  # not cached: it is 1.2 GB
    images_bhwc = np.random.default_rng(1).standard_normal((1, 224, 224, 3), np.float32)
    ours = np.asarray(jax.jit(lambda p, x: merge(graphdef, p)(x))(params, images_bhwc))

    save_dinov2(tmp_path, config, params)
    model, loading = transformers.Dinov2Model.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values()), loading
    with torch.no_grad():
        theirs = model.eval()(to_torch(images_bhwc)).last_hidden_state
    error = relative_error(ours, theirs)
    report("DINOv2-L", params, error)
    assert error <= 1e-4


def test_text_encoder_of_stable_diffusion_21_parity(transformers, tmp_path):
    import torch

    config = CLIPTextConfig()
    graphdef, params = random_model.__wrapped__(CLIPTextEncoder, config)
    ids_bs = np.random.default_rng(1).integers(0, config.vocab_size, (1, 77), np.int32)
    states, pooled = jax.jit(lambda p, ids: merge(graphdef, p)(ids))(params, ids_bs)

    save_clip_text(tmp_path, config, params)
    model, loading = transformers.CLIPTextModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values()), loading
    with torch.no_grad():
        theirs = model.eval()(torch.from_numpy(ids_bs).long())
    error = max(relative_error(states, theirs.last_hidden_state), relative_error(pooled, theirs.pooler_output))
    report("SD 2.1 text encoder", params, error)
    assert error <= 1e-4
