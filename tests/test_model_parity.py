"""U-Net and autoencoder against diffusers at random weights, through the folders that both read, and those folders."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_fixtures import drawn_from, quick_jit
from parity_fixtures import (
    assert_same_params,
    change_config,
    random_model,
    record,
    require_equal,
    to_numpy,
    to_torch,
    torch_record,
)
from safetensors.numpy import load_file, save_file

from m2m_jax.attention.layout import SetLayout
from m2m_jax.core.errors import UserError
from m2m_jax.core.parameters import merge
from m2m_jax.models import attentions, autoencoder, layers, transformer
from m2m_jax.models.autoencoder import AutoencoderConfig, AutoencoderKL
from m2m_jax.models.conditioning import Conditioning
from m2m_jax.models.diffusers_folder import (
    DIFFUSERS,
    load_autoencoder_config,
    load_params,
    load_unet_config,
    save_autoencoder,
    save_unet,
)
from m2m_jax.models.folder import require_same
from m2m_jax.models.initialization import from_pretrained, is_set_attention
from m2m_jax.models.unet import UNet, UNetConfig, denoise_sets

WEIGHTS = DIFFUSERS.weights
ATTENDS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"

TINY = UNetConfig(
    block_out_channels=(16, 32),
    down_block_types=(ATTENDS, ATTENDS),
    layers_per_block=1,
    num_attention_heads=(2, 4),
    norm_num_groups=8,
    attentions=("self",),
)
# (config, height, width) of the latents.
UNETS = {
    "conv projection, two layers, odd size": (
        dataclasses.replace(
            TINY,
            down_block_types=(ATTENDS, PLAIN),
            layers_per_block=2,
            num_attention_heads=(1, 4),
            use_linear_projection=False,
        ),
        *(7, 9),
    ),
    "two transformer layers, three layers, outer level plain, other channels": (
        dataclasses.replace(
            TINY,
            in_channels=3,
            out_channels=5,
            block_out_channels=(8, 24),
            down_block_types=(PLAIN, ATTENDS),
            layers_per_block=3,
            transformer_layers_per_block=2,
            num_attention_heads=(1, 3),
            norm_num_groups=4,
            norm_eps=1e-3,
        ),
        *(5, 6),
    ),
    "four levels, as Stable Diffusion 1.x": (
        dataclasses.replace(
            TINY,
            block_out_channels=(8, 8, 16, 16),
            down_block_types=(ATTENDS, ATTENDS, ATTENDS, PLAIN),
            num_attention_heads=(8, 8, 8, 8),
            use_linear_projection=False,
        ),
        *(13, 11),
    ),
    "text, linear projection": (dataclasses.replace(TINY, attentions=("self", "text"), cross_attention_dim=12), 6, 5),
    "text, conv projection, head counts, two transformer layers": (
        dataclasses.replace(
            TINY,
            attentions=("self", "text"),
            cross_attention_dim=10,
            block_out_channels=(16, 24, 24),
            down_block_types=(ATTENDS, ATTENDS, PLAIN),
            num_attention_heads=(1, 6, 3),
            transformer_layers_per_block=2,
            use_linear_projection=False,
        ),
        *(9, 7),
    ),
    # The output of attn2 is then its bias, which diffusers' attn2 can be made to give, too.
    "image sets without context": (dataclasses.replace(TINY, attentions=("self", "set")), 4, 4),
}

TINY_VAE = AutoencoderConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, scaling_factor=0.7)
# (config, height, width) of the images.
AUTOENCODERS = {
    "two levels": (TINY_VAE, 8, 8),
    "three levels": (
        dataclasses.replace(TINY_VAE, block_out_channels=(8, 8, 16), layers_per_block=2, norm_num_groups=2),
        *(16, 12),
    ),
    "odd size, other channels": (
        dataclasses.replace(TINY_VAE, in_channels=1, out_channels=2, latent_channels=3, layers_per_block=3),
        *(13, 10),
    ),
    "four levels, as Stable Diffusion": (
        dataclasses.replace(TINY_VAE, block_out_channels=(8, 16, 16, 8), scaling_factor=0.18215),
        *(17, 23),
    ),
}


# --- Parity ---------------------------------------------------------------------------------------------------------


RECORDED = (
    nnx.Conv,
    layers.TimestepEmbedding,
    layers.ResnetBlock,
    layers.Downsample,
    layers.Upsample,
    attentions.SelfAttention,
    attentions.CrossAttention,
    transformer.TransformerBlock,
    transformer.SpatialTransformer,
    autoencoder.SpatialSelfAttention,
)


def diffusers_unet(diffusers, folder):
    """diffusers' U-Net at the weights of `folder`, loaded strictly.

    It has no form without text: where ours has none its attn2 is made to look at a condition of 8 channels and to add
    nothing, or our attn2's bias.
    """
    import torch

    config = json.loads((folder / "config.json").read_text())
    if "text" in config["attentions"]:
        model, report = diffusers.UNet2DConditionModel.from_pretrained(folder, output_loading_info=True)
        assert not any(report.values()), report
        return model.eval()
    # diffusers would save these with what is no longer true.
    for ours in ("attentions", "context_dim", "global_embeddings", "order_embedding", "clean_sees"):
        del config[ours]
    model = diffusers.UNet2DConditionModel.from_config({**config, "cross_attention_dim": 8}).eval()
    state = {name: torch.from_numpy(x) for name, x in load_file(folder / WEIGHTS).items()}
    for name, x in model.state_dict().items():
        if is_set_attention(name) and not name.endswith(".attn2.to_out.0.bias"):
            state[name] = torch.zeros_like(x)
        elif is_set_attention(name):
            state.setdefault(name, torch.zeros_like(x))
    model.load_state_dict(state, strict=True)
    return model


@pytest.mark.parametrize("case", UNETS)
def test_unet_is_that_of_diffusers(diffusers, case, tmp_path):
    import torch

    config, height, width = UNETS[case]
    graphdef, params = random_model(UNet, config)
    rng = np.random.default_rng(1)
    x_bhwc = rng.standard_normal((2, height, width, config.in_channels)).astype(np.float32)
    timestep_b = np.asarray([3, 977], np.int32)
    text_bsc = rng.standard_normal((2, 5, config.cross_attention_dim or 8)).astype(np.float32)
    conditioning = Conditioning(text_bsc=text_bsc) if "text" in config.attentions else Conditioning()

    def call(unet, x, t):
        return {"output": unet(x, t, conditioning)[0]}

    def torch_call(unet):
        return {"output": unet(to_torch(x_bhwc), torch.from_numpy(timestep_b), torch.from_numpy(text_bsc)).sample}

    ours = record(graphdef, params, RECORDED, call, x_bhwc, timestep_b)
    save_unet(tmp_path, config, params)
    require_equal(ours, torch_record(diffusers_unet(diffusers, tmp_path), ours, torch_call))


@pytest.mark.parametrize("case", AUTOENCODERS)
def test_autoencoder_is_that_of_diffusers(diffusers, case, tmp_path):
    config, height, width = AUTOENCODERS[case]
    graphdef, params = random_model(AutoencoderKL, config)
    rng = np.random.default_rng(1)
    image_bhwc = rng.uniform(-1, 1, (2, height, width, config.in_channels)).astype(np.float32)
    latent_bhwc = rng.standard_normal((2, 3, 2, config.latent_channels)).astype(np.float32)

    def call(vae, image_bhwc, latent_bhwc):
        mean, log_variance = vae.posterior(image_bhwc)
        return {"mean": mean, "log_variance": log_variance, "decoded": vae.decode(latent_bhwc)}

    def torch_call(vae):
        posterior = vae.encode(to_torch(image_bhwc)).latent_dist
        decoded = vae.decode(to_torch(latent_bhwc) / vae.config.scaling_factor).sample
        return {"mean": posterior.mean, "log_variance": posterior.logvar, "decoded": decoded}

    ours = record(graphdef, params, RECORDED, call, image_bhwc, latent_bhwc)
    save_autoencoder(tmp_path, config, params)
    reference, report = diffusers.AutoencoderKL.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    require_equal(ours, torch_record(reference.eval(), ours, torch_call))


def test_folders_of_diffusers_are_read(diffusers, tmp_path):
    """Also in several files."""
    config, *_ = AUTOENCODERS["three levels"]
    _, params = random_model(AutoencoderKL, config)
    save_autoencoder(tmp_path / "ours", config, params)
    vae = diffusers.AutoencoderKL.from_pretrained(tmp_path / "ours")
    vae.save_pretrained(tmp_path / "whole")
    vae.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert (tmp_path / "sharded" / f"{WEIGHTS}.index.json").exists()
    for folder in (tmp_path / "whole", tmp_path / "sharded"):
        assert load_autoencoder_config(folder) == config
        assert_same_params(load_params(folder), params)

    config, *_ = UNETS["conv projection, two layers, odd size"]
    _, params = random_model(UNet, config)
    save_unet(tmp_path / "unet", config, params)
    diffusers_unet(diffusers, tmp_path / "unet").save_pretrained(tmp_path / "theirs")
    assert load_unet_config(tmp_path / "theirs", attentions=("self",), cross_attention_dim=None) == config
    text = dataclasses.replace(config, attentions=("self", "text"), cross_attention_dim=8)
    assert load_unet_config(tmp_path / "theirs") == text
    found = load_params(tmp_path / "theirs")
    assert_same_params({name: x for name, x in found.items() if not is_set_attention(name)}, params)


OLD_NAMES = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


def rename_as_before(folder) -> None:
    """The attention of an autoencoder's folder under the names of older diffusers."""
    tensors = load_file(folder / WEIGHTS)
    for new, old in OLD_NAMES.items():
        tensors = {name.replace(new, old): x for name, x in tensors.items()}
    assert sum(".mid_block.attentions.0.query." in name for name in tensors) == 4
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def test_attention_under_its_old_names_is_read_as_diffusers_reads_it(diffusers, tmp_path):
    _, params = random_model(AutoencoderKL, TINY_VAE)
    save_autoencoder(tmp_path / "old", TINY_VAE, params)
    rename_as_before(tmp_path / "old")
    assert_same_params(load_params(tmp_path / "old"), params)
    vae, report = diffusers.AutoencoderKL.from_pretrained(tmp_path / "old", output_loading_info=True)
    assert not any(report.values()), report
    vae.save_pretrained(tmp_path / "new")
    assert_same_params(load_params(tmp_path / "new"), params)


