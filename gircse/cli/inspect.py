"""`gircse inspect`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from gircse.cli.common import add_model_options, command, load_model


def add(commands: Any) -> None:
    parser = command(
        commands,
        "inspect",
        _inspect,
        "show what the soft tokens of a text say",
        "Per text and step: entropy, cosine of the embedding to the step before, the most probable tokens; warnings "
        "where the numbers show that soft tokens fail, with what to do (docs/inspecting.md).",
    )
    add_model_options(parser)
    parser.add_argument("texts", nargs="+", help="texts to look at")
    parser.add_argument("--instruction", help="what the embeddings are for")
    parser.add_argument("--top-n", type=int, default=8, help="tokens shown per step")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--html", help="also write a page of this name that needs no other file")


def _inspect(arguments: argparse.Namespace) -> None:
    from dataclasses import asdict

    from gircse.files.atomic import new_file
    from gircse.inspect.page import inspection_page
    from gircse.inspect.table import inspection_table

    model = load_model(arguments)
    inspections = model.inspect(
        arguments.texts, instruction=arguments.instruction, top_n=arguments.top_n, max_length=arguments.max_length
    )
    if arguments.json:
        print(json.dumps([asdict(inspection) for inspection in inspections], ensure_ascii=False, indent=2))
    else:
        print(inspection_table(inspections))
    if arguments.html:
        facts = {
            "model": arguments.model,
            "adapter": arguments.adapter,
            "instruction": arguments.instruction,
            "K": str(model.num_steps),
            "pooling": model.config.pooling,
            "temperature": f"{model.config.temperature:g}",
        }
        page = inspection_page(inspections, {name: fact for name, fact in facts.items() if fact})
        with new_file(Path(arguments.html)) as partial:
            partial.write_text(page, encoding="utf-8")
        print(f"wrote {arguments.html}", file=sys.stderr)
