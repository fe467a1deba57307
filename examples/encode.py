"""Search a few passages with any causal language model: python examples/encode.py MODEL"""

import sys
from pathlib import Path

# a plain checkout, nothing installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gircse import GIRCSE

QUERIES = ["how do tides work", "how is bread made"]
PASSAGES = ["The moon's gravity pulls the sea.", "Dough rises and is baked.", "A cat sleeps on the sofa."]


def main(path: str) -> None:
    """`path`: a causal LM (folder or hub name), a LoRA folder, or a folder that gircse saved."""
    model = GIRCSE.from_pretrained(path)
    instruction = "Given a question, retrieve passages that answer it"
    queries = model.encode(QUERIES, instruction=instruction, return_steps=True)  # [2, K, D]: after 1, 2, .., K steps
    passages = model.encode(PASSAGES, return_steps=True)  # [3, K, D], unit length
    for k in range(queries.shape[1]):
        print(f"K = {k + 1}:", *(PASSAGES[row.argmax()] for row in queries[:, k] @ passages[:, k].T))


if __name__ == "__main__":
    main(*sys.argv[1:])
