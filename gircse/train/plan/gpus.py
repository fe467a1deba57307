"""The GPUs that a training run can be planned for: memory and ceilings of one device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gircse.roofline import Ceilings


@dataclass(frozen=True)
class Gpu:
    """One device.

    Attributes:
        memory: bytes that PyTorch sees (`total_memory`), a little less than what is printed on the box.
        bytes_per_s: of device memory.
        half_flops_per_s: dense bfloat16 or float16 matrix products with float32 sums.
        float_flops_per_s: float32 matrix products without TF32.
        link_bytes_per_s: to the other devices of the same node, one direction.
        measured: whether memory rate and bfloat16 rate were measured; otherwise they are the data sheet's.
    """

    name: str
    memory: int
    bytes_per_s: float
    half_flops_per_s: float
    float_flops_per_s: float
    link_bytes_per_s: float
    measured: bool = False

    def ceilings(self, dtype: torch.dtype) -> Ceilings:
        return Ceilings(self.half_flops_per_s if dtype.itemsize == 2 else self.float_flops_per_s, self.bytes_per_s)


_GIB = 2**30

# H100 and A100: rates as measured with large copies and matrix products (the H200 has the H100's processors and is
# given its matrix rate). The others, float32 and links: NVIDIA's data sheets; links are NVLink, or PCIe 4.0 x16.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100", int(79.1 * _GIB), 3.0e12, 790e12, 67e12, 450e9, measured=True),
        Gpu("h200", int(139.8 * _GIB), 4.8e12, 790e12, 67e12, 450e9),
        Gpu("a100-80gb", int(79.1 * _GIB), 1.95e12, 312e12, 19.5e12, 300e9, measured=True),
        Gpu("a100-40gb", int(39.4 * _GIB), 1.555e12, 312e12, 19.5e12, 300e9),
        Gpu("l40s", int(44.4 * _GIB), 0.864e12, 362e12, 91.6e12, 32e9),
        Gpu("rtx4090", int(23.6 * _GIB), 1.008e12, 165e12, 82.6e12, 32e9),
    )
}


def find_gpu(name: str) -> Gpu:
    """
    Raises:
        ValueError: no such GPU; the message lists them.
    """
    try:
        return GPUS[name.lower()]
    except KeyError:
        raise ValueError(f"gpu: got {name!r}, expected one of {', '.join(GPUS)}") from None
