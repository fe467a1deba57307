"""Plots of `gircse analyze`, as PNG and SVG.

Okabe and Ito's colours, and a marker and a dash of its own for each line: they can be told apart by everyone and in
print.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gircse.report import new_figure, save_figure

STYLES: list[dict[str, Any]] = [
    {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    {"color": "#D55E00", "marker": "s", "linestyle": "--"},
    {"color": "#009E73", "marker": "^", "linestyle": "-."},
    {"color": "#CC79A7", "marker": "D", "linestyle": (0, (3, 1, 1, 1))},
]
_LINE: dict[str, Any] = {"linewidth": 2, "markersize": 6}
_QUIET = "#444444"


def plot_analysis(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Writes quality, movement, soft_tokens and, where texts were clustered, clustering, each .png and .svg: -> files.

    Args:
        result: of `gircse.analysis.analyze`.
    """
    plots = {"quality": plot_quality_of_steps, "movement": plot_movement, "soft_tokens": plot_soft_tokens}
    if result["clustering"] is not None:
        plots["clustering"] = plot_clustering
    files = []
    for name, plot in plots.items():
        figure = plot(result)
        files += save_figure(figure, folder / f"{name}.png", folder / f"{name}.svg")
    return files


def plot_quality_of_steps(result: Mapping[str, Any]) -> Any:
    """nDCG@10 against K with the baseline as a level; bars are the standard error of the difference to the baseline."""
    figure, axes = new_figure()
    steps, metric = result["steps"], result["metric"]
    values = [result["quality"][k][metric] for k in steps]
    differences = [result["baseline"]["differences"][k]["standard_error"] for k in steps]
    axes.errorbar(steps, values, yerr=differences, capsize=3, label="after K soft tokens", **STYLES[0], **_LINE)
    _level(axes, result["baseline"]["metrics"][metric], "encoder-only, K = 0")
    _log_steps(axes, steps)
    _trained(axes, result)
    axes.set(xlabel="soft tokens K at inference", ylabel=metric)
    refinement = result["refinement"]
    _titles(
        axes,
        "Where does refinement stop?",
        f"best K = {refinement['best_steps']}; K = {refinement['enough_steps']} is not worse by more than a standard "
        "error\nbars: standard error of the difference to the encoder-only baseline",
    )
    axes.set_ylim(bottom=0)
    axes.legend(loc="lower right")
    return figure


def plot_movement(result: Mapping[str, Any]) -> Any:
    """1 - cos(z_k, z_{k-1}) against k, queries and documents, with the threshold of `num_steps="auto"`."""
    figure, axes = new_figure()
    threshold = None
    for (name, part), style in zip(result["movement"].items(), STYLES, strict=False):
        if part["steps"]:
            values = [max(value, 1e-8) for value in part["mean"]]
            axes.plot(
                part["steps"], values, label=name, markevery=_marked(part["steps"], result["steps"]), **style, **_LINE
            )
        threshold = part["settled"]["threshold"]
    axes.set_yscale("log")
    if threshold is not None:
        _level(axes, threshold, 'num_steps="auto" stops below, twice in a row')
    _log_steps(axes, [k for k in result["steps"] if k > 1] or [2])
    axes.set(xlabel="step k", ylabel="movement, $1 - \\cos(z_k, z_{k-1})$")
    medians = ", ".join(
        f"{name} {'do not' if part['settled']['median'] is None else 'at k = ' + str(part['settled']['median'])}"
        for name, part in result["movement"].items()
    )
    _titles(axes, "How far each step moves the embedding", f"half of the texts have settled: {medians}")
    axes.legend()
    return figure


