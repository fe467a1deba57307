"""Settings of the engine, and the limits that follow from the machine's free memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from gircse.engine.free_memory import free_bytes
from gircse.integers import check_integer
from gircse.lm.attention import RolloutKV

CAPTURES = ("auto", "always", "never")
FUSED = ("auto", "never")
ATTENTIONS = ("auto", "sdpa", "flash", "triton")

# Every K up to this one runs in the same batches and buffers, so the first steps of a long run are bitwise a short run.
STEPS_BUCKET = 32
_MIB = 1 << 20


@dataclass(frozen=True)
class EngineConfig:
    """How the engine runs; what it computes does not depend on it beyond rounding.

    Attributes:
        capture: CUDA graphs of the decode step: "auto" (on a GPU, eager with a warning where a model cannot be
            captured), "always" (an error instead of the warning) or "never".
        compile: run the decoder body of the step through `torch.compile`.
        reuse_prefix: encode the tokens that all texts of a window start with (an instruction) once.
        decode_attention: on CUDA "flash" (flash-attn's `flash_attn_with_kvcache`), "triton" (our split-KV kernel) or
            "sdpa"; "auto" takes flash where it is installed and the dtype is half precision, else sdpa.
        fused_kernels: "auto" runs norms, rotary embeddings and gated MLPs on Liger-Kernel's kernels where that is
            installed (`pip install gircse[fast]`) and the model is on a GPU; "never" on the model's own. Not with
            `compile`, which fuses them itself.
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
        row_buckets: round the rows of the buffers up to a power of two (one captured graph serves them all).
    """

    rows: int
    prefill_tokens: int
    kv_tokens: int
    slot_multiple: int
    row_buckets: bool

    @classmethod
    def of(cls, config: EngineConfig, device: torch.device, kv_token_bytes: int) -> Limits:
        cuda = device.type == "cuda"
        # Enough rows to read the weights seldom. On a CPU 256 rows keep the matrix products at their ceiling already.
        rows = config.max_rows or (1024 if cuda else 256)
        # 1024 tokens' activations stay in a CPU's last cache: a prefill of 4096 takes 1.4 times as long per token
        prefill = config.prefill_tokens or (32768 if cuda else 1024)
        memory = config.kv_bytes or (
            # activations of a prefill and the soft tokens' tiles live in the rest
            int(0.6 * free_bytes(device)) if cuda else min(2048 * _MIB, free_bytes(device) // 4)
        )
        return cls(rows, prefill, max(1, memory // kv_token_bytes), 64 if cuda else 16, cuda)

    def at_most(self, rows: int | None) -> Limits:
        return self if rows is None else replace(self, rows=min(self.rows, rows))

    def halved(self) -> Limits:
        """After out-of-memory: half the rows, prefill and pool."""
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
    """Bytes that one position takes in all layers, read off a prompt of one token."""
    kv = RolloutKV(torch.ones(1, dtype=torch.long, device=lm.device))
    lm.run_prompt(kv, torch.zeros(1, 1, dtype=torch.long, device=lm.device))
    return sum(tensor.nbytes for pair in kv.prompt.values() for tensor in pair)
