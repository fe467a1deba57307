"""A base that does not fit one device: its frozen decoder layers shared out over the processes (FSDP2).

Only what is large and frozen is sharded, layer by layer; a layer is gathered for the time of its own pass. The LoRA
matrices stay whole and plain on every process, so the optimizer, the checkpoints and the one exchange of gradients a
step are those of any other run. So do the embedding table, the head and the norms outside the layers: `soft_embed`
reads them as plain matrices, K times a pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gircse.model import GIRCSE
from gircse.train.ranks import Ranks


def shard_layers(model: GIRCSE, ranks: Ranks) -> None:
    """Shards the decoder layers of `model`, which is on the CPU, and moves the rest of it to `ranks.device`.

    Raises:
        ValueError: one process only, or a decoder whose layers cannot be found.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if ranks.size == 1:
        raise ValueError("fsdp: got one process, expected several (torchrun --nproc-per-node N)")
    body = model.causal_lm.body
    layers = getattr(body, "layers", None) or getattr(body, "h", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"fsdp: {type(body).__name__} has no list of decoder layers to share out")
    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    options: Any = {"mesh": mesh, "reshard_after_forward": True}
    for layer in layers:
        adapter = {parameter for parameter in layer.parameters() if parameter.requires_grad}
        fully_shard(layer, ignored_params=adapter, **options)
    # the root shards nothing itself; it lets the layers gather ahead of each other
    sharded = {parameter for layer in layers for parameter in layer.parameters()}
    fully_shard(body, ignored_params={p for p in body.parameters() if p not in sharded}, **options)
    _move_plain(model, ranks.device)


def _move_plain(model: nn.Module, device: torch.device) -> None:
    """Whatever is no shard yet: a module's `to` would touch the shards as well."""
    from torch.distributed.tensor import DTensor

    for tensor in [*model.parameters(), *model.buffers()]:
        if not isinstance(tensor, DTensor) and tensor.device != device:
            tensor.data = tensor.data.to(device)
