"""What befalls the workers of a test's cluster: Ray calls `prepare` in every process that it starts."""

from __future__ import annotations

import os
import time
from pathlib import Path

from gircse.corpora.ray_data import EncodingActor

MARK, PAUSE = "TEST_DIED_ONCE", "TEST_PAUSE"


def prepare() -> None:
    """A text "raise" raises, the first text "die" ends its process, and every window takes a while."""
    make = EncodingActor.__init__

    def made(self: EncodingActor, *arguments: object) -> None:
        make(self, *arguments)  # type: ignore[arg-type]
        encode = self.encoder.model.encode

        def watched(texts, **options):
            time.sleep(float(os.environ.get(PAUSE, "0")))
            mark = Path(os.environ[MARK])
            if "die" in texts and not mark.exists():
                mark.touch()
                os._exit(9)
            if "raise" in texts:
                raise RuntimeError("refused\nby the test")
            return encode(texts, **options)

        self.encoder.model.encode = watched

    EncodingActor.__init__ = made  # type: ignore[method-assign]
