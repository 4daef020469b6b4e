"""``loss.png``: how the loss fell.

Drawn from the run's files, so it is right after any number of resumes. Matplotlib is imported when first drawing, and
used without pyplot, whose global state does not bear a second thread.
"""

import os
from itertools import accumulate
from pathlib import Path

from trainer.loggers import read_lines

SMOOTHED_OVER = 0.02
"""Fraction of the steps that the smoothed curve averages over."""
INK, MUTED, TRAIN, VALID = "#1f2933", "#6b7785", "#2f6fb3", "#d9622b"


def draw_loss(metrics: Path, evals: Path, png: Path, title: str) -> None:
    """Draw the losses in the files `metrics` and `evals` into `png` (1600 x 900 pixels), replacing it at once."""
    from matplotlib.figure import Figure

    steps, losses = _series(metrics, "loss")
    valid_steps, valid_losses = _series(evals, "valid_loss")
    figure = Figure(figsize=(8, 4.5), dpi=200, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, losses, color=TRAIN, alpha=0.25, linewidth=0.8)
    axes.plot(steps, smoothed(losses), color=TRAIN, linewidth=1.8, label="training, smoothed")
    if valid_steps:
        axes.plot(valid_steps, valid_losses, "o", color=VALID, markersize=5, label="validation", zorder=3)
        axes.annotate(
            f"{valid_losses[-1]:.3f}",
            (valid_steps[-1], valid_losses[-1]),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            color=VALID,
            fontsize=9,
        )
    axes.set_title(title, loc="left", color=INK, fontsize=11, fontweight="bold")
    axes.set_xlabel("optimizer steps", color=MUTED)
    axes.set_ylabel("cross-entropy (nats a token)", color=MUTED)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=MUTED)
    axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, labelcolor=INK)
    new = png.with_name(png.name + ".new")
    figure.savefig(new, format="png")
    os.replace(new, png)


def smoothed(values: list[float]) -> list[float]:
    """Each value's mean with its neighbours on both sides, `SMOOTHED_OVER` of all in sum, fewer at the ends: no lag."""
    reach = round(SMOOTHED_OVER * len(values) / 2)
    sums = [0.0, *accumulate(values)]
    windows = ((max(0, i - reach), min(len(values), i + reach + 1)) for i in range(len(values)))
    return [(sums[stop] - sums[start]) / (stop - start) for start, stop in windows]


def _series(path: Path, key: str) -> tuple[list[int], list[float]]:
    records = [record for record in read_lines(path) if key in record]
    return [record["step"] for record in records], [float(record[key]) for record in records]
