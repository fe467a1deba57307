"""What `gircse analyze` prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gircse.inspect.failures import Finding
from gircse.inspect.table import warning_lines
from gircse.show.tables import text_table


def analysis_table(result: Mapping[str, Any]) -> str:
    """A line a K (quality, difference to the baseline, movement, clustering), then the answers and the warnings.

    Args:
        result: of `gircse.analysis.analyze`.
    """
    metric, clustering, base = result["metric"], result["clustering"], result["baseline"]
    header = ["K", metric, "to K = 0", "+-", "moved queries", "moved documents"]
    rows = [[0, base["metrics"][metric], "", "", "", ""]]
    for k in result["steps"]:
        difference = base["differences"][k]
        moved = [_moved(part, k) for part in result["movement"].values()]
        rows.append([k, result["quality"][k][metric], difference["mean"], difference["standard_error"], *moved])
    if clustering is not None:
        header += ["V-measure"]
        scores = [clustering["baseline"], *(clustering["v_measure"][k] for k in result["steps"])]
        rows = [[*row, score["mean"]] for row, score in zip(rows, scores, strict=True)]
    lines = [text_table(header, rows), "", *_answers(result)]
    for warning in result["warnings"]:
        lines += warning_lines(Finding(**warning))
    return "\n".join(lines)


def _moved(part: Mapping[str, Any], k: int) -> Any:
    return f"{part['mean'][k - 2]:.1e}" if k > 1 else ""


def _answers(result: Mapping[str, Any]) -> list[str]:
    refinement, base, tokens = result["refinement"], result["baseline"], result["soft_tokens"]
    gain, at = refinement["gain_over_one_step"], refinement["enough_steps"]
    difference = base["differences"][at]
    first = result["steps"][0]
    texts = result["texts"]
    settled = ", ".join(f"{name} {f'at k = {k}' if k else 'not'}" for name, k in refinement["settled_steps"].items())
    redundant = tokens["redundant_share"]
    return [
        f"{texts['queries']:,} queries, {texts['documents']:,} documents; encoder-only is {base['model']}.",
        f"Refinement: best at K = {refinement['best_steps']} ({gain['mean']:+.4f} +- {gain['standard_error']:.4f} to "
        f"K = {first}); from K = {at} on no worse than that by more than a standard error.",
        f"Against encoder-only at K = {at}: {difference['mean']:+.4f} +- {difference['standard_error']:.4f}.",
        f"Half of the texts have settled (moved less than {result['movement']['queries']['settled']['threshold']:g} "
        f"twice): {settled}.",
        f"Soft tokens of {tokens['texts']} texts: {tokens['near_one_hot_share']:.1%} near-one-hot"
        + (f", {redundant:.1%} of the later steps redundant." if redundant is not None else "."),
    ]
