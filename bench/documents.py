"""Pages whose tables and figures are rendered from JSON records: markers, blocks, stale marks, figures.

Text between ``<!-- table:NAME -->`` and ``<!-- end:NAME -->`` belongs to the function that is registered as NAME::

    # bench/blocks_something.py: `load_blocks` imports every module of that form
    @block("something")
    def something(results: Results) -> str:
        record = results.records.get("something-cpu")
        return NO_RECORD if record is None else markdown(COLUMNS, record["points"]) + results.mark(record)

The same records and sources give the same page on any day and any machine. A figure carries a digest of its data and of
the code that draws it, so that it is drawn again only when it would change: the bytes of a PNG differ between versions
of matplotlib.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import pkgutil
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import bench
from bench import plots
from bench.sources import MEASURED_BY, sources_hash
from gircse.files.atomic import new_file

Record = dict[str, Any]

STALE = " *(stale)*"  # `same` leaves it out of the comparison, so pages must not contain it for another reason
NO_RECORD = "no record yet: `python bench/gpu_suite.py --out bench/results`"

_BLOCK = re.compile(r"<!-- table:(?P<name>\S+) -->\n(?P<body>.*?)<!-- end:(?P=name) -->", re.DOTALL)
_OPENING = re.compile(r"<!-- table:\S+ -->")
_NAMED = re.compile(rf"`(?P<name>[\w/.-]+)\.json`(?:{re.escape(STALE)})?")
_DIGEST = b"gircse-digest"


class DocumentError(ValueError):
    """A page that cannot be rendered; the message names file and line."""


class Results:
    """All JSON records below a folder.

    Attributes:
        records: path in the folder without ".json" -> record, in the order of the paths.
        figures: what the blocks rendered so far show: file name without ".png" -> figure.
    """

    def __init__(self, folder: Path) -> None:
        self.records: dict[str, Record] = {}
        self.figures: dict[str, plots.Figure] = {}
        for path in sorted(folder.rglob("*.json")):
            record = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(record, dict):
                self.records[path.relative_to(folder).with_suffix("").as_posix()] = record

    def of(self, *benchmarks: str) -> dict[str, Record]:
        """The records of these kinds, by name."""
        return {name: record for name, record in self.records.items() if record.get("benchmark") in benchmarks}

    def by_device(self, *benchmarks: str, cuda: bool) -> dict[str, list[Record]]:
        """The records of these kinds that were measured on GPUs, or on CPUs, by the name of the device."""
        devices: dict[str, list[Record]] = {}
        for record in self.of(*benchmarks).values():
            if bool(record["provenance"].get("cuda")) == cuda:
                devices.setdefault(record["provenance"]["device"], []).append(record)
        return dict(sorted(devices.items()))

    def mark(self, record: Record) -> str:
        """`STALE` where it was measured with other sources than the present ones, or does not say with which."""
        kind, sources = record.get("benchmark"), record.get("provenance", {}).get("sources")
        return "" if kind in MEASURED_BY and sources == sources_hash(kind) else STALE

    def figure(self, name: str, alt: str, figure: plots.Figure) -> str:
        """Has figures/NAME.png drawn. -> the line that shows it."""
        self.figures[name] = figure
        return f"![{alt}](figures/{name}.png)"


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
    """The page's text with all its blocks rendered; where it names a record that is stale elsewhere, a mark follows.

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

    def mark(match: re.Match[str]) -> str:
        record = results.records.get(match["name"].removeprefix("bench/results/"))
        return match[0] if record is None else f"`{match['name']}.json`{results.mark(record)}"

    return _BLOCK.sub(replace, _NAMED.sub(mark, text))


def same(ours: str, theirs: str) -> bool:
    """Equal but for stale marks: sources change with every commit, measurements do not."""
    return ours.replace(STALE, "") == theirs.replace(STALE, "")


def write(path: Path, text: str) -> None:
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def is_drawn(path: Path, figure: plots.Figure) -> bool:
    """Whether the file there shows this figure."""
    return path.is_file() and _comment(figure) in path.read_bytes()[:512]


def draw(path: Path, figure: plots.Figure) -> None:
    with new_file(path) as temporary:
        plots.draw(figure, temporary)
        png = temporary.read_bytes()
        header = 8 + 25  # signature and IHDR
        temporary.write_bytes(png[:header] + _comment(figure) + png[header:])


def _comment(figure: plots.Figure) -> bytes:
    """A PNG comment with the figure's digest: length, type, keyword and text, checksum."""
    data = json.dumps(asdict(figure), sort_keys=True, default=list)
    digest = hashlib.sha256(Path(plots.__file__).read_bytes() + data.encode()).hexdigest()[:32]
    body = b"tEXt" + _DIGEST + b"\0" + digest.encode()
    return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
