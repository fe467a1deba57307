"""The steps of a decoder layer between its matrix products, one kernel each: for inference, and with gradients.

`gircse.engine.body` runs those for inference on a GPU; its `plain.py` holds the same functions in plain PyTorch, their
reference. `gircse.train.capture` runs `add_rms_norm` and those of `gradients.py` and
`rotation.py` in training.
"""

from .attention import decode_attention
from .gate import ACTIVATIONS, gated
from .gradients import gate_grad, gated_pair, norm_grad
from .rms_norm import add_rms_norm, finish_step
from .rotary import rotary_write
from .rotation import rotate

__all__ = [
    "ACTIVATIONS",
    "add_rms_norm",
    "decode_attention",
    "finish_step",
    "gate_grad",
    "gated",
    "gated_pair",
    "norm_grad",
    "rotary_write",
    "rotate",
]
