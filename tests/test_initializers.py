"""Fresh parameters: drawn on the host, each by its name, distributed as Flax's initializers have it."""

import jax
import numpy as np
import pytest
from flax import nnx

from m2m_jax.configuration import Mesh
from m2m_jax.core import initializers, parameters
from m2m_jax.core.initializers import Fresh
from m2m_jax.core.keys import Domain, Stream, named_generator
from m2m_jax.core.parameters import abstract, initial
from m2m_jax.models.autoencoder import AutoencoderConfig, AutoencoderKL
from m2m_jax.models.bert import BertConfig, BertEncoder
from m2m_jax.models.clip_image import CLIP, CLIPImageConfig
from m2m_jax.models.clip_text import CLIPTextConfig, CLIPTextEncoder
from m2m_jax.models.dinov2 import SIZES, DINOv2
from m2m_jax.models.efficientnet import EfficientNetConfig, EfficientNetLite
from m2m_jax.models.embedders import EMBEDDERS
from m2m_jax.models.inception import Inception, InceptionConfig
from m2m_jax.models.unet import UNet, UNetConfig
from m2m_jax.training import sharding

GLOBALS = tuple(EMBEDDERS)
CONFIG = UNetConfig(
    block_out_channels=(32, 64),
    down_block_types=("CrossAttnDownBlock2D",) * 2,
    layers_per_block=1,
    num_attention_heads=(2, 4),
    attentions=("self", "set", "text"),
    cross_attention_dim=24,
    global_embeddings=GLOBALS,
    order_embedding=True,
)


def build(rngs: nnx.Rngs) -> UNet:
    return UNet(CONFIG, rngs=rngs)


@pytest.fixture(scope="module")
def params():
    return initial(build, seed=3)


def test_a_parameter_depends_on_seed_and_name_alone(params):
    names = ["mid_block.resnets.1.conv1.kernel", "conv_in.kernel"]
    some = initial(build, 3, names)
    assert list(some) == names
    for name in names:
        np.testing.assert_array_equal(some[name], params[name])
        assert np.any(initial(build, 4, [name])[name] != params[name])
    blocks = [params[f"mid_block.resnets.{i}.conv1.kernel"] for i in (0, 1)]  # of one shape
    assert np.any(blocks[0] != blocks[1])


def test_the_numbers_of_a_seed_stay():
    drawn = named_generator(Domain.INITIALIZE, 0, Stream.PARAMS, "conv_in.kernel").standard_normal(3, np.float32)
    np.testing.assert_allclose(drawn, np.float32([-1.266364, 1.169471, -1.151388]), rtol=1e-6)


SHAPE = (3, 3, 128, 256)
FLAX = {
    "lecun_normal": nnx.initializers.lecun_normal(),
    "embedding": nnx.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0),
    "zeros": nnx.initializers.zeros_init(),
    "ones": nnx.initializers.ones_init(),
}


@pytest.mark.parametrize("name", FLAX)
def test_parameters_are_distributed_as_flax_has_it(name):
    initializer, shape = getattr(initializers, name), (1000, 256) if name == "embedding" else SHAPE
    theirs = np.asarray(FLAX[name](jax.random.key(0), shape))
    ours = initializer.draw(np.random.default_rng(0), shape)
    by_jax = np.asarray(initializer(jax.random.key(0), shape))
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    np.testing.assert_allclose(by_jax, theirs, rtol=1e-5)
    shares = np.linspace(0, 1, 21)
    np.testing.assert_allclose(
        np.quantile(ours, shares[1:-1]), np.quantile(theirs, shares[1:-1]), atol=0.05 * np.std(theirs)
    )
    if name != "embedding":
        np.testing.assert_allclose(np.quantile(ours, shares[[0, -1]]), np.quantile(theirs, shares[[0, -1]]), rtol=1e-3)


def test_a_fresh_network_passes_its_input_on(params):
    """Which parameters are zero at the start: of kernels those that end a block, of tables none."""
    zero = {name for name, x in params.items() if not np.any(x)}
    ends = ("conv2.kernel", "proj_out.kernel", "conv_out.kernel", "order.kernel", "linear_2.kernel")
    assert {name for name in params if name.endswith((".bias", *ends))} - {"time_embedding.linear_2.kernel"} == zero
    assert all(np.all(x == 1) for name, x in params.items() if name.endswith(".scale"))


MODELS = {
    "unet": build,
    "autoencoder": lambda rngs: AutoencoderKL(AutoencoderConfig(), rngs=rngs),
    "clip_image": lambda rngs: CLIP(CLIPImageConfig(), CLIPTextConfig(), 8, rngs=rngs),
    "inception": lambda rngs: Inception(InceptionConfig(), rngs=rngs),
    "efficientnet": lambda rngs: EfficientNetLite(EfficientNetConfig(), rngs=rngs),
    "clip": lambda rngs: CLIPTextEncoder(CLIPTextConfig(), rngs=rngs),
    "bert": lambda rngs: BertEncoder(BertConfig(), rngs=rngs),
    "dinov2": lambda rngs: DINOv2(SIZES["small"], rngs=rngs),
}


@pytest.mark.parametrize("model", MODELS)
def test_every_parameter_of_a_network_can_be_drawn_by_its_name(model):
    _, fresh = parameters._described(lambda: MODELS[model](nnx.Rngs(0)))
    assert not [name for name, x in fresh.items() if not isinstance(x, Fresh)]


class Foreign(nnx.Module):
    """A module with Flax's initializers, as an extension may have it."""

    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(3, 5, rngs=rngs)


def test_a_module_with_other_initializers_is_drawn_by_the_seed():
    _, shapes = abstract(lambda: Foreign(nnx.Rngs(0)))
    assert {type(x) for x in shapes.values()} == {jax.ShapeDtypeStruct}
    one, same, other = (initial(Foreign, seed)["linear.kernel"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.any(one != other)


def test_each_device_gets_its_share_alone(params):
    mesh = sharding.make_mesh(Mesh(data=1, fsdp=8))
    placed = sharding.place(params, sharding.parameter_shardings(params, mesh))
    name = "mid_block.resnets.0.conv1.kernel"
    assert [shard.data.size for shard in placed[name].addressable_shards] == [params[name].size // 8] * 8
    np.testing.assert_array_equal(placed[name], params[name])
