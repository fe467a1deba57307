"""What befalls the workers of a test's cluster: Ray calls `prepare` in every process that it starts."""

from __future__ import annotations

import os
import time
from pathlib import Path

from gircse.corpora.ray_data import EncodingActor

MARK, PAUSE = "TEST_DIED_ONCE", "TEST_PAUSE"
ROOT = Path(__file__).parents[2]


def runtime(folder: Path, pause: float = 0.0) -> dict[str, object]:
    """The environment of such workers. A window takes `pause` seconds more."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {MARK: str(folder / "died"), PAUSE: str(pause), "PYTHONPATH": paths}
    return {"worker_process_setup_hook": "tests.corpora.slow_and_dying.prepare", "env_vars": environment}


def prepare() -> None:
    """A text "raise" raises, the first text "die" ends its process, and every window takes a while. A worker that has
    encoded leaves a file with the name of its node beside the mark of the first death."""
    import ray

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
            embeddings = encode(texts, **options)
            mark.with_name(ray.get_runtime_context().get_node_id()).touch()
            return embeddings

        self.encoder.model.encode = watched

    EncodingActor.__init__ = made  # type: ignore[method-assign]
