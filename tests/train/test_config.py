"""Settings: typed, checked by name, saved and read again, the same over versions."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, fields, replace

import numpy as np
import pytest

from gircse.lm.config import GircseConfig
from gircse.train.config import TrainConfig
from gircse.train.learning_rate import learning_rate


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: got 0, expected an integer >= 1"),
        ({"batch_size": "4"}, "batch_size: got '4', expected an integer"),
        ({"batch_size": 4.0}, "batch_size: got 4.0, expected an integer"),
        ({"batch_size": True}, "batch_size: got True, expected an integer"),
        ({"max_steps": 0}, "max_steps: got 0, expected an integer >= 1"),
        ({"max_negatives": -1}, "max_negatives: got -1, expected an integer >= 0"),
        ({"learning_rate": -1.0}, "learning_rate: got -1.0, expected a number > 0"),
        ({"learning_rate": "1"}, "learning_rate: got '1', expected a number"),
        ({"num_steps": -1}, "num_steps: got -1, expected an integer >= 0 or a range such as '3:10'"),
        ({"num_steps": 2.5}, "num_steps: got 2.5, expected an integer or a string"),
        *(
            ({"num_steps": steps}, f"num_steps: got {steps!r}, expected an integer >= 0 or a range")
            for steps in ("5", "", ":", "3:", "10:3", "0:3", "-1:3", "3:10:2", "3-10", "a:b", "1:9999999999", "٣:٤")
        ),
        ({"soft_token_gradient": 2}, "soft_token_gradient: got 2.0, expected a number from 0 to 1, or a schedule"),
        ({"soft_token_gradient": "0.1"}, "soft_token_gradient: got '0.1', expected a number from 0 to 1, or"),
        ({"inference_steps": -1}, "inference_steps: got -1, expected an integer >= 0"),
        ({"reduction": "max"}, "reduction: got 'max', expected 'mean' or 'sum'"),
        ({"batching": "both"}, "batching: got 'both', expected 'homogeneous' or 'mixed'"),
        ({"warmup_ratio": 1.0}, "warmup_ratio: got 1.0"),
        ({"lora_dropout": float("nan")}, "lora_dropout: got nan"),
        ({"pooling": "cls"}, "pooling: got 'cls'"),
        ({"temperature": 0.0}, "temperature: got 0.0"),
        ({"symmetric": 1}, "symmetric: got 1, expected true or false"),
        ({"device": 0}, "device: got 0, expected a string"),
        ({"data": "rows.jsonl"}, "data: got 'rows.jsonl', expected a list, each a string"),
        ({"data": ("a", 3)}, r"data\[1\]: got 3, expected a string"),
        ({"weights": (1, 0)}, r"weights: got \(1.0, 0.0\), expected numbers > 0"),
        ({"weights": (1, float("inf"))}, "weights: got"),
        ({"data": ("a", "b"), "weights": (1,)}, r"weights: got \(1.0,\), expected one for each of the 2 of data"),
        ({"data": ("a",), "instructions": ("x", "y")}, "instructions: got .*, expected one for each of the 1 of data"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


def test_lists_and_whole_numbers_are_taken():
    config = TrainConfig(data=["a", "b"], weights=[2, 1], learning_rate=1)
    assert config == TrainConfig(data=("a", "b"), weights=(2.0, 1.0), learning_rate=1.0)
    assert isinstance(config.weights[0], float)
    assert TrainConfig(learning_rate=np.float64(0.5)).learning_rate == 0.5
    assert hash(config) == hash(replace(config))


def test_fixed_and_drawn_numbers_of_steps():
    assert {TrainConfig(num_steps=4).steps_at(step) for step in range(9)} == {4}
    assert TrainConfig(num_steps=0).max_num_steps == TrainConfig(num_steps=0).steps_at(3) == 0
    config = TrainConfig(num_steps="3:10")
    drawn = [config.steps_at(step) for step in range(400)]
    assert set(drawn) == set(range(3, 11))
    assert drawn == [TrainConfig(num_steps="3:10").steps_at(step) for step in range(400)]
    assert drawn != [TrainConfig(num_steps="3:10", seed=1).steps_at(step) for step in range(400)]
    assert config.max_num_steps == 10
    assert TrainConfig(num_steps="7:7").steps_at(5) == 7


def test_the_factor_at_the_soft_tokens_of_each_step():
    config = TrainConfig(soft_token_gradient="0:1@0.5")
    assert [config.soft_token_gradient_at(step, 4) for step in range(4)] == [0, 0.5, 1, 1]
    assert config.max_soft_token_gradient == 1
    assert TrainConfig().soft_token_gradient_at(3, 4) == TrainConfig().max_soft_token_gradient == 0


def test_the_steps_of_the_saved_model():
    lengths = {"query_max_length": 7, "passage_max_length": 9}
    saved = TrainConfig(num_steps="3:10", **lengths).gircse_config()
    assert saved == GircseConfig(num_steps=10, **lengths)
    assert TrainConfig(num_steps="3:10", inference_steps=5).gircse_config().num_steps == 5
    saved = TrainConfig(num_steps=5, inference_steps=20, pooling="last", **lengths).gircse_config()
    assert saved == GircseConfig(20, "last", **lengths)
    assert TrainConfig(num_steps=5, inference_steps=0).gircse_config().num_steps == 0


def test_saved_and_read_again(tmp_path):
    path = tmp_path / "train_config.json"
    config = TrainConfig(model="m", data=("a", "b"), weights=(2, 1), instructions=("", "i"), num_steps="3:10")
    path.write_text(config.to_json())
    assert TrainConfig.from_json(path) == config
    # a file of a version that did not know some fields yet
    new = ("weights", "instructions", "batching", "inference_steps", "symmetric", "filter_false_negatives")
    path.write_text(json.dumps({k: v for k, v in asdict(config).items() if k not in new}))
    assert TrainConfig.from_json(path) == TrainConfig(model="m", data=("a", "b"), num_steps="3:10")
    TrainConfig.from_json(path).check_continues(TrainConfig(model="m", data=("a", "b"), num_steps="3:10", resume=True))


def test_a_run_from_before_the_factor_goes_on_with_the_whole_gradient(tmp_path):
    path = tmp_path / "train_config.json"
    path.write_text(json.dumps({k: v for k, v in asdict(TrainConfig()).items() if k != "soft_token_gradient"}))
    earlier = TrainConfig.from_json(path)
    assert earlier == TrainConfig(soft_token_gradient=1.0)
    with pytest.raises(ValueError, match=r"soft_token_gradient: was 1\.0, is 0\.0"):
        TrainConfig().check_continues(earlier)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting property name"),
        ('{"batchsize": 3}', "batchsize: no such setting, did you mean 'batch_size'?"),
        ('{"learning_rate": NaN}', "learning_rate: got nan, expected a number > 0"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, text, message):
    path = tmp_path / "train_config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: {re.escape(message)}"):
        TrainConfig.from_json(path)


def test_every_field_says_what_it_is():
    assert all(field.metadata["help"] for field in fields(TrainConfig))


@pytest.mark.parametrize(("total", "ratio"), [(1, 0.03), (4, 0.5), (6, 0.0), (10, 0.25), (3, 0.9)])
def test_every_step_trains(total, ratio):
    """Warm-up starts above zero; the peak is reached at its end; the decay is linear and its last step not zero."""
    config = TrainConfig(learning_rate=2.0, warmup_ratio=ratio)
    rates = [learning_rate(config, step, total) for step in range(total)]
    warmup = math.ceil(ratio * total)
    assert rates[:warmup] == [2.0 * (step + 1) / warmup for step in range(warmup)]
    assert rates[warmup:] == [2.0 * left / (total - warmup) for left in range(total - warmup, 0, -1)]
    assert min(rates) > 0
    assert max(rates) == 2.0
