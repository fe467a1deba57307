"""Plots of a training run, and the one way in which figures are made and written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gircse.files.atomic import new_file


def plot_quality(
    curves: Mapping[str, Mapping[int, Mapping[str, float]]], path: Path, *, metric: str = "ndcg@10", trained_steps: int
) -> None:
    """Quality versus number of steps at inference, one line a model; the K it was trained with is marked."""
    figure, axes = new_figure()
    for (name, curve), marker in zip(curves.items(), "osD^v", strict=False):
        steps = list(curve)
        axes.plot(steps, [curve[k][metric] for k in steps], marker=marker, label=name)
    axes.axvline(trained_steps, color="0.5", linestyle=":", linewidth=1)
    axes.annotate(
        f"trained with K = {trained_steps}",
        (trained_steps, 0.03),
        xycoords=("data", "axes fraction"),
        xytext=(4, 0),
        textcoords="offset points",
        color="0.4",
        fontsize=9,
    )
    axes.set(xlabel="soft tokens K at inference", ylabel=metric, title="Retrieval quality versus number of steps")
    axes.set_ylim(bottom=0)
    axes.set_xticks(sorted({k for curve in curves.values() for k in curve}))
    axes.legend()
    save_figure(figure, path)


def plot_losses(log: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The contrastive losses L_1..L_K over training, smoothed by a running mean of about a tenth of the run.

    Where K was drawn anew for each step, a line has the steps that had its loss, and is smoothed over a tenth of these.
    """
    import numpy as np

    figure, axes = new_figure()
    most = max(len(entry["losses"]) for entry in log)
    windows = set()
    for k in range(most):
        having = [entry for entry in log if len(entry["losses"]) > k]
        steps = np.array([entry["step"] for entry in having])
        losses = np.array([entry["losses"][k] for entry in having], dtype=float)
        window = max(1, len(having) // 10)
        windows.add(window)
        colour = _viridis(1 - (0.15 + 0.7 * k / max(1, most - 1)))
        axes.plot(steps, losses, color=colour, alpha=0.2, linewidth=1)
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        axes.plot(steps[window - 1 :], smooth, color=colour, label=f"$L_{{{k + 1}}}$", linewidth=1.8)
    axes.set(xlabel="training step", ylabel="contrastive loss (nats)", title="Loss of each step during training")
    axes.set_ylim(bottom=0)
    width = f"{min(windows)} to {max(windows)}" if len(windows) > 1 else str(max(windows))
    axes.legend(title=f"mean of {width}" if width != "1" else None)
    save_figure(figure, path)


def new_figure(columns: int = 1) -> tuple[Any, Any]:
    """A figure and its axes, or `columns` axes side by side.

    Raises:
        ModuleNotFoundError: no matplotlib; says how to install it.
    """
    try:
        import matplotlib
    except ImportError:
        raise ModuleNotFoundError("plots need matplotlib: pip install 'gircse[demo]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (7, 4.3) if columns == 1 else (4.2 * columns, 4.2)
    figure, panels = pyplot.subplots(1, columns, figsize=size, layout="constrained", squeeze=False)
    for axes in panels[0]:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels[0, 0] if columns == 1 else panels[0]


def _viridis(value: float):
    from matplotlib import colormaps

    return colormaps["viridis"](value)


def save_figure(figure: Any, *paths: Path) -> list[Path]:
    """Writes the figure to each path, in the format of its suffix, and closes it: -> the paths.

    An SVG keeps its text as text, and is the same file for the same figure.
    """
    from matplotlib import pyplot, rc_context

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "gircse"}):
        for path in paths:
            metadata = {"Date": None} if Path(path).suffix == ".svg" else None
            with new_file(Path(path)) as partial:
                figure.savefig(partial, dpi=150, metadata=metadata)
    pyplot.close(figure)
    return list(paths)
