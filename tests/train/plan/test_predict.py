"""The plan of a training run: its parts, its advice, and the peak of a real step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.shapes import SHAPES
from gircse.cli import main
from gircse.roofline import ModelFacts
from gircse.train.capture.bucket import bucket_shape
from gircse.train.config import TrainConfig
from gircse.train.plan.extrapolate import TracedModel
from gircse.train.plan.gpus import GPUS
from gircse.train.plan.parts import Parts
from gircse.train.plan.predict import USABLE, ceilings, info_nce_bytes, plan
from tests.tiny_models import tiny_model

ROOT = Path(__file__).resolve().parents[3]


LAYERS = 2
SHALLOW = SHAPES["qwen2.5-7b"].config(LAYERS)  # its plan takes a second


@pytest.fixture(scope="module", autouse=True)
def traced_once() -> Iterator[None]:
    """Plans that differ in the GPU, the batch or the steps have one traced model, whose counts are made once."""
    models: dict[Any, tuple[TracedModel, Any]] = {}
    counts: dict[Any, Any] = {}
    traced, counted = TracedModel.of, TracedModel.memory
    same = {"batch_size": 1, "micro_batch_tokens": None, "num_steps": 1, "soft_token_gradient": 1.0}

    def of(config: TrainConfig, model_config: Any = None, **options: Any) -> TracedModel:
        key = repr((replace(config, **same), options)), id(model_config)
        if key not in models:  # the config is kept, as otherwise another one may come to have its id
            models[key] = traced(config, model_config, **options), model_config
        return models[key][0]

    def memory(model: TracedModel, *sizes: Any, **options: Any) -> Any:
        key = id(model), repr((sizes, options))
        if key not in counts:
            counts[key] = counted(model, *sizes, **options)
        return counts[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TracedModel, "of", staticmethod(of))
        patch.setattr(TracedModel, "memory", memory)
        yield


def settings(**options):
    defaults = {"dtype": "bfloat16", "batch_size": 16, "num_steps": 1, "query_max_length": 512}
    defaults |= {"soft_token_gradient": 1.0}
    return TrainConfig(**{**defaults, "passage_max_length": 512, **options})


@cache
def planned(
    gpu="h100",
    checkpointing=False,
    batch_size=16,
    micro=None,
    quantization=None,
    fsdp=False,
    factor=1.0,
    graphs=True,
    **options,
):
    config = settings(
        gradient_checkpointing=checkpointing,
        batch_size=batch_size,
        micro_batch_tokens=micro,
        quantization=quantization,
        fsdp=fsdp,
        soft_token_gradient=factor,
        cuda_graphs=graphs,
    )
    return plan(config, gpu=gpu, model_config=SHALLOW, **options)


def test_fixed_parts_are_the_parameters():
    one = planned()
    hidden, inner, kv = 3584, 18944, 512
    matrices = LAYERS * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner)
    small = LAYERS * (2 * hidden + hidden + 2 * kv) + hidden  # norms and the biases of q, k, v
    assert one.memory["frozen weights"] == 2 * (matrices + small + 2 * 152064 * hidden)
    sides = LAYERS * (4 * hidden + 2 * (hidden + kv) + 3 * (hidden + inner))
    lora = 4 * 16 * sides  # float32, rank 16
    assert one.memory["LoRA weights"] == one.memory["LoRA gradients"] == lora
    assert one.memory["AdamW moments"] == 2 * lora
    assert one.memory["LoRA copies"] == lora // 2  # in bfloat16
    assert one.total_bytes == sum(one.memory.values())
    graphs = one.memory["CUDA graphs (activations once more)"]
    assert one.allocated_bytes == one.total_bytes - one.memory["CUDA context"] - graphs
    assert planned(graphs=False).total_bytes == one.total_bytes - graphs > one.allocated_bytes


def test_quantized_matrices():
    whole, eight, four = (planned(quantization=kind).memory for kind in (None, "int8", "nf4"))
    matrix = LAYERS * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944)
    assert whole["frozen weights"] - eight["frozen weights"] == matrix
    assert whole["frozen weights"] - four["frozen weights"] == pytest.approx(matrix * (2 - 0.5625), abs=1)
    assert four["dequantised matrix"] == 2 * 3584 * 18944
    assert "dequantised matrix" not in whole


def test_sharding_divides_what_belongs_to_the_model():
    one, eight = (planned(world_size=8, fsdp=fsdp) for fsdp in (False, True))
    assert eight.memory["frozen weights"] == one.memory["frozen weights"] // 8
    for part in ("LoRA weights", "LoRA copies", "LoRA gradients", "AdamW moments"):  # every process has all of them
        assert eight.memory[part] == one.memory[part]
    assert eight.memory["gathered layers"] > 0
    assert eight.network_seconds > 0 == one.network_seconds
    # and the batch is divided among the ranks
    assert one.memory["prompt keys and values"] * 8 == planned().memory["prompt keys and values"]
    assert sum(one.seconds.values()) < sum(planned().seconds.values())
    assert eight.step_seconds == max(sum(eight.seconds.values()), eight.network_seconds)


def test_gradient_caching_bounds_memory_and_costs_one_forward():
    whole = planned()
    cached = planned(micro=1026)
    assert cached.allocated_bytes < whole.allocated_bytes
    assert cached.memory["gradient cache"] == 2 * 3 * 16 * 1 * 3584 * 2  # twice, rows, K, D, bfloat16
    extra = cached.seconds["gradient caching, the extra forward"]
    assert extra == cached.seconds["prompt, forward"] + cached.seconds["steps, forward"]
    # every micro-batch reads the matrices again
    assert sum(cached.seconds.values()) - extra >= sum(whole.seconds.values())


def test_the_largest_micro_batch_fits_and_one_more_row_does_not():
    whole = planned("rtx4090", batch_size=4096)
    largest = whole.largest_micro_batch_tokens
    assert not whole.fits
    rows, rest = divmod(largest, 513)  # texts of 512 tokens and one step
    assert (bucket_shape(rows, 512, num_steps=1), rest) == ((rows, 512), 0)
    more = bucket_shape(rows + 1, 512, num_steps=1)[0] * 513
    fits, not_any_more = (planned("rtx4090", batch_size=4096, micro=tokens) for tokens in (largest, more))
    assert fits.fits
    assert fits.total_bytes > 0.9 * USABLE * GPUS["rtx4090"].memory
    assert not not_any_more.fits


def test_a_model_that_does_not_fit_at_all():
    prediction = plan(
        settings(dtype="float32", batch_size=1), gpu="rtx4090", model_config=SHAPES["qwen2.5-7b"].config(28), length=64
    )
    assert not prediction.fits
    assert prediction.largest_micro_batch_tokens is None
    assert prediction.fewest_checkpointed_layers is None
    assert "nor with all 28 layers checkpointed; not even a micro-batch of one text fits" in str(prediction)


def test_the_floor_is_that_of_the_benchmarks():
    """One phase after the other at the GPU's ceilings, as `bench/run.py` computes it."""
    from bench.shapes import meta_model

    prediction = planned("a100-80gb")
    facts, rates = ModelFacts.of(meta_model(SHALLOW, torch.bfloat16)), ceilings(GPUS["a100-80gb"], torch.bfloat16)
    expected = rates.seconds(facts.training([512] * 48, 1))
    assert prediction.step_seconds == pytest.approx(expected, rel=1e-12)


