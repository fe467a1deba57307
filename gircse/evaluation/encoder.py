"""A GIRCSE model as an encoder of mteb, one number of steps an encoder.

    encoder = GIRCSEEncoder(model, num_steps=20)
    mteb.evaluate(encoder, mteb.get_tasks(["STS12"]), cache=mteb.ResultCache("runs/mteb"))

mteb's result cache knows a model by its name, revision and `experiment_kwargs`, and nothing of what `encode` is given.
So everything that changes an embedding goes into these: the weights into the revision, K and the rest into the
`experiment_kwargs`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from gircse.config import GircseConfig
from gircse.evaluation import require
from gircse.evaluation.fingerprint import fingerprint
from gircse.evaluation.instructions import ENGLISH_V2, text_instruction
from gircse.evaluation.step_store import StepStore

require("mteb")

from mteb.models import ModelMeta  # noqa: E402
from mteb.models.abs_encoder import AbsEncoder  # noqa: E402
from mteb.models.model_meta import ScoringFunction  # noqa: E402

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.types import BatchedInput, PromptType
    from torch.utils.data import DataLoader

    from gircse.model import GIRCSE

_WINDOW_BYTES = 2**28  # of embeddings after all steps, held while they are encoded


class GIRCSEEncoder(AbsEncoder):
    """Embeds the texts of mteb's tasks after `num_steps` soft tokens.

    Queries carry the task's instruction, documents are bare where the task is not symmetric, and the texts of all
    other tasks carry it on every side (SPEC 1.6, `gircse.evaluation.instructions`).

    Args:
        model: the model; not changed.
        num_steps: K; default: the model's own. 0 is the encoder-only baseline.
        name: what mteb calls the model, "organisation/name"; default: made from the checkpoint's name.
        instructions: {task name: instruction}, over the table of MTEB(eng, v2).
        max_length: tokens of a prompt, instruction included.
        batch_size: rows per batch; default: as many as fit. (mteb's own `batch_size` only sets how texts are handed
            over; it has no bearing on the result or the memory.)
        store: keeps embeddings after several numbers of steps, `num_steps` among them; see `at_steps`.

    Raises:
        ModuleNotFoundError: mteb is not installed (when the module is imported); says how to install it.
        ValueError: `num_steps` is negative or not in the store; a `name` without a slash.
    """

    mteb_model_meta: ModelMeta

    def __init__(
        self,
        model: GIRCSE,
        *,
        num_steps: int | None = None,
        name: str | None = None,
        instructions: Mapping[str, str] | None = None,
        max_length: int = 512,
        batch_size: int | None = None,
        store: StepStore | None = None,
    ) -> None:
        self.model = model
        self.num_steps = model.config.with_steps(num_steps).num_steps
        self.instructions = {**ENGLISH_V2, **(instructions or {})}
        self.max_length, self.batch_size, self.store = max_length, batch_size, store
        if store is not None and self.num_steps not in store.steps:
            raise ValueError(f"num_steps: got {self.num_steps}, expected one of the store's {store.steps}")
        self.mteb_model_meta = _model_meta(self, name)

    def at_steps(self, num_steps: int) -> GIRCSEEncoder:
        """The same encoder at another K: one store, one look at the weights.

        Raises:
            ValueError: negative, or not in the store.
        """
        other = object.__new__(GIRCSEEncoder)
        other.__dict__.update(self.__dict__, num_steps=GircseConfig(num_steps=num_steps).num_steps)
        if other.store is not None and num_steps not in other.store.steps:
            raise ValueError(f"num_steps: got {num_steps}, expected one of the store's {other.store.steps}")
        kwargs = {**(self.mteb_model_meta.experiment_kwargs or {}), "num_steps": num_steps}
        other.mteb_model_meta = self.mteb_model_meta.model_copy(update={"experiment_kwargs": kwargs})
        return other

    def encode(
        self,
        inputs: DataLoader[BatchedInput],
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """float32 [n, D], normalised, in the order of `inputs` (mteb calls this).

        Raises:
            ValueError: an encode argument that would change the result; mteb's cache could not tell the scores apart.
        """
        refused = sorted(set(kwargs) - {"batch_size", "show_progress_bar"})
        if refused:
            raise ValueError(
                f"encode_kwargs: got {', '.join(refused)}; mteb's result cache does not know them, so give settings to "
                "GIRCSEEncoder(..) instead, where they become part of the model's name"
            )
        instruction = text_instruction(task_metadata, prompt_type, self.instructions)
        texts = [text for batch in inputs for text in batch["text"]]
        if self.store is not None:
            return self.store.embeddings(
                texts, self.num_steps, lambda missing: self._all_steps(missing, instruction), key=instruction
            )
        return self.model.encode(
            texts,
            instruction=instruction,
            num_steps=self.num_steps,
            batch_size=self.batch_size,
            max_length=self.max_length,
            show_progress_bar=kwargs.get("show_progress_bar", False),
        )

    def _all_steps(self, texts: list[str], instruction: str | None) -> Iterator[np.ndarray]:
        """[K, D] a text at the store's largest K, a bounded number of them at once."""
        assert self.store is not None
        steps = max(self.store.steps)
        row_bytes = 4 * max(steps, 1) * self.model.embedding_dimension
        return self.model.encode_stream(
            texts,
            instruction=instruction,
            num_steps=steps,
            batch_size=self.batch_size,
            max_length=self.max_length,
            return_steps=True,
            window=min(16384, max(64, _WINDOW_BYTES // row_bytes)),
        )


def _model_meta(encoder: GIRCSEEncoder, name: str | None) -> ModelMeta:
    model = encoder.model
    if name is None:
        source = str(getattr(model._unwrapped(), "name_or_path", "") or "model")
        name = "gircse/" + re.sub(r"[^\w.-]+", "-", PurePath(source).name or "model")
    elif "/" not in name:
        raise ValueError(f"name: got {name!r}, expected 'organisation/name'")
    parameters = list(model.base.parameters())
    table = json.dumps([encoder.instructions, model.config.prompt_template], sort_keys=True)
    return ModelMeta.create_empty(
        {
            "name": name,
            "revision": fingerprint(model),
            "n_parameters": sum(p.numel() for p in parameters),
            "memory_usage_mb": sum(p.numel() * p.element_size() for p in parameters) / 2**20,
            "max_tokens": encoder.max_length,
            "embed_dim": model.embedding_dimension,
            "framework": ["PyTorch", "Transformers"],
            "similarity_fn_name": ScoringFunction.COSINE,
            "use_instructions": True,
            "modalities": ["text"],
            "experiment_kwargs": {
                "num_steps": encoder.num_steps,
                "max_length": encoder.max_length,
                "instructions": hashlib.sha256(table.encode()).hexdigest()[:8],
            },
        }
    )
