"""Options of the program that scores sets."""

import dataclasses
from pathlib import Path

from m2m_jax.core.errors import UserError
from m2m_jax.core.options import Options, option

COMPARISONS = ("<", ">")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scoring(Options):
    """Which sets are compared with which, by what.

    Example:
        Scoring(generated="made", real="data:test", given=4, output="scores")
    """

    generated: str = option("What is judged: a folder of m2m_jax.generate, a folder of sets, or DIR:SPLIT.")
    real: str = option("What it is compared with, likewise; sets of the same names are taken for the same sets.")
    given: int = option("Images of each set that were given, the first of it.", low=0)
    output: Path = option("Folder for scores.json and index.html.")
    num_images: int | None = option(
        "Images of each set that are judged; all after the given if not given.", None, low=1
    )
    num_sets: int | None = option("So many sets, the first; all if not given.", None, low=2)
    image_size: int | None = option("Scale all images to so many pixels a side.", None, low=4)
    encoders: tuple[str, ...] = option("Encoders, the first for the headline: NAME or NAME=FOLDER, ...", ("pixels",))
    scores: tuple[str, ...] = option("Scores: NAME or NAME=FOLDER of weights; all that need none if not given.", ())
    training: str | None = option("What the model was trained on, to find copies of: a folder, or DIR:SPLIT.", None)
    features: Path | None = option("Folder in which features are kept; OUTPUT/features if not given.", None)
    draws: int = option("Of the bootstrap over sets, for intervals; 0: none.", 200, low=0)
    allow_few: bool = option("Measure, and mark, also what cannot bear so few sets.", False)
    require: tuple[str, ...] = option("Else the program ends with 3: NAME<NUMBER or NAME>NUMBER, ...", ())

    def __post_init__(self):
        super().__post_init__()
        if self.output.exists() and not self.output.is_dir():
            raise UserError(f"--output={self.output} is a file; name a folder")
        for text in self.require:
            parse_requirement(text)


def parse_requirement(text: str) -> tuple[str, str, float]:
    """Return name, "<" or ">", and number. Raises UserError."""
    for sign in COMPARISONS:
        name, found, number = text.partition(sign)
        try:
            if found and name.strip():
                return name.strip(), sign, float(number)
        except ValueError:
            break
    raise UserError(f"--require={text}: it takes NAME<NUMBER or NAME>NUMBER")
