"""Pairs of description and code for the demo, out of the installed Python packages.

Installed packages have thousands of functions with a docstring. The docstring's first paragraph becomes the query. The
function without its docstring and its name becomes the document. Nothing is downloaded and nothing is imported: files
are read and parsed. The same environment gives the same pairs in the same order, because files are visited in sorted
order and nothing depends on a set's order or on Python's hash of a string.

The held-out split holds out whole *distributions*, the units of installation (`matplotlib` owns `mpl_toolkits`, `torch`
owns `torchgen`). The whole standard library is the one package `stdlib`, because its modules copy each other (`decimal`
and `_pydecimal`, `os.path`, the `asyncio` event loops) and a split of it would leak.
"""

from __future__ import annotations

import gc
import os
import re
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

from gircse.data.functions import CodePair, pairs_of_file
from gircse.data.retrieval_task import RetrievalTask
from gircse.data.rows import Row
from gircse.integers import check_integer

INSTRUCTION = "Given a description of what a function does, retrieve its code"
STDLIB = "stdlib"

MAX_SAME_SUMMARY = 3  # a summary that more functions share describes none of them
NEAR_DUPLICATE = 0.8  # two functions are copies from this share of equal lines on

_OWN = frozenset({"gircse", "gircse_kernels"})  # the corpus must not change when this package does
_SKIPPED_DIRS = re.compile(
    r"__pycache__|site-packages|dist-packages|node_modules|.*\.dist-info|.*\.libs|"
    r"_?tests?|_?testing|test_?data|idle_test|benchmarks|"
    r"_?vendor(?:s|ed)?|_?(?:third|3rd)_?party|_?external(?:s)?|_?externs?|_?bundled|array_api_(?:compat|extra)",
    re.IGNORECASE,
)
_TEST_FILE = re.compile(r"(?:test_.*|.*_tests?|tests?|conftest)\.py")


def default_roots() -> list[Path]:
    """The folders of the standard library and of the installed packages of the running interpreter."""
    paths = sysconfig.get_paths()
    return [Path(p) for p in dict.fromkeys(paths[k] for k in ("stdlib", "purelib", "platlib"))]


def _owners(root: Path) -> dict[str, str]:
    """{top-level name in `root`: the distribution that installed it}, read from the RECORD files."""
    owners: dict[str, str] = {}
    for info in sorted(root.glob("*.dist-info")):
        distribution = re.sub(r"[-_.]+", "-", info.name.split("-")[0]).lower()
        try:
            record = (info / "RECORD").read_text("utf-8", errors="replace")
        except OSError:
            continue
        for line in record.split("\n"):
            top = line.split(",")[0].split("/")[0]
            if top and not top.endswith((".dist-info", ".data")) and top != "..":
                owners.setdefault(top, distribution)
    return owners


def _files(root: Path, owners: dict[str, str]) -> Iterator[tuple[Path, str, str]]:
    """(path, package, module) of the Python files below `root`, sorted, without tests, vendored copies and gircse."""
    is_stdlib = os.path.realpath(root) == os.path.realpath(sysconfig.get_paths()["stdlib"])
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(d for d in folders if not _SKIPPED_DIRS.fullmatch(d))
        parts = Path(folder).relative_to(root).parts
        for file in sorted(files):
            if not file.endswith(".py") or _TEST_FILE.fullmatch(file):
                continue
            top = parts[0] if parts else file
            package = STDLIB if is_stdlib else owners.get(top, top.removesuffix(".py"))
            if package not in _OWN:
                module = ".".join((*parts, file.removesuffix(".py"))).removesuffix(".__init__")
                yield Path(folder, file), package, module


def _normal(text: str) -> str:
    """Letters and digits in lower case, with one blank for anything between."""
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


class _Content(NamedTuple):
    """What decides whether two pairs are copies. Lines are numbers, because `hash` of a string differs between runs."""

    summary: str
    code: str
    lines: list[int]

    @classmethod
    def of(cls, pair: CodePair) -> _Content:
        stripped = (re.sub(r"\s+", "", line) for line in pair.code.split("\n")[1:])
        lines = sorted({crc32(line.encode()) for line in stripped if len(line) >= 10 and line[0] != "#"})
        return cls(_normal(pair.summary), _normal(pair.code), lines)


class _Seen:
    """The contents of pairs, among which it finds copies: the same summary, the same code, or most lines of a code."""

    _MOST = 32  # functions kept for a line; a line that more functions have says nothing about copying

    def __init__(self) -> None:
        self._texts: set[str] = set()
        self._where: defaultdict[int, list[int]] = defaultdict(list)  # {line: functions that have it}
        self._sizes: list[int] = []

    def __contains__(self, content: _Content) -> bool:
        if content.summary in self._texts or content.code in self._texts:
            return True
        shared: Counter[int] = Counter()
        for line in content.lines:
            shared.update(self._where.get(line, ()))
        size = len(content.lines)
        return any(n >= 2 and n >= NEAR_DUPLICATE * max(self._sizes[i], size) for i, n in shared.items())

    def add(self, content: _Content) -> None:
        self._texts |= {content.summary, content.code}
        for line in content.lines:
            where = self._where[line]
            if len(where) < self._MOST:
                where.append(len(self._sizes))
        self._sizes.append(len(content.lines))


