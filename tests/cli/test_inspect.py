"""`gircse inspect` as a command: table, JSON, page."""

from __future__ import annotations

import json

import pytest

from gircse import GIRCSE, GircseConfig
from gircse.cli import main
from tests.tiny_models import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def cold(tmp_path_factory):
    """A saved model whose soft tokens are all near-one-hot."""
    folder = tmp_path_factory.mktemp("model") / "cold"
    GIRCSE(tiny_model("llama"), tiny_tokenizer(), GircseConfig(temperature=1e-3)).save_pretrained(folder)
    return folder


def test_table_json_and_page_carry_the_warnings(cold, tmp_path, capsys):
    page = tmp_path / "folder" / "page.html"
    arguments = ["inspect", "--model", str(cold), "--num-steps", "3", "--top-n", "2", "--html", str(page)]
    assert main([*arguments, "<b>a</b>", "second \x1b[31m"]) == 0
    printed = capsys.readouterr()
    assert "\x1b" not in printed.out
    assert printed.out.count("! Near-one-hot soft tokens. 3 of 3") == 2
    assert "What to do: Raise the logit temperature" in printed.out
    assert max(map(len, printed.out.splitlines())) < 160
    assert str(page) in printed.err
    written = page.read_text(encoding="utf-8")
    assert "<b>a</b>" not in written
    assert "&lt;b&gt;a&lt;/b&gt;" in written
    assert written.count("Near-one-hot soft tokens.") == 2
    assert written.count("What to do:") >= 2
    assert f"<bdi>{cold}</bdi>" in written

    assert main([*arguments[:-2], "--json", "a"]) == 0
    (parsed,) = json.loads(capsys.readouterr().out)
    assert [w["signature"] for w in parsed["warnings"]][:1] == ["near-one-hot"]
    assert parsed["warnings"][0]["advice"]
    assert {"entropy", "tail_mass", "state_cosine", "cosine_to_first"} <= set(parsed["steps"][0])


def test_numbers_of_a_step_are_those_of_encoding():
    model = GIRCSE(tiny_model("llama"), tiny_tokenizer())
    steps = model.inspect("soft tokens", num_steps=4)[0].steps
    z = model.encode("soft tokens", num_steps=4, return_steps=True)
    assert [step.cosine_to_first for step in steps] == pytest.approx((z @ z[0]).tolist(), abs=1e-5)
    z = model.encode("soft tokens", num_steps=4, return_steps=True, normalize=False)
    k = [[1], [2], [3], [4]]
    g = z * k
    g[1:] -= (z * k)[:-1]  # the mean pooling undone
    g /= (g**2).sum(1, keepdims=True) ** 0.5
    assert [step.state_cosine for step in steps[1:]] == pytest.approx((g[1:] * g[:-1]).sum(1).tolist(), abs=1e-4)
