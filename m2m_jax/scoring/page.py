"""Scores as one page in one file: the headline, the table, curves by position, sets to look at, and likely copies."""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from m2m_jax.data.likeness import COPY
from m2m_jax.scoring import report
from m2m_jax.scoring.anchors import ARMS
from m2m_jax.scoring.copies import nearest_given, nearest_training
from m2m_jax.scoring.figures import Figure
from m2m_jax.scoring.metrics import SCORES
from m2m_jax.view.contact_sheet import context, generated, nearest
from m2m_jax.view.html_page import document, images
from m2m_jax.view.line_chart import STYLE, Line, key, line_chart

if TYPE_CHECKING:
    from m2m_jax.scoring.judging import Scores

_SETS_SHOWN = 3  # best, median and worst each
_COPIES_SHOWN = 8
_SEARCHED = 20_000  # generated images that are compared with all training images
_PAGE_STYLE = """
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .25rem .75rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.headline { font-size: 1.3rem; font-weight: 600; margin: 1rem 0; }
.small, small { color: var(--faint); font-size: .85rem; }
.pair { display: inline-block; margin: 0 1.25rem 1rem 0; }
section img { width: 5rem; height: 5rem; }
.images + .images { margin-top: .75rem; }
"""


def score_page(scores: Scores) -> str:
    """Return the page."""
    parts = [
        f"<p>{html.escape(report.about(scores))}</p>",
        f'<p class="headline">{html.escape(report.headline(scores))}</p>',
        _section("Figures", _table(scores)),
        _section("By position", _charts(scores)),
        _section("Sets", "".join(_sets(scores))),
        _section("The likest to what was given, or trained on", "".join(_copies(scores))),
        _section("How the sets were made", _made_by(scores)),
    ]
    return document("Scores", "\n".join(parts), STYLE + _PAGE_STYLE)


def _section(title: str, body: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{body}</section>" if body else ""


def _table(scores: Scores) -> str:
    heads = "".join(f"<th>{html.escape(head)}</th>" for head in ("figure", "N", *ARMS, "closeness"))
    rows = "".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in report.cells(figure))}</tr>"
        for figure in scores.figures
    )
    notes = "".join(f"<li>{html.escape(line)}</li>" for line in report.notes(scores))
    paper = "".join(
        f"<tr><td>{html.escape(figure.name)}</td>"
        + "".join(f"<td>{_of_positions(figure, arm)}</td>" for arm in ARMS)
        + "".join(f"<td>{_slope(figure, arm)}</td>" for arm in ("ours", "real"))
        + "</tr>"
        for figure in scores.figures
        if figure.arms
    )
    paper_heads = "".join(f"<th>{arm}</th>" for arm in (*ARMS, "drift, ours", "drift, real"))
    return (
        f'<div class="scroll"><table><tr>{heads}</tr>{rows}</table></div><ul class="small">{notes}</ul>'
        "<details><summary>Mean ± standard deviation over positions, as in the paper's table 1, and drift: the slope "
        'over positions</summary><div class="scroll"><table>'
        f"<tr><th>figure</th>{paper_heads}</tr>{paper}</table></div></details>"
    )


def _of_positions(figure: Figure, name: str) -> str:
    arm = figure.arms.get(name)
    return f"{arm.mean:.4g} ± {arm.deviation:.2g}" if arm else ""


def _slope(figure: Figure, name: str) -> str:
    arm = figure.arms.get(name)
    return f"{arm.slope:+.2g}" if arm else ""


def _charts(scores: Scores) -> str:
    drawn = []
    for figure in scores.figures:
        lines = [
            Line(name, place, figure.arms[name].values_k, figure.arms[name].half_widths_k)
            for place, name in enumerate(ARMS)
            if name in figure.arms
        ]
        if len(lines) > 1:
            title = f"{figure.name} {report.ARROWS[figure.better]}, N = {figure.num_sets}"
            drawn.append(line_chart(title, lines, "position of the judged image"))
    return f'{key(list(ARMS))}<div class="charts">{"".join(drawn)}</div>' if drawn else ""