def test_checkpointing_adds_a_prompt_and_takes_memory():
    plain, checkpointed = (planned(checkpointing=on) for on in (False, True))
    assert checkpointed.seconds["checkpointing, the prompt again"] == plain.seconds["prompt, forward"]
    assert checkpointed.memory["prompt activations"] < 0.2 * plain.memory["prompt activations"]


def test_some_layers_are_checkpointed():
    """As few as fit: with one less the step does not fit."""
    shape = SHAPES["qwen2.5-0.5b"].config(3)

    def of(layers: int | None, on: bool = True):
        config = settings(batch_size=90, gradient_checkpointing=on, checkpointed_layers=layers)
        return plan(config, gpu="l40s", model_config=shape)

    plain = of(None, on=False)
    fewest = plain.fewest_checkpointed_layers
    assert (plain.fits, fewest) == (False, 2)
    assert "fewest checkpointed layers that fit: 2 of 3" in str(plain)
    some, less = of(2), of(1)
    assert (some.fits, less.fits) == (True, False)
    assert some.fewest_checkpointed_layers == less.fewest_checkpointed_layers == fewest
    seconds = "checkpointing, the prompt again"
    assert some.seconds[seconds] == 2 * less.seconds[seconds] > 0
    with pytest.raises(ValueError, match="checkpointed_layers: got 4, expected at most 3"):
        of(4)


