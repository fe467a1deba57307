"""`gircse inspect --html`: soft tokens as one HTML page that needs nothing but itself.

No external resource, no server, no script needed to read it (the script only filters). A content security policy
forbids everything else, so that text that got past the escaping still could not run. Light and dark, narrow and in
print; tables are tables, colours are never the only sign.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Mapping, Sequence

from gircse._version import __version__
from gircse.inspect.failures import Finding
from gircse.inspect.page_style import SCRIPT, stylesheet
from gircse.inspect.soft_tokens import TAIL_TOKENS, SoftToken, TextInspection
from gircse.show.escape import html_text, html_token

# U+FE0E asks for the text form: the sign takes the colour and needs no emoji font
_WARNING_SIGN = '<span aria-hidden="true">\u26a0\ufe0e</span>'
_COLUMNS = (  # heading, what it is
    ("k", "number of the soft token"),
    ("entropy", "of its distribution over the vocabulary, in nats; 0 is one-hot"),
    ("top", "probability of the most probable token"),
    ("tail", "probability beyond the most probable {tail} tokens together"),
    ("cos z", "cosine of the embedding z to that of the step before (k = 1: to the prompt\u2019s own state); "
     "1 minus it is the movement"),
    ("cos g", "cosine of the hidden state g to that of the step before"),
    ("most probable tokens", "with their probabilities; \u2423 is a blank"),
)  # fmt: skip


def inspection_page(inspections: Sequence[TextInspection], facts: Mapping[str, str] | None = None) -> str:
    """The page, a whole HTML document.

    Args:
        inspections: of `GIRCSE.inspect`.
        facts: what the page says about their origin, for example {"model": "path", "instruction": "retrieve"}.
    """
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{_digest(SCRIPT)}'; base-uri 'none'"
    described = {**(facts or {}), "texts": str(len(inspections)), "written by": f"gircse {__version__}"}
    listed = "".join(
        f"<div><dt>{html_text(k)}</dt><dd><bdi>{html_text(v)}</bdi></dd></div>" for k, v in described.items()
    )
    columns = [(name, what.format(tail=TAIL_TOKENS)) for name, what in _COLUMNS]
    read = "".join(f"<div><dt>{name}</dt><dd>{what}.</dd></div>" for name, what in columns)
    articles = "\n".join(_article(i, inspection, columns) for i, inspection in enumerate(inspections, start=1))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>What the soft tokens say</title>
<style>{stylesheet()}</style>
</head>
<body>
<a class="skip" href="#texts">Skip to the texts</a>
<header>
<h1>What the soft tokens say</h1>
<dl class="facts">{listed}</dl>
</header>
<main>
{_summary(inspections)}
<details class="reading"><summary>How to read the tables</summary><dl>{read}</dl></details>
<form id="filter" hidden>
<label>Find <input type="search" id="find" autocomplete="off"></label>
<label><input type="checkbox" id="warned"> only texts with warnings</label>
<output id="count" aria-live="polite"></output>
</form>
<div id="texts" tabindex="-1">
{articles}
</div>
</main>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")


def _summary(inspections: Sequence[TextInspection]) -> str:
    """One line a text, linked."""
    rows = []
    for i, inspection in enumerate(inspections, start=1):
        names = ", ".join(html.escape(finding.title) for finding in inspection.warnings)
        steps = inspection.steps
        rows.append(
            f'<tr data-text="{i}"><th scope="row"><a href="#text-{i}"><bdi>{html_text(_short(inspection.text))}</bdi>'
            f'</a></th><td class="words">{f"{_WARNING_SIGN}&nbsp;{names}" if names else "none"}</td>'
            f'<td class="extra">{_mean(s.entropy for s in steps):.2f}</td>'
            f'<td class="extra">{max(s.max_probability for s in steps):.3f}</td>'
            f"<td>{1 - steps[-1].cosine_to_first:.4f}</td></tr>"
        )
    return f"""<section aria-labelledby="overview">
