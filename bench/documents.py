"""Documents whose tables and figures are rendered from JSON records: markers, blocks, stale marks, figures.

Text between ``<!-- table:NAME -->`` and ``<!-- end:NAME -->`` belongs to the renderer that is registered as NAME::

    # bench/blocks_something.py: every module of that form is found by `load_blocks`
    @block("something")
    def something(results: Results) -> str:
        record = results.named("something-cpu")
        return NO_RECORD if record is None else markdown(COLUMNS, record["points"]) + results.mark(record)

Everything follows from files: the same records and sources give the same document on any day and any machine. A figure
carries a digest of its data and of the code that drew it, so that it is drawn again only when it would change: the
bytes of a PNG differ between versions of matplotlib.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import pkgutil
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import bench
from bench.provenance import engine_hash, sources_hash
from gircse.files.atomic import new_file

Record = dict[str, Any]

STALE = " *(stale)*"  # what `same` leaves out of a comparison, so it must occur nowhere else
NO_RECORD = "no record yet: `python bench/gpu_suite.py --out bench/results`"

_BLOCK = re.compile(r"<!-- table:(?P<name>\S+) -->\n(?P<body>.*?)<!-- end:(?P=name) -->", re.DOTALL)
_OPENING = re.compile(r"<!-- table:\S+ -->")
_DIGEST = b"gircse-digest"


class DocumentError(ValueError):
    """A document that cannot be rendered; the message names file and line."""


class Figure(NamedTuple):
    """A plot that a document shows: `draw(data, path)` writes it."""

    data: Any
    draw: Callable[[Any, Path], object]

    def digest(self) -> str:
        data = json.dumps(self.data, sort_keys=True, default=str)
        return hashlib.sha256(f"{inspect.getsource(self.draw)}\0{data}".encode()).hexdigest()[:32]


class Results:
    """All JSON records below a folder, by their path in it without ".json".

    Attributes:
        records: in the order of their names.
        sources: hash of the present kernels; a record with another one is stale.
        engine_sources: of the present generation engine, which what ran on it was measured with.
        figures: what the blocks rendered so far show, by name.
    """

    def __init__(self, folder: Path, sources: str | None = None) -> None:
        self.sources = sources_hash() if sources is None else sources
        self.engine_sources = engine_hash()
        self.records: dict[str, Record] = {}
        self.figures: dict[str, Figure] = {}
        for path in sorted(folder.rglob("*.json")):
            found = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(found, dict):
                self.records[path.relative_to(folder).with_suffix("").as_posix()] = found

    def named(self, name: str) -> Record | None:
        return self.records.get(name)

    def of(self, benchmark: str) -> list[Record]:
        """The records of one kind of benchmark."""
        return [record for record in self.records.values() if record.get("benchmark") == benchmark]

    def mark(self, record: Record) -> str:
        """`STALE` where it was measured with other sources, or nobody knows with which; else nothing."""
        origin = record.get("provenance", {})
        # older records do not say which engine they had
        engine = origin.get("engine_sources", self.engine_sources) if _ran_the_engine(record) else self.engine_sources
        return "" if origin.get("sources") == self.sources and engine == self.engine_sources else STALE

    def figure(self, name: str, alt: str, data: Any, draw: Callable[[Any, Path], object]) -> str:
        """Has figures/NAME.png drawn from `data`, which JSON can hold. -> the line that shows it."""
        self.figures[name] = Figure(data, draw)
        return f"![{alt}](figures/{name}.png)"


def _ran_the_engine(record: Record) -> bool:
    """Encoding, as against an op or a training step."""
    if record.get("benchmark") == "scaling":
        return record["curve"].startswith("encode.")
    return record.get("benchmark") in ("throughput", "corpus")


Renderer = Callable[[Results], str]
_BLOCKS: dict[str, Renderer] = {}


def block(name: str) -> Callable[[Renderer], Renderer]:
    """Registers the renderer of ``<!-- table:NAME -->``."""

    def register(render: Renderer) -> Renderer:
        if name in _BLOCKS:
            raise ValueError(f"block: {name!r} is registered twice")
        _BLOCKS[name] = render
        return render

    return register


def load_blocks() -> None:
    """Imports every module `bench/blocks_*.py`."""
    for module in pkgutil.iter_modules(bench.__path__):
        if module.name.startswith("blocks_"):
            importlib.import_module(f"bench.{module.name}")


def render(path: Path, results: Results) -> str:
    """The document's text with all its blocks rendered.

    Raises:
        DocumentError: an unknown block, or one without its end.
    """
    text = path.read_text(encoding="utf-8")
    matches = {match.start(): match for match in _BLOCK.finditer(text)}
    for opening in _OPENING.finditer(text):
        where = f"{path}:{text.count(chr(10), 0, opening.start()) + 1}"
        match = matches.get(opening.start())
        if match is None:
            raise DocumentError(f"{where}: {opening[0]} has no end, or stands inside another block")
        if match["name"] not in _BLOCKS:
            known = ", ".join(sorted(_BLOCKS))
            raise DocumentError(f"{where}: got block {match['name']!r}, expected one of {known}")

    def replace(match: re.Match[str]) -> str:
        name = match["name"]
        return f"<!-- table:{name} -->\n\n{_BLOCKS[name](results).strip()}\n\n<!-- end:{name} -->"

    return _BLOCK.sub(replace, text)


def same(ours: str, theirs: str) -> bool:
    """Equal but for stale marks: sources change with every commit, measurements do not."""
    return ours.replace(STALE, "") == theirs.replace(STALE, "")


def write(path: Path, text: str) -> None:
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def is_drawn(path: Path, figure: Figure) -> bool:
    """Whether the file there shows this."""
    return path.is_file() and _text_chunk(figure) in path.read_bytes()[:512]


def draw(path: Path, figure: Figure) -> None:
    with new_file(path) as temporary:
        figure.draw(figure.data, temporary)
        png = temporary.read_bytes()
        header = 8 + 25  # signature and IHDR
        temporary.write_bytes(png[:header] + _text_chunk(figure) + png[header:])


def _text_chunk(figure: Figure) -> bytes:
    """A PNG comment: length, type, keyword and text, checksum."""
    body = b"tEXt" + _DIGEST + b"\0" + figure.digest().encode()
    return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