# --- Folders --------------------------------------------------------------------------------------------------------


@pytest.fixture
def unet_folder(tmp_path):
    config, *_ = UNETS["conv projection, two layers, odd size"]
    folder = tmp_path / "unet"
    save_unet(folder, config, random_model(UNet, config)[1])
    return folder


@pytest.mark.parametrize("case", UNETS)
def test_what_is_saved_of_a_unet_is_loaded(case, tmp_path):
    config, *_ = UNETS[case]
    _, params = random_model(UNet, config)
    save_unet(tmp_path, config, params)
    assert_same_params(load_params(tmp_path), params)
    assert load_unet_config(tmp_path) == config
    other = load_unet_config(tmp_path, clean_sees="itself", dtype="bfloat16")
    assert other == dataclasses.replace(config, clean_sees="itself", dtype="bfloat16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", WEIGHTS]


@pytest.mark.parametrize("case", AUTOENCODERS)
def test_what_is_saved_of_an_autoencoder_is_loaded(case, tmp_path):
    config, *_ = AUTOENCODERS[case]
    _, params = random_model(AutoencoderKL, config)
    save_autoencoder(tmp_path, config, params)
    assert_same_params(load_params(tmp_path), params)
    assert load_autoencoder_config(tmp_path) == config


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_weights_of_half_the_size_are_read_as_float32(dtype, tmp_path):
    _, params = random_model(UNet, TINY)
    save_unet(tmp_path, TINY, params, dtype)
    assert_same_params(load_params(tmp_path), {k: x.astype(dtype).astype(np.float32) for k, x in params.items()})


