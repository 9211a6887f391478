"""CLIP's text encoder against transformers at random weights, through the folders that both read, and those folders."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from parity_fixtures import assert_same_params, change_config, random_model, record, require_equal, torch_record
from safetensors.numpy import load_file, save_file

from m2m_jax.core.errors import UserError
from m2m_jax.core.parameters import merge
from m2m_jax.models import clip_text
from m2m_jax.models.clip_text import CLIPTextConfig, CLIPTextEncoder
from m2m_jax.models.folder import require_same
from m2m_jax.models.transformers_folder import TRANSFORMERS, load_clip_text_config, load_params, save_clip_text

WEIGHTS = TRANSFORMERS.weights
TINY = CLIPTextConfig(
    vocab_size=50,
    hidden_size=12,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=3,
    max_position_embeddings=9,
)
# (config, tokens of a text).
ENCODERS = {
    "as Stable Diffusion 2.x: gelu, end of text by the highest id": (TINY, 9),
    "as Stable Diffusion 1.x: quick_gelu, more layers": (
        dataclasses.replace(TINY, hidden_act="quick_gelu", num_hidden_layers=3, num_attention_heads=1),
        *(9,),
    ),
    "end of text by its id, shorter text": (dataclasses.replace(TINY, eos_token_id=41, num_attention_heads=6), 5),
    "other widths and epsilon, one token": (
        dataclasses.replace(
            TINY,
            vocab_size=43,
            hidden_size=35,
            intermediate_size=17,
            num_hidden_layers=1,
            num_attention_heads=5,
            layer_norm_eps=1e-3,
            eos_token_id=42,
        ),
        *(1,),
    ),
}
RECORDED = (nnx.LayerNorm, clip_text.Embeddings, clip_text.Attention, clip_text.MLP, clip_text.Layer)


def texts(config, length: int) -> np.ndarray:
    """[4, length] ids: the end of text (41 or the highest id) once, twice, nowhere, at the start."""
    ids_bs = np.random.default_rng(1).integers(3, 40, (4, length), np.int32)
    end = config.eos_token_id if config.eos_token_id != clip_text.WRONG_EOS else config.vocab_size - 1
    ids_bs[0, length // 2] = end
    ids_bs[1, length // 3 :: 2] = end
    ids_bs[3, 0] = end
    return ids_bs


def call(encoder, ids_bs):
    states_bsc, pooled_bc = encoder(ids_bs)
    return {"states": states_bsc, "pooled": pooled_bc}


# --- Parity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ENCODERS)
def test_text_encoder_has_parity_with_transformers(transformers, case, tmp_path):
    import torch

    config, length = ENCODERS[case]
    graphdef, params = random_model(CLIPTextEncoder, config)
    ids_bs = texts(config, length)
    ours = record(graphdef, params, RECORDED, call, ids_bs)

    save_clip_text(tmp_path, config, params)
    reference, report = transformers.CLIPTextModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report

    def torch_call(model):
        out = model(torch.from_numpy(ids_bs).long())
        return {"states": out.last_hidden_state, "pooled": out.pooler_output}

    require_equal(ours, torch_record(reference.eval(), ours, torch_call))


def test_folders_of_transformers_are_read_at_parity(transformers, tmp_path):
    """As transformers 5 writes them, in one file or several, and as transformers 4 did, with what else is in there."""
    config, _ = ENCODERS["end of text by its id, shorter text"]
    _, params = random_model(CLIPTextEncoder, config)
    save_clip_text(tmp_path / "ours", config, params)
    model = transformers.CLIPTextModel.from_pretrained(tmp_path / "ours")
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="5KB")
    assert (tmp_path / "sharded" / f"{WEIGHTS}.index.json").exists()
    transformers.CLIPTextModelWithProjection.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "old")
    old = load_file(tmp_path / "old" / WEIGHTS)
    assert "text_projection.weight" in old
    old["text_model.embeddings.position_ids"] = np.arange(9)[None]
    save_file(old, tmp_path / "old" / WEIGHTS)
    for name in ("whole", "sharded", "old"):
        assert load_clip_text_config(tmp_path / name) == config
        assert_same_params(load_params(tmp_path / name), params)


def test_fields_that_a_config_lacks_have_the_values_of_transformers_parity(transformers, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "clip_text_model"}')
    found, expected = load_clip_text_config(tmp_path), transformers.CLIPTextConfig()
    assert dataclasses.asdict(found) == {name: getattr(expected, name) for name in dataclasses.asdict(found)}


# --- Behaviour ------------------------------------------------------------------------------------------------------


def test_states_do_not_see_what_follows():
    graphdef, params = random_model(CLIPTextEncoder, TINY)
    ids_bs = texts(TINY, 9)
    changed_bs = np.where(np.arange(9) < 5, ids_bs, (ids_bs + 1) % 50)
    run = jax.jit(lambda ids_bs: merge(graphdef, params)(ids_bs)[0])
    same, other = run(ids_bs), run(changed_bs)
    np.testing.assert_array_equal(same[:, :5], other[:, :5])
    assert np.all(np.any(same[:, 5:] != other[:, 5:], axis=-1))


def test_longer_text_than_there_are_positions_is_refused():
    graphdef, params = random_model(CLIPTextEncoder, TINY)
    with pytest.raises(UserError, match="text of 10 tokens: this encoder has 9 positions"):
        merge(graphdef, params)(np.zeros((1, 10), np.int32))


# --- Folders --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    save_clip_text(tmp_path, TINY, random_model(CLIPTextEncoder, TINY)[1])
    return tmp_path


@pytest.mark.parametrize("case", ENCODERS)
def test_what_is_saved_is_loaded(case, tmp_path):
    config, _ = ENCODERS[case]
    _, params = random_model(CLIPTextEncoder, config)
    save_clip_text(tmp_path, config, params)
    assert_same_params(load_params(tmp_path), params)
    assert load_clip_text_config(tmp_path) == config
    assert load_clip_text_config(tmp_path, num_hidden_layers=1).num_hidden_layers == 1


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "clip"}, "describes a clip, not a clip_text_model"),
        ({"model_type": None}, "describes a None, not a clip_text_model"),
        ({"hidden_act": "relu"}, "hidden_act must be one of gelu, quick_gelu, not 'relu'"),
        ({"eos_token_id": [2, 3]}, r"eos_token_id is \[2, 3\]; it takes a whole number"),
        ({"num_attention_heads": 5}, "hidden_size=12 must be a multiple of num_attention_heads=5"),
    ],
)
def test_a_config_of_another_model_is_refused(fields, words, folder):
    change_config(folder, **fields)
    with pytest.raises(UserError, match=words):
        load_clip_text_config(folder)


def test_pickled_weights_are_refused(folder):
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is pickled and is not opened.*load it with transformers"):
        load_params(folder)


def test_parameters_that_do_not_fit_are_listed(folder):
    _, expected = random_model(CLIPTextEncoder, TINY)
    tensors = load_file(folder / WEIGHTS)
    tensors["text_model.more.weight"] = tensors.pop("text_model.final_layer_norm.bias")
    tensors["text_model.final_layer_norm.weight"] = np.ones(3, np.float32)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(UserError) as error:
        require_same(folder, expected, load_params(folder))
    assert str(error.value) == (
        f"{folder} does not hold this model: missing final_layer_norm.bias; unexpected more.scale; "
        "final_layer_norm.scale is (3,), should be (12,)"
    )
