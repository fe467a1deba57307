"""A GIRCSE model as an encoder of mteb. Each encoder has one number of steps.

    encoder = GIRCSEEncoder(model, num_steps=20)
    mteb.evaluate(encoder, mteb.get_tasks(["STS12"]), cache=mteb.ResultCache("runs/mteb"))

mteb's result cache tells models apart by name, revision and `experiment_kwargs`, and of the arguments of `encode` by
`precision` only. So everything that changes an embedding goes into these: the weights into the revision, K and the rest
into `experiment_kwargs`. Otherwise the cache would return scores of another setting.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from gircse.evaluation import MAX_LENGTH, require
from gircse.evaluation.fingerprint import fingerprint
from gircse.evaluation.instructions import ENGLISH_V2, text_instruction
from gircse.evaluation.step_store import StepStore, encode_steps
from gircse.lm.config import GircseConfig

require("mteb")

from mteb.models import ModelMeta  # noqa: E402
from mteb.models.abs_encoder import AbsEncoder  # noqa: E402
from mteb.models.model_meta import ScoringFunction  # noqa: E402
from mteb.similarity_functions import cos_sim, pairwise_cos_sim  # noqa: E402
from sentence_transformers.util import quantize_embeddings  # noqa: E402

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.types import BatchedInput, PromptType
    from torch.utils.data import DataLoader

    from gircse.model import GIRCSE

# fields of `ModelMeta` that the encoder decides
_DECIDED = frozenset(
    ("loader", "loader_kwargs", "max_tokens", "embed_dim", "similarity_fn_name", "experiment_kwargs", "modalities")
)


class GIRCSEEncoder(AbsEncoder):
    """Embeds the texts of mteb's tasks after `num_steps` soft tokens.

    Queries carry the task's instruction, and documents carry none unless the task is symmetric. The texts of all other
    tasks carry it (docs/method.md §2, `gircse.evaluation.instructions`).

    Args:
        model: the model; not changed.
        num_steps: K; default: the model's own. 0 is the encoder-only baseline.
        name: the model's name in mteb, "organisation/name"; default: made from the checkpoint's name.
        instructions: {task name: instruction}; they replace those of the table of MTEB(eng, v2).
        max_length: tokens of a prompt, instruction included.
        batch_size: rows of a batch; default: as many as fit. (mteb's own `batch_size` only decides in which portions
            mteb passes texts. It changes neither the result nor the memory.)
        store: keeps embeddings after several numbers of steps, `num_steps` among them; see `at_steps`.
        revision: a name for these weights; default: their fingerprint, computed anew whenever `mteb_model_meta` is
            read. A name given here is an error once the weights have changed.
        fields: further fields of mteb's `ModelMeta`: languages (["eng-Latn"]), license, release_date, adapted_from,
            n_embedding_parameters, open_weights, reference, training_datasets, citation, contacts and others.

    Raises:
        ModuleNotFoundError: mteb is not installed (raised when the module is imported).
        TypeError: a field that `ModelMeta` does not have, or that the encoder decides itself.
        ValueError: `num_steps` is negative or not in the store; `name` has no slash; a field is not valid.
    """

    def __init__(
        self,
        model: GIRCSE,
        *,
        num_steps: int | None = None,
        name: str | None = None,
        instructions: Mapping[str, str] | None = None,
        max_length: int = MAX_LENGTH,
        batch_size: int | None = None,
        store: StepStore | None = None,
        revision: str | None = None,
        **fields: Any,
    ) -> None:
        self.model = model
        self.num_steps = model.config.with_steps(num_steps).num_steps
        self.instructions = {**ENGLISH_V2, **(instructions or {})}
        self.max_length, self.batch_size, self.store = max_length, batch_size, store
        if store is not None and self.num_steps not in store.steps:
            raise ValueError(f"num_steps: got {self.num_steps}, expected one of the store's {store.steps}")
        self._meta = _model_meta(self, name, fields)
        self._weights: str | None = None
        self._revision = None if revision is None else (revision, fingerprint(model))

    @property
    def mteb_model_meta(self) -> ModelMeta:
        """What mteb's cache knows the model by, with the fingerprint of the weights as they are now. This reads every
        weight, unless the encoder comes from `with_these_weights`.

        Raises:
            ValueError: the weights have changed since `revision` named them.
        """
        weights = revision = self._weights or fingerprint(self.model)
        if self._revision is not None:
            revision, named = self._revision
            if weights != named:
                raise ValueError(
                    f"revision: got {revision!r} for weights that have changed since, expected another one"
                )
        instructions = json.dumps([self.instructions, self.model.config.prompt_template], sort_keys=True)
        settings = {
            "num_steps": self.num_steps,
            "max_length": self.max_length,
            "instructions": hashlib.sha256(instructions.encode()).hexdigest()[:8],
        }
        return self._meta.model_copy(
            update={
                "revision": revision,
                "max_tokens": self.max_length,
                "experiment_kwargs": {**(self._meta.experiment_kwargs or {}), **settings},
            }
        )

    @mteb_model_meta.setter
    def mteb_model_meta(self, meta: ModelMeta) -> None:  # mteb's wrappers write their settings here
        self._meta = meta

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """The cosine, which the metadata name. mteb's own method reads the metadata, and with them all weights, for
        each batch."""
        return cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        return pairwise_cos_sim(embeddings1, embeddings2)

    def with_these_weights(self) -> GIRCSEEncoder:
        """The same encoder with the fingerprint of the weights as they are now. It must not be used after a change."""
        other = self.at_steps(self.num_steps)
        other._weights = fingerprint(self.model)
        return other

    def at_steps(self, num_steps: int) -> GIRCSEEncoder:
        """The same encoder at another K, with the same store.

        Raises:
            ValueError: `num_steps` is negative, or not in the store.
        """
        other = object.__new__(GIRCSEEncoder)
        other.__dict__.update(self.__dict__, num_steps=GircseConfig(num_steps=num_steps).num_steps)
        if other.store is not None and num_steps not in other.store.steps:
            raise ValueError(f"num_steps: got {num_steps}, expected one of the store's {other.store.steps}")
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
        """The embeddings, float32 [n, D], normalised, in the order of `inputs`; mteb calls this. With `precision`
        ("int8", "uint8", "binary", "ubinary") they are quantised as sentence-transformers does it.

        Raises:
            ValueError: an argument that would change the result without changing the result's name in mteb's cache.
        """
        refused = sorted(set(kwargs) - {"batch_size", "show_progress_bar", "precision"})
        if refused:
            raise ValueError(
                f"encode_kwargs: got {', '.join(refused)}; of them mteb's result cache knows the precision only, so "
                "give settings to GIRCSEEncoder(..) instead, where they become part of the model's name"
            )
        instruction = text_instruction(task_metadata, prompt_type, self.instructions)
        texts = [text for batch in inputs for text in batch["text"]]
        embeddings = self._embed(texts, instruction, kwargs.get("show_progress_bar", False))
        precision: Any = kwargs.get("precision") or "float32"
        return embeddings if precision == "float32" else np.asarray(quantize_embeddings(embeddings, precision))

    def _embed(self, texts: list[str], instruction: str | None, show_progress_bar: bool) -> np.ndarray:
        if self.store is None:
            return self.model.encode(
                texts,
                instruction=instruction,
                num_steps=self.num_steps,
                batch_size=self.batch_size,
                max_length=self.max_length,
                show_progress_bar=show_progress_bar,
            )
        key = json.dumps([self._weights or fingerprint(self.model), self.max_length, instruction])
        encode = partial(
            encode_steps,
            self.model,
            num_steps=self.store.steps[-1],
            instruction=instruction,
            batch_size=self.batch_size,
            max_length=self.max_length,
        )
        return self.store.embeddings(texts, self.num_steps, encode, key=key)


def _model_meta(encoder: GIRCSEEncoder, name: str | None, fields: Mapping[str, Any]) -> ModelMeta:
    """The metadata that depend neither on the weights nor on the settings."""
    model = encoder.model
    unknown = sorted(set(fields) - (set(ModelMeta.model_fields) - _DECIDED))
    if unknown:
        raise TypeError(f"{unknown[0]}: expected a field of mteb's ModelMeta other than {', '.join(sorted(_DECIDED))}")
    source = str(getattr(model._unwrapped(), "name_or_path", "") or "")
    if name is None:
        name = "gircse/" + re.sub(r"[^\w.-]+", "-", PurePath(source).name or "model")
    elif "/" not in name:
        raise ValueError(f"name: got {name!r}, expected 'organisation/name'")
    parameters = list(model.base.parameters())
    of_the_model = {
        "name": name,
        "n_parameters": sum(p.numel() for p in parameters),
        "n_embedding_parameters": model.causal_lm.embed_weight.numel(),
        "memory_usage_mb": sum(p.numel() * p.element_size() for p in parameters) / 2**20,
        "embed_dim": model.embedding_dimension,
        "framework": ["PyTorch", "Transformers"],
        "similarity_fn_name": ScoringFunction.COSINE,
        "use_instructions": True,
        "modalities": ["text"],
        "adapted_from": source if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not Path(source).is_dir() else None,
    }
    return ModelMeta.model_validate({**dict(ModelMeta.create_empty()), **of_the_model, **fields})
