"""Every norm of every model keeps its digits where the mean of what it is given is large beside the spread."""

import numpy as np
import pytest
from flax import nnx
from model_fixtures import random_params

from m2m_jax.core.parameters import abstract, merge
from m2m_jax.models.autoencoder import AutoencoderConfig, AutoencoderKL
from m2m_jax.models.bert import BertConfig, BertEncoder
from m2m_jax.models.clip_text import CLIPTextConfig, CLIPTextEncoder
from m2m_jax.models.dinov2 import DINOv2, DINOv2Config
from m2m_jax.models.unet import UNet, UNetConfig

OFFSET = 50.0  # means, in standard deviations
TEXT = {"vocab_size": 8, "hidden_size": 48, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 3}
MODELS = {
    "U-Net": (
        UNet,
        UNetConfig(
            block_out_channels=(32,),
            down_block_types=("CrossAttnDownBlock2D",),
            layers_per_block=1,
            num_attention_heads=(2,),
            norm_num_groups=4,
        ),
    ),
    "autoencoder": (
        AutoencoderKL,
        AutoencoderConfig(block_out_channels=(16,), layers_per_block=1, norm_num_groups=4),
    ),
    "CLIP": (CLIPTextEncoder, CLIPTextConfig(**TEXT)),
    "BERT": (BertEncoder, BertConfig(**TEXT)),
    "DINOv2": (
        DINOv2,
        DINOv2Config(hidden_size=48, num_hidden_layers=1, num_attention_heads=3, image_size=8, patch_size=4),
    ),
}


def norms(model: nnx.Module) -> dict[str, nnx.GroupNorm | nnx.LayerNorm]:
    """{dotted name: module}."""
    kinds = (nnx.GroupNorm, nnx.LayerNorm)
    found = nnx.iter_modules(model)
    return {".".join(map(str, path)): module for path, module in found if isinstance(module, kinds)}


@pytest.mark.parametrize("name", MODELS)
def test_a_large_offset_costs_no_digits(name):
    torch = pytest.importorskip("torch", reason="the reference of the parity tests, a test-only dependency")
    build, config = MODELS[name]
    graphdef, shapes = abstract(lambda: build(config, rngs=nnx.Rngs(0)))
    found = norms(merge(graphdef, random_params(shapes)))
    assert found
    rng = np.random.default_rng(0)
    for path, module in found.items():
        scale, bias = np.asarray(module.scale[...]), np.asarray(module.bias[...])
        channels = len(scale)
        x = (OFFSET + rng.standard_normal((2, 4, 4, channels))).astype(np.float32)
        weights = [torch.tensor(a, dtype=torch.float64) for a in (x, scale, bias)]
        if isinstance(module, nnx.GroupNorm):
            expected = torch.nn.functional.group_norm(
                weights[0].permute(0, 3, 1, 2), module.num_groups, *weights[1:], module.epsilon
            ).permute(0, 2, 3, 1)
        else:
            expected = torch.nn.functional.layer_norm(weights[0], (channels,), *weights[1:], module.epsilon)
        error = np.abs(np.asarray(module(x)) - expected.numpy()).max()
        assert error < 5e-5, f"{path}: {error:.1e}"
