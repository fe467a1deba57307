"""Text for evaluation that every machine has: what the functions of Python's standard library do, by area and action.

Each text is the first paragraph of a docstring (see `gircse.data.functions`). It has two labels: the *area* of the
library that it comes from, and the *action* that its first words name; knowing one says little about the other. The
same Python release gives the same texts in the same order. Another release has slightly other ones, so its number is
part of the data's revision.
"""

from __future__ import annotations

import platform
import random
import re
import sysconfig
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import TypeVar
from zlib import crc32

from gircse.data.functions import CodePair, pairs_of_file
from gircse.data.installed_code import deduplicate

REVISION = f"python-{platform.python_version()}-1"  # of the texts; the last number changes with the code below

AREAS: dict[str, tuple[str, ...]] = {
    "e-mail": ("email", "imaplib", "mailbox", "poplib", "smtplib"),
    "web": ("ftplib", "html", "http", "socketserver", "urllib", "wsgiref", "xmlrpc"),
    "processes and threads": ("asyncio", "concurrent", "multiprocessing", "queue", "subprocess", "threading"),
    "files and archives": ("_pyio", "filecmp", "fileinput", "gzip", "pathlib", "shutil", "tarfile", "zipfile"),
    "numbers and dates": ("_pydatetime", "calendar", "datetime", "fractions", "random", "statistics"),
    "tests and logs": ("bdb", "doctest", "logging", "pdb", "trace", "traceback", "unittest"),
    "source code": ("ast", "dis", "importlib", "inspect", "pydoc", "symtable", "tokenize"),
    "text formats": ("configparser", "csv", "difflib", "json", "plistlib", "string", "textwrap", "xml"),
}

# Verbs, with or without a final s. The first match counts: "Return True if" checks, "Return a new" creates, "Return"
# gives back.
ACTIONS: dict[str, str] = {
    "check a condition": "returns? true|returns? false|returns? whether|returns? if|test|check|determine if|true",
    "create something": "create|construct|make|build|generate|returns? an? new",
    "give back a value": "return|get|fetch|retrieve|give|query|querie|list|find",
    "change something": "set|add|update|append|insert|register|replace|change|put|assign",
    "remove or end something": "remove|delete|clear|discard|close|reset|stop|terminate|shut|cancel",
    "convert something": "convert|format|encode|decode|parse|escape|unescape|quote|unquote|translate|split",
    "read or write something": "read|write|send|load|dump|save|copy|copie|open|print|log|display",
}

_T = TypeVar("_T")


@dataclass(frozen=True)
class FunctionText:
    """A function: what it does in words, its masked code, and its labels. `action` is None where no verb says it."""

    summary: str
    code: str
    module: str
    area: str
    action: str | None


@cache
def function_texts() -> tuple[FunctionText, ...]:
    """All functions of `AREAS` that say what they do; about 2,000, in the order of areas and files. Reads files only.

    Raises:
        FileNotFoundError: the standard library lies there without its source files.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    pairs: list[CodePair] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's code
        for area, modules in AREAS.items():
            for module in modules:
                folder = root / module
                for path in sorted(folder.rglob("*.py")) if folder.is_dir() else [root / f"{module}.py"]:
                    parts = path.relative_to(root).with_suffix("").parts
                    if not {"test", "tests"} & set(parts):
                        pairs += pairs_of_file(path, area, ".".join(parts).removesuffix(".__init__"))
    if not pairs:
        raise FileNotFoundError(f"no documented functions in the standard library at {root}")
    return tuple(
        FunctionText(pair.summary, pair.code, pair.module, pair.package, _action(pair.summary))
        for pair in deduplicate(pairs)
    )


def _action(summary: str) -> str | None:
    found = (name for name, verbs in ACTIONS.items() if re.match(rf"(?:{verbs})(?:e?s)?\b", summary, re.IGNORECASE))
    return next(found, None)


def draw(items: Iterable[_T], count: int, seed: int) -> list[_T]:
    """At most `count` of the items, in an order that depends on nothing but `seed` and the items' own text."""
    return sorted(items, key=lambda item: crc32(f"{seed} {item}".encode("utf-8", "surrogatepass")))[:count]


def balanced_grid(
    areas: Sequence[str], actions: Sequence[str], *, seed: int = 0, at_most: int = 8
) -> list[FunctionText]:
    """Equally many texts of each area and action, so that neither says anything about the other; in a mixed order.

    Raises:
        ValueError: a combination has fewer than three texts.
    """
    cells: defaultdict[tuple[str, str | None], list[FunctionText]] = defaultdict(list)
    for text in function_texts():
        cells[text.area, text.action].append(text)
    wanted = list(product(areas, actions))
    size = min(at_most, *(len(cells[cell]) for cell in wanted))
    if size < 3:
        raise ValueError(f"areas and actions: a combination has {size} texts, expected 3 or more in each")
    texts = [text for cell in wanted for text in draw(cells[cell], size, seed)]
    random.Random(seed).shuffle(texts)
    return texts
