"""Playing cards as a source: `data.name=cards`. `data/cards.py` makes them."""

from __future__ import annotations

from typing import Any

from m2m_jax.data.source import SOURCES
from m2m_jax.data.sources.emoji import PreparedSource


@SOURCES.register("cards")
class CardsSource(PreparedSource):
    """Playing cards of thirty decks, from m2m_jax.data.prepare --name=cards."""

    folder = "cards"

    @classmethod
    def make_builder(cls, image_size: int, directory: str) -> Any:
        from m2m_jax.data.cards import Cards

        return Cards.at(image_size, directory)
