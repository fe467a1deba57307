#!/usr/bin/env python
"""A corpus of real texts of mixed lengths without a network: docstrings of the standard library.

python bench/docstrings.py --limit 2000 --out runs/docstrings.jsonl

The same interpreter gives the same file. One object {"text": ..} a line, whole docstrings, no duplicates, drawn evenly.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

LEAST_CHARACTERS = 20


def docstrings(root: Path) -> Iterator[str]:
    """Docstrings of all modules, classes and functions below `root`, in a fixed order, each text once."""
    seen: set[str] = set()
    for path in sorted(root.rglob("*.py")):
        if {"site-packages", "dist-packages", "test", "tests", "idlelib"} & set(path.relative_to(root).parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in old files
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node) or ""
                if len(text) >= LEAST_CHARACTERS and text not in seen:
                    seen.add(text)
                    yield text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=2000, help="texts (default 2000)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default 0)")
    parser.add_argument("--out", type=Path, default=Path("runs/docstrings.jsonl"), help="default runs/docstrings.jsonl")
    options = parser.parse_args(argv)
    if options.limit < 1:
        parser.error(f"--limit: got {options.limit}, expected at least 1")
    texts = list(docstrings(Path(sysconfig.get_paths()["stdlib"])))
    if len(texts) < options.limit:
        parser.error(f"--limit: got {options.limit}, but the standard library here has {len(texts)} docstrings")
    chosen = random.Random(options.seed).sample(texts, options.limit)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("".join(json.dumps({"text": text}) + "\n" for text in chosen), encoding="utf-8")
    print(f"{len(chosen)} of {len(texts)} docstrings: {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