def deduplicate(pairs: Iterable[CodePair]) -> list[CodePair]:
    """The pairs that copy no earlier one. Summaries that more than MAX_SAME_SUMMARY different functions share are
    dropped."""
    pairs = list(pairs)
    contents = [_Content.of(pair) for pair in pairs]
    functions = Counter(summary for summary, _ in {content[:2]: None for content in contents})
    seen, kept = _Seen(), []
    for pair, content in zip(pairs, contents, strict=True):
        if functions[content.summary] <= MAX_SAME_SUMMARY and content not in seen:
            seen.add(content)
            kept.append(pair)
    return kept


def harvest(
    roots: Iterable[str | os.PathLike[str]] | None = None,
    *,
    packages: Collection[str] | None = None,
    progress: bool = False,
) -> list[CodePair]:
    """All clean, unique (summary, code) pairs of an environment, in a fixed order. Nothing is imported or written.

    Files that cannot be read, decoded or parsed are skipped without a warning.

    Args:
        roots: folders whose entries are packages or modules, such as site-packages; default: those of this interpreter.
        packages: only these distributions; "stdlib" is the standard library.
        progress: show a progress bar.
    """
    files = []
    for root in default_roots() if roots is None else map(Path, roots):
        files += [f for f in _files(root, _owners(root)) if packages is None or f[1] in packages]
    if progress:
        from tqdm import tqdm

        files = tqdm(files, desc="reading source files", unit="file")
    pairs: list[CodePair] = []
    collecting = gc.isenabled()
    gc.disable()  # syntax nodes have no cycles, so that the collector only costs time
    try:
        for path, package, module in files:
            pairs += pairs_of_file(path, package, module)
    finally:
        if collecting:
            gc.enable()
    return deduplicate(pairs)


# Held out if installed. They come with torch, matplotlib and sympy, resemble no training package, and give about
# 2,900 functions.
_PREFERRED_TEST = ("networkx", "fonttools", "mpmath", "rich", "werkzeug", "pillow", "jinja2")


@dataclass(frozen=True)
class Split:
    """Training pairs, and held-out pairs of other packages."""

    train: list[CodePair]
    test: list[CodePair]
    test_packages: tuple[str, ...]


def _stable_key(seed: int, *texts: str) -> int:
    return crc32("\0".join((str(seed), *texts)).encode("utf-8", "surrogatepass"))


def default_test_packages(pairs: Sequence[CodePair], *, fraction: float = 0.06, seed: int = 0) -> tuple[str, ...]:
    """The installed packages of a preferred list, then small packages in an order drawn by `seed`, up to `fraction` of
    the pairs. A package with more than twice that share is not held out, so that training keeps the large ones.

    Raises:
        ValueError: no package can be held out.
    """
    sizes = Counter(p.package for p in pairs)
    wanted = fraction * len(pairs)
    chosen: list[str] = []
    others = sorted((name for name in sizes if name not in _PREFERRED_TEST), key=lambda n: (_stable_key(seed, n), n))
    for name in (*_PREFERRED_TEST, *others):
        if sum(sizes[n] for n in chosen) >= wanted and name not in _PREFERRED_TEST:
            break
        if 0 < sizes[name] <= 2 * wanted and len(chosen) + 1 < len(sizes):
            chosen.append(name)
    if not chosen:
        raise ValueError(f"pairs: got packages of {dict(sizes)} pairs, expected two or more of moderate size")
    return tuple(sorted(chosen))


def split(
    pairs: Iterable[CodePair],
    *,
    test_packages: Collection[str] | None = None,
    fraction: float = 0.06,
    seed: int = 0,
) -> Split:
    """Holds out whole packages (default: `default_test_packages`); both sides are in the order of `pairs`.

    A training pair that copies a held-out one is dropped, so that nothing that is tested was trained on.

    Raises:
        ValueError: one side would be empty.
    """
    pairs = list(pairs)
    held = tuple(sorted(set(test_packages))) if test_packages is not None else None
    held = held or default_test_packages(pairs, fraction=fraction, seed=seed)
    test = [p for p in pairs if p.package in held]
    seen = _Seen()
    for pair in test:
        seen.add(_Content.of(pair))
    train = [p for p in pairs if p.package not in held and _Content.of(p) not in seen]
    if not train or not test:
        raise ValueError(f"test_packages: got {held}, which leave {len(train)} training and {len(test)} test pairs")
    return Split(train, test, held)


def to_rows(pairs: Iterable[CodePair]) -> list[Row]:
    """The pairs as training rows without hard negatives."""
    return [Row(INSTRUCTION, pair.summary, (pair.code,)) for pair in pairs]


def evaluation_set(
    pairs: Iterable[CodePair], *, num_queries: int = 500, max_documents: int = 2000, seed: int = 0
) -> RetrievalTask:
    """At most `max_documents` of the pairs' codes as documents, and `num_queries` of their summaries as queries.

    Which pairs are drawn depends on `seed` and on each pair's own text, so that one pair more or less changes little.

    Raises:
        ValueError: there is no pair, or a size is below 1.
    """
    check_integer("num_queries", num_queries, least=1)
    check_integer("max_documents", max_documents, least=1)
    drawn = sorted(pairs, key=lambda p: (_stable_key(seed, p.summary, p.code), p.summary, p.code))[:max_documents]
    if not drawn:
        raise ValueError("pairs: got none, expected one or more")
    count = min(num_queries, len(drawn))
    queries = [p.summary for p in drawn[:count]]
    # Documents are in another order than queries, so that a ranking by position does not look good.
    order = sorted(range(len(drawn)), key=lambda i: (_stable_key(seed + 1, drawn[i].code), i))
    place = {pair: position for position, pair in enumerate(order)}
    documents = [drawn[i].code for i in order]
    return RetrievalTask(INSTRUCTION, queries, documents, [{place[i]} for i in range(count)])
