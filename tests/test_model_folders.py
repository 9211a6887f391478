"""Model folders as people have them: every field of a config, variants of weights, and remedies that help."""

import dataclasses
import inspect
import json

import numpy as np
import pytest
from flax import nnx
from parity_fixtures import (
    assert_same_params,
    change_config,
    random_model,
    record,
    require_equal,
    to_torch,
    torch_record,
)
from safetensors.numpy import load_file, save_file

from m2m_jax.core.errors import UserError
from m2m_jax.models import diffusers_folder, transformers_folder
from m2m_jax.models import folder as folders
from m2m_jax.models.autoencoder import AutoencoderConfig, AutoencoderKL
from m2m_jax.models.bert import BertConfig
from m2m_jax.models.clip_text import CLIPTextConfig
from m2m_jax.models.diffusers_folder import (
    DIFFUSERS,
    load_autoencoder_config,
    load_params,
    load_schedule,
    load_unet_config,
    save_autoencoder,
    save_unet,
)
from m2m_jax.models.dinov2 import DINOv2Config
from m2m_jax.models.unet import UNetConfig

WEIGHTS = DIFFUSERS.weights
VAE = AutoencoderConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
TEXT_UNET = UNetConfig(
    block_out_channels=(8, 16),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    layers_per_block=1,
    num_attention_heads=(2, 2),
    norm_num_groups=4,
    attentions=("self", "text"),
    cross_attention_dim=24,
)


@pytest.fixture
def vae_folder(tmp_path):
    save_autoencoder(tmp_path / "vae", VAE, random_model(AutoencoderKL, VAE)[1])
    return tmp_path / "vae"


@pytest.fixture
def unet_folder(tmp_path):
    save_unet(tmp_path / "unet", TEXT_UNET, {})
    return tmp_path / "unet"


# Fields of config.json


def test_every_field_of_diffusers_is_read_or_fixed_or_harmless(diffusers, tmp_path):
    """And what a config.json lacks has the value that diffusers takes for it."""
    cases = (
        (diffusers.UNet2DConditionModel, load_unet_config, UNetConfig, "UNET", ("up_block_types",)),
        (diffusers.AutoencoderKL, load_autoencoder_config, AutoencoderConfig, "AUTOENCODER", ()),
    )
    for model, load, config, name, ours in cases:
        fixed, harmless = (getattr(diffusers_folder, f"{name}_{kind}") for kind in ("FIXED", "HARMLESS"))
        renamed = diffusers_folder.UNET_FIELDS if name == "UNET" else {}
        read = {renamed.get(field.name, field.name) for field in dataclasses.fields(config)}
        checked = {*ours, *(diffusers_folder.AUTOENCODER_BLOCKS if name == "AUTOENCODER" else ())}
        parameters = inspect.signature(model.__init__).parameters
        fields = {key: value.default for key, value in parameters.items() if key != "self"}
        assert fields.keys() <= read | checked | {*fixed, *harmless}
        assert not {*fixed, *harmless} - fields.keys()
        assert not {*fixed} & {*harmless} and not read & {*harmless}
        for key, known in fixed.items():
            assert fields[key] in known, key
        (tmp_path / "config.json").write_text("{}")
        loaded = load(tmp_path)
        for field in dataclasses.fields(config):
            default = fields.get(renamed.get(field.name, field.name))
            value = getattr(loaded, field.name)
            if renamed.get(field.name, field.name) in fields:
                assert value == default or set(value) == {default}, field.name


def test_every_field_of_transformers_is_read_or_fixed_or_harmless(transformers):
    for kind, config, fixed in (
        ("CLIPTextConfig", CLIPTextConfig, {}),
        ("BertConfig", BertConfig, transformers_folder.BERT_FIXED),
        ("Dinov2Config", DINOv2Config, transformers_folder.DINOV2_FIXED),
        ("Dinov2WithRegistersConfig", DINOv2Config, transformers_folder.DINOV2_FIXED),
    ):
        fields = getattr(transformers, kind)().to_dict().keys() - transformers.PretrainedConfig().to_dict().keys()
        read = {field.name for field in dataclasses.fields(config)}
        assert fields <= read | {*fixed, *transformers_folder.HARMLESS}, kind


