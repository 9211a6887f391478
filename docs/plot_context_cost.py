"""Draws what context costs: `python docs/plot_context_cost.py docs/context_cost_cpu.json docs/images/context_cost.png`.

Needs matplotlib (3.11.2 drew the committed one), which nothing else here does.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Seconds for the first image after so many context images, over those of Stable Diffusion 2.1 on the same machine
# (2.0): read off a plot of the paper.
PAPER = {
    "M2M-Self": {1: 4.0 / 2.0, 2: 5.0 / 2.0, 4: 9.0 / 2.0},
    "M2M-DINO": {1: 2.0 / 2.0, 2: 2.0 / 2.0, 4: 2.0 / 2.0},
}


def main(measured: str, output: str) -> None:
    result = json.loads(Path(measured).read_text())
    figure, panels = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axes, (name, table) in zip(panels, result["variants"].items(), strict=True):
        counts, none = [row["context"] for row in table], table[0]
        for kind, colour, label in (
            ("cached", "#1d3e8a", "cached"),
            ("uncached", "#d66a20", "uncached, the paper's way"),
        ):
            axes.plot(
                counts,
                [row[f"{kind}_seconds"] / none["uncached_seconds"] for row in table],
                "o-",
                color=colour,
                label=label,
            )
            floor = [row[f"{kind}_flops"] / none["uncached_flops"] for row in table]
            axes.plot(counts, floor, ":", color=colour, label=f"{kind}: FLOPs")
        axes.plot(PAPER[name].keys(), PAPER[name].values(), "s", color="#7a808c", label="the paper's (512 px)")
        axes.set(title=name, xlabel="context images", ylabel="cost of an image, over that of none", yscale="log")
        axes.set_yticks([1, 2, 4, 8, 16], [f"{tick}x" for tick in (1, 2, 4, 8, 16)])
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
