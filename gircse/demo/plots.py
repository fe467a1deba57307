"""The two plots of the demo: quality versus number of steps, and the losses of the training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gircse.show.plots import mark_steps, new_figure, save_figure


def plot_quality(curves: Mapping[str, Mapping[int, float]], path: Path, *, metric: str, trained_steps: int) -> None:
    """Quality {K: value} versus number of steps at inference, with one line for each model. The K of the training is
    marked, and a level line shows the first model without soft tokens (K = 0)."""
    figure, axes = new_figure()
    for (name, curve), marker in zip(curves.items(), "osD^v", strict=False):
        steps = [k for k in curve if k]
        axes.plot(steps, [curve[k] for k in steps], marker=marker, label=name)
    name, first = next(iter(curves.items()))
    axes.axhline(first[0], color="C2", linestyle="--", label=f"{name}, no soft token (K = 0)")
    mark_steps(axes, trained_steps, f"trained with K = {trained_steps}")
    axes.set(xlabel="soft tokens K at inference", ylabel=metric, title="Retrieval quality versus number of steps")
    axes.set_ylim(bottom=0)
    axes.set_xticks(sorted({k for curve in curves.values() for k in curve if k}))
    axes.legend()
    save_figure(figure, path)


def plot_losses(log: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The contrastive losses L_1..L_K over training, smoothed by a running mean of about a tenth of the run.

    If K was drawn for each training step, the line of L_k has only the steps with k or more, and is smoothed over a
    tenth of these.
    """
    figure, axes = new_figure()
    from matplotlib import colormaps

    most = max(len(entry["losses"]) for entry in log)
    windows = set()
    for k in range(most):
        entries = [entry for entry in log if len(entry["losses"]) > k]
        steps = np.array([entry["step"] for entry in entries])
        losses = np.array([entry["losses"][k] for entry in entries], dtype=float)
        window = max(1, len(entries) // 10)
        windows.add(window)
        colour = colormaps["viridis"](1 - (0.15 + 0.7 * k / max(1, most - 1)))
        axes.plot(steps, losses, color=colour, alpha=0.2, linewidth=1)
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        axes.plot(steps[window - 1 :], smooth, color=colour, label=f"$L_{{{k + 1}}}$", linewidth=1.8)
    axes.set(xlabel="training step", ylabel="contrastive loss (nats)", title="Loss of each step during training")
    axes.set_ylim(bottom=0)
    width = f"{min(windows)} to {max(windows)}" if len(windows) > 1 else str(max(windows))
    axes.legend(title=f"mean of {width}" if width != "1" else None)
    save_figure(figure, path)
