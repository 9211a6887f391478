"""A page of samples in one file: opens from disk, in light and dark, without a network."""

import base64
import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from m2m_jax.core.images import png_bytes
from m2m_jax.view.contact_sheet import Group, Row

_STYLE = """
:root { color-scheme: light dark; --paper: #f8f8f6; --ink: #262a32; --faint: #6c7179; --line: #d4d6da; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16181d; --ink: #e6e7ea; --faint: #9aa0aa; --line: #363a43; }
}
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 2rem; }
section { border-top: 1px solid var(--line); padding: 1rem 0; }
h2 { font-size: 1rem; margin: 0 0 .5rem; }
.images { display: flex; flex-wrap: wrap; gap: .75rem; align-items: center; }
img { width: 7rem; height: 7rem; object-fit: contain; image-rendering: pixelated; border-radius: 4px; }
img.framed { outline: 4px solid #3b62c4; }
img.framed + img:not(.framed) { margin-left: 1.5rem; }
summary, dt { color: var(--faint); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; margin: .5rem 0 0; }
dd { margin: 0; overflow-wrap: anywhere; }
"""


def html_page(rows: Sequence[Row], records: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the page of what a contact sheet shows.

    Args:
      rows: as for `contact_sheet`.
      records: by the label of a row, what is to be known of it: settings, seed, timings.
    """
    sections = "\n".join(_section(row, records[row.label]) for row in rows)
    told = "<p>Context images have a blue frame; those beside them were generated, one after another.</p>"
    return document("Samples", f"{told}\n{sections}")


def document(title: str, body: str, style: str = "") -> str:
    """Return a whole page.

    Args:
      title: plain text.
      body: HTML, below the title.
      style: CSS beyond that of all pages.
    """
    page = (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}{style}</style>\n<h1>{html.escape(title)}</h1>\n"
        f"{body}\n</html>\n"
    )
    # Names of files need not be text: Python puts half characters in the place of their bytes, which no file can hold.
    return page.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def images(groups: Sequence[Group]) -> str:
    """Return groups of pictures in a line."""
    of_all = [_image(image, group.framed, group.title) for group in groups for image in group.images]
    return f'<div class="images">{"".join(of_all)}</div>'


def _section(row: Row, record: Mapping[str, Any]) -> str:
    facts = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd>" for k, v in record.items())
    heading = f"<h2>{html.escape(row.label)}</h2>" if row.label else ""
    details = f"<details><summary>How they were made</summary><dl>{facts}</dl></details>"
    return f"<section>{heading}{images(row.groups)}{details}</section>"


def _image(image_hwc: np.ndarray, framed: bool, title: str) -> str:
    data = base64.b64encode(png_bytes(image_hwc)).decode()
    frame = ' class="framed"' if framed else ""
    return f'<img alt="{html.escape(title)}"{frame} src="data:image/png;base64,{data}">'
