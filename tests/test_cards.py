"""The data set of playing cards, on decks that are drawn here."""

import gzip
import itertools

import numpy as np
import pytest

from m2m_jax.core.errors import UserError
from m2m_jax.core.images import decode_image
from m2m_jax.data import cards
from m2m_jax.data.preparing import prepare
from m2m_jax.data.sources.cards import CardsSource

SIZE, CELL = 16, (20, 30)  # pixels of an image, units of a card in an SVG
NUM_DECKS = 12


def write_deck(folder, name, seed, colour="black"):
    """A deck of random blots, which depend on the seed and the card."""
    rng = np.random.default_rng(seed)
    width, height = CELL
    shapes = []
    for row, column in itertools.product(range(cards.ROWS), range(len(cards.RANKS))):
        for x, y in rng.uniform(0.1, 0.9, (4, 2)):
            at = (column + x) * width, (row + y) * height
            shapes.append(f'<circle cx="{at[0]}" cy="{at[1]}" r="2.5" fill="{colour}"/>')
    size = f'width="{13 * width}" height="{cards.ROWS * height}"'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" {size}><rect {size} fill="white"/>{"".join(shapes)}</svg>'
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.svgz").write_bytes(gzip.compress(svg.encode()))


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """Twelve decks, and one of them again in another colour."""
    root = tmp_path_factory.mktemp("packages")
    folder = root / "usr" / "share" / "aisleriot" / "cards"
    for number in range(NUM_DECKS):
        write_deck(folder, f"deck{number}", number)
    write_deck(folder, "deck0red", 0, "#500000")
    return str(root)


@pytest.fixture(scope="module")
def records(tmp_path_factory, packages):
    """{split: records}."""
    directory = str(tmp_path_factory.mktemp("data"))
    prepare("cards", SIZE, directory, packages, verbose=False)
    sources = {split: CardsSource.open_split(directory, SIZE, split, strict=True) for split in cards.SPLITS}
    return {split: [source[i] for i in range(len(source.kinds))] for split, source in sources.items()}


def _tags(records):
    """(card, deck) of every image."""
    captions = [caption.split(", ") for record in records for caption in record.image_captions]
    return {(card, deck) for card, _, deck in captions}


def test_decks_and_cards_are_held_out_each_and_both(records):
    tags = {split: _tags(made) for split, made in records.items()}
    decks = {split: {deck for _, deck in found} for split, found in tags.items()}
    subjects = {split: {card for card, _ in found} for split, found in tags.items()}
    assert decks["train"] == decks["test_cards"] and decks["test"] == decks["test_decks"]
    assert subjects["train"] == subjects["test_decks"] and subjects["test"] == subjects["test_cards"]
    assert not decks["train"] & decks["test"] and not subjects["train"] & subjects["test"]
    assert len(decks["train"] | decks["test"]) == NUM_DECKS + 1
    assert len(subjects["train"] | subjects["test"]) == 52


def test_a_deck_in_other_colours_is_the_same_style(packages):
    drawn = {file.stem: cards.draw_deck(file, SIZE) for file in cards.deck_files(packages)}
    splits = cards.split_decks(drawn)
    assert splits["deck0"] == splits["deck0red"]
    assert len(set(splits.values())) > 1  # of twelve others some are held out


def test_sets_are_of_one_deck_or_of_one_card(records):
    for record in itertools.chain.from_iterable(records.values()):
        found = _tags([record])
        assert 4 <= len(record.images) <= 25
        assert len({deck for _, deck in found} if record.kind == "style" else {card for card, _ in found}) == 1
        assert len(set(record.images)) == len(record.images)


def test_cards_are_cut_where_they_are(packages, records):
    """The blots of a card are in its image, as they stand in the file."""
    record = next(record for record in records["train"] if record.kind == "style")
    card, _, deck = record.image_captions[0].split(", ")
    number = cards.CARDS.index(card)
    rng = np.random.default_rng(int(deck.removeprefix("deck").removesuffix("red")))
    blots = rng.uniform(0.1, 0.9, (cards.ROWS * 13, 4, 2))[number]
    image = np.asarray(decode_image(record.images[0], "card").convert("RGBA"))
    columns = round(SIZE * CELL[0] / CELL[1])
    left = (SIZE - columns) // 2
    for x, y in blots:
        assert image[int(y * SIZE), left + int(x * columns), :3].mean() < 160
    assert not image[:, :left, 3].any() and image[:, left : left + columns, 3].min() > 250


def test_without_the_package_the_remedy_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no playing cards in .*make debian-cards"):
        prepare("cards", SIZE, str(tmp_path / "data"), str(tmp_path), verbose=False)


def test_a_file_of_another_shape_is_no_deck(tmp_path):
    (tmp_path / "wide.svgz").write_bytes(
        gzip.compress(
            b'<svg xmlns="http://www.w3.org/2000/svg" width="900" height="20"><rect width="5" height="5"/></svg>'
        )
    )
    with pytest.raises(UserError, match=r"wide\.svgz is .* no sheet of 13 x 5 cards"):
        cards.draw_deck(tmp_path / "wide.svgz", SIZE)
