"""What a record was measured with: a hash of every file that its numbers depend on, found by following imports.

A kind of record (`record["benchmark"]`) is measured by a few modules. Everything of this checkout that these import,
directly or through others, inside functions too, is hashed: bench's own measuring code, `gircse`, the kernels and their
config table. A record whose hash differs from the present one is stale. Modules that only show numbers are left out.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = {
    "gircse": ROOT / "gircse",
    "gircse_kernels": ROOT / "kernels" / "gircse_kernels",
    "bench": ROOT / "bench",
    "tests": ROOT / "tests",
}
# Kind of record -> the modules that measure it; a package stands for all of its modules. `bench.run` and the GPU suite
# give them a model of `bench.shapes` and the ceilings of `bench.floors`, which numbers of the record depend on too.
MEASURED_BY: dict[str, tuple[str, ...]] = {
    "big-batch": ("bench.big_batch",),
    "candidates": ("bench.suite.candidates",),
    "corpus": ("bench.corpus", "bench.floors", "bench.shapes"),
    "decode-attention": ("bench.suite.attention", "bench.floors"),
    "info_nce": ("bench.info_nce",),
    "info_nce-ranks": ("bench.info_nce",),
    "jacobi": ("bench.jacobi",),
    "kernels-compile": ("bench.compile_kernels",),
    "op": ("bench.op_measure", "bench.floors"),
    "plan": ("bench.plan_check",),
    "quality": ("bench.quality",),
    "ray-encode": ("bench.ray_encode",),
    "scaling": ("bench.sweep",),
    "summary": ("bench.suite",),
    "step": ("bench.suite.steps", "bench.floors", "bench.shapes"),
    "soft_embed": ("bench.soft_embed",),
    "soft-token-gradient": ("bench.soft_token_gradient",),
    "tests": ("tests.gpu", "tests.conftest"),
    "throughput": ("bench.throughput", "bench.encode_check", "bench.floors", "bench.shapes"),
    "train-step": ("bench.suite.train_steps", "bench.floors", "bench.shapes"),
    "training": ("bench.training", "bench.train_check", "bench.floors", "bench.shapes"),
}
_SHOWS = {f"bench.{name}" for name in ("documents", "plots", "provenance", "records", "sources", "tables")}


@cache
def sources_hash(benchmark: str) -> str:
    """16 hex digits over names and contents of everything that a record of this kind depends on."""
    digest = hashlib.sha256()
    for path in dependencies(MEASURED_BY[benchmark]).values():
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def dependencies(roots: tuple[str, ...]) -> dict[str, Path]:
    """The modules that `roots` import, themselves included, and the JSON files beside them: name -> file, sorted."""
    everything = modules()
    waiting = [name for root in roots for name in (root, *_below(root))]
    if unknown := [root for root in roots if root not in everything]:
        raise ValueError(f"dependencies: got {unknown[0]!r}, expected a module of this checkout")
    reached: dict[str, Path] = {}
    while waiting:
        name = waiting.pop()
        if name in reached or name in _SHOWS or name not in everything:
            continue
        reached[name] = everything[name]
        waiting += [*imports(name), name.rpartition(".")[0]]  # Python runs the `__init__` of each package on the way
    folders = {path.parent for path in reached.values()}
    data = {str(path.relative_to(ROOT)): path for folder in folders for path in folder.glob("*.json")}
    return dict(sorted((reached | data).items()))


@cache
def modules() -> dict[str, Path]:
    """Every module of this checkout by the name that it is imported by."""
    files = {}
    for package, folder in _PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = (package, *path.relative_to(folder).with_suffix("").parts)
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


@cache
def imports(name: str) -> frozenset[str]:
    """Modules that one module imports, wherever in it; not those that it imports for type checkers alone."""
    path = modules()[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    names: set[str] = set()
    for node in _executed(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, package)
            names |= {base} | {_home(base, alias.name) for alias in node.names}
        elif isinstance(node, ast.Call) and _last_name(node.func) == "import_module":
            names |= _computed(node.args[0], package)
    return frozenset(names)


def _executed(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but the bodies of `if TYPE_CHECKING:`."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        for child in ast.iter_child_nodes(node):
            checked = isinstance(child, ast.If) and _last_name(child.test) == "TYPE_CHECKING"
            waiting += child.orelse if checked else [child]


def _last_name(node: ast.expr) -> str:
    """`importlib.import_module` -> "import_module"."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _absolute(node: ast.ImportFrom, package: str) -> str:
    """`from ..a import b` in `package` -> the absolute name of `..a`."""
    if not node.level:
        return node.module or ""
    parts = package.split(".")[: len(package.split(".")) - node.level + 1]
    return ".".join([*parts, *([node.module] if node.module else [])])


@cache
def _home(package: str, name: str) -> str:
    """`from package import name` -> the module that this loads: a submodule, or where a package that loads its names
    late (`__getattr__`) says to type checkers that the name is from."""
    path = modules().get(package)
    if f"{package}.{name}" not in modules() and path is not None and path.name == "__init__.py":
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.ImportFrom) and name in {alias.asname or alias.name for alias in node.names}:
                return _absolute(node, package)
    return f"{package}.{name}"


def _computed(argument: ast.expr, package: str) -> set[str]:
    """The modules that `import_module(f"package.{name}")` may load."""
    first = argument.values[0] if isinstance(argument, ast.JoinedStr) else argument
    text = first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else ""
    return _below((package if text.startswith(".") else "") + text.rstrip(".")) | {text} if text else set()


def _below(package: str) -> set[str]:
    return {name for name in modules() if name.startswith(f"{package}.")}