def test_equal_sides_are_one_size(tmp_path):
    config = DINOv2Config(hidden_size=12, num_hidden_layers=1, num_attention_heads=3, image_size=20, patch_size=4)
    transformers_folder.save_dinov2(tmp_path, config, {})
    change_config(tmp_path, image_size=[20, 20], patch_size=[4, 4])
    assert transformers_folder.load_dinov2_config(tmp_path) == config
    change_config(tmp_path, image_size=[20, 24])
    with pytest.raises(UserError, match=r"image_size=\[20, 24\]; 2 equal values are implemented"):
        transformers_folder.load_dinov2_config(tmp_path)


@pytest.mark.parametrize("off", ["use_quant_conv", "use_post_quant_conv", "mid_block_add_attention"])
def test_an_autoencoder_without_some_of_its_parts_is_that_of_diffusers(diffusers, off, tmp_path):
    config = dataclasses.replace(VAE, **{off: False})
    graphdef, params = random_model(AutoencoderKL, config)
    rng = np.random.default_rng(1)
    image_bhwc = rng.uniform(-1, 1, (2, 8, 6, 3)).astype(np.float32)
    latent_bhwc = rng.standard_normal((2, 3, 2, 4)).astype(np.float32)

    def call(vae, image_bhwc, latent_bhwc):
        return {"mean": vae.posterior(image_bhwc)[0], "decoded": vae.decode(latent_bhwc)}

    def torch_call(vae):
        decoded = vae.decode(to_torch(latent_bhwc) / vae.config.scaling_factor).sample
        return {"mean": vae.encode(to_torch(image_bhwc)).latent_dist.mean, "decoded": decoded}

    ours = record(graphdef, params, (nnx.Conv,), call, image_bhwc, latent_bhwc)
    save_autoencoder(tmp_path, config, params)
    reference, report = diffusers.AutoencoderKL.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    require_equal(ours, torch_record(reference.eval(), ours, torch_call))
    reference.save_pretrained(tmp_path / "theirs")
    assert load_autoencoder_config(tmp_path / "theirs") == config
    assert_same_params(load_params(tmp_path / "theirs"), params)


SAME = {
    "only_cross_attention": [False, False],
    "cross_attention_dim": [24, 24],
    "layers_per_block": [1, 1],
    "transformer_layers_per_block": [1, 1],
    "attention_head_dim": 2,
    "mid_block_only_cross_attention": False,
    "act_fn": "swish",
}


@pytest.mark.parametrize("field", SAME)
def test_a_list_of_equal_values_means_that_value(diffusers, field, unet_folder):
    change_config(unet_folder, **{field: SAME[field]})
    assert load_unet_config(unet_folder) == TEXT_UNET
    values = json.loads((unet_folder / "config.json").read_text())
    known = inspect.signature(diffusers.UNet2DConditionModel.__init__).parameters
    diffusers.UNet2DConditionModel(**{name: value for name, value in values.items() if name in known})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("only_cross_attention", [False, True]),
        ("only_cross_attention", [False]),
        ("only_cross_attention", []),
        ("cross_attention_dim", [24, 32]),
        ("cross_attention_dim", [24, 24, 24]),
        ("transformer_layers_per_block", [1, 2]),
        ("layers_per_block", [2, 1]),
    ],
)
def test_a_list_of_other_values_is_refused(field, value, unet_folder):
    change_config(unet_folder, **{field: value})
    with pytest.raises(UserError, match=f"config.json has {field}="):
        load_unet_config(unet_folder)


@pytest.mark.parametrize("value", [True, "gelu", [3], {"a": 1}, 0.5])
@pytest.mark.parametrize("field", diffusers_folder.UNET_FIXED)
def test_another_value_of_a_fixed_field_is_refused(field, value, unet_folder):
    if value in diffusers_folder.UNET_FIXED[field]:
        pytest.skip("which is the value that is implemented")
    change_config(unet_folder, **{field: value})
    with pytest.raises(UserError, match=rf"config\.json has {field}="):
        load_unet_config(unet_folder)


