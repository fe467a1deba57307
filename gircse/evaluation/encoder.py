"""A GIRCSE model as an encoder of mteb, one number of steps an encoder.

    encoder = GIRCSEEncoder(model, num_steps=20)
    mteb.evaluate(encoder, mteb.get_tasks(["STS12"]), cache=mteb.ResultCache("runs/mteb"))

mteb's result cache knows a model by its name, revision and `experiment_kwargs`, and of what `encode` is given the
`precision` only. So everything that changes an embedding goes into these: the weights into the revision, K and the rest
into the `experiment_kwargs`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from gircse.evaluation import require
from gircse.evaluation.fingerprint import fingerprint
from gircse.evaluation.instructions import ENGLISH_V2, text_instruction
from gircse.evaluation.step_store import StepStore
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
_WINDOW_BYTES = 2**28  # of embeddings after all steps, held while they are encoded


class GIRCSEEncoder(AbsEncoder):
    """Embeds the texts of mteb's tasks after `num_steps` soft tokens.

    Queries carry the task's instruction, documents are bare where the task is not symmetric, and the texts of all
    other tasks carry it on every side (docs/method.md §2, `gircse.evaluation.instructions`).

    Args:
        model: the model; not changed.
        num_steps: K; default: the model's own. 0 is the encoder-only baseline.
        name: what mteb calls the model, "organisation/name"; default: made from the checkpoint's name.
        instructions: {task name: instruction}, over the table of MTEB(eng, v2).
        max_length: tokens of a prompt, instruction included.
        batch_size: rows per batch; default: as many as fit. (mteb's own `batch_size` only sets how texts are handed
            over; it has no bearing on the result or the memory.)
        store: keeps embeddings after several numbers of steps, `num_steps` among them; see `at_steps`.
        revision: what mteb calls these weights; default: their fingerprint, taken anew at each look at
            `mteb_model_meta`. A name that is given here is theirs alone: once they change, it is refused.
        fields: further fields of mteb's `ModelMeta`: languages (["eng-Latn"]), license, release_date, adapted_from,
            n_embedding_parameters, open_weights, reference, training_datasets, citation, contacts and the like.

    Raises:
        ModuleNotFoundError: mteb is not installed (when the module is imported); says how to install it.
        TypeError: a field that `ModelMeta` does not have, or that the encoder decides itself.
        ValueError: `num_steps` is negative or not in the store; a `name` without a slash; a field that is not valid.
    """

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
        """What mteb's cache goes by, of the weights as they are now. Reads every weight (see `with_these_weights`).

        Raises:
            ValueError: the weights are not those that `revision` names.
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
    def mteb_model_meta(self, meta: ModelMeta) -> None:  # mteb's wrappers put their settings into it
        self._meta = meta

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """The cosine, as the metadata say; mteb's own method would look at them, so at all weights, for each batch."""
        return cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        return pairwise_cos_sim(embeddings1, embeddings2)

    def with_these_weights(self) -> GIRCSEEncoder:
        """The same encoder for as long as nobody changes the weights: it looks at them now and not again."""
        other = self.at_steps(self.num_steps)
        other._weights = fingerprint(self.model)
        return other

    def at_steps(self, num_steps: int) -> GIRCSEEncoder:
        """The same encoder at another K, with the same store.

        Raises:
            ValueError: negative, or not in the store.
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
        """float32 [n, D], normalised, in the order of `inputs` (mteb calls this). With `precision` ("int8", "uint8",
        "binary", "ubinary") quantised as sentence-transformers does it.

        Raises:
            ValueError: an encode argument that would change the result; mteb's cache could not tell the scores apart.
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
        return self.store.embeddings(
            texts, self.num_steps, lambda missing: self._all_steps(missing, instruction), key=key
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


def _model_meta(encoder: GIRCSEEncoder, name: str | None, fields: Mapping[str, Any]) -> ModelMeta:
    """What does not change with the weights or the settings."""
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
