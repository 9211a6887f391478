"""Generated sets judged against real ones, whoever made them: what `python -m m2m_jax.score` does.

    scores = score_sets(Scoring(generated="made", real="data:test", given=4, output="scores"))
    scores.headline.closeness                     # 0: as sets torn apart, 1: as real sets
    print(scores.table())

Two phases: features of all images, kept on disk; then figures of features (`figures.py`), beside those of `anchors.py`.
Nothing here knows a model.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from m2m_jax.core import disk
from m2m_jax.core.errors import UserError
from m2m_jax.core.paths import expand_home
from m2m_jax.core.printing import say
from m2m_jax.scoring import features as features_module
from m2m_jax.scoring.encoders import FEATURES, LOGITS, SET_ENCODERS, SetEncoder, require_unseen
from m2m_jax.scoring.figures import Figure, measure
from m2m_jax.scoring.metrics import SCORES, Features, Score
from m2m_jax.scoring.options import Scoring, parse_requirement
from m2m_jax.scoring.sets import Sets, open_images, open_sets, pair

_HEADLINES = ("similarity_to_given", "similarity_to_before")  # the first that there is


@dataclasses.dataclass(frozen=True)
class Scores:
    """What was found.

    Attributes:
      options: what was asked.
      made, real, training: the sets that were compared, and single images that the model was trained on.
      paired: whether they are the same sets.
      encoders: that gave features.
      features, pixels: by the first encoder; None where no score needed pixels.
      figures: in the order in which they were measured.
      skipped: {score: what it lacked}.
    """

    options: Scoring
    made: Sets
    real: Sets
    training: Sets | None
    paired: bool
    encoders: list[SetEncoder]
    features: Features
    pixels: Features | None
    figures: list[Figure]
    skipped: dict[str, str]

    @property
    def num_positions(self) -> int:
        return self.made.num_images - self.options.given

    @property
    def headline(self) -> Figure | None:
        """The likeness to the given images, or to those before, by the first encoder."""
        names = [f"{name}/{self.encoders[0].name}" for name in _HEADLINES]
        return next((figure for name in names for figure in self.figures if figure.name == name), None)

    def unmet(self) -> list[str]:
        """Return a line on each requirement that the judged sets do not meet.

        Raises:
          UserError: there is no such figure, or it was not measured.
        """
        values = {figure.name: figure.arms["ours"].mean for figure in self.figures if figure.arms}
        if self.headline and self.headline.closeness is not None:
            values["closeness"] = self.headline.closeness
        lines = []
        for text in self.options.require:
            name, sign, number = parse_requirement(text)
            if name not in values:
                raise UserError(f"--require={text}: no such figure was measured; there are {', '.join(values)}")
            if not (values[name] < number if sign == "<" else values[name] > number):
                lines.append(f"{name} is {values[name]:.4g}, and not {sign} {number:g}")
        return lines

    def as_json(self) -> dict[str, Any]:
        """Return everything as `json` can write it."""
        headline = self.headline
        return {
            "generated": self.made.name,
            "made_by": self.made.made_by,
            "real": self.real.name,
            "same_sets": self.paired,
            "num_sets": len(self.made),
            "given": self.options.given,
            "num_images": self.num_positions,
            "image_size": self.made.image_size,
            "training": self.training.name if self.training else None,
            "encoders": [{"name": one.name, "fingerprint": one.fingerprint} for one in self.encoders],
            "headline": headline and {"figure": headline.name, "closeness": headline.closeness},
            "figures": [figure.as_json() for figure in self.figures],
            "not_measured": self.skipped,
        }


def score_sets(options: Scoring, *, report: Callable[[str], object] = say) -> Scores:
    """Judge sets, and write scores.json and index.html.

    Args:
      report: given a line when images are encoded.

    Raises:
      UserError: the sets cannot be compared so, a name is unknown, or the folder cannot be written.
    """
    encoders = [make_named(SET_ENCODERS.choose, text) for text in options.encoders]
    chosen = {_name(text): make_named(SCORES.choose, text) for text in options.scores or _that_need_no_weights()}
    made, real, paired = _open(options)
    training = open_images(options.training, options.image_size or made.image_size) if options.training else None
    if conditioned_on := made.made_by.get("conditioned_on"):
        for encoder in encoders:
            require_unseen(encoder, {conditioned_on})
    cache = options.features or options.output / "features"
    figures: list[Figure] = []
    skipped: dict[str, str] = {}
    first = of_pixels = None
    for encoder in encoders:
        features, beside = encoded(encoder, made, real, training, options.given, cache, report)
        first = first or features
        for name, score in chosen.items():
            if _needs_pixels(score):
                continue
            if lacking := [field for field in score.needs if not features.has(field)]:
                skipped[f"{name}/{encoder.name}"] = f"needs {', '.join(lacking)}"
                continue
            figures += measure(score, features, beside, draws=options.draws, allow_few=options.allow_few)
    if by_pixels := {name: score for name, score in chosen.items() if _needs_pixels(score)}:
        of_pixels, beside = pixels(made, real, training, options.given)
        for name, score in by_pixels.items():
            if lacking := [field for field in score.needs if not of_pixels.has(field)]:
                skipped[name] = f"needs {', '.join(lacking)}"
                continue
            figures += measure(score, of_pixels, beside, draws=options.draws, allow_few=options.allow_few)
    if not paired:  # of places in other sets
        figures = [figure for figure in figures if "_to_real" not in figure.name]
    assert first is not None
    scores = Scores(options, made, real, training, paired, encoders, first, of_pixels, figures, skipped)
    from m2m_jax.scoring.page import score_page  # which draws; a caller that wants numbers alone need not

    with disk.errors(f"--output={options.output}"):
        options.output.mkdir(parents=True, exist_ok=True)
        disk.write(options.output / "scores.json", f"{json.dumps(scores.as_json(), indent=1)}\n".encode())
        disk.write(options.output / "index.html", score_page(scores).encode())
    return scores


def encoded(
    encoder: SetEncoder,
    made: Sets,
    real: Sets,
    training: Sets | None,
    given: int,
    cache: Path | None = None,
    report: Callable[[str], object] = lambda line: None,
) -> tuple[Features, dict[str, np.ndarray]]:
    """Return the features of sets by one encoder, and what `anchors.arms` wants beside them."""
    of_made, of_real = (features_module.features_of(sets, encoder, cache, report) for sets in (made, real))
    beside = {"given_nmc": of_real[FEATURES][:, :given]}
    if LOGITS in of_made:
        beside |= {"real_nkl": of_real[LOGITS][:, given:], "given_nml": of_made[LOGITS][:, :given]}
    features = Features(
        encoder=encoder.name,
        made_nkc=of_made[FEATURES][:, given:],
        real_nkc=of_real[FEATURES][:, given:],
        given_nmc=of_made[FEATURES][:, :given],
        logits_nkl=of_made[LOGITS][:, given:] if LOGITS in of_made else None,
        text_nc=encoder.encode_text(made.captions) if encoder.reads_text and all(made.captions) else None,
        training_tc=features_module.features_of(training, encoder, cache, report)[FEATURES][:, 0] if training else None,
    )
    return features, beside


def pixels(made: Sets, real: Sets, training: Sets | None, given: int) -> tuple[Features, dict[str, np.ndarray]]:
    """Return the pixels of sets, as `encoded`. They are held in memory."""
    of_made, of_real = (np.stack([sets.images(i) for i in range(len(sets))]) for sets in (made, real))
    features = Features(
        made_nkhwc=of_made[:, given:],
        real_nkhwc=of_real[:, given:],
        given_nmhwc=of_made[:, :given],
        training_thwc=np.concatenate([training.images(i) for i in range(len(training))]) if training else None,
    )
    return features, {"given_nmhwc": of_real[:, :given]}


def _open(options: Scoring) -> tuple[Sets, Sets, bool]:
    total = options.num_images and options.given + options.num_images
    made = open_sets(options.generated, total, options.image_size)
    if made.num_images <= options.given:
        raise UserError(
            f"{options.generated}: sets of {made.num_images} images leave none to judge beside --given={options.given}"
        )
    real = open_sets(options.real, made.num_images, options.image_size)
    made, real, paired = pair(made, real)
    if options.num_sets:
        if options.num_sets > len(made):
            raise UserError(f"--num_sets={options.num_sets}: there are {len(made)} sets to compare")
        made, real = made.choose(range(options.num_sets)), real.choose(range(options.num_sets))
    if len(made) < 2:
        raise UserError(
            f"{options.generated} and {options.real} have {len(made)} sets to compare; two at least are needed"
        )
    return made, real, paired


def _needs_pixels(score: Score) -> bool:
    return any(name.endswith("hwc") for name in score.needs)


def _that_need_no_weights() -> Iterable[str]:
    return [name for name, score in SCORES.items() if not score.weights]


def _name(text: str) -> str:
    return text.partition("=")[0]


def make_named(choose: Callable[[str], Any], text: str) -> Any:
    """Make what NAME or NAME=FOLDER names."""
    name, _, folder = text.partition("=")
    kind = choose(name)
    if folder and not expand_home(folder).is_dir():
        raise UserError(f"{text}: no such folder")
    takes_none = inspect.signature(kind).parameters["folder"].default is None and not getattr(kind, "weights", "")
    if not (folder or takes_none):
        raise UserError(f"{name} needs a folder of weights: {name}=FOLDER; docs/scores.md says which program makes one")
    return kind(expand_home(folder) if folder else None)
