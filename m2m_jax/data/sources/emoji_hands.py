"""The emoji data set of many hands as a source: `data.name=emoji_hands`. `data/emoji/hands_builder.py` makes it."""

from __future__ import annotations

from typing import Any

from m2m_jax.data.source import SOURCES
from m2m_jax.data.sources.emoji import PreparedSource


@SOURCES.register("emoji_hands")
class EmojiHandsSource(PreparedSource):
    """Emoji drawn by ten hands, two of which never train, from m2m_jax.data.prepare --name=emoji_hands."""

    folder = "emoji_hands"

    @classmethod
    def make_builder(cls, image_size: int, directory: str) -> Any:
        from m2m_jax.data.emoji.hands_builder import EmojiHands

        return EmojiHands.at(image_size, directory)
