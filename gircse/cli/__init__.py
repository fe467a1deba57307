"""The command line: `gircse COMMAND` (also `python -m gircse`), one module for each command.

`common` has what several commands share, `settings` the options that are fields of a dataclass. A command imports what
it runs only when it runs, so that `--help` needs no torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from gircse._version import __version__
from gircse.cli import analyze, demo, distill, encode, evaluate, inspect, train

# Errors of the user or of the machine are reported in one line with exit code 2. All others are bugs and keep their
# traceback.
_REPORTED = (ValueError, TypeError, OSError, ModuleNotFoundError, FloatingPointError)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code (0 good, 2 bad input, 130 interrupted)."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        print("gircse: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0  # the program that reads our output, such as `head`, has closed it
    except _REPORTED as error:
        print(f"gircse {arguments.command}: error: {error}", file=sys.stderr)
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gircse",
        description="Text embeddings of a language model that speaks K soft tokens: the mean of their states.",
    )
    parser.add_argument("--version", action="version", version=f"gircse {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (demo, train, distill, encode, evaluate, inspect, analyze):
        command.add(commands)
    return parser
