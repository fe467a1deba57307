"""A small float64 model with LoRA on it and batches of token ids, for the tests of gradient caching and of ranks."""

from __future__ import annotations

import torch

from gircse import GIRCSE
from gircse.train.config import TrainConfig
from gircse.train.lora import trainable_model
from gircse.train.step import Batch
from tests.tiny_models import VOCAB, tiny_model, tiny_tokenizer

NUM_STEPS = 3


def config(**options) -> TrainConfig:
    return TrainConfig(**{"num_steps": NUM_STEPS, "lora_dropout": 0.0, "contrastive_temperature": 0.1, **options})


def adapted(settings: TrainConfig, dtype: torch.dtype = torch.float64, **options) -> GIRCSE:
    """In training mode, its LoRA matrices as after some training: with B = 0 there is no gradient on A."""
    torch.manual_seed(0)
    model = trainable_model(settings, GIRCSE(tiny_model("llama", dtype=dtype), tiny_tokenizer()), **options)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    return model.train()


def batch(rows: int = 6) -> Batch:
    """Queries and candidates of 2 to 17 tokens, rows with different numbers of negatives, some masked."""
    generator = torch.Generator().manual_seed(2)
    counts = [1 + row % 3 for row in range(rows)]

    def draw(most: int) -> list[int]:
        size = int(torch.randint(2, most, (1,), generator=generator))
        return torch.randint(3, VOCAB, (size,), generator=generator).tolist()

    target = torch.tensor(counts).cumsum(0) - torch.tensor(counts)
    mask = torch.zeros(rows, sum(counts), dtype=torch.bool)
    mask[0, -1] = mask[-1, 0] = True
    return Batch([draw(9) for _ in range(rows)], [draw(18) for _ in range(sum(counts))], target, mask)


def share_of(whole: Batch, rows: slice) -> Batch:
    """The rows of one process."""
    ends = [*whole.target.tolist(), len(whole.passages)]
    first, last = ends[rows.start], ends[rows.stop]
    mask = None if whole.mask is None else whole.mask[rows]
    return Batch(whole.queries[rows], whole.passages[first:last], whole.target[rows] - first, mask)


def gradients(model: GIRCSE) -> torch.Tensor:
    """Of all LoRA matrices, flat; clears them."""
    parts = [p for p in model.parameters() if p.requires_grad]
    flat = torch.cat([p.grad.reshape(-1) for p in parts])
    model.zero_grad(set_to_none=True)
    return flat


def weighted_sum(states: torch.Tensor) -> torch.Tensor:
    """A loss whose gradient at the states is random, the same for every call with the same shape.

    The sum of their squares would be none: after the decoder's last norm it is a constant, and its gradient rounding.
    """
    weight = torch.randn(states.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return (states * weight.to(states)).sum()