@pytest.mark.parametrize("field", diffusers_folder.AUTOENCODER_BLOCKS)
def test_other_blocks_of_an_autoencoder_are_refused(field, vae_folder):
    change_config(vae_folder, **{field: ["AttnDownEncoderBlock2D", "DownEncoderBlock2D"]})
    with pytest.raises(UserError, match=f"config.json has {field}="):
        load_autoencoder_config(vae_folder)


def test_files_that_begin_with_a_mark_of_their_encoding_are_read(vae_folder, tmp_path):
    """As editors on Windows write them; also an index of weights, and a schedule."""
    expected = load_params(vae_folder)
    shard(vae_folder)
    (tmp_path / "scheduler_config.json").write_text("{}")
    schedule = load_schedule(tmp_path / "scheduler_config.json")
    for path in (*vae_folder.glob("*.json"), tmp_path / "scheduler_config.json"):
        path.write_text(path.read_text(), encoding="utf-8-sig")
    assert load_autoencoder_config(vae_folder) == VAE
    assert_same_params(load_params(vae_folder), expected)
    assert load_schedule(tmp_path / "scheduler_config.json") == schedule


# Files of weights


def shard(folder, name=WEIGHTS, index=f"{WEIGHTS}.index.json") -> None:
    """Splits the weights of a folder, as diffusers does."""
    tensors = load_file(folder / name)
    (folder / name).unlink()
    stem, suffix = name.removesuffix(".safetensors"), ".safetensors"
    files = [f"{stem}-{i:05d}-of-00002{suffix}" for i in (1, 2)]
    weight_map = {key: files[i % 2] for i, key in enumerate(tensors)}
    for file in files:
        save_file({key: tensors[key] for key in tensors if weight_map[key] == file}, folder / file)
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


FP16 = WEIGHTS.replace(".safe", ".fp16.safe")


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("pickled", [False, True])
def test_the_only_variant_that_is_there_is_read(vae_folder, sharded, pickled):
    expected = load_params(vae_folder)
    (vae_folder / WEIGHTS).rename(vae_folder / FP16)
    if sharded:
        shard(vae_folder, FP16, f"{WEIGHTS}.index.fp16.json")
    if pickled:
        (vae_folder / "diffusion_pytorch_model.bin").write_bytes(b"")
    assert_same_params(load_params(vae_folder), expected)


def test_variants_that_diffusers_saves_are_read(diffusers, vae_folder, tmp_path):
    expected = load_params(vae_folder)
    vae = diffusers.AutoencoderKL.from_pretrained(vae_folder)
    for name, size in (("whole", "1GB"), ("sharded", "5KB")):
        vae.save_pretrained(tmp_path / name, variant="fp16", max_shard_size=size)
        assert not (tmp_path / name / WEIGHTS).exists()
        assert_same_params(load_params(tmp_path / name), expected)
    assert len([*(tmp_path / "sharded").glob("*.safetensors")]) > 1


def test_of_several_variants_one_must_be_left(vae_folder):
    expected = load_params(vae_folder)
    (vae_folder / WEIGHTS).rename(vae_folder / FP16)
    other = vae_folder / WEIGHTS.replace(".safe", ".non_ema.safe")
    other.write_bytes((vae_folder / FP16).read_bytes())
    with pytest.raises(UserError, match=f"several variants, {FP16} and {other.name}: leave one of them in the folder"):
        load_params(vae_folder)
    other.unlink()
    assert_same_params(load_params(vae_folder), expected)


def test_the_default_weights_are_read_before_variants(vae_folder):
    expected = load_params(vae_folder)
    save_file({"a.weight": np.zeros(1, np.float32)}, vae_folder / FP16)
    assert_same_params(load_params(vae_folder), expected)


@pytest.mark.parametrize("name", [WEIGHTS, FP16])
def test_parts_without_their_index_ask_for_it(name, vae_folder):
    expected = load_params(vae_folder)
    if name != WEIGHTS:
        (vae_folder / WEIGHTS).rename(vae_folder / name)
    index = vae_folder / f"{WEIGHTS}.index.json"
    shard(vae_folder, name)
    elsewhere = index.rename(vae_folder / "elsewhere")
    with pytest.raises(UserError, match=rf"there is .*-00001-of-00002\.safetensors, a part: copy {index.name}, which"):
        load_params(vae_folder)
    elsewhere.rename(index)
    assert_same_params(load_params(vae_folder), expected)


