"""The tables and figures of docs/quality.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bench.documents import Record, Results, block
from bench.plots import Figure, Panel, Series
from bench.quality_arms import ARMS, UNTRAINED
from bench.quality_run import MAX_STEPS, Run
from bench.quality_stats import Estimate, difference, estimate, per_query
from bench.tables import Column, column, markdown

METRIC = "ndcg@10"
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

Arms = dict[str, dict[int, Run]]  # arm -> seed -> run


def _block(name: str) -> Callable[[Callable[[Record, str, Arms, Results], str]], Callable[[Results], str]]:
    """Registers a block that is rendered for each corpus of each record, below a line that says which."""

    def register(render: Callable[[Record, str, Arms, Results], str]) -> Callable[[Results], str]:
        @block(name)
        def sections(results: Results) -> str:
            parts = []
            for record in results.of("quality").values():
                for corpus in record["corpora"]:
                    text = render(record, corpus, grouped(record, corpus), results)
                    parts += [f"{_where(record, corpus, results.mark(record))}\n\n{text}"] if text else []
            return "\n\n".join(parts) or "no record yet: `python bench/quality.py`"

        return sections

    return register


def _where(record: Record, corpus: str, mark: str) -> str:
    size, train = record["corpora"][corpus], record["train"]
    return (
        f"**{corpus}**{mark} ({record['base']}, scale {record['scale']}: {train['max_steps']} steps of "
        f"{train['batch_size']} rows out of {size['training']:,}; {size['queries']} queries, {size['documents']} "
        f"documents, {size['labels']} labels, {size['pairs']} pairs; {record['provenance']['device']}, "
        f"{record['provenance']['date'][:10]})"
    )


def grouped(record: Record, corpus: str) -> Arms:
    """The runs on the corpus as it is in the record now."""
    current = record["corpora"][corpus]["fingerprint"]
    arms: Arms = {}
    for run in record["runs"]:
        if run["corpus"] == corpus and run["fingerprint"] == current:
            arms.setdefault(run["arm"], {})[run["seed"]] = run
    return {arm: arms[arm] for arm in sorted(arms, key=[UNTRAINED, *ARMS].index)}


def own_steps(arm: str) -> int:
    """The K that an arm is judged at: what it was trained for, 5 where that is a range."""
    steps = ARMS[arm].settings.get("num_steps", TRAINED_STEPS) if arm in ARMS else TRAINED_STEPS
    return steps if isinstance(steps, int) else TRAINED_STEPS


def _in(arm: str, *groups: str) -> bool:
    """Whether an arm belongs to one of the groups; the untrained model belongs to none."""
    return arm in ARMS and ARMS[arm].group in groups


def _at(runs: dict[int, Run], k: int) -> Estimate | None:
    """Quality at K = `k`, over the seeds that there are."""
    return estimate(per_query(list(runs.values()), k, METRIC)) if runs else None


def _mean(runs: dict[int, Run], k: int, metric: str = METRIC) -> float:
    return float(per_query(list(runs.values()), k, metric).mean())


def _interval(name: str, key: str, sign: str = "") -> Column:
    """A mean with its interval; `sign` "+" for a difference."""

    def text(row: dict[str, Any]) -> str:
        value: Estimate | None = row[key]
        if value is None:
            return "-"
        return f"{value.mean:{sign}.3f} [{value.low:{sign}.3f}, {value.high:{sign}.3f}]"

    return name, text


def _curve(steps: Sequence[int] = SHOWN_STEPS) -> list[Column]:
    return [(f"K = {k}", lambda row, k=k: f"{row['curve'][k]:.3f}") for k in steps]


_ARM, _SEEDS = column("arm", "arm", "`{}`"), column("seeds", "seeds")


@_block("quality-ablation")
def ablation(record: Record, corpus: str, arms: Arms, results: Results) -> str:
    """The paper's order of arms, with paired differences from the encoder-only baseline."""
    base, rows = arms.get("encoder-only", {}), []
    for arm, runs in arms.items():
        if arm == UNTRAINED or _in(arm, "ablation"):
            k, paired = own_steps(arm), base and arm not in (UNTRAINED, "encoder-only")
            rows.append(
                {
                    "arm": arm,
                    "k": k,
                    "seeds": len(runs),
                    "value": _at(runs, k),
                    "gain": difference(runs, base, k, 0, METRIC) if paired else None,
                    "mrr": _mean(runs, k, "mrr@10"),
                    **{key: np.mean([run[key][k] for run in runs.values()]) for key in ("spearman", "v_measure")},
                    "paper": "{} / {}".format(*PAPER[arm]) if arm in PAPER else None,
                }
            )
    columns = [
        _ARM,
        column("K", "k"),
        _SEEDS,
        _interval("nDCG@10", "value"),
        _interval("against encoder-only", "gain", "+"),
        column("MRR@10", "mrr", "{:.3f}"),
        column("Spearman", "spearman", "{:.3f}"),
        column("V-measure", "v_measure", "{:.3f}"),
        column("paper: MTEB, instruction following", "paper"),
    ]
    return markdown(columns, rows)


