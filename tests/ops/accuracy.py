"""What every backend's tests of ``soft_embed`` share: inputs, results with gradients, the tolerance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gircse.ops import SoftTokenStats, soft_embed
from gircse.ops.noise import gumbel
from gircse.ops.soft_embed_reference import soft_embed_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 3.0},
    "logit_scale": {"logit_scale": 0.25},
    "embed_scale": {"embed_scale": 8.0},
    "all": {"temperature": 1.6, "softcap": 5.0, "logit_scale": 1.5, "embed_scale": 3.0},
}


def random_inputs(
    leading: tuple[int, ...] = (11,),
    vocab: int = 53,
    width: int = 9,
    embed: int | None = None,
    bias: bool = False,
    row_temperature: bool = False,
    scale: float = 1.0,
    shift: float = 0.0,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> dict[str, Tensor]:
    """The tensor arguments, drawn in float64 and rounded to dtype, so that every dtype sees representable values."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    tensors = {"hidden": normal(*leading, width) * scale, "head_weight": normal(vocab, width)}
    if embed is not None:
        tensors["embed_weight"] = normal(vocab, embed)
    if bias:
        tensors["bias"] = normal(vocab) + shift
    if row_temperature:
        tensors["temperature"] = torch.rand(leading, dtype=torch.float64, generator=generator) + 0.5
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def upstream_gradients(out: Tensor, stats: SoftTokenStats | None) -> list[Tensor]:
    """Random gradients for out and, with stats, for lse and entropy, of values that every dtype represents."""
    generator = torch.Generator().manual_seed(17)
    targets = [out] if stats is None else [out, stats.lse, stats.entropy]
    draws = [torch.randn(t.shape, dtype=torch.float64, generator=generator) for t in targets]
    return [draw.bfloat16().half().double().to(out.device) for draw in draws]


def run(
    function: Any, tensors: dict[str, Tensor], dtype: torch.dtype, with_stats: bool, options: dict[str, Any]
) -> dict[str, Tensor]:
    """Results and the gradients of all tensors, in one dictionary."""
    leaves = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in tensors.items()}
    if function is soft_embed_reference:
        options = {name: value for name, value in options.items() if name != "backend"}
        if "gumbel_seed" in options:
            options["noise"] = noise_of(options.pop("gumbel_seed"), leaves).to(dtype)
        out, stats = function(**leaves, **options)
    else:
        out, stats = function(**leaves, **options, return_stats=True)
    gradients = upstream_gradients(out, stats if with_stats else None)
    targets = [out, stats.lse, stats.entropy][: len(gradients)]
    grads = torch.autograd.grad(
        targets, list(leaves.values()), [g.to(t) for g, t in zip(gradients, targets, strict=True)]
    )
    results = {
        "out": out,
        "lse": stats.lse,
        "entropy": stats.entropy,
        "max_prob": stats.max_prob,
        "argmax": stats.argmax,
    }
    return {**results, **{f"grad {name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def noise_of(seed: int | Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """The Gumbel noise of a call, [..., V]."""
    leading, vocab = tensors["hidden"].shape[:-1], tensors["head_weight"].shape[0]
    seeds = torch.as_tensor(seed, device=tensors["hidden"].device).expand(leading).reshape(-1)
    return gumbel(seeds, 0, vocab).reshape(*leading, vocab)


def rms(values: list[Tensor]) -> float:
    """Root mean square over all elements of all tensors."""
    return torch.cat([value.double().flatten() for value in values]).square().mean().sqrt().item()


def rounding_unit(name: str, exact: dict[str, list[Tensor]], dtype: torch.dtype) -> float:
    """What the best arithmetic of a dtype may lose in a result: eps times its size, or what that comes to for the two
    statistics that are differences of scores and of which a row has one each. Let u = eps / 2. Scores s_v are known to
    u |s_v| at best, the end of any sum of D products.

    entropy: H = lse - mean with mean = sum_v p_v s_v. To first order the scores move it by
        sum_v p_v (mean - s_v) u |s_v|; the mass of a softmax lies at scores within about one of the mean, so this is up
        to u |mean|. The terms themselves, rounded, add u |lse| + u |mean|. Together less than eps (|lse| + |mean|),
        whatever H is: with scores of 8 in the mean and an entropy of 4, five times eps H.
    max_prob: p = e^(s - lse), so what is lost in s and lse, u |s| + u |lse| each for the scores and for the terms, is
        lost in p relatively: eps p (|s| + |lse|) with s = lse + log p.

    Eager PyTorch loses as much: over 120 rows of V = 3,011 and D = 896 the root mean square of its entropy's error is
    9.8e-7, of ours 6.5e-7, and the largest of ours 0.9 of this unit. But in one row it may happen to lose nothing, and
    twice its error then allows nothing. Statistics of half-precision inputs are computed in float32.
    """
    if name not in ("entropy", "max_prob"):
        return torch.finfo(dtype).eps * rms(exact[name])
    if name == "entropy":
        sizes = [lse.abs() + (lse - entropy).abs() for lse, entropy in zip(exact["lse"], exact[name], strict=True)]
    else:
        sizes = [p * (lse.abs() + (lse + p.log()).abs()) for lse, p in zip(exact["lse"], exact[name], strict=True)]
    return torch.finfo(torch.promote_types(dtype, torch.float32)).eps * rms(sizes)


def assert_as_accurate_as_eager(
    with_stats: bool = True,
    options: dict[str, Any] | None = None,
    *,
    device: str = "cpu",
    seeds: int = 6,
    **shape: Any,
) -> None:
    """Root mean square error over several draws <= 2x eager's in the same dtype + a unit of rounding (see
    `rounding_unit`).

    Over several draws, at least where there are few rows: the ratio of two single maxima says more about luck than
    about the arithmetic. For float64 itself, where eager is the truth and its error reads 0, 64 units.
    """
    options = options or {}
    errors: dict[str, tuple[list[Tensor], list[Tensor], list[Tensor]]] = {}
    for seed in range(seeds):
        tensors = {name: tensor.to(device) for name, tensor in random_inputs(seed=seed, **shape).items()}
        dtype = tensors["hidden"].dtype
        ours = run(soft_embed, tensors, dtype, with_stats, options)
        eager = run(soft_embed_reference, tensors, dtype, with_stats, options)
        truth = run(soft_embed_reference, tensors, torch.float64, with_stats, options)
        for name, exact in truth.items():
            assert not ours[name].isnan().any(), name
            if name == "argmax":
                assert torch.equal(ours[name], exact)
                continue
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            assert ours[name].dtype == (dtype if name == "out" or name.startswith("grad") else wide), name
            of_ours, of_eager, values = errors.setdefault(name, ([], [], []))
            of_ours.append(ours[name].double() - exact)
            of_eager.append(eager[name].double() - exact)
            values.append(exact)
    exact_values = {name: values for name, (_, _, values) in errors.items()}
    for name, (of_ours, of_eager, _) in errors.items():
        rounding = (64 if dtype == torch.float64 else 1) * rounding_unit(name, exact_values, dtype)
        error, allowed = rms(of_ours), 2 * rms(of_eager) + rounding
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
