"""Playing cards: image sets of thirty decks of 52 cards, as a TFDS builder. Style and content are known exactly.

Decks are those of Debian's package `gnome-cards-data`: SVG files of 13 x 5 cells, ranks from ace to king in columns,
suits in rows. Records as in `records.py`; images are RGBA PNG, a card as high as the image, on a transparent ground.

- "style": one deck, up to 25 cards;
- "content": one card in up to 25 decks.

A set has 4 to 25 images, no two of them copies of each other by `likeness.py`. Decks that share a quarter of their
drawings are one style in a split. Decks and cards are held out, and both at once:

| split      | decks    | cards    |
|------------|----------|----------|
| train      | train    | train    |
| test_cards | train    | held out |
| test_decks | held out | train    |
| test       | held out | held out |
"""

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from m2m_jax.core.errors import UserError
from m2m_jax.core.images import on_white
from m2m_jax.data import records
from m2m_jax.data.drawing import render_file
from m2m_jax.data.likeness import COPY, shapes
from m2m_jax.data.set_builder import SetBuilder, deal, different, make_record, png, style_caption
from m2m_jax.data.splits import TRAIN, connected_components, split_by_component

RANKS = ("ace", "2", "3", "4", "5", "6", "7", "8", "9", "10", "jack", "queen", "king")
SUITS = ("clubs", "diamonds", "hearts", "spades")
CARDS = tuple(f"{rank} of {suit}" for suit in SUITS for rank in RANKS)
ROWS = 5  # the fifth has jokers and backs
SAME_DECK = 0.25  # share of cards that are copies, from which two decks are one style
HELD_OUT = {"decks": 0.125, "cards": 0.1}  # twice this share, for here one test split has what two have elsewhere
# Split -> whether its decks and its cards are held out.
SPLITS = {"train": (False, False), "test_cards": (False, True), "test_decks": (True, False), "test": (True, True)}

Decks = Mapping[str, np.ndarray]  # name -> uint8 RGBA [52, size, size, 4], in the order of CARDS


class Cards(SetBuilder):
    """Build the data set of playing cards: `Cards.at(64, "data")`."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "gnome-cards-data 1:3.22.23-1."}
    licenses = "GPL-3+ and LGPL-3+"
    license_file = "cards_licenses.md"
    packages = "data/debian"

    def make_sets(self) -> tuple[dict[str, list[records.ImageSetRecord]], dict[str, Any]]:
        files = deck_files(self.packages)
        decks = {}
        for done, file in enumerate(files, start=1):
            decks[file.stem] = draw_deck(file, self.image_size)
            if self.report_progress:
                self.report_progress(len(CARDS) * done, len(CARDS) * len(files))
        of_deck, of_card = split_decks(decks), split_cards()
        return {split: list(build_sets(split, decks, of_deck, of_card)) for split in SPLITS}, {"decks": of_deck}


def deck_files(packages: str | Path) -> list[Path]:
    """List the decks in a folder that holds the unpacked package. Raises UserError where there are none."""
    files = sorted(Path(packages).rglob("usr/share/aisleriot/cards/*.svgz"))
    if not files:
        raise UserError(f"no playing cards in {packages}: fetch them with make debian-cards")
    return files


def draw_deck(file: Path, size: int) -> np.ndarray:
    """Draw the 52 cards of a file: uint8 RGBA [52, size, size, 4]. Raises UserError for a file that is no deck."""
    # At twice the size: columns need not begin at whole pixels.
    sheet = Image.fromarray(render_file(file, height=2 * size * ROWS))
    height, width = 2 * size, sheet.width / len(RANKS)
    if not 0.3 * height < width <= height:
        raise UserError(f"{file} is {sheet.width} x {sheet.height} pixels: no sheet of {len(RANKS)} x {ROWS} cards")
    columns = round(width / 2)
    cards = np.zeros((len(CARDS), size, size, 4), np.uint8)
    left = (size - columns) // 2
    for i, (row, column) in enumerate(itertools.product(range(len(SUITS)), range(len(RANKS)))):
        box = (column * width, row * height, (column + 1) * width, (row + 1) * height)
        card = sheet.resize((columns, size), Image.Resampling.LANCZOS, box=box)
        cards[i, :, left : left + columns] = np.asarray(card)
    return cards


def split_decks(decks: Decks) -> dict[str, str]:
    """Split decks, so that those that share many drawings stay together: {name: "train", "validation" or "test"}."""
    shapes_of = {name: shapes(on_white(cards)) for name, cards in decks.items()}

    def shared(one: str, other: str) -> float:
        return float(np.mean(np.sum(shapes_of[one] * shapes_of[other], axis=1) > COPY))

    links = [pair for pair in itertools.combinations(decks, 2) if shared(*pair) >= SAME_DECK]
    return split_by_component(connected_components(decks, links), held_out_share=HELD_OUT["decks"])


def split_cards() -> dict[str, str]:
    """Split cards: {"ace of clubs": "train", "validation" or "test"}."""
    return split_by_component({card: card for card in CARDS}, held_out_share=HELD_OUT["cards"])


def build_sets(
    split: str, decks: Decks, of_deck: Mapping[str, str], of_card: Mapping[str, str]
) -> Iterator[records.ImageSetRecord]:
    """Yield all sets of a split: style rows, then content rows."""
    names = [name for name in decks if (of_deck[name] != TRAIN) == SPLITS[split][0]]
    numbers = [i for i, card in enumerate(CARDS) if (of_card[card] != TRAIN) == SPLITS[split][1]]
    rows = [("style", name, [(name, i) for i in numbers]) for name in names]
    rows += [("content", CARDS[i], [(name, i) for name in names]) for i in numbers]
    for kind, subject, row in rows:
        for number, part in enumerate(deal(different(row, (decks[name][i] for name, i in row)))):
            cards = [CARDS[i] for _, i in part]
            caption = style_caption("playing cards", subject, cards) if kind == "style" else subject
            captions = (f"{CARDS[i]}, playing cards, {name}" for name, i in part)
            images = (png(decks[name][i]) for name, i in part)
            yield make_record(f"{kind}/{split}/{subject}/{number}", kind, caption, images, captions)
