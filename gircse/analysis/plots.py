"""Plots of `gircse analyze`, as PNG and SVG.

Okabe and Ito's colours, and a marker and a dash of its own for each line: they can be told apart by everyone and in
print.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gircse.show.plots import new_figure, save_figure

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
    """Anatomy: entropy, highest probability and tail, change of the state; medians and the middle 80%."""
    figure, panels = new_figure(columns=3)
    tokens = result["soft_tokens"]
    steps = list(range(1, len(tokens["entropy"]["mean"]) + 1))
    spread, probability, state = panels
    _band(spread, result, "entropy", "entropy", STYLES[0])
    _band(probability, result, "max_probability", "most probable token", STYLES[0])
    _band(probability, result, "tail_mass", f"beyond the top {tokens['tail_tokens']}", STYLES[1])
    _level(probability, tokens["one_hot_probability"], "near-one-hot above")
    _band(state, result, "state_cosine", "change of the state", STYLES[0], change=True)
    _level(state, tokens["same_state"], "redundant below")
    spread.set(ylabel="entropy, nats")
    probability.set(ylabel="probability", ylim=(0, 1.02))
    state.set(ylabel="$1 - \\cos(g_k, g_{k-1})$", yscale="log")
    for axes in panels:
        _log_steps(axes, [k for k in (1, 2, 5, 10, 20, 50, 100, 200, 500) if k <= steps[-1]])
        axes.set(xlabel="step k")
    spread.set_ylim(bottom=0)
    for axes in (probability, state):  # above the axes: no corner is free for sure
        axes.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, borderaxespad=0.2)
    _titles(spread, "What the soft tokens are made of", f"{tokens['texts']} texts: median and middle 80%")
    return figure


def _band(
    axes: Any, result: Mapping[str, Any], name: str, label: str, style: dict[str, Any], *, change: bool = False
) -> None:
    """Median and the middle 80% of an entry of the anatomy; with `change` of 1 minus it."""
    quantiles = [result["soft_tokens"][name]["quantiles"][q] for q in ("0.1", "0.5", "0.9")]
    low, middle, high = ([max(1 - v, 1e-8) if change else v for v in values] for values in quantiles)
    steps = list(range(1, len(middle) + 1))
    axes.fill_between(steps, low, high, color=style["color"], alpha=0.18, linewidth=0)
    axes.plot(steps, middle, label=label, markevery=_marked(steps, result["steps"]), **style, **_LINE)


def _titles(axes: Any, title: str, small: str) -> None:
    axes.figure.suptitle(title, fontsize=13, fontweight="bold", x=0.01, ha="left")
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
