"""Checkpoints of a training run, damaged in every way: an error that names the checkpoint, or the state bitwise."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from gircse.train import train
from gircse.train.checkpoint import STATE_NAME, SUMS_NAME, WEIGHTS_NAME, list_checkpoints, load_checkpoint
from gircse.train.lora import trainable_model
from tests.fuzz.hostile_pickle import plain_pickle, save_torch
from tests.fuzz.json_values import damaged, values
from tests.fuzz.outcome import outcome
from tests.fuzz.profiles import fuzz
from tests.tiny_models import tiny_model, tiny_tokenizer
from tests.training_process import ROWS, settings


class Run:
    """A run of two steps, its checkpoint, and a place for damaged copies of it."""

    def __init__(self, folder: Path) -> None:
        tiny_model("llama").save_pretrained(folder / "base")
        tiny_tokenizer().save_pretrained(folder / "base")
        self.config = settings(folder / "base", folder / "run", max_steps=2, lora_r=2)
        train(self.config, rows=ROWS)
        self.whole = list_checkpoints(folder / "run")[-1]
        self.copy = folder / "copy" / self.whole.name
        self.model = trainable_model(self.config)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.before = [p.detach().clone() for p in self.parameters]
        self.trained = self.state(self.whole)

    def fresh(self) -> Path:
        shutil.rmtree(self.copy, ignore_errors=True)
        return Path(shutil.copytree(self.whole, self.copy))

    def state(self, folder: Path) -> list[Any]:
        """What a fresh model and optimizer hold after loading, the next step included."""
        for parameter, value in zip(self.parameters, self.before, strict=True):
            parameter.data.copy_(value)
        optimizer = torch.optim.AdamW(self.parameters, lr=self.config.learning_rate)
        step = load_checkpoint(folder, self.model, optimizer)
        for parameter in self.parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        return [step, *(parameter.detach().clone() for parameter in self.parameters)]

    def loads(self) -> bool:
        """Whether the copy is loaded, and then it is what was saved; otherwise the error names it."""
        found, error = outcome(lambda: self.state(self.copy), ValueError)
        if error is not None:
            assert str(error).startswith(f"checkpoint {self.copy} cannot be read: ")
            return False
        assert found[0] == self.trained[0]
        assert all(torch.equal(a, b) for a, b in zip(found[1:], self.trained[1:], strict=True))
        return True


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return Run(tmp_path_factory.mktemp("fuzz"))


def test_it_loads_with_and_without_checksums(run):
    run.fresh()
    assert run.loads()
    (run.copy / SUMS_NAME).unlink()
    assert run.loads()


@fuzz(25)
@given(data=st.data())
def test_bytes(run, data):
    name = data.draw(st.sampled_from([WEIGHTS_NAME, STATE_NAME, SUMS_NAME]))
    path = run.fresh() / name
    content = path.read_bytes()
    path.write_bytes(damaged(content, data.draw))
    if path.read_bytes() == content:
        assert run.loads()
    elif name != SUMS_NAME:  # there a blank more or less changes nothing
        assert not run.loads()
    else:
        run.loads()


@fuzz(10)
@given(data=st.data())
def test_bytes_without_checksums(run, data):
    """Structure is still checked; what is loaded is not asked for: a flipped bit among the numbers is not seen."""
    folder = run.fresh()
    (folder / SUMS_NAME).unlink()
    path = folder / data.draw(st.sampled_from([WEIGHTS_NAME, STATE_NAME]))
    path.write_bytes(damaged(path.read_bytes(), data.draw))
    outcome(lambda: run.state(run.copy), ValueError)


@fuzz(15)
@given(data=st.data())
def test_contents(run, data):
    """Well-formed files that hold something else."""
    folder = run.fresh()
    (folder / SUMS_NAME).unlink()
    if data.draw(st.booleans()):
        tensors = load_file(folder / WEIGHTS_NAME)
        name = data.draw(st.sampled_from(sorted(tensors)))
        value = tensors.pop(name)
        if data.draw(st.booleans()):
            tensors[name if data.draw(st.booleans()) else "another"] = torch.cat([value, value])
        save_file(tensors, folder / WEIGHTS_NAME)
    else:
        state = torch.load(folder / STATE_NAME, weights_only=True)
        how = data.draw(st.sampled_from(["any", "missing", "shape", "step", "groups"]))
        if how == "any":
            state[data.draw(st.sampled_from(sorted(state)))] = data.draw(values)
        elif how == "missing":
            del state[data.draw(st.sampled_from(sorted(state)))]
        elif how == "shape":
            state["optimizer"]["state"][0]["exp_avg"] = torch.ones(3, 3)
        elif how == "step":
            state["step"] = data.draw(values.filter(lambda value: value != 2))
        else:
            state["optimizer"]["param_groups"] = state["optimizer"]["param_groups"] * 2
        torch.save(state, folder / STATE_NAME)
    assert not run.loads()


@pytest.mark.parametrize("packed", [True, False])
def test_a_hostile_pickle_is_never_run(run, tmp_path, packed):
    folder = run.fresh()
    (folder / SUMS_NAME).unlink()
    sentinel = tmp_path / "it has run"
    if packed:
        save_torch(folder / STATE_NAME, sentinel, step=2)
    else:
        (folder / STATE_NAME).write_bytes(plain_pickle(sentinel))
    assert not run.loads()
    assert not sentinel.exists()


def test_folders_of_other_names_are_passed_over(run, tmp_path):
    for name in (
        "step-000002",
        "step-000010",
        "step-2.bak",
        "step-",
        "step-000003 (copy)",
        "step-x",
        ".step-000004.partial",
    ):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000002", "step-000010"]


def test_a_run_does_not_go_on_from_a_damaged_checkpoint(run, tmp_path):
    again = Path(shutil.copytree(run.whole.parents[1], tmp_path / "run"))
    path = list_checkpoints(again)[-1] / STATE_NAME
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    config = settings(Path(run.config.model), again, max_steps=2, lora_r=2, resume=True)
    with pytest.raises(
        ValueError, match=f"step-000002 cannot be read: ValueError: {STATE_NAME} is not as it was written"
    ):
        train(config, rows=ROWS)
