"""The plot of the losses of a training."""

from __future__ import annotations

import pytest

from gircse.demo import plots


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws a log -> {label: (steps, losses)} of the smoothed lines, and the legend's title."""
    kept = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: kept.append(figure))

    def draw(log):
        plots.plot_losses(log, tmp_path / "losses.png")
        axes = kept[-1].axes[0]
        lines = {line.get_label(): line for line in axes.get_lines() if not line.get_label().startswith("_")}
        title = axes.get_legend().get_title().get_text()
        return {name: (list(line.get_xdata()), list(line.get_ydata())) for name, line in lines.items()}, title

    return draw


def _entry(step: int, *losses: float) -> dict:
    return {"step": step, "losses": list(losses)}


def test_quality_with_and_without_soft_tokens(monkeypatch, tmp_path):
    kept = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: kept.append(figure))
    curves = {"trained": {0: 0.3, 1: 0.4, 5: 0.5}, "untrained": {0: 0.01, 1: 0.02, 5: 0.04}}
    plots.plot_quality(curves, tmp_path / "quality.png", metric="ndcg@10", trained_steps=5)
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in kept[0].axes[0].get_lines()}
    assert lines["trained"] == ([1, 5], [0.4, 0.5])
    assert lines["untrained"] == ([1, 5], [0.02, 0.04])
    assert lines["trained, no soft token (K = 0)"][1] == [0.3, 0.3]


def test_losses_of_a_run_with_one_k(drawn):
    lines, title = drawn([_entry(step, step, 10 * step) for step in range(1, 21)])
    assert list(lines) == ["$L_{1}$", "$L_{2}$"]
    steps, losses = lines["$L_{2}$"]
    assert steps == list(range(2, 21))
    assert losses == pytest.approx([10 * step - 5 for step in steps])  # the mean of a step and the one before
    assert title == "mean of 2"


def test_losses_of_a_run_whose_k_is_drawn_anew(drawn):
    """Every line has exactly the steps that had its loss."""
    log = [_entry(1, 4.0, 3.0, 2.0), _entry(2, 3.5), _entry(3, 3.0, 2.0), _entry(4, 2.5, 1.5, 1.0)]
    lines, title = drawn(log)
    assert lines == {
        "$L_{1}$": ([1, 2, 3, 4], [4.0, 3.5, 3.0, 2.5]),
        "$L_{2}$": ([1, 3, 4], [3.0, 2.0, 1.5]),
        "$L_{3}$": ([1, 4], [2.0, 1.0]),
    }
    assert title in ("", "None")


def test_each_line_is_smoothed_over_a_tenth_of_its_own_steps(drawn):
    log = [_entry(step, 1.0, *([2.0] if step % 2 else [])) for step in range(40)]
    lines, title = drawn(log)
    assert len(lines["$L_{1}$"][0]) == 40 - 3
    assert len(lines["$L_{2}$"][0]) == 20 - 1
    assert title == "mean of 2 to 4"


def test_the_picture_is_written(tmp_path):
    path = tmp_path / "losses.png"
    plots.plot_losses([_entry(1, 2.0, 1.0), _entry(2, 1.5)], path)
    assert path.read_bytes().startswith(b"\x89PNG")
