"""What several commands share: how a command is declared, the options of a model, and loading it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any


def command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], None], help: str, description: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help, description=description, formatter_class=_HelpFormatter)
    parser.set_defaults(run=run)
    return parser


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something: not None, False or an empty list."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == ():
            return action.help
        return super()._get_help_string(action)


def add_model_options(parser: argparse.ArgumentParser, steps: bool = True) -> None:
    parser.add_argument("--model", required=True, help="base model, saved GIRCSE folder or LoRA folder, or a hub name")
    parser.add_argument("--adapter", help="LoRA folder or hub name to put on the base model")
    parser.add_argument("--dtype", default="auto", help="dtype of the weights")
    parser.add_argument("--device", help="device (default: CUDA if there is one)")
    parser.add_argument("--trust-remote-code", action="store_true", help="let the checkpoint run its own code")
    parser.add_argument("--batch-size", type=int, help="texts per batch (default: by a token budget)")
    parser.add_argument(
        "--max-length",
        type=int,
        help="tokens of a prompt, instruction included (default: what the model was trained with, else 512)",
    )
    if steps:
        parser.add_argument("--num-steps", type=int, help="K, soft tokens per text (default: the model's own)")


def load_model(arguments: argparse.Namespace, *, merge_adapter: bool = False) -> Any:
    from transformers.utils import logging

    from gircse.model import GIRCSE

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    steps = getattr(arguments, "num_steps", None)
    return GIRCSE.from_pretrained(
        arguments.model,
        adapter=arguments.adapter,
        num_steps=None if isinstance(steps, str) else steps,
        dtype=arguments.dtype,
        device=arguments.device,
        trust_remote_code=arguments.trust_remote_code,
        merge_adapter=merge_adapter,
    )
