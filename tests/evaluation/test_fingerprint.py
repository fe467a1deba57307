from __future__ import annotations

import dataclasses

import torch
from peft import LoraConfig

from gircse import GIRCSE, GircseConfig
from gircse.evaluation.fingerprint import fingerprint
from tests.tiny_models import tiny_model, tiny_tokenizer


def model(seed=0, dtype=torch.float32, tokenizer=None, **config):
    return GIRCSE(tiny_model("llama", seed=seed, dtype=dtype), tokenizer or tiny_tokenizer(), GircseConfig(**config))


def test_the_same_model_has_the_same_name_however_it_is_used():
    one = model()
    before = fingerprint(one)
    one.tokenizer(["a", "longer"], padding=True, truncation=True, max_length=3)
    one.encode(["a text"], num_steps=2)
    assert fingerprint(one) == before == fingerprint(model(num_steps=9))
    assert len(before) == 16


def test_what_changes_an_embedding_changes_the_name():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["another"])
    changed = model()
    with torch.no_grad():
        next(iter(changed.base.parameters()))[0, 0] += 1e-6
    others = [
        model(seed=1),
        model(dtype=torch.bfloat16),
        model(pooling="last"),
        model(temperature=0.5),
        model(append_eos=True),
        model(include_prompt_state=True),
        model(decoding="auto"),
        model(decoding="jacobi"),
        model(decoding="jacobi", jacobi_tolerance=0.01),
        model(tokenizer=tokenizer),
        changed,
    ]
    names = {fingerprint(other) for other in [model(), *others]}
    assert len(names) == len(others) + 1
    assert fingerprint(model(jacobi_tolerance=0.01)) in names  # sequential decoding has none


def test_adapters_count_by_name_and_strength_and_apart_from_merged():
    base = tiny_model("llama")
    for name in ("other", "default"):
        base.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), name)
    adapted = GIRCSE(base, tiny_tokenizer()).eval()
    names = [fingerprint(model()), fingerprint(adapted)]
    base.set_adapter("other")
    names.append(fingerprint(adapted))
    base.set_adapter("default")
    assert fingerprint(adapted) == names[1]
    adapted.merge_adapter()
    names.append(fingerprint(adapted))
    adapted.unmerge_adapter()
    assert fingerprint(adapted) == names[1]
    for layer in base.modules():
        if hasattr(layer, "active_adapters") and hasattr(layer, "scaling"):
            layer.scaling["default"] *= 3
    names.append(fingerprint(adapted))
    assert len(set(names)) == 5


def test_quantised_weights_are_read_by_their_parts():
    class Parts(torch.nn.Parameter):
        def __tensor_flatten__(self):
            return ["scale"], None

    def quantised(scale):
        one = model()
        one.base.lm_head.weight = Parts(one.base.lm_head.weight.data)
        one.base.lm_head.weight.scale = torch.tensor(scale)
        return one

    assert fingerprint(quantised(1.0)) == fingerprint(quantised(1.0)) != fingerprint(quantised(2.0))


def test_every_setting_of_the_config_but_the_steps_counts():
    names = {field.name for field in dataclasses.fields(GircseConfig)}
    counted = {"pooling", "temperature", "append_eos", "include_prompt_state", "prompt_template", "decoding"}
    assert names - {"num_steps", "query_max_length", "passage_max_length", "jacobi_tolerance"} - counted == set()
