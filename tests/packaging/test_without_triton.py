"""An environment without Triton (macOS, Windows): import, encode and train on the torch backend."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.tiny_models import tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]

# Neither an import of Triton succeeds nor a look whether it is there.
BLOCK = """
import importlib.util, sys

class NoTriton:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoTriton)
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "triton" else find_spec(name, package)
"""

SCRIPT = (
    BLOCK
    + """
import json, sys
from pathlib import Path
import torch
import gircse, gircse_kernels
from gircse.ops import soft_embed
from gircse.data.rows import Row
from gircse.train import train
from gircse.train_config import TrainConfig

folder = Path(sys.argv[1])
hidden = torch.randn(3, 8, requires_grad=True)
soft_embed(hidden, torch.randn(20, 8), top_p=0.9).sum().backward()
try:
    soft_embed(hidden, torch.randn(20, 8), backend="triton")
except RuntimeError as error:
    refusal = str(error)
model = gircse.GIRCSE.from_pretrained(folder / "base", num_steps=3)
embeddings = model.encode(["a fox", "the sea"])
rows = [Row("echo", f"{a} b", (f"b {a}",), ()) for a in "cdefgh"]
result = train(
    TrainConfig(
        model=str(folder / "base"), output=str(folder / "run"), num_steps=2, max_steps=2, batch_size=3, progress=False
    ),
    rows=rows,
)
again = gircse.GIRCSE.from_pretrained(result.folder).encode(["a fox"])
print(json.dumps({
    "refusal": refusal,
    "shape": embeddings.shape,
    "steps": len(result.log),
    "finite": bool(torch.isfinite(torch.from_numpy(again)).all()),
    "triton": [name for name in sys.modules if name.split(".")[0] == "triton"],
}))
"""
)


def test_import_encode_and_train(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["shape"] == [2, 32]
    assert found["steps"] == 2
    assert found["finite"]
    assert found["triton"] == []
    assert "backend: 'triton' is not available: the package triton is not installed" in found["refusal"]
