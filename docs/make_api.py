#!/usr/bin/env python
"""Write docs/api.md: signature and first paragraph of the docstring of every public name. `--check` only compares.

The sources are parsed and not imported, so the page does not depend on what is installed.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "api.md"
OPENING = """# Public names

`python docs/make_api.py` writes this page from the docstrings, of which it shows the first paragraph. The linked files
describe the arguments with shapes, dtypes, units and errors. `GIRCSE` inherits the methods of `Embedder`.
"""
# public module: {source file: names; "Class.method" for a method}
NAMES = {
    "gircse": {
        "model": (
            *("GIRCSE", "GIRCSE.from_pretrained", "GIRCSE.save_pretrained"),
            *("GIRCSE.encode", "GIRCSE.encode_stream", "GIRCSE.inspect"),
        ),
        "embedder": (
            *("Embedder.rollout", "Embedder.pool", "Embedder.train"),
            *("Embedder.merge_adapter", "Embedder.unmerge_adapter", "Embedder.quantize_weights"),
        ),
        "lm.config": ("GircseConfig",),
        "ops.head_facts": ("UnsupportedModelError",),
        "engine.engine": ("Engine", "Engine.states", "EngineReport"),
        "engine.config": ("EngineConfig",),
        "sentence_transformers.loading": ("load",),
    },
    "gircse.ops": {
        "ops.soft_embed": ("soft_embed", "SoftTokenStats", "FullStats"),
        "ops.soft_embed_logits": ("soft_embed_logits",),
        "ops.top_tokens": ("top_tokens",),
        "ops.module": ("from_model", "SoftEmbedding"),
        "ops.head_facts": ("HeadFacts",),
        "ops.vocab_parallel": ("VocabShard",),
        "ops.info_nce": ("stepwise_info_nce", "InfoNCEStats"),
        "ops.objective": ("icr_objective",),
        "ops.pooling": ("pool_steps", "l2_normalize"),
    },
    "gircse.train, gircse.train_config": {"train.loop": ("train", "TrainResult"), "train.config": ("TrainConfig",)},
    "gircse.corpora": {
        "corpora.job": ("EncodeJob",),
        "corpora.text_encoder": ("TextEncoder",),
        "corpora.ray_data": ("encode_dataset",),
    },
    "gircse.sentence_transformers": {
        "sentence_transformers.module": ("GIRCSEModule",),
        "sentence_transformers.losses": ("GIRCSELoss", "CachedGIRCSELoss"),
        "sentence_transformers.callback": ("SoftTokenGradientCallback",),
    },
}


def page() -> str:
    parts = [OPENING]
    for title, files in NAMES.items():
        parts.append(f"\n## {title}\n")
        for module, names in files.items():
            path = f"gircse/{module.replace('.', '/')}.py"
            tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
            parts += [f"\n[`{signature(tree, name)}`](../{path})\n\n{summary(tree, name)}\n" for name in names]
    return "".join(parts)


def signature(tree: ast.AST, name: str) -> str:
    """The name and, of a function or a class with `__init__`, the arguments without their types."""
    node = definition(tree, name)
    if isinstance(node, ast.ClassDef):
        node = next((part for part in node.body if getattr(part, "name", None) == "__init__"), None)
    if not isinstance(node, ast.FunctionDef):
        return name
    arguments = node.args
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
        if argument is not None:
            argument.annotation = None
    text = ast.unparse(arguments)
    return f"{name}({text.removeprefix('self, ').removeprefix('cls, ').removeprefix('self')})"


def summary(tree: ast.AST, name: str) -> str:
    text = ast.get_docstring(definition(tree, name))
    assert text, f"{name} has no docstring"
    return text.split("\n\n")[0].removesuffix("::")


def definition(tree: ast.AST, name: str) -> ast.AST:
    """The last one of the name, which of an overloaded function is the implementation."""
    for part in name.split("."):
        tree = [node for node in ast.iter_child_nodes(tree) if getattr(node, "name", None) == part][-1]
    return tree


def main() -> int:
    text = page()
    if "--check" in sys.argv[1:]:
        return int(PAGE.read_text(encoding="utf-8") != text)
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
