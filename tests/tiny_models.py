"""Tiny random causal LMs of every supported architecture, and a tokenizer for them. Nothing is downloaded."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCAB = 131
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.07,  # far enough from zero that softmaxes and soft-caps bite
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 0,
}
_TYPES = ["full_attention", "sliding_attention"]

CONFIGS = {
    "llama": lambda: AutoConfig.for_model("llama", **_COMMON),
    "llama-tied": lambda: AutoConfig.for_model("llama", **_COMMON, tie_word_embeddings=True),
    "mistral": lambda: AutoConfig.for_model("mistral", **_COMMON, sliding_window=5),
    "qwen2": lambda: AutoConfig.for_model("qwen2", **_COMMON, tie_word_embeddings=True),
    "qwen3": lambda: AutoConfig.for_model("qwen3", **_COMMON, head_dim=8),
    "gemma": lambda: AutoConfig.for_model("gemma", **_COMMON, head_dim=8),
    "gemma2": lambda: AutoConfig.for_model(
        "gemma2",
        **_COMMON,
        head_dim=8,
        sliding_window=5,
        query_pre_attn_scalar=8,
        final_logit_softcapping=2.0,
        attn_logit_softcapping=3.0,
        layer_types=_TYPES,
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **_COMMON, head_dim=8, sliding_window=5, query_pre_attn_scalar=8, layer_types=_TYPES
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=256,
        initializer_range=0.07,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=0,
    ),
}

# Layers that differ from those above only for the engine's own decoder body.
MORE_CONFIGS = {
    "phi3": lambda: AutoConfig.for_model("phi3", **_COMMON, partial_rotary_factor=0.5, sliding_window=5),
    "llama-bias": lambda: AutoConfig.for_model("llama", **_COMMON, attention_bias=True, mlp_bias=True),
    "llama-wide-heads": lambda: AutoConfig.for_model("llama", **_COMMON | {"num_key_value_heads": 1}, head_dim=24),
    "qwen2-window": lambda: AutoConfig.for_model(
        "qwen2", **_COMMON, use_sliding_window=True, sliding_window=5, layer_types=_TYPES
    ),
}


def tiny_model(
    name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, attn: str | None = None, **overrides
) -> PreTrainedModel:
    """The same weights for the same name and seed, whatever `attn`."""
    config = (CONFIGS | MORE_CONFIGS)[name]()
    for key, value in overrides.items():
        setattr(config, key, value)
    torch.manual_seed(seed)
    kwargs = {} if attn is None else {"attn_implementation": attn}
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **kwargs).to(dtype).eval()
    for module in model.modules():
        for key, buffer in module.named_buffers(recurse=False):
            if "inv_freq" in key:  # rotary frequencies are float32 by definition, whatever the weights are
                setattr(module, key, buffer.type(torch.float32))
    return model


def definition(name: str) -> str | None:
    """The stock attention that computes what the config says: older SDPA integrations ignore Gemma 2's soft-cap."""
    return "eager" if name == "gemma2" else None


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character (byte-wise), <eos> = 0, <unk> = 2: whatever text comes, no special token is added."""
    vocab = {"<eos>": 0, "<bos>": 1, "<unk>": 2}
    for byte in range(10, 127):
        vocab[pre_tokenizers_byte(byte)] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>", pad_token="<eos>")


def pre_tokenizers_byte(byte: int) -> str:
    """The character ByteLevel writes for an ASCII byte."""
    return chr(byte) if 33 <= byte <= 126 else chr(256 + byte)
