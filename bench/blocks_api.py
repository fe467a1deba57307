"""The page of the public names, docs/api.md, made from their signatures and docstrings."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from typing import Any, ForwardRef

from bench.documents import Results, block

# Module -> the names of it that are shown; none: its `__all__`.
MODULES: dict[str, tuple[str, ...]] = {
    "gircse": (),
    "gircse.ops": (),
    "gircse.train": (),
    "gircse.train_config": ("TrainConfig",),
}


@block("api")
def api(_: Results) -> str:
    return "\n\n".join(part for module in MODULES for part in _module(module))


def _module(name: str) -> Iterator[str]:
    module: Any = importlib.import_module(name)
    yield f"## {name}"
    for public in MODULES[name] or module.__all__:
        member = getattr(module, public)
        if not (inspect.ismodule(member) or isinstance(member, str)):
            yield f"### {name}.{public}"
            yield _fenced(public, member)
            if inspect.isclass(member):
                yield from _methods(public, member)


def _methods(owner: str, cls: type) -> Iterator[str]:
    """What the class itself defines under a public name, with a docstring."""
    for name, member in vars(cls).items():
        function = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
        if not name.startswith("_") and inspect.isroutine(function) and function.__doc__:
            yield f"#### {owner}.{name}"
            yield _fenced(f"{owner}.{name}", function)


def _fenced(name: str, member: Any) -> str:
    return f"```text\n{name}{_signature(member)}\n\n{inspect.getdoc(member) or ''}".rstrip() + "\n```"


def _signature(member: Any) -> str:
    """Arguments with types and defaults; a line for each where there are more than two."""
    if inspect.isclass(member) and issubclass(member, Exception):
        return ""
    signature, arguments, kinds = inspect.signature(member), [], []
    for parameter in signature.parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.kind not in kinds:
            arguments.append("*")
        kinds.append(parameter.kind)
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        kind = "" if parameter.annotation is parameter.empty else f": {_annotation(parameter.annotation)}"
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        arguments.append(f"{stars}{parameter.name}{kind}{default}")
    lines = "".join(f"    {argument},\n" for argument in arguments)
    shown = f"(\n{lines})" if len(kinds) > 2 else f"({', '.join(arguments)})"
    return shown + ("" if inspect.isclass(member) else f" -> {_annotation(signature.return_annotation)}")


def _annotation(annotation: Any) -> str:
    """As it is written in the source."""
    if isinstance(annotation, ForwardRef):
        return annotation.__forward_arg__
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
