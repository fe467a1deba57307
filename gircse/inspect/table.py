"""The result of `GIRCSE.inspect` as plain text for the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from gircse.inspect.failures import Finding
from gircse.inspect.soft_tokens import TextInspection
from gircse.show.escape import terminal_text


def inspection_table(inspections: Sequence[TextInspection], *, width: int = 100) -> str:
    """Per text a heading, one line a step (entropy, movement, top tokens with probabilities), and the warnings."""
    blocks = []
    for inspection in inspections:
        text = terminal_text(inspection.text)
        lines = [text if len(text) <= width else text[: width - 1] + "…"]
        lines.append(f"  {'k':>3} {'entropy':>8} {'cos to k-1':>10}  top tokens")
        for step in inspection.steps:
            tokens = "  ".join(
                f"{token!r} {probability:.3f}"
                for token, probability in zip(step.tokens, step.probabilities, strict=True)
            )
            lines.append(f"  {step.step:>3} {step.entropy:>8.3f} {step.cosine_to_previous:>10.4f}  {tokens}")
        if inspection.jacobi_moves:
            moves = ", ".join(f"{moved:.1e}" for moved in inspection.jacobi_moves)
            lines.append(
                f"  Jacobi decoding: {len(inspection.jacobi_moves) + 1} passes; from the second on it moves by {moves}"
            )
        for finding in inspection.warnings:
            lines += warning_lines(finding, width=width)
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def warning_lines(finding: Finding, *, width: int = 100) -> list[str]:
    """A finding as lines of at most `width` characters, indented."""
    layout: dict[str, Any] = {"width": width, "break_long_words": False, "break_on_hyphens": False}
    said = textwrap.wrap(
        f"{finding.title}. {finding.message}", initial_indent="  ! ", subsequent_indent="    ", **layout
    )
    return [
        *said,
        *textwrap.wrap(f"What to do: {finding.advice}", initial_indent="    ", subsequent_indent="    ", **layout),
    ]