def test_queries_and_passages_go_together():
    """In one rollout where their lengths allow it, otherwise in two, which CUDA graphs run one after the other."""
    same = Parts.of([512] * 48, None, 5, graphs=True)
    assert (same.shapes, same.cached) == ([(48, 512)], False)
    mixed = Parts.of([100] * 9 + [512] * 18, None, 5, graphs=False)
    assert (mixed.shapes, mixed.cached) == ([(18, 512), (9, 100)], False)
    padded = Parts.of([100] * 9 + [512] * 17, None, 5, graphs=True)
    assert (padded.shapes, padded.cached) == ([(18, 512), (9, 112)], True)
    assert [len(part.lengths) for part in padded.each] == [17, 9]


def test_steps_by_the_block():
    """No backward through single steps, and gradient caching does not draft twice."""
    steps, block = (planned(micro=1040, num_steps=8, factor=factor) for factor in (1.0, 0.0))
    assert block.seconds["backward"] < steps.seconds["backward"]
    assert block.memory["generated steps"] < steps.memory["generated steps"]
    assert block.memory["gradient cache"] == 1.5 * steps.memory["gradient cache"]
    extra = block.seconds["gradient caching, the extra forward"]
    assert block.seconds["prompt, forward"] < extra < 0.8 * steps.seconds["gradient caching, the extra forward"]
    assert "K = 8 by the block" in str(block)


def test_lengths_are_capped_by_the_config():
    assert str(planned(length=4000)) == str(planned())
    assert str(planned(length=128)) != str(planned())


def test_the_loss_stays_within_its_budget():
    # beside one step's rows and carry there is a piece of 512 MiB
    assert info_nce_bytes(100_000, 7, 20, 4096) <= 4 * 4096 * (2 * 100_000 + 9 * 100_000) + (512 << 20)
    assert info_nce_bytes(4, 1, 5, 576) == 5 * (2 * (4 * 576) * (4 + 8) + 8 * 4 * 8)
    assert info_nce_bytes(4, 1, 5, 576, ranks=2) == 5 * (2 * (4 * 576) * (4 + 16) + 8 * 4 * 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu": "h900"}, "gpu: got 'h900', expected one of h100, "),
        ({"world_size": 0}, "world_size: got 0, expected an integer >= 1"),
        ({"length": 0}, "length: got 0"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        plan(settings(), **{"gpu": "h100", "model_config": SHALLOW, **options})


def test_the_command(tmp_path, capsys):
    tiny_model("qwen2").save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()  # the config is enough
    arguments = ["train", "--model", str(tmp_path / "base"), "--data", "nowhere.jsonl"]
    assert main([*arguments, "--output", str(tmp_path / "run"), "--plan", "--gpu", "l40s", "--length", "64"]) == 0
    out = capsys.readouterr().out
    for words in ("memory of a rank", "floor of a step", "frozen weights", "fits:", "l40s", "64 tokens"):
        assert words in out
    assert not (tmp_path / "run").exists()
    assert main([*arguments, "--plan", "--gpu", "abacus"]) == 2
    assert "gpu: got 'abacus'" in capsys.readouterr().err
