"""What the kernels of `soft_embed` offer: tensors in, tensors out. No autograd, no argument checks.

All tensors are on one device; hidden, head, embed, bias and the upstream gradient have one dtype: bfloat16, float16 or
float32, whose products are never rounded to TF32. Matrices may have any strides. Nothing here waits for the device
or depends on its values, so both passes can be captured in a CUDA graph.
"""

from torch import Tensor

from ..contract import Forward, Grads, Inputs, Needs, Options, Saved
from ..launching import INTERPRETED, device_of
from .launch_backward import backward as _backward
from .launch_forward import forward
from .launch_many_rows import chunk_scores
from .truncation.launch_kept_rows import backward_kept_rows
from .truncation.launch_selection import candidates, select

__all__ = [
    "INTERPRETED",
    "Forward",
    "Grads",
    "Inputs",
    "Needs",
    "Options",
    "Saved",
    "backward",
    "candidates",
    "chunk_scores",
    "device_of",
    "forward",
    "select",
]


def backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    grad_entropy: Tensor | None,
    inputs: Inputs,
    saved: Saved,
    options: Options,
    needs: Needs,
) -> Grads:
    """Gradients from grad_out [T, E], grad_lse [T], grad_entropy [T]; None: zero. See `launch_backward.backward`."""
    function = _backward if inputs.ids is None else backward_kept_rows
    return function(grad_out, grad_lse, grad_entropy, inputs, saved, options, needs)
