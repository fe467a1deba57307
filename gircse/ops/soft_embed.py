"""``soft_embed``: the convex combination of all input embeddings that a language-model head's softmax describes."""

from __future__ import annotations

import math
import numbers
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import soft_embed_torch as torch_backend
from .soft_embed_torch import Options

BACKENDS = ("torch", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class SoftTokenStats(NamedTuple):
    """Diagnostics of the soft tokens, each shaped ``hidden.shape[:-1]``; float32 (float64 for float64 inputs).

    ``lse`` and ``entropy`` are differentiable, ``max_prob`` and ``argmax`` are not.
    """

    lse: Tensor  # logsumexp of the scores, in nats
    entropy: Tensor  # of the probabilities, in nats: 0 (one-hot) to log V (uniform)
    max_prob: Tensor  # the largest probability
    argmax: Tensor  # its vocabulary index, int64; the lowest one of a tie


def soft_embed(
    hidden: Tensor,
    head_weight: Tensor,
    embed_weight: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    embed_scale: float = 1.0,
    return_stats: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, SoftTokenStats]:
    """Soft tokens (GIRCSE, arXiv 2509.24291, section 3; SPEC 1.2)::

        logits = logit_scale * (hidden @ head_weight.T + bias)
        if softcap is not None: logits = softcap * tanh(logits / softcap)
        out = embed_scale * softmax(logits / temperature) @ embed_weight

    Exact and dense, yet no tensor of size [T, V] (T = rows of hidden) is made in forward or backward: temporaries are
    a fixed chunk budget below 64 MiB plus O(T * (D + E)). Scores, softmax and sums are float32 (float64 for float64
    inputs) whatever the input dtype; on CUDA the process-wide TF32 setting of PyTorch, off by default, applies to
    float32 products. The first derivative is defined for every tensor argument; a second one raises RuntimeError.
    Gradients come in their input's dtype, and those that nobody asks for are not computed.

    Args:
        hidden: [..., D], float32, float64, bfloat16 or float16. A row with NaN or inf spoils that row of the result
            only.
        head_weight: [V, D], same dtype and device as hidden. Entries of -inf belong into ``bias``, not here.
        embed_weight: [V, E], same dtype and device; None, or the same tensor as head_weight, means a tied matrix,
            whose gradient is the sum of both uses.
        bias: [V], same dtype and device; -inf removes an entry (unless soft-capped).
        temperature: > 0, a number or a floating-point tensor broadcastable to ``hidden.shape[:-1]``, differentiable.
            The values of a CUDA tensor are not checked, which would stall the device.
        softcap: > 0 or None; applied before the temperature (Gemma 2's ``final_logit_softcapping``).
        logit_scale: factor of the logits, bias included, before the soft-cap.
        embed_scale: factor of the result, the one that the model's own embedding layer applies (Gemma: sqrt(D)).
        return_stats: also return a `SoftTokenStats`, from the same pass.
        backend: None (choose) or "torch".

    Under ``torch.autocast`` all tensors but float64 ones are cast to the autocast dtype first, as for a linear layer.

    Returns:
        [..., E] in hidden's dtype (under autocast: the autocast dtype); with ``return_stats`` a pair of it and the
        statistics.

    Raises:
        TypeError: an argument is of the wrong type or dtype. ValueError: of the wrong rank, shape, device or value.
        RuntimeError: the backend is not available.
    """
    hidden, head_weight, embed_weight, bias = _autocast(hidden, head_weight, embed_weight, bias)
    options = check_scores(hidden, head_weight, bias, temperature, softcap, logit_scale)
    options = options._replace(embed_scale=check_number("embed_scale", embed_scale))
    if embed_weight is not None:
        _check_embed(embed_weight, head_weight)
    resolve_backend(backend)
    if embed_weight is head_weight:
        embed_weight = None
    leading = hidden.shape[:-1]
    # The operation returns the accumulation dtype: that is what backward needs saved (a rounded output would spoil the
    # cancellation in dS for nearly one-hot rows), and the cast's own gradient is the up-cast of the upstream one.
    out, lse, entropy, max_prob, argmax, *_ = _SoftEmbed.apply(
        hidden.reshape(-1, hidden.shape[-1]),
        head_weight,
        embed_weight,
        bias,
        row_temperature(temperature, leading),
        options,
        return_stats,
    )
    result = out.to(hidden.dtype).reshape(*leading, out.shape[-1])
    if not return_stats:
        return result
    return result, SoftTokenStats(*(stat.reshape(leading) for stat in (lse, entropy, max_prob, argmax)))


class _SoftEmbed(torch.autograd.Function):
    """Connects a backend's ``forward`` and ``backward`` to autograd."""

    @staticmethod
    def forward(hidden, head, embed, bias, temperature, options, with_stats):
        with torch.autocast(hidden.device.type, enabled=False):
            result = torch_backend.forward(hidden, head, embed, bias, temperature, options, with_stats=with_stats)
        return tuple(result)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, options, _ = inputs
        out, _lse, entropy, max_prob, argmax, peak, total = output
        ctx.mark_non_differentiable(*(tensor for tensor in (max_prob, argmax, peak, total) if tensor is not None))
        ctx.set_materialize_grads(False)
        ctx.options = options
        ctx.save_for_backward(*tensors, out, peak, total, entropy)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_lse, grad_entropy, *_):
        if grad_out is None and grad_lse is None and grad_entropy is None:
            return (None,) * 7
        saved = torch_backend.Saved(*ctx.saved_tensors)
        needs = torch_backend.Needs(*ctx.needs_input_grad[:5])
        with torch.autocast(saved.hidden.device.type, enabled=False):
            grads = torch_backend.backward(grad_out, grad_lse, grad_entropy, saved, ctx.options, needs)
        return (*grads, None, None)