def _sets(scores: Scores) -> Iterator[str]:
    """Pictures of the best, the median and the worst sets, by the figure of the headline."""
    figure = scores.headline
    if figure is None or figure.of_sets_nk is None:
        return
    value_n = figure.of_sets_nk.mean(1)
    worst_first = np.argsort(value_n if figure.better == "higher" else -value_n, kind="stable")
    count, middle = min(_SETS_SHOWN, len(worst_first)), len(worst_first) // 2
    below = "; below is the real set" if scores.paired else ""
    yield f'<p class="small">By {html.escape(figure.name)}. Given images have a blue frame{below}.</p>'
    first = max(middle - count // 2, 0)
    groups = {
        "Best": worst_first[::-1][:count],
        "Median": worst_first[first : first + count],
        "Worst": worst_first[:count],
    }
    for title, chosen in groups.items():
        yield f"<h3>{title}</h3>"
        for index in chosen.tolist():
            made, real, given = scores.made.images(index), scores.real.images(index), scores.options.given
            yield f"<p>{html.escape(scores.made.set_ids[index])} <small>{value_n[index]:.4f}</small></p>"
            yield images([context(list(made[:given])), generated(list(made[given:]))])
            if scores.paired:
                yield images([context(list(real[:given])), generated(list(real[given:]))])


def _copies(scores: Scores) -> Iterator[str]:
    """Yield the generated images whose shapes are most like a given or training image, beside it: the score "copy"."""
    pixels = scores.pixels
    if pixels is None or "copy" not in _names_of_scores(scores):
        return
    made, real = pixels.get("made_nkhwc"), pixels.get("real_nkhwc")
    yield '<p class="small">Correlation of luminance, mirrored ones too; 1 is the same up to colour.</p>'
    if scores.options.given:
        given = pixels.get("given_nmhwc")
        likeness_nk, which_nk = nearest_given(made, given)
        yield _told("given", likeness_nk, nearest_given(real, given)[0])
        for n, k in _likest(likeness_nk):
            yield _pair(made[n, k], given[n, which_nk[n, k]], likeness_nk[n, k], scores.made.set_ids[n])
    if pixels.has("training_thwc"):
        training, few = pixels.get("training_thwc"), max(_SEARCHED // made.shape[1], 1)
        likeness_nk, which_nk = nearest_training(made[:few], training)
        yield _told("training", likeness_nk, nearest_training(real[:few], training)[0])
        for n, k in _likest(likeness_nk):
            yield _pair(made[n, k], training[which_nk[n, k]], likeness_nk[n, k], scores.made.set_ids[n])


def _names_of_scores(scores: Scores) -> set[str]:
    chosen = scores.options.scores
    return {text.partition("=")[0] for text in chosen} if chosen else set(SCORES)


def _told(what: str, made_nk: np.ndarray, real_nk: np.ndarray) -> str:
    def told(x_nk: np.ndarray) -> str:
        return f"median {np.median(x_nk):.3f}, largest {x_nk.max():.3f}, {np.mean(x_nk > COPY):.1%} above {COPY}"

    return (
        f"<p>Generated images, each beside the likest {what} image. All {made_nk.size}: {told(made_nk)}. "
        f"Real images in their place: {told(real_nk)}.</p>"
    )


def _likest(likeness_nk: np.ndarray) -> list[tuple[int, int]]:
    """The places of the largest, one of each set."""
    best_n = likeness_nk.argmax(1)
    order = np.argsort(-likeness_nk.max(1), kind="stable")[:_COPIES_SHOWN]
    return [(int(n), int(best_n[n])) for n in order]


def _pair(made_hwc: np.ndarray, other_hwc: np.ndarray, likeness: float, set_id: str) -> str:
    shown = images([generated([made_hwc]), nearest([other_hwc])])
    return f'<div class="pair">{shown}<small>{likeness:.3f} {html.escape(set_id[:40])}</small></div>'


def _made_by(scores: Scores) -> str:
    facts = {**scores.made.made_by, **{one.name: one.fingerprint or "no weights" for one in scores.encoders}}
    return f"<dl>{''.join(f'<dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd>' for k, v in facts.items())}</dl>"
