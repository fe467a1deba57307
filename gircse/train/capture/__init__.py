"""Micro-batches as CUDA graphs: the host starts two graphs, forward and backward, in place of thousands of kernels.

A rollout of a small model is bound by the host, which starts each kernel of the forward and of the backward pass. Here
both passes of a micro-batch are captured once for each bucket (texts, padded length, K, factor of the soft tokens'
gradient) and replayed for every micro-batch that fits it. Gradient caching (`gircse.train.grad_cache`) keeps the loss
outside: the forward graph leaves the states in a buffer, and the backward graph reads their gradient from another.

    CapturedPasses.embed   pads to the bucket -> replay F -> states, with an autograd node -> backward: replay B, which
                           adds the gradients of the trained weights to buffers that are their `.grad`

Every micro-batch is padded to its bucket, captured or not, so dropout masks are the same on both paths: the states of a
text do not depend on the padding, but the masks depend on the shape. A replay takes its random numbers from PyTorch's
generator, as a pass of single kernels does. A bucket is captured when it comes for the second time. All graphs share
one pool of memory, so the activations of one micro-batch live at a time, and the largest bucket decides how large the
pool is. A draft (`gircse.lm.rollout`, "by the block") is part of the forward graph, and its repetition makes the same
tokens.

Where a capture fails, or memory does not hold graphs beside passes of single kernels, the run goes on without graphs,
with one warning.
"""

from gircse.train.capture.passes import CapturedPasses, refusal_of

__all__ = ["CapturedPasses", "refusal_of"]
