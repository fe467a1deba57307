"""Real text for the demo: (what a function does, its code) pairs out of the Python environment itself.

Every installed package carries thousands of functions with a docstring. The docstring's first paragraph becomes the
query, the function without its docstring and without its name becomes the document. Nothing is downloaded and nothing
is imported: files are read and parsed. The same environment gives the same pairs in the same order, because files are
visited in sorted order and no set or hash of a string ever decides anything.

The unit of the held-out split is the *distribution* that a file was installed by (`matplotlib` owns `mpl_toolkits`,
`torch` owns `torchgen`), and the whole standard library is the one package `stdlib`: its modules copy each other
(`decimal` and `_pydecimal`, `os.path`, the `asyncio` event loops), so that a split inside of it would leak.
"""

from __future__ import annotations

import gc
import os
import re
import sysconfig
import warnings
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

from gircse.data.functions import CodePair, pairs_of_file
from gircse.data.retrieval_task import RetrievalTask

INSTRUCTION = "Given a description of what a function does, retrieve its code"
STDLIB = "stdlib"

MAX_SAME_SUMMARY = 3  # a summary that more functions than this share describes none of them
NEAR_DUPLICATE = 0.8  # share of equal lines from which two functions count as copies of each other

_OWN = frozenset({"gircse", "gircse_kernels"})  # the corpus must not change when we edit ourselves
_SKIPPED_DIRS = re.compile(
    r"__pycache__|site-packages|dist-packages|node_modules|.*\.dist-info|.*\.libs|"
    r"_?tests?|_?testing|test_?data|idle_test|benchmarks|"
    r"_?vendor(?:s|ed)?|_?(?:third|3rd)_?party|_?external(?:s)?|_?externs?|_?bundled|array_api_(?:compat|extra)",
    re.IGNORECASE,
)
_TEST_FILE = re.compile(r"(?:test_.*|.*_tests?|tests?|conftest)\.py")


# ---------------------------------------------------------------- the environment


def default_roots() -> list[Path]:
    """The standard library's folder and the folder(s) of installed packages of the running interpreter."""
    paths = sysconfig.get_paths()
    return [Path(p) for p in dict.fromkeys(paths[k] for k in ("stdlib", "purelib", "platlib"))]


def _owners(root: Path) -> dict[str, str]:
    """Top-level name in `root` -> distribution that installed it, read from the RECORD files."""
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
    """(path, package, module) of the Python files below `root`, sorted; no tests, no vendored copies, not ourselves."""
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
    """Letters and digits in lower case, everything else one blank: what counts as the same text."""
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


def _line_keys(code: str) -> list[int]:
    """The distinct telling lines of a function. crc32 because `hash` of a string differs from run to run."""
    kept = (re.sub(r"\s+", "", line) for line in code.split("\n")[1:])
    return sorted({crc32(line.encode()) for line in kept if len(line) >= 10 and line[0] != "#"})


class _NearDuplicates:
    """Finds functions that share most of their lines with one seen before, through an index from line to function."""

    _FULL = 32  # a line in that many functions tells nothing about copying, and following it would cost the most

    def __init__(self) -> None:
        self._where: defaultdict[int, list[int]] = defaultdict(list)
        self._sizes: list[int] = []

    def find(self, keys: Sequence[int]) -> bool:
        shared: Counter[int] = Counter()
        for key in keys:
            shared.update(self._where.get(key, ()))
        return any(n >= 2 and n >= NEAR_DUPLICATE * max(self._sizes[i], len(keys)) for i, n in shared.items())

    def add(self, keys: Sequence[int]) -> None:
        for key in keys:
            where = self._where[key]
            if len(where) < self._FULL:
                where.append(len(self._sizes))
        self._sizes.append(len(keys))


def deduplicate(pairs: Iterable[CodePair]) -> list[CodePair]:
    """The pairs whose summary and code (normalised) occur for the first time and copy no earlier function's lines.

    Summaries that more than MAX_SAME_SUMMARY different functions share are dropped altogether.
    """
    pairs = list(pairs)
    summaries = [_normal(p.summary) for p in pairs]
    codes = [_normal(p.code) for p in pairs]
    different = Counter(summary for summary, _ in dict.fromkeys(zip(summaries, codes, strict=True)))
    seen_summaries: set[str] = set()
    seen_codes: set[str] = set()
    near = _NearDuplicates()
    kept = []
    for pair, summary, code in zip(pairs, summaries, codes, strict=True):
        if different[summary] > MAX_SAME_SUMMARY or summary in seen_summaries or code in seen_codes:
            continue
        keys = _line_keys(pair.code)
        if near.find(keys):
            continue
        seen_summaries.add(summary)
        seen_codes.add(code)
        near.add(keys)
        kept.append(pair)
    return kept


