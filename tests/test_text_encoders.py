"""A text encoder of one's own: registered, read from a folder, run, and described in a checkpoint."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from run_fixtures import make_autoencoder

from m2m_jax.configuration import default_config
from m2m_jax.core.errors import UserError
from m2m_jax.models.frozen import TEXT_ENCODER, FrozenModels
from m2m_jax.models.text_encoders import TEXT_ENCODERS, TextEncoder, load_text_encoder


@dataclasses.dataclass(frozen=True)
class TableConfig:
    vocab_size: int = 5
    hidden_size: int = 3


class Table(nnx.Module):
    """A token is its row of a table."""

    def __init__(self, config: TableConfig, *, rngs: nnx.Rngs):
        self.rows = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs)

    def __call__(self, token_ids_bs):
        return self.rows(token_ids_bs)


ROWS = np.arange(15, dtype=np.float32).reshape(5, 3)


@pytest.fixture
def table_folder(tmp_path, monkeypatch):
    kind = TextEncoder(TableConfig, Table, lambda folder: TableConfig(), lambda folder: {"rows.embedding": ROWS})
    monkeypatch.setattr(TEXT_ENCODERS, "_registered", dict(TEXT_ENCODERS))
    TEXT_ENCODERS.register("table")(kind)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "table"}))
    yield tmp_path
    TEXT_ENCODERS._by.pop("table")


def test_a_registered_encoder_is_read_run_and_described(table_folder):
    config = default_config()
    config.autoencoder.path = str(make_autoencoder(table_folder / "vae"))
    config.text_encoder.path = str(table_folder)
    models, params = FrozenModels.load(config)
    token_ids_bs = jnp.array([[4, 0], [1, 1]], jnp.int32)
    np.testing.assert_array_equal(models.encode_text(params, token_ids_bs), ROWS[token_ids_bs])
    assert models.text_encoder == TableConfig() and list(params[TEXT_ENCODER]) == ["rows.embedding"]
    assert FrozenModels.from_metadata(json.loads(json.dumps(models.metadata))) == models


def test_a_folder_of_no_registered_encoder_is_refused(table_folder):
    (table_folder / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(UserError, match="describes a t5; text encoders are clip_text_model and bert and table"):
        load_text_encoder(table_folder)
