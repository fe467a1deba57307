#!/usr/bin/env python
"""The inner loops of forms 1 and 2 beside those of the kernels that were timed, without a GPU.

    python -m bench.static.loops                 # a table for sm_90, with the Triton that is installed

Two kernels that compile to the same loop run at the same speed. Sketches of both forms were timed on an H200; what
Triton made of their loops is kept in `loops.json`: instructions by kind, registers, shared memory, and the milliseconds
of the call, which had no options. A kernel of ours that needs more is slower; an option that is off must not add
anything. Needs a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import triton

from bench.static.compile_report import compiled, dump
from bench.static.launches import DEVICES, Call, Launch, launches

REFERENCES = Path(__file__).with_name("loops.json")
KINDS = {  # the first pattern that matches an opcode of the assembler names its kind
    "tensor core": r"HMMA|HGMMA",
    "global to shared": r"LDGSTS|UTMALDG",
    "global load": r"LDG\b",
    "shared load": r"LDS",
    "shared store": r"STS",
    "exponential": r"MUFU",
    "float32": r"F(FMA|MUL|ADD|MNMX|SEL|SETP)",
    "conversion": r"F2F|PRMT|HADD2|I2F|F2I",
    "integer": r"I(MAD|ADD3|SETP|MNMX)|LEA|SHF|LOP3|SEL|MOV|UIADD3|ULEA|USHF|ULOP3",
    "shuffle": r"SHFL|REDUX",
    "barrier": r"BAR|DEPBAR|WARPSYNC|SYNCS|WARPGROUP",
}
WORK = r"HMMA|HGMMA|FFMA|LDG|UTMALDG|MUFU"  # by which the main loop is recognised


class Loop(NamedTuple):
    """The main loop of a compiled kernel, for one warp and one turn."""

    counts: dict[str, int]  # instructions by kind; "other" has the rest
    registers: int
    shared: int

    @property
    def instructions(self) -> int:
        return sum(self.counts.values())


def loop_of(launch: Launch, arch: int) -> Loop:
    """The loop with the most work in it: of all backward branches the one that spans it."""
    kernel = compiled(launch, arch)
    registers = re.search(r"REG:(\d+)", dump(kernel, "cuobjdump", "--dump-resource-usage"))
    assert registers is not None
    return Loop(_main_loop(dump(kernel, "nvdisasm", "-c").splitlines()), int(registers[1]), kernel.metadata.shared)


def _main_loop(lines: list[str]) -> dict[str, int]:
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    spans = []
    for line in lines:
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(opcodes)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)(.*);", line):
            target = re.search(r"\.L_x_\d+", found[2]) if found[1].startswith("BRA") else None
            if target and target[0] in labels:
                spans.append((labels[target[0]], len(opcodes) + 1))
            opcodes.append(found[1])
    first, last = max(spans, key=lambda span: sum(bool(re.match(WORK, o)) for o in opcodes[slice(*span)]))
    return dict(Counter(map(_kind, opcodes[first:last])).most_common())


def _kind(opcode: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.match(pattern, opcode)), "other")


def compare() -> list[dict[str, Any]]:
    """For each timed case: what was timed, and the loop that the plan runs in its place on an H100 or H200."""
    version = triton.__version__.rsplit(".", 1)[0]
    cases = json.loads(REFERENCES.read_text())
    for case in cases:
        launch = launches(Call("soft_embed", tuple(case["sizes"]), "bfloat16"), DEVICES[90])[0]
        config = launch.config
        case["timed"] = case.pop("loops").get(version)
        case["ours"] = loop_of(launch, 90)._asdict()
        case["same config"] = [dict(config.blocks), config.num_warps, config.num_stages] == [
            case["blocks"], case["num_warps"], case["num_stages"]
        ]  # fmt: skip
    return cases


def main() -> int:
    cases = compare()
    if "--json" in sys.argv:
        print(json.dumps(cases))
        return 0
    for case in cases:
        print(f"{case['name']}: {case['milliseconds']} ms on an H200; blocks {case['blocks']}")
        for which in ("timed", "ours"):
            if case[which]:
                loop = Loop(**case[which])
                kinds = ", ".join(f"{kind} {count}" for kind, count in loop.counts.items())
                size = f"{loop.instructions} instructions, {loop.registers} registers, {loop.shared} bytes shared"
                print(f"  {which:5s} {size}: {kinds}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
