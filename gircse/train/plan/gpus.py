"""The GPUs that a training run can be planned for. It needs no torch, so that `gircse train --help` can list them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One device.

    Attributes:
        memory: bytes that PyTorch sees (`total_memory`), a little less than the advertised size.
        bytes_per_s: bandwidth of the device memory.
        half_flops_per_s: rate of dense bfloat16 or float16 matrix products with float32 sums.
        float_flops_per_s: rate of float32 matrix products without TF32.
        link_bytes_per_s: bandwidth to the other devices of the node, in one direction.
    """

    name: str
    memory: int
    bytes_per_s: float
    half_flops_per_s: float
    float_flops_per_s: float
    link_bytes_per_s: float


_GIB = 2**30

DEFAULT_GPU = "h100"
# The memory and bfloat16 rates of H100 and A100 80 GB were measured with large copies and matrix products. The H200 has
# the H100's processors and is given its matrix rate. All other figures are those of NVIDIA's data sheets; links are
# NVLink, or PCIe 4.0 x16.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100", int(79.1 * _GIB), 3.0e12, 790e12, 67e12, 450e9),
        Gpu("h200", int(139.8 * _GIB), 4.8e12, 790e12, 67e12, 450e9),
        Gpu("a100-80gb", int(79.1 * _GIB), 1.95e12, 312e12, 19.5e12, 300e9),
        Gpu("a100-40gb", int(39.4 * _GIB), 1.555e12, 312e12, 19.5e12, 300e9),
        Gpu("l40s", int(44.4 * _GIB), 0.864e12, 362e12, 91.6e12, 32e9),
        Gpu("rtx4090", int(23.6 * _GIB), 1.008e12, 165e12, 82.6e12, 32e9),
    )
}