@_block("quality-steps")
def steps(record: Record, corpus: str, arms: Arms, results: Results) -> str:
    """nDCG@10 of every arm against K at inference, and the curves."""
    curves = {arm: [_mean(runs, k) for k in range(MAX_STEPS + 1)] for arm, runs in arms.items()}
    rows = [{"arm": arm, "seeds": len(arms[arm]), "curve": curve} for arm, curve in curves.items()]
    picture = results.figure(
        f"quality-{record['scale']}-{corpus}", f"nDCG@10 against K, {corpus}", _steps_figure(curves)
    )
    return f"{markdown([_ARM, _SEEDS, *_curve()], rows)}\n\n{picture}"


def _steps_figure(curves: dict[str, list[float]]) -> Figure:
    """A panel for the ablation, one for the attempts at step scaling. K = 0 is shown of the arm that is trained so."""
    ablation = [arm for arm in curves if arm == UNTRAINED or _in(arm, "ablation")]
    attempts = [arm for arm in curves if arm == "gircse" or _in(arm, "scaling")]
    panels = []
    for title, arms in (("ablation", ablation), ("step scaling", attempts)):
        series = [
            Series(
                label=arm,
                x=range(arm != "encoder-only", MAX_STEPS + 1),
                y=curves[arm][arm != "encoder-only" :],
                color=number % 7,
            )
            for number, arm in enumerate(arms)
        ]
        axes: dict[str, Any] = {"x_ticks": SHOWN_STEPS, "y_label": "nDCG@10", "y_from": 0.0}
        panels.append(Panel(series=series, title=title, x_label="K, soft tokens at inference", **axes))
    return Figure(panels=panels, columns=2, width=10.0)


@_block("quality-scaling")
def scaling(record: Record, corpus: str, arms: Arms, results: Results) -> str:
    """What more steps at inference give, and what each attempt costs at K = 5."""
    base, rows = arms.get("gircse", {}), []
    for arm, runs in arms.items():
        if arm == "gircse" or _in(arm, "scaling"):
            other = arm != "gircse"
            rows.append(
                {
                    "arm": arm,
                    "what": ARMS[arm].what,
                    "seeds": len(runs),
                    "at": _at(runs, 5),
                    "more": difference(runs, runs, 20, 5, METRIC),
                    "five": difference(runs, base, 5, 5, METRIC) if other else None,
                    "twenty": difference(runs, base, 20, 5, METRIC) if other else None,
                }
            )
    columns = [
        _ARM,
        column("what", "what"),
        _SEEDS,
        _interval("nDCG@10 at K = 5", "at"),
        _interval("K = 20 minus K = 5", "more", "+"),
        _interval("K = 5 minus gircse's", "five", "+"),
        _interval("K = 20 minus gircse's K = 5", "twenty", "+"),
    ]
    return markdown(columns, rows) if rows else ""


@_block("quality-budget")
def budget(record: Record, corpus: str, arms: Arms, results: Results) -> str:
    """Whether more training changes what more steps at inference are worth."""
    rows = []
    for baseline, arm in LONGER:
        if arm in arms:
            runs, base = arms[arm], arms.get(baseline, {})
            rows.append(
                {
                    "steps": next(iter(runs.values()))["steps"],
                    "base_seeds": ", ".join(map(str, sorted(base))) or None,
                    "base": _at(base, 0),
                    "seeds": ", ".join(map(str, sorted(runs))),
                    "five": _at(runs, 5),
                    "twenty": _at(runs, 20),
                    "more": difference(runs, runs, 20, 5, METRIC),
                    "gain": difference(runs, base, 5, 0, METRIC),
                    "most": difference(runs, base, 20, 0, METRIC),
                }
            )
    columns = [
        column("training steps", "steps"),
        column("encoder-only: seeds", "base_seeds"),
        _interval("K = 0", "base"),
        column("gircse: seeds", "seeds"),
        _interval("K = 5", "five"),
        _interval("K = 20", "twenty"),
        _interval("K = 20 minus K = 5", "more", "+"),
        _interval("K = 5 minus encoder-only", "gain", "+"),
        _interval("K = 20 minus encoder-only", "most", "+"),
    ]
    return markdown(columns, rows) if rows else ""


