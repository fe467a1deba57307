"""The losses against docs/method.md §5-6 written plainly, their gradients, and the library's modifiers around them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("sentence_transformers")
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from transformers import TrainerState

from gircse import GIRCSE, GircseConfig
from gircse.ops.info_nce_reference import info_nce_reference
from gircse.sentence_transformers import CachedGIRCSELoss, GIRCSELoss, GIRCSEModule, SoftTokenGradientCallback
from gircse.sentence_transformers.losses import embed_steps, minibatch
from tests.plain import plain_losses, plain_objective, plain_rollout
from tests.tiny_models import tiny_model, tiny_tokenizer

COLUMNS = {
    "anchor": ["who", "where is it", "what", "when was that", "why"],
    "positive": ["she did", "in the north", "a thing", "long ago, in spring", "because"],
    "negative_1": ["no", "never, or hardly ever", "x", "somewhere", "y"],
    "negative_2": ["an apple", "z", "a very much longer text", "green", "blue"],
}


def build(**overrides) -> SentenceTransformer:
    model = GIRCSE(tiny_model("llama", dtype=torch.float64, **overrides), tiny_tokenizer(), GircseConfig(num_steps=3))
    return SentenceTransformer(modules=[GIRCSEModule(model)], device="cpu").train()


def features(st: SentenceTransformer) -> list[dict]:
    return [st.preprocess(texts) for texts in COLUMNS.values()]


def gradients(st: SentenceTransformer, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    st.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in st.named_parameters() if parameter.grad is not None}


def plain_steps(st: SentenceTransformer, column: str) -> torch.Tensor:
    """[B, K, D] from the stock model, a row at a time, without any cache."""
    tokenizer, model = st.tokenizer, tiny_model("llama", dtype=torch.float64)
    rows = [torch.tensor(ids) for ids in tokenizer(COLUMNS[column], add_special_tokens=False)["input_ids"]]
    with torch.no_grad():
        return torch.stack([plain_rollout(model, ids, 3)[1] for ids in rows])


def plain_loss(st: SentenceTransformer, dim: int | None = None) -> torch.Tensor:
    steps = [plain_steps(st, column)[..., :dim] for column in COLUMNS]
    return plain_objective(plain_losses(steps[0], torch.cat(steps[1:]), torch.arange(5)))


def test_the_loss_is_the_specs(no_downcast):
    st = build()
    assert torch.allclose(GIRCSELoss(st)(features(st)), plain_loss(st), atol=1e-10)
    assert torch.allclose(CachedGIRCSELoss(st, mini_batch_size=2)(features(st)), plain_loss(st), atol=1e-10)


@pytest.mark.parametrize(("mini_batch_size", "factor"), [(1, 1.0), (2, 0.3), (3, 0.0), (8, 1.0)])
def test_cached_equals_uncached(no_downcast, mini_batch_size, factor):
    st = build()
    options = {"temperature": 0.05, "reg_weight": 0.3, "reduction": "sum", "soft_token_gradient": factor}
    whole = GIRCSELoss(st, **options)(features(st))
    expected = gradients(st, whole)
    cached = CachedGIRCSELoss(st, mini_batch_size=mini_batch_size, **options)(features(st))
    found = gradients(st, cached)
    assert abs((cached - whole).item()) < 1e-10
    assert found.keys() == expected.keys()
    assert max(float(g.abs().max()) for g in expected.values()) > 1e-3
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() < 1e-10, name
    with torch.no_grad():
        assert abs(float(CachedGIRCSELoss(st, mini_batch_size=2, **options)(features(st)) - whole)) < 1e-10


def test_the_factor_reaches_the_rollout(no_downcast):
    """The head gets no gradient where tokens are constants."""
    st, found = build(), {}
    for factor in (1.0, 0.0):
        loss = GIRCSELoss(st, soft_token_gradient=factor)
        assert loss.get_config_dict()["soft_token_gradient"] == factor
        found[factor] = gradients(st, loss(features(st)[:2]))
        model, columns = st[0].model, []
        for column in features(st)[:2]:
            states = model.rollout(column["input_ids"], column["attention_mask"], soft_token_gradient=factor)
            columns.append(torch.nn.functional.normalize(model.pool(states), dim=-1))
        expected = gradients(st, loss.objective(columns))
        assert found[factor].keys() == expected.keys()
        for name, gradient in expected.items():
            assert (found[factor][name] - gradient).abs().max() < 1e-10, name
    assert [name for name in found[1.0] if name not in found[0.0]] == ["0.model.base.lm_head.weight"]


def test_a_schedule_sets_the_factor_of_each_step():
    st = build()
    loss = GIRCSELoss(st)
    callback = SoftTokenGradientCallback(loss, "0:1@0.5")
    for step, expected in ((0, 0.0), (1, 0.5), (3, 1.0)):
        callback.on_step_begin(None, TrainerState(global_step=step, max_steps=4), None)
        assert loss.soft_token_gradient == expected
    for factor in (-0.5, 2):
        with pytest.raises(ValueError, match="soft_token_gradient: got"):
            loss.soft_token_gradient = factor


@pytest.mark.parametrize("factor", [1.0, 0.0])
def test_dropout_is_replayed(no_downcast, factor):
    """Both passes of gradient caching draw the same masks: its gradient is that of one pass over the mini-batches."""
    st = build(attention_dropout=0.3)
    torch.manual_seed(7)
    cached = CachedGIRCSELoss(st, mini_batch_size=2, soft_token_gradient=factor)
    loss = cached(features(st))
    torch.rand(5)  # whatever else draws in between
    found = gradients(st, loss)

    torch.manual_seed(7)
    columns = [
        torch.cat([cached.embed(minibatch(column, start, start + 2)) for start in range(0, 5, 2)])
        for column in features(st)
    ]
    once = cached.objective(columns)
    expected = gradients(st, once)
    torch.manual_seed(8)
    assert abs((once - loss).item()) < 1e-10
    assert abs(float(cached(features(st)) - loss)) > 1e-4  # the masks matter
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() < 1e-10, name


@pytest.mark.parametrize("kind", [GIRCSELoss, CachedGIRCSELoss])
def test_matryoshka_shortens_every_step(no_downcast, kind):
    st = build()
    dims, weights = [32, 12, 5], [1.0, 0.5, 0.25]
    loss = MatryoshkaLoss(st, kind(st, soft_token_gradient=0.3), dims, weights)(features(st), None)
    expected = sum(weight * plain_loss(st, dim) for dim, weight in zip(dims, weights, strict=True))
    assert torch.allclose(loss, expected, atol=1e-10)
    assert abs(float(plain_loss(st, 5) - plain_loss(st))) > 1e-3
    found = gradients(st, loss)

    columns = [GIRCSELoss(st, soft_token_gradient=0.3).embed(column) for column in features(st)]
    parts = [GIRCSELoss(st).objective([column[..., :dim] for column in columns]) for dim in dims]
    by_hand = gradients(st, sum(weight * part for weight, part in zip(weights, parts, strict=True)))
    for name, gradient in by_hand.items():
        assert (found[name] - gradient).abs().max() < 1e-10, name


def test_gradient_checkpointing(no_downcast):
    st = build()
    expected = gradients(st, GIRCSELoss(st)(features(st)))
    st.gradient_checkpointing_enable()
    layer = st.transformers_model.model.layers[0]
    assert layer.gradient_checkpointing
    for kind in (GIRCSELoss, CachedGIRCSELoss):
        found = gradients(st, kind(st)(features(st)))
        for name, gradient in expected.items():
            assert (found[name] - gradient).abs().max() < 1e-10, name
    with pytest.raises(ValueError, match="use_reentrant=True"):
        st.gradient_checkpointing_enable({"use_reentrant": True})


KINDS = [(GIRCSELoss, {}), (CachedGIRCSELoss, {"mini_batch_size": 2})]


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_right_answers_are_no_negatives(no_downcast, kind, options):
    """Row 1 has the anchor of row 0, row 2 the positive of row 0, row 3 a positive that is a negative and the anchor of
    others; the mask is written out by hand."""
    anchors = ["who", "who", "what", "when was that"]
    positives = ["she did", "he did", "she did", "who"]
    negatives = ["no", "she did", "who", "he did"]
    masked = [(0, 1), (0, 2), (0, 3), (0, 5), (0, 6), (0, 7), (1, 0), (1, 2), (1, 3), (1, 5), (1, 6), (1, 7)]
    masked += [(2, 0), (2, 5), (3, 6)]
    mask = torch.zeros(4, 8, dtype=torch.bool)
    mask[tuple(torch.tensor(masked).T)] = True
    st = build()
    columns = [st.preprocess(texts) for texts in (anchors, positives, negatives)]
    with torch.no_grad():
        steps = [embed_steps(st, column) for column in columns]
        options_of_op = {"temperature": 0.02, "pooling": "last"}
        target = torch.arange(4)
        right, all_count = (
            plain_objective(info_nce_reference(steps[0], torch.cat(steps[1:]), target, mask=m, **options_of_op))
            for m in (mask, None)
        )
    assert abs(float(kind(st, **options)(columns) - right)) < 1e-10
    assert abs(float(kind(st, filter_false_negatives=False, **options)(columns) - all_count)) < 1e-10
    assert float(all_count - right) > 0.1


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_copies_of_a_row_have_no_negatives(no_downcast, kind, options):
    st = build()
    columns = [st.preprocess([text] * 4) for text in ("who", "she did")]
    assert float(kind(st, **options)(columns)) == pytest.approx(0.0, abs=1e-12)
    copies = torch.log(torch.tensor(4.0))
    assert float(kind(st, filter_false_negatives=False, **options)(columns)) == pytest.approx(float(copies), abs=1e-6)


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_matryoshka_keeps_the_mask(no_downcast, kind, options):
    st = build()
    columns = [st.preprocess([text] * 4) for text in ("who", "she did")]
    assert float(MatryoshkaLoss(st, kind(st, **options), [32, 5])(columns, None)) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_labels_and_frozen_weights_are_refused(kind, options):
    st = build()
    with pytest.raises(ValueError, match=r"labels: got 5 of them, expected none.* remove the column \(label"):
        kind(st, **options)(features(st), torch.ones(5))
    st.requires_grad_(False)
    with pytest.raises(ValueError, match=r"model: got frozen weights only.* is_trainable=True"):
        kind(st, **options)(features(st))
    with torch.no_grad():
        assert kind(st, **options)(features(st)) > 0  # what an evaluation asks for


def test_what_is_refused():
    st = build()
    for options, words in (
        ({"temperature": 0.0}, "temperature: got 0.0"),
        ({"reg_weight": -1.0}, "reg_weight: got -1.0"),
        ({"reduction": "max"}, "reduction: got 'max'"),
    ):
        with pytest.raises(ValueError, match=words):
            GIRCSELoss(st, **options)
    with pytest.raises(ValueError, match="mini_batch_size: got 0"):
        CachedGIRCSELoss(st, mini_batch_size=0)
    with pytest.raises(ValueError, match="got 1 columns, expected anchor, positive"):
        GIRCSELoss(st)(features(st)[:1])
    st.append(Dense(32, 8).double())
    with pytest.raises(ValueError, match="Dense after the GIRCSEModule would not be trained"):
        GIRCSELoss(st)
    with pytest.raises(TypeError, match="its first module is Dense"):
        GIRCSELoss(SentenceTransformer(modules=[Dense(32, 8)], device="cpu"))
