"""A vocabulary in shards on 2 and 3 processes against the unsharded op, values and every gradient."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from gircse.ops import VocabShard, soft_embed, soft_embed_logits, top_tokens
from tests.forkserver import CONTEXT
from tests.ops.accuracy import random_inputs, upstream_gradients
from tests.ops.test_soft_embed_op import HAS_TRITON

# (processes, bounds of their shards): uneven, one of a single row, one of none, none aligned to a tile or to the
# noise's lanes
DIVISIONS = [(2, (0, 1, 53)), (3, (0, 23, 23, 53))]
ROWS = ("hidden", "temperature")
BIAS_IDS = torch.arange(22).reshape(11, 2) * 2  # in different shards
BITMASK = (torch.arange(22, dtype=torch.int32).reshape(11, 2) * 0x9E3779B) | 1


def in_processes(size: int, task: Any, folder: Path, *arguments: Any) -> None:
    method = CONTEXT.get_start_method()
    mp.start_processes(_enter, (size, task, str(folder), arguments), nprocs=size, start_method=method)


def _enter(rank: int, size: int, task: Any, folder: str, arguments: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    try:
        task(rank, *arguments)
    finally:
        dist.destroy_process_group()


def compare(rank: int, bounds: tuple[int, ...], backend: str, dtype: torch.dtype) -> None:
    for embed, options in [
        (None, {}),
        (6, {"softcap": 3.0, "temperature": 0.7, "logit_scale": 1.3, "embed_scale": 2.0}),
        (6, {"row_temperature": True, "gumbel_seed": 11}),
        (None, {"gumbel_seed": torch.arange(11) * 5}),
        (6, {"top_k": 12, "top_p": 0.9, "min_p": 0.01, "temperature": 1.3}),
        (None, {"top_k": 9, "gumbel_seed": 3, "gumbel_temperature": 0.5, "hard": torch.arange(11) % 2 == 0}),
        (
            6,
            {
                "row_temperature": True,
                "token_bitmask": BITMASK,
                "bias_ids": BIAS_IDS,
                "gumbel_seed": 3,
                "noise_scale": torch.linspace(0, 1, 11),
                "top_p": 0.9,
                "top_n": 12,
            },
        ),
        (6, {"given": True, "row_temperature": True, "top_p": 0.9, "hard": torch.arange(11) % 2 == 0}),
    ]:
        per_row = bool(options.pop("row_temperature", False))  # type: ignore[arg-type]
        tensors = random_inputs((11,), 53, 9, embed, bias=True, row_temperature=per_row, dtype=dtype)
        if "bias_ids" in options:
            options["logit_bias"] = options.pop("bias_ids"), torch.linspace(-1, 2, 22).reshape(11, 2).to(dtype)
        given = options.pop("given", False)
        if given:
            tensors["logits"] = tensors.pop("hidden") @ tensors.pop("head_weight").T
        start, stop = bounds[rank], bounds[rank + 1]

        def of_shard(name: str, tensor: torch.Tensor, start: int = start, stop: int = stop) -> torch.Tensor:
            if name.split()[-1] in ROWS:
                return tensor
            return tensor[:, start:stop] if name == "logits" else tensor[start:stop]

        whole = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        part = {name: of_shard(name, tensor).clone().requires_grad_() for name, tensor in tensors.items()}
        results = []
        for leaves, shard in ((whole, None), (part, VocabShard(start, stop))):
            out, stats = (soft_embed_logits if given else soft_embed)(
                **leaves,  # type: ignore[arg-type]
                **options,  # type: ignore[arg-type]
                vocab_parallel=shard,
                return_stats=True,
                backend="torch" if shard is None else backend,
            )
            targets = [out, stats.lse, stats.entropy]
            upstream = [g.to(t) for g, t in zip(upstream_gradients(out, stats), targets, strict=True)]
            grads = torch.autograd.grad(targets, list(leaves.values()), upstream)
            results.append(({"out": out, **stats._asdict()}, dict(zip(leaves, grads, strict=True))))
            if backend == "torch" and not given:
                _top_tokens(leaves, options, shard, results[-1])
        (expected, exact), (got, ours) = results
        tolerance = 1e-11 if dtype == torch.float64 else 3e-5
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=tolerance, atol=tolerance)
        for name, value in exact.items():
            torch.testing.assert_close(ours[name], of_shard(name, value), rtol=tolerance, atol=tolerance)


def _top_tokens(leaves: dict[str, Any], options: dict[str, Any], shard: VocabShard | None, results: Any) -> None:
    """Adds ids, weights and their gradients."""
    leaves = {name: leaf for name, leaf in leaves.items() if name != "embed_weight"}
    others = {name: value for name, value in options.items() if name not in ("hard", "embed_scale")}
    ids, weights = top_tokens(**leaves, n=7, **others, vocab_parallel=shard)
    results[0].update(ids=ids.masked_fill(weights == 0, -1), weights=weights)
    if weights.requires_grad:
        grads = torch.autograd.grad(weights, list(leaves.values()), torch.linspace(-1, 2, 7).expand_as(weights))
        results[1].update({f"weights to {name}": grad for name, grad in zip(leaves, grads, strict=True)})


@pytest.mark.parametrize(
    ("size", "bounds", "backend"),
    [(*DIVISIONS[0], "torch"), (*DIVISIONS[1], "torch"), pytest.param(*DIVISIONS[1], "triton", marks=HAS_TRITON)],
)
def test_equals_the_unsharded_op(size: int, bounds: tuple[int, ...], backend: str, tmp_path: Path) -> None:
    if backend == "triton":
        assert os.environ["TRITON_INTERPRET"] == "1"
    dtype = torch.float64 if backend == "torch" else torch.float32
    in_processes(size, compare, tmp_path, bounds, backend, dtype)


def second(hidden: torch.Tensor, head: torch.Tensor, shard: VocabShard) -> None:
    leaf = hidden.clone().requires_grad_()
    out = soft_embed(leaf, head, vocab_parallel=shard)
    torch.autograd.grad(torch.autograd.grad(out.square().sum(), leaf, create_graph=True)[0].sum(), leaf)  # type: ignore[union-attr]


def special_cases(rank: int) -> None:
    size = dist.get_world_size()
    # shards that hold none of the probability, a tie across shards, a bad row, no rows, a group of one
    hidden, head = torch.ones(3, 4), torch.ones(8, 4)
    bias = torch.full((8,), -torch.inf)
    bias[5:7] = 0.0
    shard = VocabShard.even(8)
    mine = slice(shard.start, shard.stop)
    _, stats = soft_embed(hidden, head[mine], bias=bias[mine], vocab_parallel=shard, return_stats=True)
    assert stats.argmax.tolist() == [5, 5, 5]
    torch.testing.assert_close(stats.max_prob, torch.full((3,), 0.5))
    hidden[1, 2] = torch.nan
    out, stats = soft_embed(hidden, head[mine], vocab_parallel=shard, return_stats=True)
    assert out.isnan().any(1).tolist() == [False, True, False]
    assert ((stats.argmax >= 0) & (stats.argmax < 8)).all()
    assert soft_embed(hidden[:0], head[mine], vocab_parallel=shard).shape == (0, 4)  # type: ignore[union-attr]
    table = torch.ones(20, 4)  # a tie of 40 entries, more than there are candidates of top_k=2
    torch.testing.assert_close(
        soft_embed(hidden[:1], table, top_k=2, vocab_parallel=VocabShard.even(40), return_stats=True)[1].max_prob,
        torch.full((1,), 1 / 40),
    )
    groups = [dist.new_group([i]) for i in range(size)]
    alone = soft_embed(torch.ones(3, 4), head, vocab_parallel=VocabShard(0, 8, groups[rank]))
    torch.testing.assert_close(alone, soft_embed(torch.ones(3, 4), head))
    with pytest.raises(RuntimeError, match="vocab_parallel: got a derivative of the gradient"):
        second(hidden.nan_to_num(), head[mine], shard)
    tokens = [
        (torch.compile(f, fullgraph=True, backend="aot_eager") if i else f)(hidden.nan_to_num(), head[mine])
        for i, f in enumerate([lambda h, w: soft_embed(h, w, vocab_parallel=shard, hard=True, top_k=5)] * 2)
    ]
    assert torch.equal(*tokens)
    compiled = torch.compile(lambda h, w: soft_embed(h, w, vocab_parallel=shard), fullgraph=True, backend="aot_eager")
    leaf = torch.randn(3, 4, requires_grad=True)
    (one,) = torch.autograd.grad(compiled(leaf, head[mine]).square().sum(), leaf)
    (other,) = torch.autograd.grad(soft_embed(leaf, head).square().sum(), leaf)  # type: ignore[union-attr]
    torch.testing.assert_close(one, other)


def test_special_cases(tmp_path: Path) -> None:
    in_processes(2, special_cases, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0.5, 2), TypeError, r"VocabShard.start: got float, expected an int"),
        ((0, True), TypeError, r"VocabShard.stop: got bool, expected an int"),
        ((-1, 2), ValueError, r"got start -1 and stop 2, expected 0 <= start <= stop"),
        ((3, 2), ValueError, r"got start 3 and stop 2, expected 0 <= start <= stop"),
    ],
)
def test_bad_shards(arguments: tuple[Any, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        VocabShard(*arguments)