<h2 id="overview">Overview</h2>
<div class="scroll" tabindex="0" role="region" aria-labelledby="overview">
<table class="summary">
<caption>The texts, and the signs of failure found in them</caption>
<thead><tr><th scope="col">text</th><th scope="col" class="words">warnings</th>
<th scope="col" class="extra">mean entropy</th><th scope="col" class="extra">highest probability</th>
<th scope="col"><abbr title="1 minus the cosine between the embedding after one step and after all">moved after
step 1</abbr></th></tr></thead>
<tbody>
{chr(10).join(rows)}
</tbody>
</table>
</div>
</section>"""


# A narrow screen lays the rows of this table out as grids, which takes table semantics away: the roles give them back
def _article(number: int, inspection: TextInspection, columns: Sequence[tuple[str, str]]) -> str:
    heads = "".join(
        f'<th scope="col" role="columnheader"{" class=words" if i == len(columns) - 1 else ""}><abbr '
        f'title="{html.escape(what)}">{name}</abbr></th>'
        for i, (name, what) in enumerate(columns)
    )
    most = max((step.entropy for step in inspection.steps), default=0.0) or 1.0
    rows = "\n".join(_row(step, most) for step in inspection.steps)
    return f"""<article id="text-{number}" data-text="{number}" data-warnings="{len(inspection.warnings)}">
<h2>Text {number}</h2>
<p class="text" dir="auto"{_reachable(number, inspection.text)}>{html_text(inspection.text)}</p>
{_warnings(inspection.warnings)}
<div class="scroll" tabindex="0" role="region" aria-label="soft tokens of text {number}">
<table class="steps" role="table">
<caption>Soft tokens of text {number}</caption>
<thead role="rowgroup"><tr role="row">{heads}</tr></thead>
<tbody role="rowgroup">
{rows}
</tbody>
</table>
</div>
</article>"""


def _reachable(number: int, text: str) -> str:
    """A text so long that its box may scroll can be reached by keyboard."""
    long = len(text) > 800 or text.count("\n") > 8
    return f' tabindex="0" role="region" aria-label="text {number}"' if long else ""


def _row(step: SoftToken, most_entropy: float) -> str:
    tokens = "".join(
        f'<li style="--share:{100 * probability:.2f}%"><code><bdi>{html_token(token)}</bdi></code>'
        f'<span class="p">{probability:.3f}</span></li>'
        for token, probability in zip(step.tokens, step.probabilities, strict=True)
    )
    return (
        f'<tr role="row"><th scope="row" role="rowheader">{step.step}</th>'
        f"{_cell(f'{step.entropy:.3f}', step.entropy / most_entropy)}"
        f"{_cell(f'{step.max_probability:.3f}', step.max_probability)}"
        f"{_cell(f'{step.tail_mass:.3f}')}{_cell(f'{step.cosine_to_previous:.4f}')}{_cell(f'{step.state_cosine:.4f}')}"
        f'<td role="cell" class="words"><ol>{tokens}</ol></td></tr>'
    )


def _cell(label: str, share: float | None = None) -> str:
    """A number, with a bar of `share` of its width."""
    bar = "" if share is None else f' class="bar" style="--share:{100 * min(1.0, max(0.0, share)):.1f}%"'
    return f'<td role="cell"{bar}>{label}</td>'


def _warnings(findings: Sequence[Finding]) -> str:
    if not findings:
        return ""
    items = "".join(
        f"<li><strong>{_WARNING_SIGN} {html.escape(finding.title)}.</strong> {html.escape(finding.message)} "
        f"<em>What to do:</em> {html.escape(finding.advice)}</li>"
        for finding in findings
    )
    return f'<ul class="warnings" aria-label="Warnings">{items}</ul>'


def _short(text: str, width: int = 80) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "\u2026"


def _mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)
