"""The steps of a decoder layer between its matrix products, one kernel each, for inference.

`gircse.engine.body` runs them on a GPU; its `plain.py` holds the same functions in plain PyTorch, their reference.
"""

from .attention import decode_attention
from .gate import ACTIVATIONS, gated
from .rms_norm import add_rms_norm, finish_step
from .rotary import rotary_write

__all__ = ["ACTIVATIONS", "add_rms_norm", "decode_attention", "finish_step", "gated", "rotary_write"]
