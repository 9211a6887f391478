"""Draws the curves of a run: `python docs/plot_run.py runs/emoji/metrics.jsonl docs/images/emoji_curves.png`.

Needs matplotlib (3.11.2 drew the committed ones), which nothing else here does.
"""

import json
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SMOOTHED = 25  # log entries


def main(metrics: str, output: str) -> None:
    entries = [json.loads(line) for line in Path(metrics).read_text().splitlines()]

    def series(name):
        return np.array([(x["step"], x[name]) for x in entries if name in x]).T

    figure, (training, evaluation) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, colour in (("train/loss", "#1d3e8a"), ("train/loss_first", "#d66a20"), ("train/loss_last", "#3b8f5a")):
        step, value = series(name)
        window = min(SMOOTHED, len(value))
        smooth = np.convolve(value, np.ones(window) / window, "valid")
        training.plot(step[window - 1 :], smooth, color=colour, label=name.removeprefix("train/"))
    training.set(title=f"Training loss, mean of {SMOOTHED} entries", xlabel="step")

    step, other = series("eval/loss_other_context")
    evaluation.plot(step, other, "o-", color="#7a808c", label="another set's context")
    sizes = sorted(int(name.rpartition("/")[2]) for name in _last_evaluation(entries) if "/loss_by" in name)
    for k, shade in zip(sizes, np.linspace(0.3, 1.0, len(sizes)), strict=True):
        step, value = series(f"eval/loss_by_context_size/{k}")
        label = f"{k} own context image{'s' if k != 1 else ''}"
        evaluation.plot(step, value, "o-", color=plt.cm.Blues(shade), label=label)
    evaluation.set(title="Held-out loss of the last image", xlabel="step")
    for axes in (training, evaluation):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(output, dpi=110)


def _last_evaluation(entries):
    return next(x for x in reversed(entries) if "eval/loss_own_context" in x)


if __name__ == "__main__":
    main(*sys.argv[1:])