def test_a_missing_part_is_asked_for(vae_folder):
    expected = load_params(vae_folder)
    shard(vae_folder)
    part = next(vae_folder.glob("*-00002-of-*"))
    aside = part.rename(vae_folder / "aside")
    with pytest.raises(UserError, match=rf"no weights at .*{part.name}, which .*index\.json names: copy it from where"):
        load_params(vae_folder)
    aside.rename(part)
    assert_same_params(load_params(vae_folder), expected)


def test_pickled_weights_are_read_once_their_library_has_saved_them_again(diffusers, vae_folder, tmp_path):
    expected = load_params(vae_folder)
    diffusers.AutoencoderKL.from_pretrained(vae_folder).save_pretrained(tmp_path / "old", safe_serialization=False)
    with pytest.raises(UserError, match="load it with diffusers where that does no harm, and save it again"):
        load_params(tmp_path / "old")
    diffusers.AutoencoderKL.from_pretrained(tmp_path / "old", use_safetensors=False).save_pretrained(tmp_path / "old")
    assert_same_params(load_params(tmp_path / "old"), expected)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "int8", "uint8", "bool", "int64", "complex64"])
def test_numbers_that_are_no_plain_floats_are_refused_in_a_line(diffusers, dtype, vae_folder):
    import torch
    from safetensors import torch as safetensors_torch

    tensors = safetensors_torch.load_file(vae_folder / WEIGHTS)
    tensors["encoder.conv_in.weight"] = tensors["encoder.conv_in.weight"].to(getattr(torch, dtype))
    safetensors_torch.save_file(tensors, vae_folder / WEIGHTS)
    with pytest.raises(UserError, match=r"holds encoder\.conv_in\.weight as \w+: it is quantized.*F16, BF16 are read"):
        load_params(vae_folder)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_floats_of_any_size_are_read(diffusers, dtype, vae_folder):
    import torch
    from safetensors import torch as safetensors_torch

    tensors = safetensors_torch.load_file(vae_folder / WEIGHTS)
    tensors = {name: x.to(getattr(torch, dtype)) for name, x in tensors.items()}
    safetensors_torch.save_file(tensors, vae_folder / WEIGHTS)
    found = load_params(vae_folder)
    assert {x.dtype for x in found.values()} == {np.dtype("float32")}
    x = tensors["encoder.conv_in.weight"].float().numpy().transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(found["encoder.conv_in.kernel"], x)


# What does not fit


def test_the_first_problems_are_some_of_each_kind():
    expected = {f"a.{i}": np.zeros(2) for i in range(200)} | {"same": np.zeros(2)}
    found = {f"b.{i}": np.zeros(2) for i in range(200)} | {"same": np.zeros(3)}
    said = folders.first_of(folders.differences(expected, found))
    assert said.count("missing a.") == 4 and said.count("unexpected b.") == 3
    assert "same is (3,), should be (2,)" in said and said.endswith("and 393 more")


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_a_prefix_before_all_names_is_named_and_without_it_they_fit(prefix, vae_folder):
    shapes = load_params(vae_folder)
    tensors = load_file(vae_folder / WEIGHTS)
    save_file({f"{prefix}{name}": x for name, x in tensors.items()}, vae_folder / WEIGHTS)
    for part in prefix.removesuffix(".").split("."):
        with pytest.raises(UserError, match=rf"all names there begin with '{part}\.': save them without it"):
            folders.require_same(vae_folder, shapes, load_params(vae_folder))
        bare = {name.removeprefix(f"{part}."): x for name, x in load_file(vae_folder / WEIGHTS).items()}
        save_file(bare, vae_folder / WEIGHTS)
    folders.require_same(vae_folder, shapes, load_params(vae_folder))


def test_what_does_not_fit_under_its_prefix_is_said_too():
    expected = {"a.x": np.zeros(2), "b.y": np.zeros(2)}
    found = {f"module.{name}": x for name, x in {"a.x": np.zeros(2), "b.z": np.zeros(2)}.items()}
    assert folders.differences(expected, found)[1:] == ["missing b.y", "unexpected b.z"]
