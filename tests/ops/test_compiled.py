"""torch.compile and torch.export of the public ops: whole graphs, new numbers, what is traced."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import gircse
from gircse.ops import SoftEmbedding, info_nce_op, soft_embed, stepwise_info_nce, top_tokens

HIDDEN, HEAD = torch.randn(5, 8), torch.randn(37, 8)
SEEDS = torch.arange(5)


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


NUMBERS: dict[str, Callable[[float], Any]] = {
    "temperature": lambda t: soft_embed(HIDDEN, HEAD, temperature=t),
    "both temperatures": lambda t: soft_embed(
        HIDDEN, HEAD, temperature=2 * t, gumbel_temperature=t, gumbel_seed=SEEDS, softcap=3.0
    ),
    "truncated": lambda t: soft_embed(HIDDEN, HEAD, temperature=t, top_p=t / 5, min_p=t / 50),
    "top_k": lambda t: soft_embed(HIDDEN, HEAD, top_k=t),
    "top_tokens": lambda t: top_tokens(HIDDEN, HEAD, 3, temperature=t)[1],
}


@pytest.mark.parametrize("name", NUMBERS)
def test_new_numbers_need_no_new_graph(name: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(NUMBERS[name], fullgraph=True, backend=counter)
    for i in range(12):
        t = i + 2 if name == "top_k" else 0.31 + 0.3 * i
        torch.testing.assert_close(compiled(t), NUMBERS[name](t), rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 2  # the second number is the first that varies


def test_annealed_temperature_in_training() -> None:
    compiled = torch.compile(soft_embed, fullgraph=True, backend="aot_eager")
    for i in range(3):
        options = {"temperature": 0.7 + i / 7, "gumbel_seed": SEEDS, "gumbel_temperature": 0.5 + i / 9}
        grads = []
        for function in (soft_embed, compiled):
            hidden, head = HIDDEN.double().requires_grad_(), HEAD.double().requires_grad_()
            function(hidden, head, **options).square().sum().backward()
            grads.append((hidden.grad, head.grad))
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("all_options", [False, True])
def test_contrastive_loss(autocast: bool, all_options: bool) -> None:
    """One operator in the graph, whatever the number of rows; bitwise the eager losses and gradients."""

    def function(queries: Tensor, docs: Tensor, target: Tensor, mask: Tensor | None) -> Any:
        return stepwise_info_nce(
            queries, docs, target, mask=mask, include_queries=all_options, symmetric=all_options, return_stats=True
        )

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for rows in (4, 6, 7, 9):
        target = torch.arange(rows) * 2
        mask = (torch.arange(rows)[:, None] * 2 + 1 == torch.arange(2 * rows)) if all_options else None
        found = []
        for each in (function, compiled):
            generator = torch.Generator().manual_seed(rows)
            queries = torch.randn(rows, 3, 8, generator=generator, requires_grad=True)
            docs = torch.randn(2 * rows, 3, 8, generator=generator, requires_grad=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                losses, stats = each(queries, docs, target, mask)
                losses.square().sum().backward()
            found.append((losses, *stats, queries.grad, docs.grad))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert counter.frame_count == 2


class _LanguageModel(nn.Module):
    """What a soft embedding asks a model for."""

    def __init__(self, embed_scale: float = 1.0, softcap: float | None = None) -> None:
        super().__init__()
        self.head, self.table = nn.Linear(8, 37), nn.Embedding(37, 8)
        self.table.embed_scale = embed_scale  # type: ignore[assignment]
        self.config = SimpleNamespace(final_logit_softcapping=softcap)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def get_input_embeddings(self) -> nn.Module:
        return self.table


def test_module_and_top_tokens() -> None:
    soft = SoftEmbedding(_LanguageModel(embed_scale=2.0, softcap=5.0))

    def function(hidden: Tensor) -> Any:
        return soft(hidden, temperature=0.7, return_stats=True), soft.top_tokens(hidden, 3)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (5, 7):
        (ours, stats), (ids, probs) = compiled(torch.ones(rows, 2, 8).cumsum(0))
        (expected, expected_stats), (expected_ids, expected_probs) = function(torch.ones(rows, 2, 8).cumsum(0))
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(tuple(stats), tuple(expected_stats))
        assert torch.equal(ids, expected_ids)
        torch.testing.assert_close(probs, expected_probs)


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.9, "gumbel_seed": 3}], ids=str)
def test_export_with_a_dynamic_batch(options: dict[str, Any]) -> None:
    class Module(nn.Module):
        def forward(self, hidden: Tensor, head: Tensor) -> Any:
            return soft_embed(hidden, head, temperature=0.7, **options)

    shapes = ({0: torch.export.Dim("batch")}, None)
    exported = torch.export.export(Module(), (torch.randn(3, 2, 8), HEAD), dynamic_shapes=shapes).module()
    hidden = torch.randn(6, 2, 8)
    torch.testing.assert_close(exported(hidden, HEAD), Module()(hidden, HEAD))


@pytest.mark.parametrize("all_options", [False, True])
def test_opcheck(all_options: bool) -> None:
    """Schemas, fakes and autograd registration of the ops that others do not check; the tests above trace them."""
    checks = {"test_utils": ("test_schema", "test_faketensor", "test_autograd_registration")}
    queries, docs = torch.randn(3, 2, 8, requires_grad=True), torch.randn(6, 2, 8, requires_grad=True)
    mask = torch.arange(18).reshape(3, 6) % 7 == 3 if all_options else None
    scalars = (0.1, "weighted" if all_options else "mean", all_options, all_options, None, "torch")
    tensors = (queries, docs, torch.arange(3) * 2, mask)
    torch.library.opcheck(torch.ops.gircse.stepwise_info_nce.default, (*tensors, *scalars), **checks)
    saved = [result.detach() for result in info_nce_op.OP.op(*tensors, *scalars)[4:]]
    for needs in ([True, True], [False, True]):
        torch.library.opcheck(
            torch.ops.gircse.stepwise_info_nce_backward.default,
            (torch.rand(2), *tensors, *saved, *scalars, needs),
            **checks,
        )
    bias, temperature = (torch.randn(37), torch.rand(5) + 0.5) if all_options else (None, None)
    torch.library.opcheck(
        torch.ops.gircse.top_tokens.default,
        (HIDDEN, HEAD, None, bias, temperature, *[None] * 11, 3, 1.0, None, 1.0, None, 0, 1.0, None, "torch"),
        **checks,
    )


def test_compiled_autograd() -> None:
    """The backward of an eager forward as one graph: the eager gradients."""
    queries, docs = torch.randn(4, 2, 8, requires_grad=True), torch.randn(8, 2, 8)
    hidden, head = HIDDEN.clone().requires_grad_(), HEAD.clone().requires_grad_()
    leaves = [queries, hidden, head]

    def loss() -> Tensor:
        return stepwise_info_nce(queries, docs).sum() + soft_embed(hidden, head, top_k=9).square().sum()  # type: ignore[union-attr]

    expected = torch.autograd.grad(loss(), leaves)
    total = loss()
    with torch._dynamo.compiled_autograd._enable(torch.compile(fullgraph=True, backend="aot_eager")):
        total.backward()
    for leaf, exact in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, exact)


def traced_code(function: Callable[..., Any], *arguments: Any) -> list[CodeType]:
    """Every function that the compiler looked into."""
    found: list[CodeType] = []

    def backend(graph: Any, inputs: Any) -> Any:
        found.extend(torch._guards.TracingContext.get().traced_code)
        return graph.forward

    torch.compile(function, fullgraph=True, backend=backend)(*arguments)
    return found


def private_names(code: CodeType) -> list[str]:
    """Attributes of torch with a leading underscore, branches for `not torch.compiler.is_compiling()` aside."""
    lines, _ = inspect.getsourcelines(code)
    try:
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except SyntaxError:  # a lambda or comprehension in the middle of an expression, part of its function
        return []
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Attribute, ast.ImportFrom)):
            name = ast.unparse(node) if isinstance(node, ast.Attribute) else str(node.module)
            if name.startswith("torch.") and any(part.startswith("_") for part in name.split(".")):
                found.append(f"{code.co_name}: {name}")
    return found


def test_no_private_name_of_torch_is_traced() -> None:
    """An older PyTorch cannot trace a function of a newer one's inside: `torch._C._is_autocast_available` was one."""
    package = Path(gircse.__file__).parent
    queries, docs = torch.randn(4, 2, 8, requires_grad=True), torch.randn(8, 2, 8)
    mask = torch.zeros(4, 8, dtype=torch.bool)
    soft = SoftEmbedding(_LanguageModel())
    every = {
        "temperature": 0.7, "softcap": 3.0, "embed_scale": 2.0, "top_k": 9, "top_p": 0.9, "min_p": 0.01,
        "gumbel_seed": SEEDS, "gumbel_temperature": torch.ones(5), "hard": torch.ones(5, dtype=torch.bool),
    }  # fmt: skip
    code = []
    with torch.autocast("cpu", torch.bfloat16):
        code += traced_code(lambda h: soft_embed(h, HEAD, HEAD, bias=HEAD[:, 0], return_stats=True, **every), HIDDEN)
        code += traced_code(lambda h: soft_embed(h, HEAD, temperature=torch.ones(5)), HIDDEN)
    code += traced_code(lambda h: soft(h, temperature=0.7), HIDDEN)
    code += traced_code(lambda h: soft.top_tokens(h, 3), HIDDEN)
    code += traced_code(
        lambda q: stepwise_info_nce(q, docs, mask=mask, symmetric=True, include_queries=True, return_stats=True),
        queries,
    )
    ours = {c for c in code if Path(c.co_filename).is_relative_to(package)}
    assert {"soft_embed", "stepwise_info_nce", "top_tokens", "compute", "narrow", "select", "run"} <= {
        c.co_name for c in ours
    }
    assert [name for c in ours for name in private_names(c)] == []
    # PyTorch's own wrappers that are looked into: the call of a custom op, and of a function under no_grad
    theirs = {c.co_name for c in code if "torch" in Path(c.co_filename).parts and "_dynamo" not in c.co_filename}
    assert theirs <= {"__call__", "decorate_context"} | {c.co_name for c in code if "/nn/" in c.co_filename}


def test_the_search_for_private_names_finds_them() -> None:
    def guilty(tensor: Tensor) -> Tensor:
        return tensor if torch._C._is_autocast_available("cpu") else -tensor  # type: ignore[attr-defined]

    assert private_names(guilty.__code__) == ["guilty: torch._C._is_autocast_available", "guilty: torch._C"]