def test_one_number_of_heads_counts_for_every_level(unet_folder):
    change_config(unet_folder, attention_head_dim=4)
    assert load_unet_config(unet_folder).num_attention_heads == (4, 4)


def shard(folder, names=("one.safetensors", "two.safetensors")) -> None:
    """Splits the weights of a folder into two files under an index."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    weight_map = {name: names[i % 2] for i, name in enumerate(tensors)}
    for file in names:
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def test_weights_in_several_files_are_read(unet_folder):
    expected = load_params(unet_folder)
    shard(unet_folder)
    assert_same_params(load_params(unet_folder), expected)
    (unet_folder / "two.safetensors").unlink()
    with pytest.raises(UserError, match=r"no weights at .*two\.safetensors"):
        load_params(unet_folder)


@pytest.mark.parametrize("name", ["../outside.safetensors", "{root}/outside.safetensors", "..", ".", ""])
def test_an_index_that_points_outside_its_folder_is_refused(name, unet_folder):
    outside = unet_folder.parent / "outside.safetensors"
    outside.write_bytes((unet_folder / WEIGHTS).read_bytes())
    index = {"weight_map": {"conv_in.weight": name.format(root=unet_folder.parent)}}
    (unet_folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"outside its folder|no weights at"):
        load_params(unet_folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 1}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none_is_refused(text, unet_folder):
    (unet_folder / f"{WEIGHTS}.index.json").write_text(text)
    with pytest.raises(UserError, match=r"index\.json is (damaged|not JSON|no JSON object)"):
        load_params(unet_folder)


def test_pickled_weights_are_refused(unet_folder):
    (unet_folder / WEIGHTS).rename(unet_folder / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match=r"diffusion_pytorch_model\.bin is pickled and is not opened"):
        load_params(unet_folder)


def test_a_folder_without_weights_or_config_is_refused(tmp_path):
    with pytest.raises(UserError, match="no weights at"):
        load_params(tmp_path)
    with pytest.raises(UserError, match="is not a diffusers model folder"):
        load_unet_config(tmp_path)


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_truncated_weights_are_refused(kept, unet_folder):
    path = unet_folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match="is damaged"):
        load_params(unet_folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_a_damaged_config_is_refused(text, unet_folder):
    (unet_folder / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json is not JSON|config\.json is no JSON object"):
        load_unet_config(unet_folder)


def test_a_folder_of_another_model_is_refused(unet_folder):
    with pytest.raises(UserError, match="describes a UNet2DConditionModel, not a AutoencoderKL"):
        load_autoencoder_config(unet_folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [("act_fn", "gelu"), ("shift_factor", 0.0609), ("latents_mean", [0.1] * 4), ("latents_std", [1.1] * 4)],
)
def test_an_autoencoder_of_other_latents_is_refused(field, value, tmp_path):
    save_autoencoder(tmp_path, AutoencoderConfig(), {})
    change_config(tmp_path, act_fn="silu", shift_factor=0.0, latents_mean=None, latents_std=None)
    assert load_autoencoder_config(tmp_path) == AutoencoderConfig()
    change_config(tmp_path, **{field: value})
    with pytest.raises(UserError, match=f"config.json has {field}="):
        load_autoencoder_config(tmp_path)


def test_require_same_names_what_does_not_fit():
    a, b = np.zeros((2, 3)), np.zeros((3, 2))
    require_same("somewhere", {"a": a, "b": b}, {"b": b, "a": a})
    with pytest.raises(UserError) as error:
        require_same("somewhere", {"missing_one": a, "shape": a, "same": a}, {"shape": b, "same": a, "extra_one": a})
    assert str(error.value) == (
        "somewhere does not hold this model: "
        "missing missing_one; unexpected extra_one; shape is (3, 2), should be (2, 3)"
    )


# --- Starting from a single-image model -----------------------------------------------------------------------------

SETS = dataclasses.replace(TINY, attentions=("self", "set"))


def test_at_step_0_the_set_model_is_the_single_image_model_whatever_the_context(tmp_path):
    single, single_params = random_model(UNet, TINY)
    sets, sets_params = random_model(UNet, SETS)
    save_unet(tmp_path, TINY, single_params)
    pretrained = load_params(tmp_path), load_unet_config(tmp_path), str(tmp_path)
    started = from_pretrained(sets_params, drawn_from(sets_params), SETS, *pretrained)
    require_same("what is started", sets_params, started)
    for name, x in started.items():
        if ".attn2.to_out." in name:
            assert not np.any(x)
        elif is_set_attention(name):
            copied = name.replace(".attn2.", ".attn1.").replace(".norm2.", ".norm1.")
            np.testing.assert_array_equal(x, single_params[copied])

    layout = SetLayout.training(3)
    rng = np.random.default_rng(2)
    noised = rng.standard_normal((1, 3, 8, 8, 4)).astype(np.float32)
    contexts = rng.standard_normal((2, 1, 2, 8, 8, 4)).astype(np.float32)
    timestep = np.asarray([[0, 500, 999]], np.int32)

    @quick_jit
    def run(params, clean):
        return denoise_sets(merge(sets, params), clean, noised, timestep, layout, clean_timestep=0)

    @quick_jit
    def run_single(params, clean):
        return denoise_sets(merge(single, params), clean, noised, timestep, layout, clean_timestep=0)

    expected = run_single(single_params, contexts[0])
    for clean in contexts:
        np.testing.assert_array_equal(run(started, clean), expected)
    assert np.any(run(sets_params, contexts[0]) != run(sets_params, contexts[1]))


def test_a_set_model_starts_from_a_set_model_as_it_is():
    _, params = random_model(UNet, SETS)
    started = from_pretrained(params, drawn_from({}), SETS, params, SETS, "somewhere")
    assert_same_params(started, params)


def test_a_single_image_model_that_does_not_fit_is_refused():
    _, params = random_model(UNet, SETS)
    _, pretrained = random_model(UNet, TINY)
    misfit = dict(pretrained)
    misfit["more.kernel"] = misfit.pop("conv_in.bias")
    misfit["conv_out.bias"] = np.zeros(5, np.float32)
    with pytest.raises(UserError) as error:
        from_pretrained(params, drawn_from(params), SETS, misfit, TINY, "somewhere")
    assert str(error.value) == (
        "init.path=somewhere does not fit config.model: missing conv_in.bias; "
        "unexpected more.kernel; conv_out.bias is (5,), should be (4,); "
        "set config.model to that folder's config.json, or init.path= to train from scratch"
    )
    with pytest.raises(UserError, match=r"and [0-9]+ more;"):
        from_pretrained(params, drawn_from(params), SETS, {}, TINY, "somewhere")
    with pytest.raises(UserError, match=r"unexpected down_blocks.*attn2"):
        from_pretrained(pretrained, drawn_from(pretrained), TINY, params, SETS, "somewhere")
    other_heads = dataclasses.replace(TINY, num_attention_heads=(4, 4))
    with pytest.raises(UserError, match=r"num_attention_heads is \(4, 4\) there and \(2, 4\) here"):
        from_pretrained(params, drawn_from(params), SETS, pretrained, other_heads, "somewhere")


@pytest.mark.parametrize("encoded", [False, True], ids=["M2M-Self", "M2M-DINO"])
@pytest.mark.parametrize("order_embedding", [False, True])
def test_at_step_0_m2m_is_stable_diffusion_without_text(diffusers, encoded, order_embedding, tmp_path):
    """Its unconditional output: what diffusers gives for text tokens that are zero, whatever the context."""
    import torch

    text_config, height, width = UNETS["text, conv projection, head counts, two transformer layers"]
    save_unet(tmp_path, text_config, random_model(UNet, text_config)[1])
    reference = diffusers.UNet2DConditionModel.from_pretrained(tmp_path).eval()

    tokens = 10 if encoded else None
    config = dataclasses.replace(
        text_config,
        attentions=("self", "set"),
        cross_attention_dim=None,
        context_dim=tokens,
        order_embedding=order_embedding,
    )
    graphdef, params = random_model(UNet, config)
    params = {name: x * 0 if ".order." in name else x for name, x in params.items()}  # it starts at zero
    pretrained = load_params(tmp_path), load_unet_config(tmp_path), "somewhere"
    started = from_pretrained(params, drawn_from(params), config, *pretrained)
    require_same("what is started", params, started)

    rng = np.random.default_rng(2)
    layout = SetLayout.training(3, encoded=encoded)
    noised = rng.standard_normal((1, 3, height, width, 4)).astype(np.float32)
    context = rng.standard_normal((1, 2, 6, 10) if encoded else (1, 2, height, width, 4)).astype(np.float32)
    timestep = np.asarray([[0, 500, 999]], np.int32)

    @quick_jit
    def run(params, context):
        return denoise_sets(merge(graphdef, params), context, noised, timestep, layout, clean_timestep=0)

    with torch.no_grad():
        no_text = torch.zeros(3, 5, text_config.cross_attention_dim)
        expected = to_numpy(reference(to_torch(noised[0]), torch.from_numpy(timestep[0]), no_text).sample)
    out = run(started, context)[0]
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_array_equal(out, run(started, -context)[0])
    faded_in = {name: x + 1.0 if ".attn2.to_out.kernel" in name else x for name, x in started.items()}
    assert np.abs(run(faded_in, context) - run(faded_in, -context))[0, 1:].max() > 1e-3
