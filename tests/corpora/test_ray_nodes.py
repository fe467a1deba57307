"""A cluster that loses a machine: two nodes are simulated, and one is killed while rows are encoded. It takes a minute:

RAY_NODES=1 pytest tests/corpora/test_ray_nodes.py
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install gircse[ray]")

from ray.cluster_utils import Cluster  # noqa: E402

from gircse.cli import main  # noqa: E402
from tests.corpora.slow_and_dying import runtime  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("RAY_NODES" not in os.environ, reason="takes a minute: RAY_NODES=1 runs it"),
]
TEXTS = [f"text {i} {'o' * (i % 5)}" for i in range(400)]


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """The first node has enough processors for the job alone, the second only for a worker."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    node = {"object_store_memory": 100_000_000, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "num_cpus": 3})
    cluster.add_node(**node, num_cpus=1)
    environment = runtime(tmp_path, pause=0.5)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error", runtime_env=environment)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_a_node_is_removed_while_rows_are_encoded(cluster, base, model, tmp_path):
    table = pa.table({"id": range(len(TEXTS)), "text": TEXTS})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=100)
    out = tmp_path / "out"
    (lost,) = {node["NodeID"] for node in ray.nodes()} - {ray.get_runtime_context().get_node_id()}
    before: list[Path] = []

    def remove() -> None:
        """When a worker on the node has encoded rows."""
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and not before:
            time.sleep(0.05)
            if (tmp_path / lost).exists() and len(there := list(out.glob("*.parquet"))) >= 2:
                before.extend(there)
                cluster.remove_node(cluster.list_all_nodes()[-1], allow_graceful=False)

    thread = threading.Thread(target=remove)
    thread.start()
    options = ["--model", base, "--num-steps", "1", "--rows-per-task", "10", "--workers", "2", "--id", "id"]
    status = main(["encode", str(tmp_path / "in.parquet"), "--output", str(out), "--ray", *options])
    thread.join()
    assert status == 0
    assert 2 <= len(before) < 35  # in the midst of forty blocks
    assert [node["Alive"] for node in ray.nodes() if node["NodeID"] == lost] == [False]
    result = pq.read_table(out).sort_by("id")
    assert result["id"].to_pylist() == list(range(len(TEXTS)))
    assert result["text"].to_pylist() == TEXTS
    embeddings = np.array(result["embedding"].to_pylist(), dtype=np.float32)
    np.testing.assert_allclose(embeddings, model.encode(TEXTS, num_steps=1), atol=1e-6)
