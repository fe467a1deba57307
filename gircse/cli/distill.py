"""`gircse distill`: its options are the fields of `DistillConfig`."""

from __future__ import annotations

import argparse
from typing import Any

from gircse.cli.common import command
from gircse.cli.settings import add_settings, config_of, require


def add(commands: Any) -> None:
    from gircse.train.distill_config import DistillConfig

    parser = command(
        commands,
        "distill",
        _distill,
        "train a student without steps towards a GIRCSE teacher",
        "The student is the teacher's base with LoRA of its own; it embeds at the price of one pass, K = 0.",
    )
    add_settings(parser, DistillConfig)


def _distill(arguments: argparse.Namespace) -> None:
    from gircse.lm.environment import first_process
    from gircse.train.distill import distill
    from gircse.train.distill_config import DistillConfig

    config = config_of(arguments, DistillConfig, {})
    require(config, "teacher", "data")
    result = distill(config)
    if not first_process():
        return
    if result.quality:
        print(result.table())
    before, after = result.agreement["before"], result.agreement["after"]
    print(
        f"distilled {len(result.log)} steps, last loss {result.log[-1]['loss']:.4f}; cosine to the teacher "
        f"{before:.4f} -> {after:.4f}; model in {result.folder}"
    )
