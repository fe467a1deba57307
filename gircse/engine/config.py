"""Settings of the engine, and the limits that follow from the machine's free memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from gircse.engine.free_memory import free_bytes
from gircse.integers import check_integer
from gircse.lm.attention import RolloutKV

CAPTURES = ("auto", "always", "never")
FUSED = ("auto", "always", "never")
ATTENTIONS = ("auto", "sdpa", "flash", "triton")

# Every K up to this one runs in the same batches and buffers, so a short run is bitwise the beginning of a longer one.
STEPS_BUCKET = 32
_MIB = 1 << 20


@dataclass(frozen=True)
class EngineConfig:
    """How the engine runs. The settings change its results by rounding only.

    Attributes:
        capture: CUDA graphs of the decode step: "auto" (on a GPU; a model that cannot be captured runs eagerly, with a
            warning), "always" (with an error instead of the warning) or "never".
        compile: run the decoder body of the step through `torch.compile`.
        reuse_prefix: encode once the tokens that all texts of a window start with, such as an instruction.
        decode_attention: "triton" (our split-KV kernel; heads of more than 256 columns run SDPA), "sdpa", or on CUDA
            "flash" (flash-attn's `flash_attn_with_kvcache`); "auto" takes triton where its kernels run, else sdpa.
        fused_kernels: "auto" runs a decoder body of our own on a GPU, of nine kernels a layer; it runs the model's own,
            with a warning, where ours does not know the layers or an adapter is not merged. "always" runs ours on any
            device and raises an error instead of the warning. "never" runs the model's. `compile` excludes ours.
        max_rows: rows of a decode batch at most; None: by device.
        prefill_tokens: tokens of one prefill at most (a longer text runs alone); None: by device.
        kv_bytes: memory for keys and values; None: a share of what is free.
    """

    capture: str = "auto"
    compile: bool = False
    reuse_prefix: bool = True
    decode_attention: str = "auto"
    fused_kernels: str = "auto"
    max_rows: int | None = None
    prefill_tokens: int | None = None
    kv_bytes: int | None = None

    def __post_init__(self) -> None:
        for name, known in (("capture", CAPTURES), ("decode_attention", ATTENTIONS), ("fused_kernels", FUSED)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(map(repr, known))}")
        for name in ("compile", "reuse_prefix"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected True or False")
        for name in ("max_rows", "prefill_tokens", "kv_bytes"):
            value = getattr(self, name)
            if value is not None:
                expected = "an integer >= 1 or None"
                object.__setattr__(self, name, check_integer(name, value, least=1, expected=expected))


@dataclass(frozen=True)
class Limits:
    """What one decode batch may take.

    Attributes:
        rows: rows of a decode batch.
        prefill_tokens: tokens of one prefill, each row counted at the length of the longest.
        kv_tokens: slots of the pool of keys and values, over all rows.
        slot_multiple: slots of a row are rounded up to a multiple of this.
        row_buckets: round the rows of the buffers up to a power of two, and the tokens of a Jacobi pass up to a
            multiple (one captured graph serves them all).
    """

    rows: int
    prefill_tokens: int
    kv_tokens: int
    slot_multiple: int
    row_buckets: bool

    @classmethod
    def of(cls, config: EngineConfig, device: torch.device, kv_token_bytes: int) -> Limits:
        cuda = device.type == "cuda"
        # Many rows share one read of the weights. On a CPU, 256 rows already run the matrix products at full speed.
        rows = config.max_rows or (1024 if cuda else 256)
        # The activations of 1024 tokens stay in a CPU's last cache; with 4096 a token takes 1.4 times as long.
        prefill = config.prefill_tokens or (32768 if cuda else 1024)
        memory = config.kv_bytes or (
            # The rest holds the activations of a prefill and the tiles of the soft tokens.
            int(0.6 * free_bytes(device)) if cuda else min(2048 * _MIB, free_bytes(device) // 4)
        )
        return cls(rows, prefill, max(1, memory // kv_token_bytes), 64 if cuda else 16, cuda)

    def at_most(self, rows: int | None) -> Limits:
        return self if rows is None else replace(self, rows=min(self.rows, rows))

    def halved(self) -> Limits:
        """Half the rows, prefill and pool, for use after an out-of-memory error."""
        return replace(
            self,
            rows=max(1, self.rows // 2),
            prefill_tokens=max(1, self.prefill_tokens // 2),
            kv_tokens=max(1, self.kv_tokens // 2),
        )

    @property
    def smallest(self) -> bool:
        return self.rows == 1

    def slots(self, longest: int, num_steps: int) -> int:
        """Slots of a row for prompts of up to `longest` tokens and `num_steps` steps."""
        wanted = longest + max(num_steps, STEPS_BUCKET)
        return -(-wanted // self.slot_multiple) * self.slot_multiple

    def buffer_rows(self, rows: int) -> int:
        """Rows of the buffers that `rows` rows run in."""
        return 1 << (rows - 1).bit_length() if self.row_buckets else rows


@torch.inference_mode()
def kv_bytes_per_token(lm) -> int:
    """Bytes of keys and values of one position in all layers, measured on a prompt of one token."""
    kv = RolloutKV(torch.ones(1, dtype=torch.long, device=lm.device))
    lm.run_prompt(kv, torch.zeros(1, 1, dtype=torch.long, device=lm.device))
    return sum(tensor.nbytes for pair in kv.prompt.values() for tensor in pair)
