"""Sets that `make road` exported, and what its runs made of them: `python docs/plot_road.py runs/road OUT.png`."""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from m2m_jax.core.images import read_image, write_png
from m2m_jax.view.contact_sheet import Group, Row, contact_sheet, context

RUNS = {
    "self_on_mis": "M2M-Self, synthetic sets",
    "self_on_emoji": "M2M-Self, real sets",
    "dino_on_mis": "M2M-DINO, synthetic sets",
    "dino_on_emoji": "M2M-DINO, real sets",
}
CONTEXT = GENERATED = 3


def main(road: Path, output: Path) -> None:
    rows = []
    for folder in sorted((road / "sets").iterdir()):
        groups = [context(first_images(folder, CONTEXT))]
        for run, title in RUNS.items():
            groups.append(Group(title, first_images(road / run / "test_samples" / folder.name, GENERATED)))
        rows.append(Row("", groups))
    write_png(output, contact_sheet(rows))


def first_images(folder: Path, number: int) -> list[np.ndarray]:
    paths = sorted(folder.glob("*.png"))[:number]
    return [read_image(path, Image.open(path).width) for path in paths]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
