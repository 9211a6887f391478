"""Line charts as SVG within a page: they take the page's colours, light or dark, and need no script."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Sequence

import numpy as np

_WIDTH, _HEIGHT = 340, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 12, 34  # around the plane
_TICKS = 5

# Colours of the lines, by their place: each has its dash, too, for eyes that do not tell colours apart.
COLOURS = (("#2468c9", "#74acff"), ("#1b7f57", "#4fc78d"), ("#b8500f", "#f09a63"), ("#7d45b5", "#c79af2"))
_DASHES = ("", "7 4", "2 4", "9 3 2 3")
STYLE = (
    ":root {"
    + "".join(f" --line{i}: {light};" for i, (light, _) in enumerate(COLOURS))
    + " }\n@media (prefers-color-scheme: dark) { :root {"
    + "".join(f" --line{i}: {dark};" for i, (_, dark) in enumerate(COLOURS))
    + """ } }
.charts { display: flex; flex-wrap: wrap; gap: 1.5rem; }
figure { margin: 0; }
figcaption { font-weight: 600; font-size: .9rem; max-width: 340px; overflow-wrap: anywhere; }
svg { display: block; font: 11px system-ui, sans-serif; }
svg text { fill: var(--faint); }
.key { display: flex; flex-wrap: wrap; gap: .5rem 1.5rem; margin: .5rem 0 1rem; }
.key span { display: inline-flex; align-items: center; gap: .5rem; }
"""
)


@dataclasses.dataclass(frozen=True)
class Line:
    """One line, at 1, 2, 3 and so on.

    Attributes:
      name: for who points at it.
      colour: its place among `COLOURS`.
      values_k, half_widths_k: heights, and of the band around them; None: there is no band.
    """

    name: str
    colour: int
    values_k: np.ndarray
    half_widths_k: np.ndarray | None = None


def key(names: Sequence[str]) -> str:
    """Return a legend of lines, in the order of their colours."""
    shown = (
        f'<span><svg width="36" height="10">{_stroke(i, "M0 5H36")}</svg>{html.escape(name)}</span>'
        for i, name in enumerate(names)
    )
    return f'<div class="key">{"".join(shown)}</div>'


def line_chart(title: str, lines: Sequence[Line], across: str) -> str:
    """Return a figure with a title. across: what the horizontal axis counts."""
    lines = [line for line in lines if len(line.values_k)]
    count = max((len(line.values_k) for line in lines), default=1)
    bands = [0.0 if line.half_widths_k is None else line.half_widths_k for line in lines]
    reach = np.concatenate([[line.values_k - band, line.values_k + band] for line, band in zip(lines, bands)], axis=1)
    low, high = float(reach.min()), float(reach.max())
    ticks = _ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])

    def x(position: float) -> float:
        inner = _WIDTH - _LEFT - _RIGHT
        return _LEFT + inner * ((position - 0.5) / count)

    def y(value: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - value) / (high - low)

    parts = []
    for tick in ticks:
        parts.append(f'<path d="M{_LEFT} {y(tick):.1f}H{_WIDTH - _RIGHT}" stroke="var(--line)"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{_number(tick, ticks)}</text>')
    for position in range(1, count + 1, max(math.ceil(count / 10), 1)):
        parts.append(f'<text x="{x(position):.1f}" y="{_HEIGHT - _BOTTOM + 15}" text-anchor="middle">{position}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle:.1f}" y="{_HEIGHT - 4}" text-anchor="middle">{html.escape(across)}</text>')
    for line in lines:
        places = [(x(i + 1), value) for i, value in enumerate(line.values_k.tolist())]
        title_of_line = f"<title>{html.escape(line.name)}: {', '.join(f'{v:.4g}' for _, v in places)}</title>"
        parts.append(f"<g>{title_of_line}")
        colour = f"var(--line{line.colour})"
        if line.half_widths_k is not None:
            halves = line.half_widths_k.tolist()
            there = [f"{a:.1f} {y(v + h):.1f}" for (a, v), h in zip(places, halves)]
            back = [f"{a:.1f} {y(v - h):.1f}" for (a, v), h in zip(places, halves)]
            if len(places) > 1:
                parts.append(f'<path d="M{"L".join(there + back[::-1])}Z" fill="{colour}" opacity=".18"/>')
            else:
                parts.append(f'<path d="M{there[0]}L{back[0]}" stroke="{colour}" stroke-width="6" opacity=".3"/>')
        parts.append(_stroke(line.colour, f"M{'L'.join(f'{a:.1f} {y(v):.1f}' for a, v in places)}"))
        parts += [f'<circle cx="{a:.1f}" cy="{y(v):.1f}" r="2.5" fill="{colour}"/>' for a, v in places]
        parts.append("</g>")
    svg = f'<svg width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(parts)}</svg>'
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{svg}</figure>"


def _stroke(colour: int, path: str) -> str:
    dash = f' stroke-dasharray="{_DASHES[colour]}"' if _DASHES[colour] else ""
    return f'<path d="{path}" fill="none" stroke="var(--line{colour})" stroke-width="2"{dash}/>'


def _ticks(low: float, high: float) -> list[float]:
    """Return round numbers that span a range."""
    if not high > low:
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / _TICKS
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [i * step for i in range(first, last + 1)]


def _number(value: float, ticks: Sequence[float]) -> str:
    step = ticks[1] - ticks[0]
    if step >= 1e4 or (step < 1e-4):
        return f"{value:.3g}"
    places = max(0, -math.floor(math.log10(step) + 1e-9) + (round(step / 10 ** math.floor(math.log10(step)), 3) == 2.5))
    return f"{value:.{places}f}"
