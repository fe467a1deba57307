"""An integer is whatever Python takes for an index, at every entrance; what leaves is Python's own."""

from __future__ import annotations

import json
import operator

import numpy as np
import pytest
import torch

from gircse import GIRCSE, GircseConfig, ops
from gircse.analysis.analyze import _checked_steps
from gircse.analysis.clustering import kmeans
from gircse.data.retrieval_task import RetrievalTask
from gircse.engine.config import EngineConfig
from gircse.evaluation.metrics import metrics_by_step
from gircse.evaluation.retrieval import evaluate_retrieval
from gircse.integers import as_integer, check_integer
from gircse.ops import VocabShard
from gircse.train.config import TrainConfig
from gircse.train.distill_config import DistillConfig
from tests.tiny_models import tiny_model, tiny_tokenizer


class Index:
    """An integer of somebody else's."""

    def __index__(self) -> int:
        return 2


TWOS = [np.int64(2), np.uint8(2), np.array(2), torch.tensor(2), Index()]


@pytest.mark.parametrize("value", TWOS, ids=lambda value: type(value).__name__)
def test_every_entrance_takes_it(value):
    config = GircseConfig(num_steps=value, query_max_length=value, temperature=np.float32(0.5))
    assert json.loads(config.to_json())["num_steps"] == 2
    settings = TrainConfig(num_steps=value, max_steps=value, batch_size=value, learning_rate=np.float32(0.5))
    assert json.loads(settings.to_json())["max_steps"] == 2
    assert settings.max_num_steps == 2
    assert type(DistillConfig(num_steps=value).num_steps) is int
    assert type(EngineConfig(max_rows=value).max_rows) is int

    model = GIRCSE(tiny_model("llama"), tiny_tokenizer()).eval()
    plain = model.encode(["red"], num_steps=2, batch_size=2, max_length=2, truncate_dim=2)
    assert np.array_equal(
        model.encode(["red"], num_steps=value, batch_size=value, max_length=value, truncate_dim=value), plain
    )
    assert np.array_equal(
        next(model.encode_stream(["red"], num_steps=value, window=value)), model.encode("red", num_steps=2)
    )
    assert model.encode(["red"], num_steps="auto", max_steps=value, return_steps=True).shape[1] == 2
    ids = torch.tensor([[5, 6]])
    assert model.rollout(ids, torch.ones_like(ids), value).shape[1] == 2
    assert len(model.inspect("red", num_steps=value, top_n=value)[0].steps[0].tokens) == 2

    task = RetrievalTask("retrieve", ["red"], ["fox"], [{0}])
    assert list(evaluate_retrieval(model, task, steps=[value])) == [2]
    assert list(metrics_by_step(np.ones((1, 2, 3)), np.ones((1, 2, 3)), [0], [value], k=value)) == [2]
    assert _checked_steps([value, 1]) == (1, 2)
    assert kmeans(np.eye(3), value, seed=value).shape == (3,)

    hidden, head = torch.randn(1, 4), torch.randn(5, 4)
    assert ops.top_tokens(hidden, head, value)[0].shape == (1, 2)
    assert VocabShard(0, value).stop == 2
    if not isinstance(value, torch.Tensor):  # a tensor holds a seed for each row
        drawn = [ops.soft_embed(hidden, head, gumbel_seed=seed) for seed in (value, 2)]
        assert torch.equal(*drawn)


@pytest.mark.parametrize("value", [True, np.True_, torch.tensor(True), 2.0, np.float64(2), "2", None, np.ones(2, int)])
def test_nothing_else_is_one(value):
    assert as_integer(value) is None
    with pytest.raises(ValueError, match="num_steps: got .*, expected an integer >= 0"):
        check_integer("num_steps", value, least=0)
    with pytest.raises(ValueError, match="num_steps"):
        GircseConfig(num_steps=value)
    with pytest.raises(ValueError, match="batch_size"):
        TrainConfig(batch_size=value)


def test_bounds_are_named():
    assert check_integer("n", np.int64(3), least=3, most=3) == 3
    with pytest.raises(ValueError, match="n: got 2, expected an integer >= 3"):
        check_integer("n", 2, least=3)
    with pytest.raises(ValueError, match="n: got 4, expected at most 3"):
        check_integer("n", 4, least=3, most=3)
    assert operator.index(Index()) == 2