def harvest(
    roots: Iterable[str | os.PathLike[str]] | None = None,
    *,
    packages: Collection[str] | None = None,
    progress: bool = False,
) -> list[CodePair]:
    """All clean, unique (summary, code) pairs of an environment, in a fixed order. Reads files, imports and writes
    nothing.

    roots: folders whose entries are packages or modules, such as site-packages (default: those of this interpreter).
    packages: only these distributions ("stdlib" is the standard library). progress: show a progress bar.
    Files that cannot be read, decoded or parsed are skipped without a word.
    """
    files = []
    for root in default_roots() if roots is None else map(Path, roots):
        files += [f for f in _files(root, _owners(root)) if packages is None or f[1] in packages]
    if progress:
        from tqdm import tqdm

        files = tqdm(files, desc="reading source files", unit="file")
    found: list[CodePair] = []
    collecting = gc.isenabled()
    gc.disable()  # millions of short-lived syntax nodes without cycles: the collector only costs time
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes and the like in other people's code
            for path, package, module in files:
                found += pairs_of_file(path, package, module)
    finally:
        if collecting:
            gc.enable()
    return deduplicate(found)


# ---------------------------------------------------------------- training and evaluation sets

# Held out where installed: graphs, fonts, numerics, terminals, web, images and templates come with torch, matplotlib
# and sympy, resemble no training package closely, and give about 2,900 functions.
_PREFERRED_TEST = ("networkx", "fonttools", "mpmath", "rich", "werkzeug", "pillow", "jinja2")


@dataclass(frozen=True)
class Split:
    """Training pairs and held-out pairs of other packages."""

    train: list[CodePair]
    test: list[CodePair]
    test_packages: tuple[str, ...]


def _stable_key(seed: int, *texts: str) -> int:
    return crc32("\0".join((str(seed), *texts)).encode("utf-8", "surrogatepass"))


def default_test_packages(pairs: Sequence[CodePair], *, fraction: float = 0.06, seed: int = 0) -> tuple[str, ...]:
    """A preferred list as far as it is installed, then small packages in an order drawn by `seed`, up to `fraction`
    of the pairs.

    A package with more than twice that share is never taken: training keeps the large ones. Raises ValueError if
    nothing is left.
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
        raise ValueError(f"no package to hold out: need two or more packages of moderate size, got {dict(sizes)}")
    return tuple(sorted(chosen))


def split(
    pairs: Iterable[CodePair],
    *,
    test_packages: Collection[str] | None = None,
    fraction: float = 0.06,
    seed: int = 0,
) -> Split:
    """Holds out whole packages (default: `default_test_packages`), both sides in the order of `pairs`.

    A training pair whose summary or code (normalised) occurs in the held-out packages, or that copies most lines of a
    held-out function, is dropped: what is tested was never trained on. Raises ValueError if one side is empty.
    """
    pairs = list(pairs)
    held = tuple(sorted(set(test_packages))) if test_packages is not None else None
    held = held or default_test_packages(pairs, fraction=fraction, seed=seed)
    test = [p for p in pairs if p.package in held]
    texts = {_normal(p.summary) for p in test} | {_normal(p.code) for p in test}
    near = _NearDuplicates()
    for pair in test:
        near.add(_line_keys(pair.code))
    train = [
        p
        for p in pairs
        if p.package not in held
        and _normal(p.summary) not in texts
        and _normal(p.code) not in texts
        and not near.find(_line_keys(p.code))
    ]
    if not train or not test:
        raise ValueError(
            f"test_packages {held} leave {len(train)} training and {len(test)} test pairs, both are needed"
        )
    return Split(train, test, held)


def to_rows(pairs: Iterable[CodePair]) -> list[dict[str, str | list[str]]]:
    """The pairs as training rows {"prompt", "query", "pos", "neg"} (docs/method.md §7) without hard negatives."""
    return [{"prompt": INSTRUCTION, "query": p.summary, "pos": [p.code], "neg": []} for p in pairs]


def evaluation_set(
    pairs: Iterable[CodePair], *, num_queries: int = 500, max_documents: int = 2000, seed: int = 0
) -> RetrievalTask:
    """At most `max_documents` of the pairs' codes as the corpus, and `num_queries` of their summaries as the queries.

    Both are drawn by `seed` and the texts themselves, so that a pair more or less elsewhere changes little. Raises
    ValueError for no pairs or sizes below 1.
    """
    if min(num_queries, max_documents) < 1:
        raise ValueError(f"num_queries and max_documents must be at least 1, got {num_queries} and {max_documents}")
    drawn = sorted(pairs, key=lambda p: (_stable_key(seed, p.summary, p.code), p.summary, p.code))[:max_documents]
    if not drawn:
        raise ValueError("pairs is empty")
    count = min(num_queries, len(drawn))
    queries = [p.summary for p in drawn[:count]]
    # The documents are put in another order than the queries: a ranking that follows the position must not look good.
    order = sorted(range(len(drawn)), key=lambda i: (_stable_key(seed + 1, drawn[i].code), i))
    place = {pair: position for position, pair in enumerate(order)}
    documents = [drawn[i].code for i in order]
    return RetrievalTask(INSTRUCTION, queries, documents, [{place[i]} for i in range(count)])
