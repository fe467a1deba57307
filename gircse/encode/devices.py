"""One process, several devices: a copy of the model on each, all taking windows of texts from one queue."""

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

if TYPE_CHECKING:
    from gircse.embedder import Embedder

# A device that gets long texts should not keep the others waiting: each takes several windows.
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
        ValueError: no device, or one that does not exist here.
    """
    places = check_devices(devices)
    single = isinstance(texts, str)
    texts = check_texts(texts)
    size = max(1, min(WINDOW, -(-len(texts) // (_WINDOWS_PER_DEVICE * len(places)))))
    # windows of texts alike in length would all be long ones first; in file order every window is a mixture
    starts = iter(range(0, len(texts), size))
    found: np.ndarray | None = None
    lock, failed = threading.Lock(), threading.Event()

    def work(replica: Embedder) -> None:
        nonlocal found
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
                if found is None:
                    found = np.empty((len(texts), *block.shape[1:]), dtype=np.float32)
            found[start : start + len(block)] = block

    if not texts:
        return encode(model, texts, options, show_progress_bar=False)
    replicas = [
        model if i == 0 and place == model.device else replica_on(model, place) for i, place in enumerate(places)
    ]
    with ThreadPoolExecutor(len(places), thread_name_prefix="gircse-encode") as pool:
        for future in [pool.submit(work, replica) for replica in replicas]:
            future.result()
    assert found is not None
    return found[0] if single else found


def check_devices(devices: Sequence[str | torch.device]) -> list[torch.device]:
    try:
        wanted = [] if isinstance(devices, (str, torch.device)) else list(devices)
    except TypeError:
        wanted = []
    if not wanted:
        raise ValueError(f"devices: got {devices!r}, expected a list of at least one device")
    places = []
    for device in wanted:
        try:
            place = torch.device(device)
        except (RuntimeError, TypeError):
            raise ValueError(f"devices: got {device!r}, expected a device such as 'cuda:0' or 'cpu'") from None
        if place.type == "cuda":
            place = torch.device("cuda", place.index or 0)
            if place.index >= torch.cuda.device_count():
                raise ValueError(f"devices: got {device!r}, but PyTorch sees {torch.cuda.device_count()} CUDA devices")
        places.append(place)
    return places


def replica_on(model: Embedder, device: torch.device) -> Embedder:
    """A copy of the model with its weights on `device`; nothing is copied twice on the way."""
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
