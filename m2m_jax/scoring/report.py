"""Scores for a terminal: a table of all figures, and what stands above it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from m2m_jax.scoring.anchors import ARMS
from m2m_jax.scoring.figures import Arm, Figure

if TYPE_CHECKING:
    from m2m_jax.scoring.judging import Scores

ARROWS = {"lower": "↓", "higher": "↑", "as real": "≈"}
MARK = "†"  # of what was measured with too few sets


def table(scores: Scores) -> str:
    """Return the table, and a line on each thing that it cannot show."""
    heads = ("figure", "N", *ARMS, "closeness")
    rows = [cells(figure) for figure in scores.figures]
    widths = [max(map(len, column)) for column in zip(heads, *rows)]
    lines = [about(scores), headline(scores), ""]
    for row in (heads, *rows):
        aligned = (
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))
        )
        lines.append("  ".join(aligned).rstrip())
    return "\n".join([*lines, "", *notes(scores)])


def about(scores: Scores) -> str:
    """Return a line on what is compared."""
    same = "the same sets" if scores.paired else "other sets"
    return (
        f"{len(scores.made)} sets of {scores.made.name}, {scores.options.given} images given and "
        f"{scores.num_positions} judged of each, beside {same} of {scores.real.name}; {scores.made.image_size} px"
    )


def headline(scores: Scores) -> str:
    """Return the one figure, and what it means."""
    figure = scores.headline
    if figure is None or not figure.arms:
        return "closeness: none, for nothing is given that images could be like"
    if figure.closeness is None:
        return f"closeness: none, for {figure.name} hardly tells real sets from shuffled ones here"
    half_width = figure.closeness_half_width
    margin = f" ± {half_width:.3f}" if half_width is not None else ""
    formula = "(shuffled - ours) / (shuffled - real); 1 is as real"
    return f"closeness {figure.closeness:.3f}{margin} of {figure.name}: {formula}"


def cells(figure: Figure) -> tuple[str, ...]:
    """Return a row of a table: name, N, each arm, closeness."""
    name = f"{figure.name} {ARROWS[figure.better]}{f' {MARK}' if figure.too_few and figure.arms else ''}"
    if not figure.arms:
        return name, str(figure.num_sets), f"needs {figure.minimum}", *[""] * (len(ARMS) - 1), ""
    arms = [value(figure.arms[arm]) if arm in figure.arms else "" for arm in ARMS]
    closeness = "" if figure.closeness is None else f"{figure.closeness:.3f}"
    return name, str(figure.num_sets), *arms, closeness


def value(arm: Arm) -> str:
    """Return the mean over positions, and its 95 % interval over sets."""
    half_width = arm.half_width
    return f"{_rounded(arm.mean):.4g}" + (f" ± {_rounded(half_width):.2g}" if half_width is not None else "")


def _rounded(number: float) -> float:
    """Zero for what is left of it in float32."""
    return 0.0 if abs(number) < 1e-6 else number


def notes(scores: Scores) -> list[str]:
    """Return lines on how to read the table."""
    lines = [f"{name}: {what}" for name, what in ARMS.items()]
    lines.append("means over positions ± 95 % over sets; N is the number of sets, the same in all arms and positions")
    if any(figure.num_sets < len(scores.made) for figure in scores.figures):
        lines.append("distances of distributions: one half of the sets against real images of the other half")
    if any(figure.too_few and figure.arms for figure in scores.figures):
        lines.append(f"{MARK} of fewer sets than it can bear: not to be compared with anything")
    return lines + [f"not measured: {name} {why}" for name, why in scores.skipped.items()]
