"""The decoder body that the engine runs: the model's own, or one of few kernels on the model's weights.

plain.py     the elementwise steps of a layer in plain PyTorch; `gircse_kernels.decoder` has them as kernels
facts.py     what is read off a stock decoder
rotary.py    the rotary values of every position
weights.py   several projections of one input as one product
decoder.py   both decoders
probe.py     which one runs: ours must give the stock body's states
"""

from gircse.engine.body.decoder import Decoder, FusedDecoder, StockDecoder
from gircse.engine.body.probe import choose_decoder

__all__ = ["Decoder", "FusedDecoder", "StockDecoder", "choose_decoder"]
