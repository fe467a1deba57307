"""The table of docs/scale.md: a corpus on Ray against one process."""

from __future__ import annotations

from bench import ray_encode
from bench.blocks_performance import versions
from bench.documents import Results, block
from bench.tables import filled, markdown


@block("ray-encode")
def ray(results: Results) -> str:
    parts = []
    for name, record in results.of("ray-encode").items():
        columns = filled(ray_encode.COLUMNS, record["points"])
        origin = f"`{name}.json`{results.mark(record)}: `python bench/ray_encode.py`, {versions([record])}"
        parts += [origin, markdown(columns, record["points"])]
    return "\n\n".join(parts) or "no record yet: `python bench/ray_encode.py`"
