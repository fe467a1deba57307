"""One process, several devices: each has a copy of the model, and all take windows of texts from one queue."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from gircse.encode.pipeline import WINDOW, EncodeOptions, encode
from gircse.encode.tokens import check_texts
from gircse.lm.device import to_device

if TYPE_CHECKING:
    from gircse.embedder import Embedder

# Each device takes several windows, so that the others need not wait long for one that gets long texts.
_WINDOWS_PER_DEVICE = 4


def encode_on(
    devices: Sequence[str | torch.device],
    model: Embedder,
    texts: str | Sequence[str],
    options: EncodeOptions,
    *,
    show_progress_bar: bool | None,
) -> np.ndarray:
    """`GIRCSE.encode(devices=...)`.

    Raises:
        ValueError: the list is empty, or names a device that does not exist here.
    """
    places = check_devices(devices)
    single = isinstance(texts, str)
    texts = check_texts(texts)
    size = max(1, min(WINDOW, -(-len(texts) // (_WINDOWS_PER_DEVICE * len(places)))))
    # The texts stay in the given order, so that every window has short and long ones.
    starts = iter(range(0, len(texts), size))
    embeddings: np.ndarray | None = None
    lock, failed = threading.Lock(), threading.Event()

    def work(replica: Embedder) -> None:
        nonlocal embeddings
        while not failed.is_set():
            with lock:
                start = next(starts, None)
            if start is None:
                return
            try:
                block = encode(replica, texts[start : start + size], options, show_progress_bar=False)
            except BaseException:
                failed.set()
                raise
            with lock:
                if embeddings is None:
                    embeddings = np.empty((len(texts), *block.shape[1:]), dtype=np.float32)
            embeddings[start : start + len(block)] = block

    if not texts:
        return encode(model, texts, options, show_progress_bar=False)
    replicas = [
        model if i == 0 and place == model.device else replica_on(model, place) for i, place in enumerate(places)
    ]
    with ThreadPoolExecutor(len(places), thread_name_prefix="gircse-encode") as pool:
        for future in [pool.submit(work, replica) for replica in replicas]:
            future.result()
    assert embeddings is not None
    return embeddings[0] if single else embeddings


def check_devices(devices: Sequence[str | torch.device]) -> list[torch.device]:
    try:
        wanted = [] if isinstance(devices, (str, torch.device)) else list(devices)
    except TypeError:
        wanted = []
    if not wanted:
        raise ValueError(f"devices: got {devices!r}, expected a list of at least one device")
    places = []
    for device in wanted:
        place = to_device(device, "devices")
        if place.type == "cuda":
            place = torch.device("cuda", place.index or 0)
            if place.index >= torch.cuda.device_count():
                raise ValueError(f"devices: got {device!r}, but PyTorch sees {torch.cuda.device_count()} CUDA devices")
        places.append(place)
    return places


def replica_on(model: Embedder, device: torch.device) -> Embedder:
    """A copy of the model with its weights on `device`. Each weight is copied once, straight to the device."""
    memo: dict[int, object] = {}
    for tensors in (model.parameters(), model.buffers()):
        for tensor in tensors:
            moved = tensor.detach().to(device, copy=True)
            memo[id(tensor)] = nn.Parameter(moved, requires_grad=False) if isinstance(tensor, nn.Parameter) else moved
    for shared in (model.tokenizer, model._merged):  # a replica is never unmerged
        memo[id(shared)] = shared
    replica = copy.deepcopy(model, memo)
    replica._merged = None
    return replica.eval()
