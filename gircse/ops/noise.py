"""Gumbel noise that depends on a seed and a vocabulary index alone: the torch form of the kernels' generator.

Counter-based, so nothing is stored: backward, every chunking and every shard of the vocabulary draw the same numbers.
Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), key = the 64-bit seed,
counter = index // 4, lane = index % 4; kernels/gircse_kernels/scores.py holds the device form.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10


def gumbel(seeds: Tensor, start: int, stop: int) -> Tensor:
    """Standard Gumbel noise of vocabulary entries start..stop-1, [R, stop - start] float32, for seeds [R] int64."""
    counter = torch.arange(start // 4, -(-stop // 4), dtype=torch.int64, device=seeds.device)
    bits = _philox(seeds, counter.expand(len(seeds), -1)).flatten(1)
    return _gumbel(bits[:, start % 4 :][:, : stop - start])


def gumbel_at(seeds: Tensor, index: Tensor) -> Tensor:
    """The same noise of the vocabulary entries index [R, C], [R, C] float32."""
    return _gumbel(_philox(seeds, index // 4).gather(2, index[..., None] % 4)[..., 0])


def _gumbel(bits: Tensor) -> Tensor:
    # -log(Exp(1)), Exp(1) = -log(1 - w): small w is the large noise, whose series keeps the resolution of all bits
    w = bits.to(torch.float32).mul_(2.0**-32).add_(2.0**-33)
    series = w * (1.0 + w * (0.5 + w * (1 / 3 + w * (0.25 + w * 0.2))))
    far = (1.0 - w.clamp_max(1.0 - 2.0**-24)).log_().neg_()
    return torch.where(w < 2.0**-6, series, far).log_().neg_()


def _philox(seeds: Tensor, counter: Tensor) -> Tensor:
    """The four 32-bit numbers of each counter [R, N], [R, N, 4] int64."""
    keys = seeds[:, None] & _LOW, (seeds[:, None] >> 32) & _LOW
    zero = torch.zeros_like(counter)
    c0, c1, c2, c3 = counter, zero, zero, zero
    for _ in range(_ROUNDS):
        # products of 32-bit numbers wrap around in int64 with the right bits
        product_0, product_2 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = (product_2 >> 32) & _LOW ^ c1 ^ keys[0], product_2 & _LOW
        c2, c3 = (product_0 >> 32) & _LOW ^ c3 ^ keys[1], product_0 & _LOW
        keys = (keys[0] + _WEYL[0]) & _LOW, (keys[1] + _WEYL[1]) & _LOW
    return torch.stack([c0, c1, c2, c3], -1)