def resolve_backend(backend: str | None) -> str:
    """The backend to use; None chooses."""
    if backend is None or backend == "torch":
        return "torch"
    if backend == "triton":
        raise RuntimeError("backend: 'triton' is not available in this build; use None or 'torch'")
    raise ValueError(f"backend: got {backend!r}, expected None or one of {', '.join(map(repr, BACKENDS))}")


def check_scores(
    hidden: Tensor,
    head_weight: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
) -> Options:
    """Check the arguments that define the scores (shared by all ops over a vocabulary) and collect the scalar ones."""
    check_floating("hidden", hidden)
    check_floating("head_weight", head_weight)
    if hidden.dim() < 1:
        raise ValueError("hidden: got a 0-dimensional tensor, expected [..., D]")
    if head_weight.dim() != 2:
        raise ValueError(f"head_weight: got shape {tuple(head_weight.shape)}, expected [V, D]")
    if 0 in head_weight.shape:
        raise ValueError(f"head_weight: got shape {tuple(head_weight.shape)}, expected V and D of at least 1")
    if hidden.shape[-1] != head_weight.shape[1]:
        raise ValueError(
            f"hidden: got shape {tuple(hidden.shape)}, expected a last dimension of {head_weight.shape[1]}, "
            f"the D of head_weight {tuple(head_weight.shape)}"
        )
    _check_like("head_weight", head_weight, "hidden", hidden)
    if bias is not None:
        check_floating("bias", bias)
        if bias.shape != head_weight.shape[:1]:
            raise ValueError(
                f"bias: got shape {tuple(bias.shape)}, expected ({head_weight.shape[0]},), "
                "one entry for each row of head_weight"
            )
        _check_like("bias", bias, "hidden", hidden)
    if softcap is not None:
        softcap = check_number("softcap", softcap, positive=True)
    logit_scale = check_number("logit_scale", logit_scale)
    if isinstance(temperature, Tensor):
        _check_temperature(temperature, hidden)
        return Options(softcap=softcap, logit_scale=logit_scale)
    return Options(check_number("temperature", temperature, positive=True), softcap, logit_scale)


def row_temperature(temperature: float | Tensor, leading: torch.Size) -> Tensor | None:
    """A tensor temperature as one value for each row, [T]; None for a number."""
    if isinstance(temperature, Tensor):
        return temperature.broadcast_to(leading).reshape(-1)
    return None


def check_floating(name: str, value: object) -> None:
    """``value`` must be a tensor of a dtype that the backends compute."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a torch.Tensor")
    if value.dtype not in DTYPES:
        raise TypeError(f"{name}: got dtype {value.dtype}, expected one of {', '.join(map(str, DTYPES))}")


def check_number(name: str, value: object, *, positive: bool = False) -> float:
    """``value`` must be a finite real number, above 0 if ``positive``."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a number")
    number = float(value)
    if not math.isfinite(number) or (positive and number <= 0):
        raise ValueError(f"{name}: got {value}, expected a finite number{' above 0' if positive else ''}")
    return number


def _autocast(hidden: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    tensors = (hidden, *others)
    device = hidden.device.type if isinstance(hidden, Tensor) else ""
    if torch.amp.is_autocast_available(device or "cpu") and device and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        tensors = tuple(
            tensor.to(dtype)
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64
            else tensor
            for tensor in tensors
        )
        if others[1] is others[0]:  # still the same tensor after the cast
            tensors = (*tensors[:2], tensors[1], tensors[3])
    return tensors  # type: ignore[return-value]


def _check_embed(embed_weight: Tensor, head_weight: Tensor) -> None:
    check_floating("embed_weight", embed_weight)
    if embed_weight.dim() != 2 or embed_weight.shape[0] != head_weight.shape[0] or embed_weight.shape[1] == 0:
        raise ValueError(
            f"embed_weight: got shape {tuple(embed_weight.shape)}, expected [{head_weight.shape[0]}, E] "
            f"with E of at least 1, one row for each of head_weight {tuple(head_weight.shape)}"
        )
    _check_like("embed_weight", embed_weight, "head_weight", head_weight)


def _check_like(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.dtype != other.dtype:
        raise TypeError(f"{name}: got dtype {value.dtype}, expected {other.dtype}, the dtype of {other_name}")
    if value.device != other.device:
        raise ValueError(f"{name}: got device {value.device}, expected {other.device}, the device of {other_name}")


def _check_temperature(temperature: Tensor, hidden: Tensor) -> None:
    check_floating("temperature", temperature)
    if temperature.device != hidden.device:
        raise ValueError(
            f"temperature: got device {temperature.device}, expected {hidden.device}, the device of hidden"
        )
    leading = hidden.shape[:-1]
    try:
        fits = torch.broadcast_shapes(temperature.shape, leading) == leading
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"temperature: got shape {tuple(temperature.shape)}, expected one broadcastable to {tuple(leading)}, "
            "the leading dimensions of hidden"
        )
    # On an accelerator the comparison would wait for the device.
    if temperature.device.type == "cpu" and not bool((temperature > 0).all()):
        raise ValueError(f"temperature: got {temperature.detach().min().item()}, expected values above 0")
