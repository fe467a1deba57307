"""What the kernels of `soft_embed` offer: tensors in, tensors out. No autograd, no argument checks.

All tensors are on one device; hidden, head, embed, bias and the upstream gradient have one dtype: bfloat16, float16 or
float32, whose products are never rounded to TF32. Matrices may have any strides. Nothing here waits for the device
or depends on its values, so both passes can be captured in a CUDA graph.
"""

from .contract import Forward, Grads, Inputs, Needs, Options, Saved
from .launch_backward import backward
from .launch_forward import forward
from .launch_many_rows import chunk_scores
from .launching import INTERPRETED, device_of

__all__ = [
    "INTERPRETED",
    "Forward",
    "Grads",
    "Inputs",
    "Needs",
    "Options",
    "Saved",
    "backward",
    "chunk_scores",
    "device_of",
    "forward",
]