@_block("quality-course")
def courses(record: Record, corpus: str, arms: Arms, results: Results) -> str:
    """How far each training got: what the seeds differ in."""
    rows = [
        {"arm": arm, "seed": seed, "k": own_steps(arm), "value": _mean({seed: run}, own_steps(arm)), **run}
        for arm, runs in arms.items()
        if _in(arm, "ablation", "scaling", "budget")
        for seed, run in sorted(runs.items())
        if "course" in run
    ]
    columns: list[Column] = [
        _ARM,
        column("seed", "seed"),
        column("steps", "steps"),
        ("gradient norm, first quarter", lambda r: f"{r['course']['grad_norm'][0]:.0f}"),
        ("last quarter", lambda r: f"{r['course']['grad_norm'][1]:.1f}"),
        ("contrastive loss, first quarter", lambda r: f"{r['course']['loss'][0]:.2f}"),
        ("last quarter", lambda r: f"{r['course']['loss'][1]:.2f}"),
        column("K", "k"),
        column("nDCG@10", "value", "{:.3f}"),
    ]
    return markdown(columns, rows) if rows else ""


@_block("quality-poolings")
def poolings(record: Record, corpus: str, arms: Arms, results: Results) -> str:
    """MRR@10 of the same states read in other ways: where the loss beyond the trained K comes from."""
    readings = [("mean of the states", "mrr", "mean"), ("the same, centred", "centred_mrr", "mean")]
    readings += [("last state", "mrr", "last"), ("the same, centred", "centred_mrr", "last")]
    rows = [
        {"arm": arm, "reading": reading, "curve": np.mean([run[key][pooling] for run in runs.values()], axis=0)}
        for arm, runs in arms.items()
        if _in(arm, "ablation", "scaling")
        for reading, key, pooling in readings
        if all(key in run for run in runs.values())
    ]
    return markdown([_ARM, column("embedding", "reading"), *_curve(SHOWN_STEPS[1:])], rows) if rows else ""


@_block("quality-other")
def other(record: Record, corpus: str, arms: Arms, results: Results) -> str:
    """Spearman correlation and V-measure against K."""
    rows = [
        {"arm": arm, "what": what, "curve": np.mean([run[key] for run in runs.values()], axis=0)}
        for arm, runs in arms.items()
        for what, key in (("Spearman", "spearman"), ("V-measure", "v_measure"))
        if arm == UNTRAINED or _in(arm, "ablation", "scaling")
    ]
    errors, spreads = (
        np.mean([value for runs in arms.values() for run in runs.values() for value in run[key]])
        for key in ("spearman_error", "v_measure_std")
    )
    return (
        f"{markdown([_ARM, column('measure', 'what'), *_curve()], rows)}\n\nStandard errors: Spearman {errors:.3f} "
        f"(pairs resampled), V-measure {spreads:.3f} (seeds of k-means)."
    )


@_block("quality-negatives")
def negatives(record: Record, corpus: str, arms: Arms, results: Results) -> str:
    """Batch sizes at equal numbers of texts."""
    train, base, rows = record["train"], arms.get("gircse", {}), []
    for arm, runs in arms.items():
        if arm == "gircse" or _in(arm, "negatives"):
            size = ARMS[arm].settings.get("batch_size", train["batch_size"])
            rows.append(
                {
                    "negatives": size - 1,
                    "size": size,
                    "steps": next(iter(runs.values()))["steps"],
                    "rate": ARMS[arm].settings.get("learning_rate", train["learning_rate"]),
                    "seeds": len(runs),
                    "value": _at(runs, 5),
                    "gain": difference(runs, base, 5, 5, METRIC) if arm != "gircse" else None,
                }
            )
    rows.sort(key=lambda row: (row["size"], row["rate"]))
    columns = [
        column("negatives a query", "negatives"),
        column("rows a step", "size"),
        column("steps", "steps"),
        column("learning rate", "rate", "{:g}"),
        _SEEDS,
        _interval("nDCG@10 at K = 5", "value"),
        _interval(f"against {train['batch_size'] - 1} negatives", "gain", "+"),
    ]
    return markdown(columns, rows) if any(_in(arm, "negatives") for arm in arms) else ""


@_block("quality-anatomy")
def soft_tokens(record: Record, corpus: str, arms: Arms, results: Results) -> str:
    """Soft tokens before and after training, by step, of one run of each arm."""
    measures = ("entropy", "max_probability", "tail_mass", "state_cosine")
    rows = [
        {"arm": arm, "k": k, **{name: run["anatomy"][name]["mean"][k - 1] for name in measures}}
        for arm in (UNTRAINED, "encoder-only", "generation", "gircse")
        for run in list(arms.get(arm, {}).values())[:1]
        for k in (1, 2, 5, 10, 20)
    ]
    columns = [
        _ARM,
        column("step", "k"),
        column("entropy (nats)", "entropy", "{:.2f}"),
        column("largest probability", "max_probability", "{:.2f}"),
        column("mass beyond 256 tokens", "tail_mass", "{:.2f}"),
        column("cosine to the state before", "state_cosine", "{:.3f}"),
    ]
    return markdown(columns, rows) if rows else ""
