"""Stopping a run without losing a step: SIGTERM and SIGINT ask, the loop answers when the step is done."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class TrainingStopped(SystemExit):
    """A run that was asked to stop, did so after a whole step, and was saved. As a SystemExit with code 0 it ends the
    program well, unless somebody catches it.

    Attributes:
        step: steps done.
        checkpoint: the folder to go on from.
    """

    def __init__(self, step: int, checkpoint: Path) -> None:
        super().__init__(0)
        self.step, self.checkpoint = step, checkpoint

    def __str__(self) -> str:
        return f"stopped after step {self.step}, saved in {self.checkpoint}"


class StopRequest:
    """Whether a signal came.

    Attributes:
        name: of the signal, None as long as there is none.
    """

    def __init__(self) -> None:
        self.name: str | None = None

    @property
    def requested(self) -> bool:
        return self.name is not None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.name == signal.Signals(number).name:
            raise KeyboardInterrupt  # asked twice: at once
        self.name = signal.Signals(number).name
        print(f"{self.name}: stopping when this step is done and saved", file=sys.stderr, flush=True)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Inside, SIGTERM and SIGINT are noted instead of ending the process (in the main thread, where Python has its
    handlers; elsewhere nothing changes). A second SIGINT raises KeyboardInterrupt."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request) for number in _SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
