#!/usr/bin/env python
"""A corpus of real texts of mixed lengths without a network: docstrings of the standard library.

    python bench/docstrings.py --limit 2000 --out runs/docstrings.jsonl

The same interpreter gives the same file: one object {"text": ..} a line, whole docstrings, drawn evenly, none twice.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import sysconfig
import warnings
from pathlib import Path

LEAST_CHARACTERS = 20


def docstrings(root: Path) -> list[str]:
    """Docstrings of all modules, classes and functions below `root`, in a fixed order, each text once."""
    texts: dict[str, None] = {}
    warnings.simplefilter("ignore")  # invalid escapes in old files
    for path in sorted(root.rglob("*.py")):
        if not {"site-packages", "dist-packages", "test", "tests", "idlelib"} & set(path.relative_to(root).parts):
            try:
                nodes = list(ast.walk(ast.parse(path.read_bytes())))
            except (SyntaxError, ValueError):
                continue
            owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            texts |= dict.fromkeys(ast.get_docstring(node) or "" for node in nodes if isinstance(node, owners))
    return [text for text in texts if len(text) >= LEAST_CHARACTERS]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--limit", type=int, default=2000, help="texts (default 2000)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default 0)")
    parser.add_argument("--out", type=Path, default=Path("runs/docstrings.jsonl"), help="default runs/docstrings.jsonl")
    options = parser.parse_args(argv)
    texts = docstrings(Path(sysconfig.get_paths()["stdlib"]))
    if not 1 <= options.limit <= len(texts):
        parser.error(f"--limit: got {options.limit}, expected 1 to {len(texts)} docstrings")
    chosen = random.Random(options.seed).sample(texts, options.limit)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("".join(json.dumps({"text": text}) + "\n" for text in chosen), encoding="utf-8")
    print(f"{len(chosen)} of {len(texts)} docstrings: {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
