"""Which mutants there are of a file, and a sample of them that a seed fixes. The operators are Cosmic Ray's."""

from __future__ import annotations

import ast
import difflib
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cosmic_ray.ast import ast_nodes, get_ast_from_path
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names


@dataclass(frozen=True)
class Mutant:
    """One change of one file: the `occurrence`-th place at which Cosmic Ray's `operator` applies."""

    path: Path
    operator: str
    occurrence: int
    line: int
    column: int

    def source(self) -> str | None:
        """The whole changed file; None where the operator changes nothing after all."""
        code = self.path.read_text(encoding="utf-8")
        return mutate_code(code, get_operator(self.operator)(), self.occurrence)

    def diff(self) -> str:
        """The changed lines alone, as `-old` and `+new`."""
        before, after = self.path.read_text(encoding="utf-8").splitlines(), (self.source() or "").splitlines()
        changes = difflib.unified_diff(before, after, lineterm="", n=0)
        return "\n".join(line for line in changes if line[:1] in "+-" and line[:3] not in ("+++", "---"))


def mutants(path: Path) -> Iterator[Mutant]:
    """All of a file's, except inside annotations, which nothing evaluates."""
    tree, silent = get_ast_from_path(path), _annotations(path)
    for name in operator_names():
        kind = get_operator(name)
        if kind.arguments():
            continue
        operator = kind()
        places = (place for node in ast_nodes(tree) for place in operator.mutation_positions(node))
        for occurrence, ((line, column), _) in enumerate(places):
            if not any(start <= (line, column) < stop for start, stop in silent):
                yield Mutant(path, name, occurrence, line, column)


def sample(paths: list[Path], size: int, seed: int) -> list[Mutant]:
    """Places are drawn without replacement, each with one of its mutants: files weigh as much as they have places.

    Not mutants themselves: one `a * b` has a dozen, and arithmetic would be all that is drawn.
    """
    places: dict[tuple[Path, int, int], list[Mutant]] = defaultdict(list)
    for path in sorted(paths):
        for mutant in mutants(path):
            places[path, mutant.line, mutant.column].append(mutant)
    draw = random.Random(seed)
    chosen = draw.sample(sorted(places), min(size, len(places)))
    return [draw.choice(places[place]) for place in chosen]


def _annotations(path: Path) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """From where to where each annotation reaches: (line, column) pairs."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for name in ("annotation", "returns"):
            part = getattr(node, name, None)
            if isinstance(part, ast.expr):
                found.append(
                    ((part.lineno, part.col_offset), (part.end_lineno or 0, part.end_col_offset or 0)),
                )
    return found