def plot_clustering(result: Mapping[str, Any]) -> Any:
    """V-measure of k-means against K, with the baseline as a level; bars are the standard deviation over seeds."""
    figure, axes = new_figure()
    clustering, steps = result["clustering"], result["steps"]
    scores = [clustering["v_measure"][k] for k in steps]
    axes.errorbar(
        steps,
        [score["mean"] for score in scores],
        yerr=[score["std"] for score in scores],
        capsize=3,
        label="after K soft tokens",
        **STYLES[0],
        **_LINE,
    )
    _level(axes, clustering["baseline"]["mean"], "encoder-only, K = 0")
    _log_steps(axes, steps)
    _trained(axes, result)
    axes.set(xlabel="soft tokens K at inference", ylabel="V-measure of k-means")
    axes.set_ylim(bottom=0)
    _titles(
        axes,
        "Clustering quality of each prefix",
        f"{clustering['texts']:,} texts, {clustering['labels']} labels; bars: standard deviation over seeds",
    )
    axes.legend(loc="lower right")
    return figure


def plot_soft_tokens(result: Mapping[str, Any]) -> Any:
    """Anatomy: entropy, highest probability and tail, likeness of successive states; medians and the middle 80%."""
    figure, panels = new_figure(columns=3)
    tokens, steps = result["soft_tokens"], list(range(1, len(result["soft_tokens"]["entropy"]["mean"]) + 1))
    tail = f"beyond the top {tokens['tail_tokens']}"
    groups: list[tuple[str, list[tuple[str, str]], float | None]] = [
        ("entropy, nats", [("entropy", "entropy")], None),
        (
            "probability",
            [("max_probability", "most probable token"), ("tail_mass", tail)],
            tokens["one_hot_probability"],
        ),
        ("$\\cos(g_k, g_{k-1})$", [("state_cosine", "state to the one before")], 1 - tokens["same_state"]),
    ]
    for axes, (label, lines, threshold) in zip(panels, groups, strict=True):
        for (name, legend), style in zip(lines, STYLES, strict=False):
            low, middle, high = (tokens[name]["quantiles"][q] for q in ("0.1", "0.5", "0.9"))
            axes.fill_between(steps, low, high, color=style["color"], alpha=0.18, linewidth=0)
            axes.plot(steps, middle, label=legend, markevery=_marked(steps, result["steps"]), **style, **_LINE)
        if threshold is not None:
            _level(axes, threshold, "near-one-hot" if label == "probability" else "redundant above")
        _log_steps(axes, [k for k in (1, 2, 5, 10, 20, 50, 100) if k <= steps[-1]])
        axes.set(xlabel="step k", ylabel=label)
        axes.set_ylim(top=1.02 if threshold is not None else None, bottom=None if "cos" in label else 0)
        if len(lines) > 1 or threshold is not None:
            axes.legend(fontsize=8)
    _titles(
        panels[0], "What the soft tokens are made of", f"{tokens['texts']} texts: median and middle 80%", figure=figure
    )
    return figure


def _titles(axes: Any, title: str, small: str, *, figure: Any = None) -> None:
    (figure or axes.figure).suptitle(title, fontsize=13, fontweight="bold", x=0.01, ha="left")
    axes.set_title(small, loc="left", fontsize=9, color=_QUIET)


def _level(axes: Any, value: float, label: str) -> None:
    axes.axhline(value, color="#222222", linewidth=1.4, linestyle=":", label=label)


def _trained(axes: Any, result: Mapping[str, Any]) -> None:
    steps = result["trained_steps"]
    if steps:
        axes.axvline(steps, color="0.55", linewidth=1, zorder=0)
        axes.annotate(
            f"the model's K = {steps}",
            (steps, 0.02),
            xycoords=("data", "axes fraction"),
            xytext=(4, 0),
            textcoords="offset points",
            color=_QUIET,
            fontsize=9,
        )


def _log_steps(axes: Any, ticks: Sequence[int]) -> None:
    """A logarithmic axis of steps with plain numbers."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _marked(steps: Sequence[int], at: Sequence[int]) -> list[int]:
    """Indices of the points that get a marker: on a logarithmic axis a hundred of them run together."""
    return [i for i, k in enumerate(steps) if k in set(at)]
