"""Whose drawings there are: hands, the families that they drew, and every subject's picture in each.

A *hand* is who drew; a *family* is one set of drawings. Most hands drew one family; Microsoft's two share their
drawings, shaded and flat, and are one hand. Families come from npm's `@iconify-json/*` packages or, three of them, from
Python packages that `requirements.txt` installs, so that there is something to draw without npm.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from m2m_jax.data.drawing import draw_all
from m2m_jax.data.emoji import artwork, iconify
from m2m_jax.data.emoji.table import TableSubject

# Hand -> its families.
HANDS = {
    "noto": ("noto",),
    "noto-v1": ("noto-v1",),
    "twemoji": ("twemoji",),
    "openmoji": ("openmoji",),
    "emojione": ("emojione",),
    "fxemoji": ("fxemoji",),
    "fluent": ("fluent-emoji", "fluent-emoji-flat"),
    "noto-mono": ("noto-mono",),
    "emojione-v1": ("emojione-v1",),
    "streamline": ("streamline-emojis",),
}
# No training of anything sees these. emojione-v1 is painted where its successor, which trains, is flat: a new style
# near to a known one. Streamline's shares publisher, drawings and manner with no other hand: a new style far from all;
# and of all families it is the smallest, so that holding it out costs the least.
UNSEEN_HANDS = ("emojione-v1", "streamline")
# Families that Python packages hold, and the style of `artwork.draw` that each is.
PYPI_STYLES = {"twemoji": "twemoji", "openmoji": "openmoji", "noto-mono": "noto-regular"}

Draw = Callable[[TableSubject, int], np.ndarray | None]


def hand_of(family: str) -> str:
    """Name the hand that drew a family."""
    return next(hand for hand, families in HANDS.items() if family in families)


def drawable_families(folder: str | Path) -> list[str]:
    """List the families that can be drawn with the npm packages in a folder, in the order of `HANDS`."""
    there = {*iconify.families_in(folder), *PYPI_STYLES}
    return [family for families in HANDS.values() for family in families if family in there]


def family_artist(folder: str | Path, family: str) -> Draw:
    """Return what draws a subject in a family: (subject, size) -> uint8 RGBA [size, size, 4], or None.

    folder: of npm packages; where the family's is not in it, the family's Python package is used.
    Raises UserError where neither is there.
    """
    if family not in iconify.families_in(folder) and family in PYPI_STYLES:
        return functools.partial(_draw_by_codepoints, PYPI_STYLES[family])
    return functools.partial(_draw_by_name, iconify.load_family(str(folder), family))


def draw_pictures(
    folder: str | Path,
    families: Sequence[str],
    subjects: Sequence[TableSubject],
    size: int,
    report: Callable[[int, int], None] | None = None,
) -> dict[tuple[str, str], np.ndarray]:
    """Draw subjects in families: (family, subject's name) -> uint8 RGBA [size, size, 4]. report: as of `draw_all`."""
    artists = {family: family_artist(folder, family) for family in families}
    jobs = [(family, subject) for family in families for subject in subjects]
    drawn = draw_all(jobs, lambda job: artists[job[0]](job[1], size), lambda pixels: pixels, report)
    return {(family, subject.name): pixels for (family, subject), pixels in drawn.items()}


def _draw_by_name(family: iconify.Family, subject: TableSubject, size: int) -> np.ndarray | None:
    pictures = (family.draw(name, size) for name in subject.names)
    return next((picture for picture in pictures if picture is not None), None)


def _draw_by_codepoints(style: str, subject: TableSubject, size: int) -> np.ndarray | None:
    return artwork.draw(subject.codepoints, style, size) if subject.codepoints else None
