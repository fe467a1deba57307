"""Train a LoRA adapter on a few rows: python examples/train.py MODEL NEW_FOLDER"""

import json
import sys
from pathlib import Path

# a plain checkout, nothing installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gircse.train import train
from gircse.train.config import TrainConfig

PAIRS = {"hot": "cold", "big": "small", "early": "late", "wet": "dry"}


def main(model: str, folder: str) -> None:
    """`model`: folder or hub name of a causal LM. `folder` gets the rows, the log, checkpoints and the adapter."""
    data = Path(folder) / "rows.jsonl"
    data.parent.mkdir(parents=True)
    rows = [{"prompt": "Retrieve the opposite", "query": q, "pos": [p], "neg": []} for q, p in PAIRS.items()]
    data.write_text("\n".join(map(json.dumps, rows)))
    run = train(TrainConfig(model=model, data=(str(data),), output=folder, batch_size=4, max_steps=5))
    print("losses after 1..K steps:", *(f"{loss:.3f}" for loss in run.log[-1]["losses"]))
    print(f"adapter: {run.folder}, which examples/encode.py can load")


if __name__ == "__main__":
    main(*sys.argv[1:])
