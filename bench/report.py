#!/usr/bin/env python
"""Render every table and figure of the docs from the records in bench/results/.

    python bench/report.py            # rewrites what changed
    python bench/report.py --check    # exit code 1 if anything would change

Records that were measured with other kernels than the present ones are marked *(stale)*; `--check` does not look at
these marks, because they come and go with every edit of a kernel, while it guards the figures.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import documents
from bench.provenance import ROOT


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0, 1 with --check something would change, 2 bad options or documents."""
    parser = argparse.ArgumentParser(prog="bench/report.py", description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", metavar="DIR", help="JSON records")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", metavar="DIR", help="Markdown, and figures/")
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if anything would change")
    options = parser.parse_args(argv)
    for name in ("results", "docs"):
        if not getattr(options, name).is_dir():
            parser.error(f"--{name}: {getattr(options, name)} is not a folder")
    documents.load_blocks()
    results = documents.Results(options.results)
    try:
        pages = [*sorted(options.docs.rglob("*.md")), *([ROOT / "README.md"] if options.docs == ROOT / "docs" else [])]
        texts = {path: documents.render(path, results) for path in pages}
    except documents.DocumentError as error:
        parser.error(str(error))
    figures = {options.docs / "figures" / f"{name}.png": figure for name, figure in results.figures.items()}
    missing = [path for path, figure in figures.items() if not documents.is_drawn(path, figure)]
    if options.check:
        changed = [path for path, text in texts.items() if not documents.same(path.read_text(encoding="utf-8"), text)]
        for path in [*changed, *missing]:
            print(f"{path}: not what the records say; run python bench/report.py")
        return 1 if changed or missing else 0
    for path, text in texts.items():
        if path.read_text(encoding="utf-8") != text:
            documents.write(path, text)
            print(f"written: {path}")
    if missing and importlib.util.find_spec("matplotlib") is None:
        print(f"not drawn, matplotlib is not installed: {', '.join(path.name for path in missing)}")
        return 0
    for path in missing:
        documents.draw(path, figures[path])
        print(f"drawn: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
