"""The tables and figures of docs/quality.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.documents import Record, Results, block
from bench.plots import pyplot, save_figure
from bench.quality_arms import ARMS, UNTRAINED
from bench.quality_run import MAX_STEPS, Run
from bench.quality_stats import Estimate, difference, estimate, per_query
from bench.tables import Column, markdown

METRIC = "ndcg@10"
NO_RECORD = "no record yet: `python bench/quality.py`"
SHOWN_STEPS = (0, 1, 2, 3, 5, 7, 10, 15, 20)
TRAINED_STEPS = 5
# Mistral-7B, 50,000 samples (arXiv 2509.24291): MTEB(eng, v2) average, instruction following.
PAPER = {
    "encoder-only": (63.84, 47.05),
    "generation": (65.21, 56.47),
    "stepwise": (65.69, 60.13),
    "gircse": (66.27, 62.97),
}
# the baseline and the full objective, with the same training each
LONGER = (("encoder-only", "gircse"), ("encoder-only-long", "long"), ("encoder-only-longer", "longer"))
_ANATOMY = ("entropy", "max_probability", "tail_mass", "state_cosine")
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")  # Okabe and Ito


def grouped(record: Record, corpus: str) -> dict[str, dict[int, Run]]:
    """{arm: {seed: run}} of the corpus as it is in the record now."""
    current = record["corpora"][corpus]["fingerprint"]
    found: dict[str, dict[int, Run]] = {}
    for run in record["runs"]:
        if run["corpus"] == corpus and run["fingerprint"] == current:
            found.setdefault(run["arm"], {})[run["seed"]] = run
    order = [UNTRAINED, *ARMS]
    return {arm: found[arm] for arm in sorted(found, key=order.index)}


def own_steps(arm: str) -> int:
    """The K that an arm is judged at: what it was trained for, 5 where that is a range."""
    steps = ARMS[arm].settings.get("num_steps", TRAINED_STEPS) if arm in ARMS else TRAINED_STEPS
    return steps if isinstance(steps, int) else TRAINED_STEPS


def _records(results: Results) -> list[Record]:
    return results.of("quality")


def _where(record: Record, corpus: str) -> str:
    size, train = record["corpora"][corpus], record["train"]
    return (
        f"**{corpus}** ({record['base']}, scale {record['scale']}: {train['max_steps']} steps of {train['batch_size']} "
        f"rows out of {size['training']:,}; {size['queries']} queries, {size['documents']} documents, {size['labels']} "
        f"labels, {size['pairs']} pairs; {record['provenance']['device']}, {record['provenance']['date'][:10]})"
    )


def _sections(results: Results, render: Any) -> str:
    parts = []
    for record in _records(results):
        for corpus in record["corpora"]:
            found = render(record, corpus, grouped(record, corpus))
            if found:
                parts.append(f"{_where(record, corpus)}\n\n{found}")
    return "\n\n".join(parts) or NO_RECORD


def _interval(value: Estimate | None, sign: str = "") -> str:
    if value is None:
        return "-"
    return f"{value.mean:{sign}.3f} [{value.low:{sign}.3f}, {value.high:{sign}.3f}]"


def _in(arm: str, *groups: str) -> bool:
    """Whether an arm belongs to one of the groups; the untrained model belongs to none."""
    return arm in ARMS and ARMS[arm].group in groups


def _at(runs: dict[int, Run], k: int) -> Estimate | None:
    """Quality at K = `k`, over the seeds that there are."""
    return estimate(per_query(list(runs.values()), k, METRIC)) if runs else None


def _seeds(runs: dict[int, Run]) -> str:
    return ", ".join(map(str, sorted(runs))) or "-"


def _mean(runs: dict[int, Run], key: str, k: int) -> str:
    return f"{np.mean([run[key][k] for run in runs.values()]):.3f}"


@block("quality-ablation")
def ablation(results: Results) -> str:
    """The paper's order of arms, with paired differences from the encoder-only baseline."""

    def render(record: Record, corpus: str, arms: dict[str, dict[int, Run]]) -> str:
        names = [arm for arm in arms if arm == UNTRAINED or _in(arm, "ablation")]
        base = arms.get("encoder-only", {})
        rows = [
            {
                "arm": f"`{arm}`",
                "k": own_steps(arm),
                "runs": arms[arm],
                "value": _at(arms[arm], own_steps(arm)),
                "gain": difference(arms[arm], base, own_steps(arm), 0, METRIC)
                if base and arm not in (UNTRAINED, "encoder-only")
                else None,
                "paper": PAPER.get(arm),
            }
            for arm in names
        ]
        columns: list[Column] = [
            ("arm", lambda r: r["arm"]),
            ("K", lambda r: str(r["k"])),
            ("seeds", lambda r: str(len(r["runs"]))),
            ("nDCG@10", lambda r: _interval(r["value"])),
            ("against encoder-only", lambda r: _interval(r["gain"], "+")),
            (
                "MRR@10",
                lambda r: f"{per_query(list(r['runs'].values()), r['k'], 'mrr@10').mean():.3f}",
            ),
            ("Spearman", lambda r: _mean(r["runs"], "spearman", r["k"])),
            ("V-measure", lambda r: _mean(r["runs"], "v_measure", r["k"])),
            (
                "paper: MTEB, instruction following",
                lambda r: "-" if r["paper"] is None else "{} / {}".format(*r["paper"]),
            ),
        ]
        return markdown(columns, rows)

    return _sections(results, render)


