"""ConSE (Norouzi et al., arXiv 1312.5650): images and captions in one space, by a classifier and a text encoder.

Where there is no CLIP: a classifier of ImageNet says what an image shows, and a text encoder what that means. It knows
only what ImageNet names. Its figures are "ConSE", never CLIP scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from m2m_jax.core.errors import UserError
from m2m_jax.core.parameters import Params, abstract, merge
from m2m_jax.models.folder import require_same
from m2m_jax.models.text_encoders import encode_text, load_text_encoder, make_text_encoder
from m2m_jax.models.tokenizer import load_tokenizer
from m2m_jax.scoring.efficientnet import EfficientNetEncoder
from m2m_jax.scoring.encoders import FEATURES, LOGITS, SET_ENCODERS, SetEncoder, in_batches

# What a folder holds.
CLASSIFIER, TEXT_ENCODER, CLASSES = "classifier", "text_encoder", "classes.txt"
# Fixed before any use. Of the four settings tried on 33 photographs of animals, the best.
_TOP, _TEMPERATURE = 50, 2.0
_TEMPLATE = "a photo of a {}"
_LENGTH = 64  # tokens of a caption


class SentenceEncoder:
    """Means of a text encoder's states over the tokens, of unit length, as Sentence-Transformers does (MiniLM)."""

    def __init__(self, folder: Path):
        self.config, self.params = load_text_encoder(folder)
        graphdef, shapes = abstract(lambda: make_text_encoder(self.config))
        require_same(folder, shapes, self.params)
        self._tokenizer = load_tokenizer(str(folder), min(_LENGTH, self.config.max_position_embeddings))

        def forward(params: Params, token_ids_bs: jax.Array) -> jax.Array:
            return encode_text(self.config, merge(graphdef, params), token_ids_bs)

        self._forward = jax.jit(forward)

    def __call__(self, captions: Sequence[str]) -> np.ndarray:
        """Return unit vectors [b, c]."""
        token_ids_bs = self._tokenizer(captions)
        longest = int((token_ids_bs != self.config.pad_token_id).sum(1).max(initial=1))
        token_ids_bs = token_ids_bs[:, : -(-longest // 16) * 16]  # few lengths, few programs; nothing sees what is cut
        states_bsc = in_batches(lambda ids: {FEATURES: self._forward(self.params, ids)}, token_ids_bs)[FEATURES]
        sees_bs = token_ids_bs != self.config.pad_token_id
        sums_bc = np.einsum("bsc,bs->bc", states_bsc, sees_bs.astype(np.float32))
        return _unit(sums_bc / np.maximum(sees_bs.sum(1, keepdims=True), 1))


@SET_ENCODERS.register("conse")
class Conse(SetEncoder):
    """Weighted means of the names of an image's likeliest classes, in a text encoder's space.

    An image is the sum over its 50 likeliest classes of softmax(logits / 2) times the unit vector of the class's name,
    less the mean of all names; a caption is its unit vector, less the same mean.
    """

    reads_text = True

    def __init__(self, folder: Path):
        """Make it of a folder that `prepare_conse` wrote: a classifier, a text encoder and the classes' names."""
        self._classifier, self._text = EfficientNetEncoder(folder / CLASSIFIER), SentenceEncoder(folder / TEXT_ENCODER)
        names = read_classes(folder / CLASSES)
        vectors_lc = self._text([_TEMPLATE.format(name) for name in names])
        self._mean_c = vectors_lc.mean(0)
        self._classes_lc = _unit(vectors_lc - self._mean_c)
        super().__init__(
            f"conse-{self._classifier.name}",
            {f"{part}.{name}": x for part, params in self._parts() for name, x in params.items()},
            lambda params, images_bhwc: {},
            self._classifier.size,
            vectors_lc.shape[1],
        )

    def _parts(self) -> tuple[tuple[str, Params], ...]:
        return (CLASSIFIER, self._classifier.params), (TEXT_ENCODER, self._text.params)

    def outputs(self, images_bhwc: np.ndarray) -> dict[str, np.ndarray]:
        """Return features [b, c] of uint8 images."""
        logits_bl = self._classifier.outputs(images_bhwc)[LOGITS]
        weight_bl = np.exp((logits_bl - logits_bl.max(1, keepdims=True)) / _TEMPERATURE)
        top = min(_TOP, weight_bl.shape[1])
        weight_bl[weight_bl < np.partition(weight_bl, -top, axis=1)[:, -top, None]] = 0
        return {FEATURES: _unit(weight_bl @ self._classes_lc)}

    def encode_text(self, captions: Sequence[str]) -> np.ndarray:
        """Return features [b, c] of captions."""
        return _unit(self._text(captions) - self._mean_c)


def read_classes(path: Path) -> list[str]:
    """Return the classes' names, a line each, in the order of the classifier's logits. Raises UserError without."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        remedy = "make it with python -m m2m_jax.data.prepare_conse"
        raise UserError(f"{path} cannot be read ({error}): {remedy}") from error


def _unit(x_bc: np.ndarray) -> np.ndarray:
    return (x_bc / np.maximum(np.linalg.norm(x_bc, axis=1, keepdims=True), 1e-12)).astype(np.float32)
