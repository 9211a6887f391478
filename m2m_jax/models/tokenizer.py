"""Captions to token ids. A tokenizer is its JSON text, as the library `tokenizers` writes it, length included."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers

from m2m_jax.core.errors import UserError


class Tokenizer:
    """Rows of as many ids as the tokenizer was made for; shorter captions are filled up, longer ones cut."""

    def __init__(self, text: str):
        """Raise UserError where `text` is no tokenizer, or one that does not fill up and cut."""
        self.text = text
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
            padding, truncation = self._tokenizer.padding or {}, self._tokenizer.truncation or {}
            self.length = int(padding["length"])
            if not 0 < self.length == truncation["max_length"]:
                raise ValueError("it fills up to another length than it cuts to")
        except Exception as error:  # the library raises Exception itself
            raise UserError(f"not a tokenizer of this project: {' '.join(str(error).split())[:200]}") from error

    def __call__(self, captions: Sequence[str]) -> np.ndarray:
        """Return ids int32 [captions, length]."""
        encodings = self._tokenizer.encode_batch_fast(list(captions))
        return np.array([encoding.ids for encoding in encodings], np.int32).reshape(len(captions), self.length)


@functools.cache
def load_tokenizer(folder: str, length: int) -> Tokenizer:
    """Read a tokenizer in a folder of transformers, or in `tokenizer` beside it, as in a pipeline: `length` ids a row.

    Raises UserError where the folder has none, or one that is slow (in Python) or has no token to fill up with.
    """
    places = (Path(folder), Path(folder) / ".." / "tokenizer")
    files = [place / name for place in places for name in ("tokenizer.json", "vocab.json", "vocab.txt")]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise UserError(f"{folder} holds no tokenizer: neither tokenizer.json nor vocab.json nor vocab.txt")
    folder = str(file.parent)
    from transformers import AutoTokenizer  # it takes a second, and only text needs it

    try:
        found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        tokenizer = found.backend_tokenizer
    except Exception as error:  # of JSON, of the library in Rust, of transformers
        raise UserError(f"{folder}: its tokenizer cannot be read ({' '.join(str(error).split())[:300]})") from error
    if found.pad_token is None:
        raise UserError(f"{folder}: its tokenizer has no token to fill up short captions with (pad_token)")
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=found.pad_token_id, pad_token=found.pad_token)
    return Tokenizer(json.dumps(json.loads(tokenizer.to_str()), sort_keys=True, ensure_ascii=False))