@block("quality-steps")
def steps(results: Results) -> str:
    """nDCG@10 of every arm against K at inference, and the curves."""

    def render(record: Record, corpus: str, arms: dict[str, dict[int, Run]]) -> str:
        curves = {
            arm: [float(per_query(list(runs.values()), k, METRIC).mean()) for k in range(MAX_STEPS + 1)]
            for arm, runs in arms.items()
        }
        columns: list[Column] = [
            ("arm", lambda r: f"`{r['arm']}`"),
            ("seeds", lambda r: str(r["seeds"])),
            *((f"K = {k}", lambda r, k=k: f"{r['curve'][k]:.3f}") for k in SHOWN_STEPS),
        ]
        rows = [{"arm": arm, "seeds": len(arms[arm]), "curve": curve} for arm, curve in curves.items()]
        shown = {arm: curve for arm, curve in curves.items() if arm == UNTRAINED or _in(arm, "ablation", "scaling")}
        figure = results.figure(
            f"quality-{record['scale']}-{corpus}", f"nDCG@10 against K, {corpus}", shown, plot_steps
        )
        return f"{markdown(columns, rows)}\n\n{figure}"

    return _sections(results, render)


@block("quality-scaling")
def scaling(results: Results) -> str:
    """What more steps at inference give, and what each attempt costs at K = 5."""

    def render(record: Record, corpus: str, arms: dict[str, dict[int, Run]]) -> str:
        base = arms.get("gircse", {})
        names = [arm for arm in arms if arm == "gircse" or _in(arm, "scaling")]
        rows = [
            {
                "arm": arm,
                "seeds": len(arms[arm]),
                "at": _at(arms[arm], 5),
                "more": difference(arms[arm], arms[arm], 20, 5, METRIC),
                "five": difference(arms[arm], base, 5, 5, METRIC) if arm != "gircse" else None,
                "twenty": difference(arms[arm], base, 20, 5, METRIC) if arm != "gircse" else None,
            }
            for arm in names
        ]
        columns: list[Column] = [
            ("arm", lambda r: f"`{r['arm']}`"),
            ("what", lambda r: ARMS[r["arm"]].what),
            ("seeds", lambda r: str(r["seeds"])),
            ("nDCG@10 at K = 5", lambda r: _interval(r["at"])),
            ("K = 20 minus K = 5", lambda r: _interval(r["more"], "+")),
            ("K = 5 minus gircse's", lambda r: _interval(r["five"], "+")),
            ("K = 20 minus gircse's K = 5", lambda r: _interval(r["twenty"], "+")),
        ]
        return markdown(columns, rows) if names else ""

    return _sections(results, render)


