"""Which captions image sets are made from."""

from __future__ import annotations

import dataclasses
import functools
import unicodedata

from m2m_jax.core.errors import UserError
from m2m_jax.core.options import Options, option


@dataclasses.dataclass(frozen=True)
class CaptionRules(Options):
    """Which captions are used. Spaces count as one, and not at the ends; empty captions are always dropped.

    Example:
        CaptionRules(max_words=3).broken_by("a cat on a mat")  # "max_words"
    """

    drop_duplicates: bool = option(
        "Keep the first of captions that are alike but for case, spaces and the forms of characters that Unicode calls "
        "compatible (NFKC).",
        True,
    )
    min_characters: int = option("Of a caption.", 1, low=1)
    max_characters: int = option("Of a caption. CLIP's text encoder reads 77 tokens, some 300 characters.", 1000)
    min_words: int = option("Of a caption: what spaces divide. A caption in Chinese is one word.", 1, low=1)
    max_words: int = option("Of a caption.", 256)
    min_latin_share: float = option(
        "Of a caption's letters, those of the Latin script; 0: any script. It is no recognition of language: French "
        'passes, and "café" is all Latin. A caption without letters has a share of 0.',
        0.0,
        low=0.0,
        high=1.0,
    )

    def __post_init__(self):
        super().__post_init__()
        for what in ("characters", "words"):
            least, most = getattr(self, f"min_{what}"), getattr(self, f"max_{what}")
            if least > most:
                raise UserError(f"--min_{what}={least} is more than --max_{what}={most}")

    def broken_by(self, caption: str) -> str | None:
        """Return the name of the rule that a caption breaks, "empty", or None.

        Duplicates are `clean_captions`' to find.
        """
        if not caption:
            return "empty"
        if len(caption) < self.min_characters:
            return "min_characters"
        if len(caption) > self.max_characters:
            return "max_characters"
        words = caption.count(" ") + 1
        if words < self.min_words:
            return "min_words"
        if words > self.max_words:
            return "max_words"
        if self.min_latin_share and latin_share(caption) < self.min_latin_share:
            return "min_latin_share"
        return None


def latin_share(text: str) -> float:
    """Return which share of the letters of a text is of the Latin script; 0 without letters."""
    if text.isascii():
        return float(text.lower() != text.upper())
    latin = sum(map(_is_latin, text))
    letters = sum(map(str.isalpha, text))
    return latin / letters if letters else 0.0


@functools.cache
def _is_latin(character: str) -> bool:
    # NFKC: full-width forms are Latin letters, too.
    return character.isalpha() and "LATIN " in unicodedata.name(unicodedata.normalize("NFKC", character)[0], "")
