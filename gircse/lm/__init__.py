"""A causal LM taken apart: its facts, its attention, the differentiable rollout, its files and its adapters.

    causal_lm.py          `CausalLM`: body, head facts and position limit, probed when a model is loaded
    attention.py          the attention function that is registered with transformers, and the rollout's keys and values
    rollout.py            the differentiable rollout
    onednn.py             faster float32 linear layers on x86 CPUs
    config.py             `GircseConfig`
    prompts.py            instruction and text to prompt
    token_ids.py          checks of token ids
    load.py, save.py      folders in and out
    base_fingerprint.py   which base an adapter was trained on
    adapter.py            PEFT adapters in a model
    lora.py               LoRA layers that read the same input compute together,
    lora_products.py      by one autograd function
    merged_adapter.py     an adapter merged into the base, and taken out bitwise
    quantize.py           8- and 4-bit weights
    device.py             devices, autocast
    environment.py        the variables of a launcher such as torchrun
    forking.py            locks and threads after a fork

Imports `gircse.ops`, `gircse.files` and `gircse.integers`.
"""