@block("quality-budget")
def budget(results: Results) -> str:
    """Whether more training changes what more steps at inference are worth."""

    def render(record: Record, corpus: str, arms: dict[str, dict[int, Run]]) -> str:
        rows = []
        for baseline, arm in LONGER:
            if arm in arms:
                runs, base = arms[arm], arms.get(baseline, {})
                rows.append(
                    {
                        "steps": next(iter(runs.values()))["steps"],
                        "seeds": _seeds(runs),
                        "base_seeds": _seeds(base),
                        "base": _at(base, 0),
                        "five": _at(runs, 5),
                        "twenty": _at(runs, 20),
                        "more": difference(runs, runs, 20, 5, METRIC),
                        "gain": difference(runs, base, 5, 0, METRIC),
                        "most": difference(runs, base, 20, 0, METRIC),
                    }
                )
        columns: list[Column] = [
            ("training steps", lambda r: str(r["steps"])),
            ("encoder-only: seeds", lambda r: r["base_seeds"]),
            ("K = 0", lambda r: _interval(r["base"])),
            ("gircse: seeds", lambda r: r["seeds"]),
            ("K = 5", lambda r: _interval(r["five"])),
            ("K = 20", lambda r: _interval(r["twenty"])),
            ("K = 20 minus K = 5", lambda r: _interval(r["more"], "+")),
            ("K = 5 minus encoder-only", lambda r: _interval(r["gain"], "+")),
            ("K = 20 minus encoder-only", lambda r: _interval(r["most"], "+")),
        ]
        return markdown(columns, rows) if rows else ""

    return _sections(results, render)


@block("quality-course")
def courses(results: Results) -> str:
    """How far each training got: what the seeds differ in."""

    def render(record: Record, corpus: str, arms: dict[str, dict[int, Run]]) -> str:
        rows = [
            {"arm": arm, "seed": seed, "k": own_steps(arm), "run": run, **run["course"]}
            for arm, runs in arms.items()
            if _in(arm, "ablation", "scaling", "budget")
            for seed, run in sorted(runs.items())
            if "course" in run
        ]
        columns: list[Column] = [
            ("arm", lambda r: f"`{r['arm']}`"),
            ("seed", lambda r: str(r["seed"])),
            ("steps", lambda r: str(r["run"]["steps"])),
            ("gradient norm, first quarter", lambda r: f"{r['grad_norm'][0]:.0f}"),
            ("last quarter", lambda r: f"{r['grad_norm'][1]:.1f}"),
            ("contrastive loss, first quarter", lambda r: f"{r['loss'][0]:.2f}"),
            ("last quarter", lambda r: f"{r['loss'][1]:.2f}"),
            ("K", lambda r: str(r["k"])),
            ("nDCG@10", lambda r: f"{per_query([r['run']], r['k'], METRIC).mean():.3f}"),
        ]
        return markdown(columns, rows) if rows else ""

    return _sections(results, render)


@block("quality-poolings")
def poolings(results: Results) -> str:
    """MRR@10 of the same states read in other ways: where the loss beyond the trained K comes from."""

    def render(record: Record, corpus: str, arms: dict[str, dict[int, Run]]) -> str:
        readings = [("mean of the states", "mrr", "mean"), ("the same, centred", "centred_mrr", "mean")]
        readings += [("last state", "mrr", "last"), ("the same, centred", "centred_mrr", "last")]
        rows = [
            {"arm": arm, "reading": reading, "curve": np.mean([run[key][pooling] for run in runs.values()], axis=0)}
            for arm, runs in arms.items()
            if _in(arm, "ablation", "scaling")
            for reading, key, pooling in readings
            if all(key in run for run in runs.values())
        ]
        columns: list[Column] = [
            ("arm", lambda r: f"`{r['arm']}`"),
            ("embedding", lambda r: r["reading"]),
            *((f"K = {k}", lambda r, k=k: f"{r['curve'][k]:.3f}") for k in SHOWN_STEPS[1:]),
        ]
        return markdown(columns, rows) if rows else ""

    return _sections(results, render)


@block("quality-other")
def other(results: Results) -> str:
    """Spearman correlation and V-measure against K."""

    def render(record: Record, corpus: str, arms: dict[str, dict[int, Run]]) -> str:
        rows = [
            {"arm": arm, "what": what, "curve": np.mean([run[key] for run in runs.values()], axis=0)}
            for arm, runs in arms.items()
            for what, key in (("Spearman", "spearman"), ("V-measure", "v_measure"))
            if arm == UNTRAINED or _in(arm, "ablation", "scaling")
        ]
        columns: list[Column] = [
            ("arm", lambda r: f"`{r['arm']}`"),
            ("measure", lambda r: r["what"]),
            *((f"K = {k}", lambda r, k=k: f"{r['curve'][k]:.3f}") for k in SHOWN_STEPS),
        ]
        errors = [error for runs in arms.values() for run in runs.values() for error in run["spearman_error"]]
        spreads = [spread for runs in arms.values() for run in runs.values() for spread in run["v_measure_std"]]
        return (
            f"{markdown(columns, rows)}\n\nStandard errors: Spearman {np.mean(errors):.3f} (pairs resampled), "
            f"V-measure {np.mean(spreads):.3f} (seeds of k-means)."
        )

    return _sections(results, render)


