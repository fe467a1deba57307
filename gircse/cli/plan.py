"""`gircse train --plan`: what the run will need, instead of the run."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gircse.train.config import TrainConfig


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("planning", "memory and time predicted from the model's config")
    group.add_argument("--plan", action="store_true", help="print the prediction and do nothing")
    group.add_argument("--gpu", default="h100", help="device: h100, h200, a100-80gb, a100-40gb, l40s, rtx4090")
    group.add_argument("--length", type=int, help="tokens of every text (default: the limits of the config)")
    group.add_argument("--plan-ranks", type=int, default=1, metavar="N", help="number of GPUs")


def print_plan(config: TrainConfig, arguments: argparse.Namespace) -> None:
    from gircse.train.plan.predict import plan

    print(plan(config, gpu=arguments.gpu, length=arguments.length, world_size=arguments.plan_ranks))
