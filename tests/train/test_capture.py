"""Captured micro-batches give the losses and gradients of single kernels, and can be captured. Here on a CPU their
replays run the functions that a GPU captures; tests/gpu/test_training_gpu.py replays graphs."""

from __future__ import annotations

import warnings
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from gircse.lm.lora import fused_lora
from gircse.train.capture import CapturedPasses
from gircse.train.capture.bucket import Bucket
from gircse.train.capture.checkpoints import packed, unpacked
from gircse.train.grad_cache import micro_batches
from gircse.train.step import contrastive_backward
from gircse.train.step_monitor import StepMonitor
from tests.capture_guard import two_steps
from tests.training_batches import NUM_STEPS, adapted, batch, config, gradients


def run_in_place(captured):
    """What a capture does with a pass, without a graph."""
    captured.warm_up()
    return captured.forward, captured.backward


def never(captured):
    raise RuntimeError("operation not permitted when stream is capturing\nmore")


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.usefixtures("no_downcast")
@pytest.mark.parametrize(
    ("num_steps", "factor", "budget"),
    [(0, 0.0, None), (NUM_STEPS, 0.0, 90), (NUM_STEPS, 1.0, 90)],
)
def test_equals_single_kernels(num_steps, factor, budget):
    """In the first step nothing is captured, in the second all is, and in the others nothing new. An update between the
    steps counts, and so does what `.grad` held before."""
    whole, settings = batch(), config(micro_batch_tokens=budget)
    model, monitor, plain = adapted(settings), StepMonitor(torch.device("cpu")), StepMonitor(torch.device("cpu"))
    graphs = CapturedPasses(model, record=run_in_place)
    made, options = [], {"num_steps": num_steps, "soft_token_gradient": factor}
    for _ in range(2):
        loss, losses, _ = contrastive_backward(model, whole, settings, **options, monitor=plain)
        expected = gradients(model)
        monitor.start()
        plain.entropies()
        found = contrastive_backward(model, whole, settings, **options, monitor=monitor, graphs=graphs)
        made.append(len(graphs.buckets))
        assert relative(found[0], loss) < 1e-10
        assert relative(found[1], losses) < 1e-10
        first = next(p for p in model.parameters() if p.requires_grad)
        whole_gradient = first.grad.clone()
        contrastive_backward(model, whole, settings, **options, graphs=graphs)  # adds to the gradients
        assert relative(first.grad, 2 * whole_gradient) < 1e-10
        assert relative(gradients(model), 2 * expected) < 1e-10
        assert monitor.entropies() == pytest.approx(plain.entropies())
        plain.start()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(1.1)
    assert made[1] == len(graphs.buckets) > 0
    assert graphs.refusal is None


@pytest.mark.usefixtures("no_downcast")
@pytest.mark.parametrize(("factor", "checkpointing"), [(0.0, False), (0.0, True), (1.0, True)])
def test_dropout_falls_on_the_same_places(factor, checkpointing):
    """With checkpointing in graphs, too, where a layer's second pass draws nothing."""
    whole, settings = batch(), config(lora_dropout=0.3, micro_batch_tokens=120, gradient_checkpointing=checkpointing)
    model, results = adapted(settings), []
    for record in (run_in_place, never):
        if record is never:
            for layer in model.causal_lm.body.layers:
                layer.gradient_checkpointing = False
        graphs = CapturedPasses(model, record=record)
        graphs.refusal = None if record is run_in_place else "not at all"
        for seed in (3, 4):
            torch.manual_seed(seed)
            loss = contrastive_backward(
                model, whole, settings, num_steps=NUM_STEPS, soft_token_gradient=factor, graphs=graphs
            )[0]
            results.append((loss, gradients(model), torch.rand(2)))
        assert bool(graphs.buckets) == (record is run_in_place)
    for captured, single in zip(results[:2], results[2:], strict=True):
        for ours, theirs in zip(captured, single, strict=True):
            assert relative(ours, theirs) < 1e-10
    assert relative(results[0][1], results[1][1]) > 1e-3