@block("quality-negatives")
def negatives(results: Results) -> str:
    """Batch sizes at equal numbers of texts."""

    def render(record: Record, corpus: str, arms: dict[str, dict[int, Run]]) -> str:
        names = [arm for arm in arms if arm == "gircse" or _in(arm, "negatives")]
        if names == ["gircse"]:
            return ""
        rows = []
        for arm in names:
            size = ARMS[arm].settings.get("batch_size", record["train"]["batch_size"])
            runs = arms[arm]
            rows.append(
                {
                    "size": size,
                    "steps": next(iter(runs.values()))["steps"],
                    "rate": ARMS[arm].settings.get("learning_rate", record["train"]["learning_rate"]),
                    "seeds": len(runs),
                    "value": _at(runs, 5),
                    "gain": difference(runs, arms.get("gircse", {}), 5, 5, METRIC) if arm != "gircse" else None,
                }
            )
        rows.sort(key=lambda r: (r["size"], r["rate"]))
        columns: list[Column] = [
            ("negatives a query", lambda r: str(r["size"] - 1)),
            ("rows a step", lambda r: str(r["size"])),
            ("steps", lambda r: str(r["steps"])),
            ("learning rate", lambda r: f"{r['rate']:g}"),
            ("seeds", lambda r: str(r["seeds"])),
            ("nDCG@10 at K = 5", lambda r: _interval(r["value"])),
            (f"against {record['train']['batch_size'] - 1} negatives", lambda r: _interval(r["gain"], "+")),
        ]
        return markdown(columns, rows)

    return _sections(results, render)


@block("quality-anatomy")
def soft_tokens(results: Results) -> str:
    """Soft tokens before and after training, by step."""

    def render(record: Record, corpus: str, arms: dict[str, dict[int, Run]]) -> str:
        rows = []
        for arm in (UNTRAINED, "encoder-only", "generation", "gircse"):
            for run in list(arms.get(arm, {}).values())[:1]:
                found = run["anatomy"]
                rows += [
                    {"arm": arm, "k": k, **{name: found[name]["mean"][k - 1] for name in _ANATOMY}}
                    for k in (1, 2, 5, 10, 20)
                ]
        columns: list[Column] = [
            ("arm", lambda r: f"`{r['arm']}`"),
            ("step", lambda r: str(r["k"])),
            ("entropy (nats)", lambda r: f"{r['entropy']:.2f}"),
            ("largest probability", lambda r: f"{r['max_probability']:.2f}"),
            ("mass beyond 256 tokens", lambda r: f"{r['tail_mass']:.2f}"),
            ("cosine to the state before", lambda r: f"{r['state_cosine']:.3f}"),
        ]
        return markdown(columns, rows) if rows else ""

    return _sections(results, render)


def plot_steps(curves: dict[str, Sequence[float]], path: Path) -> None:
    """A panel for the ablation, one for the attempts at step scaling; K = 0 is the prompt's own state."""
    plt = pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    ablation = [arm for arm in curves if arm == UNTRAINED or _in(arm, "ablation")]
    attempts = ["gircse", *(arm for arm in curves if _in(arm, "scaling"))]
    for axes, names, title in zip(panels, (ablation, attempts), ("ablation", "step scaling"), strict=True):
        for number, arm in enumerate(name for name in names if name in curves):
            colour, style = _COLOURS[number % len(_COLOURS)], "-" if number < len(_COLOURS) else "--"
            axes.plot(range(1, MAX_STEPS + 1), curves[arm][1:], style, color=colour, label=arm, linewidth=1.8)
            if arm == "encoder-only":  # never generated in training: its own K is 0
                axes.plot([0], curves[arm][:1], "o", color=colour)
        axes.axvline(TRAINED_STEPS, color="0.6", linestyle=":", linewidth=1)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("K, soft tokens at inference")
        axes.set_xticks(SHOWN_STEPS)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("nDCG@10")
    panels[0].set_ylim(bottom=0)
    save_figure(plt, figure, path)
