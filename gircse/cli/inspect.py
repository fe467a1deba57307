"""`gircse inspect`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from gircse.cli.common import add_model_options, command, load_model


def add(commands: Any) -> None:
    parser = command(
        commands,
        "inspect",
        _inspect,
        "show what the soft tokens of a text say",
        "Per text and step: entropy, cosine of the embedding to the step before, and the most probable tokens.",
    )
    add_model_options(parser)
    parser.add_argument("texts", nargs="+", help="texts to look at")
    parser.add_argument("--instruction", help="what the embeddings are for")
    parser.add_argument("--top-n", type=int, default=8, help="tokens shown per step")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _inspect(arguments: argparse.Namespace) -> None:
    from dataclasses import asdict

    from gircse.report import inspection_table

    inspections = load_model(arguments).inspect(
        arguments.texts, instruction=arguments.instruction, top_n=arguments.top_n, max_length=arguments.max_length
    )
    if arguments.json:
        print(json.dumps([asdict(inspection) for inspection in inspections], ensure_ascii=False, indent=2))
    else:
        print(inspection_table(inspections))
