"""Read and write `subjects.tsv`: the subjects of all emoji families, with the split that each belongs to.

The file is committed, so that a subject keeps its name and its split whatever families are installed. The program
`m2m_jax.data.emoji_splits` makes it again.
"""

import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path

from m2m_jax.core import disk
from m2m_jax.core.errors import UserError
from m2m_jax.data.emoji.naming import NamedSubject
from m2m_jax.data.splits import SPLITS

FILE = Path(__file__).with_name("subjects.tsv")
_HEADER = ("name", "other names", "codepoints", "category", "group", "component", "split")


@dataclasses.dataclass(frozen=True)
class TableSubject:
    """One line of the table; see `naming.NamedSubject`. component: all that must share its split, by one's name."""

    name: str
    others: tuple[str, ...]
    codepoints: tuple[int, ...]
    category: str
    group: str
    component: str
    split: str

    @property
    def names(self) -> tuple[str, ...]:
        """All names that an icon of it may have."""
        return (self.name, *self.others)

    @property
    def caption(self) -> str:
        """The name as words."""
        return self.name.replace("-", " ")


@functools.cache
def load_table(path: Path = FILE) -> tuple[TableSubject, ...]:
    """Read the table. Raises UserError where it is damaged."""
    try:
        header, *lines = path.read_text(encoding="utf-8").splitlines()
        if tuple(header.split("\t")) != _HEADER:
            raise ValueError("another header")
        subjects = []
        for line in lines:
            name, others, codepoints, category, group, component, split = line.split("\t")
            if split not in SPLITS:
                raise ValueError(f"split {split!r}")
            points = tuple(int(point, 16) for point in codepoints.split("-")) if codepoints else ()
            subjects.append(TableSubject(name, tuple(others.split()), points, category, group, component, split))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): python -m m2m_jax.data.emoji_splits makes it again") from error
    return tuple(subjects)


def write_table(
    subjects: Iterable[NamedSubject], components: dict[str, str], splits: dict[str, str], path: Path = FILE
) -> None:
    """Write the table, a line a subject."""
    lines = ["\t".join(_HEADER)]
    for one in subjects:
        points = "-".join(f"{point:x}" for point in one.codepoints)
        fields = (
            one.name,
            " ".join(one.others),
            points,
            one.category,
            one.group,
            components[one.name],
            splits[one.name],
        )
        lines.append("\t".join(fields))
    disk.write(path, ("\n".join(lines) + "\n").encode())
