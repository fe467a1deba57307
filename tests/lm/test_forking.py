"""A process that is forked while other threads work: its model is whole, and no lock of theirs stops it."""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from gircse import GIRCSE, GircseConfig
from gircse.engine import Engine
from tests.lm.test_rollout import with_lora
from tests.tiny_models import tiny_model, tiny_tokenizer

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork"),
]

TEXTS = ["soft tokens", "a", "the quick brown fox", "x" * 40]
LIMIT = 60.0  # seconds; a child that waits for a lock waits for ever


def forked(work: Callable[[], object]) -> str:
    """Runs `work` in a forked process: "done", "failed" (with the traceback on stderr), or "hung"."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return "done" if status == 0 else "failed"
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "hung"


@contextmanager
def in_a_thread(work: Callable[[Callable[[], None]], object]):
    """`work` in another thread, which calls what it is given when it is where it should be, and waits there until the
    block is left."""
    there, leave = threading.Event(), threading.Event()

    def wait() -> None:
        there.set()
        leave.wait(LIMIT)

    thread = threading.Thread(target=work, args=(wait,))
    thread.start()
    try:
        assert there.wait(LIMIT)
        yield
    finally:
        leave.set()
        thread.join()


@pytest.fixture
def model() -> GIRCSE:
    return GIRCSE(tiny_model("llama"), tiny_tokenizer(), GircseConfig(num_steps=3))


@pytest.mark.parametrize("training", [False, True])
def test_another_thread_encodes(model, training):
    """In the middle of a batch: buffers hold anything, and the model is in eval mode for as long as that thread is."""
    model.train(training)
    expected = model.encode(TEXTS)

    def encode(wait):
        def settled(states):
            engine._pool._flat[0][0].fill_(float("nan"))  # as an overflow leaves them until they are wiped
            wait()
            engine._pool.zero_()
            return torch.ones(len(states), dtype=torch.bool)

        with model.inference() as engine:
            engine.run([[3, 4, 5, 6], [7]], 4, lambda *_: None, settled=settled)

    def check():
        assert model.training == training
        np.testing.assert_array_equal(model.encode(TEXTS), expected)
        np.testing.assert_array_equal(np.stack(list(model.encode_stream(TEXTS, window=4))), expected)
        model.inspect(TEXTS[0])
        assert model.training == training

    with in_a_thread(encode):
        assert not model.training
        assert forked(check) == "done"
    model.train(training)
    np.testing.assert_array_equal(model.encode(TEXTS), expected)  # the parent goes on


def test_another_thread_runs_an_engine_of_its_own(model):
    engine, rows = Engine(model.causal_lm), [[3, 4, 5], [6]]
    expected = engine.states(rows, 3)

    def run(wait):
        def settled(states):
            wait()
            return torch.zeros(len(states), dtype=torch.bool)

        engine.run(rows, 3, lambda *_: None, settled=settled)

    model.eval()
    with in_a_thread(run):
        assert forked(lambda: torch.testing.assert_close(engine.states(rows, 3), expected, rtol=0, atol=0)) == "done"


def test_several_children_while_threads_go_on_encoding(model):
    expected, stop = model.encode(TEXTS), threading.Event()

    def encode():
        while not stop.is_set():
            model.encode(TEXTS * 3, instruction="the same")

    threads = [threading.Thread(target=encode) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        found = [forked(lambda: np.testing.assert_array_equal(model.encode(TEXTS), expected)) for _ in range(6)]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert found == ["done"] * 6


def test_the_thread_that_forks_is_encoding_itself(model):
    expected = model.encode(TEXTS)
    with model.inference():
        assert forked(lambda: np.testing.assert_array_equal(model.encode(TEXTS), expected)) == "done"

    def leaves_the_block():
        with model.inference():
            if os.fork() == 0:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.wait()[1]) == 0

    leaves_the_block()


def test_a_fork_waits_for_an_adapter_that_is_being_merged():
    """So that no child has half of its layers merged."""
    model = GIRCSE(
        with_lora(tiny_model("llama", num_hidden_layers=4)), tiny_tokenizer(), GircseConfig(num_steps=2)
    ).eval()
    apart = model.encode(TEXTS)
    model.merge_adapter()
    merged = model.encode(TEXTS)
    assert not np.array_equal(apart, merged)
    stop = threading.Event()

    def merge():
        while not stop.is_set():
            model.merge_adapter()
            model.unmerge_adapter()
            time.sleep(0.003)  # the lock is not fair

    def check():
        found = model.encode(TEXTS)
        assert np.array_equal(found, apart) or np.array_equal(found, merged)
        model.unmerge_adapter()
        np.testing.assert_array_equal(model.encode(TEXTS), apart)

    thread = threading.Thread(target=merge)
    thread.start()
    try:
        found = [forked(check) for _ in range(6)]
    finally:
        stop.set()
        thread.join()
    assert found == ["done"] * 6


def test_a_stream_goes_on_in_its_own_process_alone(model):
    stream = model.encode_stream(TEXTS, window=2)
    next(stream)

    def go_on():
        with pytest.raises(RuntimeError, match=r"encode_stream: got process \d+, forked from \d+, which began"):
            list(stream)
        assert model.encode(TEXTS).shape == (4, 32)

    assert forked(go_on) == "done"
    assert len(list(stream)) == 3


def test_threads_of_the_parent_that_a_child_does_not_have(model):
    """GNU's OpenMP waits for them for ever."""

    def work():
        with pytest.warns(UserWarning, match="forked from one that had computed with several threads"):
            model.encode(TEXTS)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.encode(TEXTS)
        torch.randn(1000, 1000).softmax(-1)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.randn(1000, 1000).softmax(-1)  # starts the threads
        assert forked(work) == "done"
    finally:
        torch.set_num_threads(before)