def texts(rows: int, length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 100, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, length // 2 :] = 0
    return ids, mask


@pytest.mark.parametrize(
    ("num_steps", "factor", "checkpointing"),
    [(0, 0.0, False), (NUM_STEPS, 0.0, True), (NUM_STEPS, 0.0, False), (NUM_STEPS, 1.0, False)],
)
def test_two_replays_are_the_same_operations(num_steps, factor, checkpointing):
    """Forward and backward, on other texts and after an update of the weights: no wait for the device, no number or
    address that changes."""
    model = adapted(config(lora_dropout=0.1, gradient_checkpointing=checkpointing), dtype=torch.float32)
    graphs = CapturedPasses(model, record=run_in_place)
    for seed in range(2):
        graphs.embed(*texts(3, 9, seed), num_steps=num_steps, soft_token_gradient=factor).sum().backward()
    (captured,) = (one for one in graphs._passes.values() if one is not None)
    seeds = iter(range(2))

    def replay():
        captured.forward()
        captured.backward()

    def changed():
        with torch.no_grad():
            captured.ids.copy_(torch.randint(3, 100, captured.ids.shape))
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(1 + next(seeds))
                    break

    calls = []
    for _ in range(2):
        captured.warm_up()  # as before each capture
        first, second = two_steps(replay)
        calls += [first, second]
        changed()
    assert len(calls[0]) > 100
    assert calls[0] == calls[1]
    assert calls[2] == calls[3]
    names = [Counter(name for name, _ in each) for each in calls]
    assert names[0] == names[2]  # in an order of the weights' gradients that depends on when autograd's nodes were made


def test_a_replay_reads_the_weights_of_now():
    """The copies of LoRA's weights that products read are written inside of the graph, whatever the host knows."""
    model = adapted(config())
    graphs = CapturedPasses(model, record=run_in_place)
    for _ in range(2):
        graphs.embed(*texts(3, 9, 0), num_steps=2)
    (captured,) = graphs._passes.values()
    shared = fused_lora(model.base).inputs[0]
    with torch.no_grad():
        shared.products.a.zero_()
    assert shared.is_current()
    captured.forward()
    assert shared.products.a.any()


@pytest.mark.parametrize("error", [RuntimeError("not permitted when capturing\nmore"), torch.OutOfMemoryError("full")])
def test_a_capture_that_fails_falls_back_with_one_warning(error):
    model, attempts = adapted(config()), []

    def failing(captured):
        attempts.append(1)
        raise error

    graphs, kept = CapturedPasses(model, record=failing), texts(3, 9, 0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        states = [graphs.embed(*kept, num_steps=2) for _ in range(4)]
    assert [str(one.message).splitlines()[0] for one in caught] == [
        f"micro-batches are not captured as CUDA graphs, which is slower: {graphs.refusal}"
    ]
    assert graphs.refusal == f"{type(error).__name__}: {str(error).splitlines()[0]}"
    assert len(attempts) == 1
    assert torch.equal(states[3], states[0])
    assert relative(states[0], model.rollout(*kept, 2)) < 1e-10


@pytest.mark.parametrize("own", ["attention", "an unknown layer"])
def test_checkpoints_of_layers_with_other_dropout_are_not_captured(own):
    model, kept = adapted(config(gradient_checkpointing=True, lora_dropout=0.1)), texts(3, 9, 0)
    for layer in model.causal_lm.body.layers:
        if own == "attention":
            layer.self_attn.attention_dropout = 0.1
        else:
            layer.input_layernorm.register_forward_hook(lambda _, __, out: torch.nn.functional.dropout(out, 0.1))
    graphs = CapturedPasses(model, record=run_in_place)
    options = {"num_steps": 2, "soft_token_gradient": 0}
    graphs.embed(*kept, **options)
    with pytest.warns(UserWarning, match="draws random numbers in a checkpointed layer"):
        graphs.embed(*kept, **options).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graphs.embed(*kept, **options).sum().backward()
    assert graphs.buckets == []


@pytest.mark.parametrize("shape", [(3, 8), (5, 7), (0, 8)])
def test_masks_of_one_bit(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    assert packed(mask).nbytes == -(-mask.numel() // 8)
    assert torch.equal(unpacked(packed(mask), mask.shape), mask)


def test_activations_of_one_micro_batch_live_at_a_time():
    graphs = CapturedPasses(adapted(config()), record=run_in_place)
    for _ in range(2):
        states = graphs.embed(*texts(3, 9, 0), num_steps=2)
        states.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="or a second one"):
        states.sum().backward()
    first, second = (graphs.embed(*texts(3, 9, seed), num_steps=2) for seed in range(2))
    with pytest.raises(RuntimeError, match="after another micro-batch"):
        first.sum().backward()
    second.sum().backward()


def test_what_is_not_captured():
    """A change of the model drops the graphs, a factor that changes from step to step and a model in eval mode make
    none."""
    model = adapted(config())
    graphs, kept = CapturedPasses(model, record=run_in_place), texts(3, 9, 0)
    for _ in range(2):
        graphs.embed(*kept, num_steps=2)
    assert graphs.buckets == [Bucket(3, 16, 2, 1.0)]
    with pytest.warns(UserWarning, match="soft_token_gradient between 0 and 1"):
        graphs.embed(*kept, num_steps=2, soft_token_gradient=0.5)
    weight = next(p for p in model.parameters() if p.requires_grad)
    weight.data = weight.data.clone()
    graphs.embed(*kept, num_steps=3)
    assert graphs.buckets == []
    model.eval()
    graphs.embed(*kept, num_steps=2)
    assert graphs.buckets == []


def test_runs_that_make_no_graphs():
    on_gpu = SimpleNamespace(device=torch.device("cuda"))
    assert CapturedPasses.of(adapted(config()), config()) is None
    assert CapturedPasses.of(on_gpu, config(cuda_graphs=False)) is None
    for setting in ({"fsdp": True}, {"quantization": "nf4"}):
        with pytest.warns(UserWarning, match="not captured as CUDA graphs"):
            assert CapturedPasses.of(on_gpu, config(**setting)) is None


def test_micro_batches_stay_within_their_budget_as_buckets():
    graphs = CapturedPasses(adapted(config()), record=run_in_place)
    padded = partial(graphs.padded, num_steps=5)
    for budget in (90, 2000):
        parts = micro_batches(
            [[7] * (3 + row % 30) for row in range(200)], budget, num_steps=5, pad_id=0, padded=padded
        )
        shapes = [Bucket.of(part.input_ids.shape, 5, 0.0, most_positions=None) for part in parts]
        assert max(shape.positions for shape in shapes) <= budget
        assert min(len(part.rows) for part in parts[:-1]) > 1 or budget == 90


def test_buckets_are_few_and_little_larger():
    found = {Bucket.of(torch.Size((rows, length)), 5, 0.0, most_positions=None) for rows in (24,) for length in
             range(257, 513)}  # fmt: skip
    assert len(found) == 8
    for rows, length in ((1, 1), (7, 33), (17, 130), (100, 511), (999, 4000)):
        bucket = Bucket.of(torch.Size((rows, length)), 5, 0.0, most_positions=4005)
        assert rows <= bucket.rows <= 1.125 * rows
        assert length <= bucket.length <= max(16, 1.125 * length, length + 15)
        assert bucket.length + 5 <= 4005
