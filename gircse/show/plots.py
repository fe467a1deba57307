"""How figures are made and written, and the mark of a number of steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gircse.files.atomic import new_file


def new_figure(columns: int = 1) -> tuple[Any, Any]:
    """A figure and its axes, or a row of `columns` axes.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message has the command that installs it.
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


def mark_steps(axes: Any, steps: int, label: str) -> None:
    """A vertical line at a number of steps, with its label at the foot."""
    axes.axvline(steps, color="0.55", linestyle=":", linewidth=1, zorder=0)
    axes.annotate(
        label,
        (steps, 0.03),
        xycoords=("data", "axes fraction"),
        xytext=(4, 0),
        textcoords="offset points",
        color="0.3",
        fontsize=9,
    )


def save_figure(figure: Any, *paths: Path) -> list[Path]:
    """Writes the figure to each path in the format of its suffix, closes it, and returns the paths.

    An SVG keeps its text as text, and the same figure gives the same file.
    """
    from matplotlib import pyplot, rc_context

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "gircse"}):
        for path in paths:
            metadata = {"Date": None} if Path(path).suffix == ".svg" else None
            with new_file(Path(path)) as partial:
                figure.savefig(partial, dpi=150, metadata=metadata)
    pyplot.close(figure)
    return list(paths)
