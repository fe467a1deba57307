"""`gircse train`: its options are the fields of `TrainConfig`, and a recipe is a file that sets them.

With --plan it prints what the run will need, instead of the run.
"""

from __future__ import annotations

import argparse
from typing import Any

from gircse.cli.common import command
from gircse.cli.settings import add_settings, config_of, require


def add(commands: Any) -> None:
    from gircse.train.config import TrainConfig
    from gircse.train.plan.gpus import DEFAULT_GPU, GPUS

    parser = command(
        commands,
        "train",
        _train,
        "train LoRA adapters with the stepwise contrastive objective",
        'Rows are JSONL: {"prompt": str, "query": str, "pos": [str, ..], "neg": [str, ..]}; all are checked first. '
        "Settings come from the command line, else from the recipe, else they are the defaults below.",
    )
    parser.add_argument("--recipe", help="TOML file with settings, named as the options, with _ for -")
    add_settings(parser, TrainConfig)
    group = parser.add_argument_group("planning", "memory and time predicted from the model's config")
    group.add_argument("--plan", action="store_true", help="print the prediction and do nothing")
    group.add_argument("--gpu", default=DEFAULT_GPU, help=f"device: {', '.join(GPUS)}")
    group.add_argument("--length", type=int, help="tokens of every text (default: the limits of the config)")
    group.add_argument("--plan-ranks", type=int, default=1, metavar="N", help="number of GPUs")


def train_config_of(arguments: argparse.Namespace) -> Any:
    """The `TrainConfig` of a parsed command line and its recipe. A plan needs a base, but no data.

    Raises:
        OSError: the recipe cannot be read.
        ValueError: a setting or the recipe is wrong, or a setting is missing.
    """
    from gircse.train.config import TrainConfig
    from gircse.train.recipes import load_recipe

    config = config_of(arguments, TrainConfig, load_recipe(arguments.recipe) if arguments.recipe else {})
    if arguments.plan or not config.adapter:  # an adapter names its base
        require(config, "model")
    if not arguments.plan:
        require(config, "data")
    return config


def _train(arguments: argparse.Namespace) -> None:
    config = train_config_of(arguments)
    if arguments.plan:
        from gircse.train.plan.predict import plan

        print(plan(config, gpu=arguments.gpu, length=arguments.length, world_size=arguments.plan_ranks))
        return
    from gircse.lm.environment import environment_integer, first_process
    from gircse.train import train
    from gircse.train.step_time import expected, taken

    if first_process() and (text := expected(config, environment_integer("WORLD_SIZE", 1))):
        print(text, flush=True)
    result = train(config)
    if first_process():
        print(taken(result.log))
        print(f"trained {len(result.log)} steps, last loss {result.log[-1]['loss']:.4f}; model in {result.folder}")
