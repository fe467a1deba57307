"""`GIRCSEModule`: the sentence-transformers module on the engine (encoding) and the differentiable rollout (training).

Inputs, settings and outputs are those of `modeling_gircse.GIRCSEModule`, which is saved with a model. Generation,
saving and loading are those of this package.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from gircse.engine import Jacobi
from gircse.lm.load import load_pretrained
from gircse.lm.rollout import Drafter
from gircse.model import GIRCSE
from gircse.sentence_transformers import modeling_gircse
from gircse.sentence_transformers.modeling_gircse import LENGTH_CONFIG
from gircse.sentence_transformers.modeling_gircse_folder import name_base_model, save_code, without_wrapper


def _of_the_model(name: str) -> Any:
    """A property of the module that reads and writes a setting in its GIRCSE model's config."""

    def read(module: GIRCSEModule) -> Any:
        return getattr(module.model.config, name)

    def write(module: GIRCSEModule, value: Any) -> None:
        module.model.config = replace(module.model.config, **{name: value})

    return property(read, write)


class GIRCSEModule(modeling_gircse.GIRCSEModule):
    """Puts a `gircse.GIRCSE` into a `SentenceTransformer`::

        model = SentenceTransformer(modules=[GIRCSEModule(GIRCSE.from_pretrained(path))])

    In eval mode without gradients it runs the generation engine. In training mode, or when a gradient is recorded, it
    runs the differentiable rollout, so that both passes of gradient caching compute the same function.

    Args:
        model: the GIRCSE model. Its `PeftModel` wrapper, if any, is removed: `model.base` becomes the transformers
            model with the same LoRA layers, whose adapter methods (`add_adapter`, ..) a `SentenceTransformer` calls.
        max_seq_length: the most tokens of a text, its prompt included; None: the config's `query_max_length` with a
            prompt, its `passage_max_length` without.
    """

    __module__ = "modeling_gircse"  # modules.json names the file beside the weights

    def __init__(self, model: GIRCSE, *, max_seq_length: int | None = None) -> None:
        if not isinstance(model, GIRCSE):
            raise TypeError(f"model: got {type(model).__name__}, expected gircse.GIRCSE")
        if hasattr(model.base, "get_base_model"):
            model.base = without_wrapper(model.base)
        super().__init__(model, model.tokenizer, max_seq_length=max_seq_length, **asdict(model.config))

    @property
    def causal_lm(self) -> Any:
        return self.model.causal_lm.model

    @property
    def max_positions(self) -> int | None:
        return self.model.causal_lm.max_positions

    @property
    def tokenizer(self) -> Any:
        return self.model.tokenizer

    @tokenizer.setter
    def tokenizer(self, value: Any) -> None:
        self.model.tokenizer = value

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        num_steps: int,
        *,
        soft_token_gradient: float = 1.0,
        drafter: Drafter | None = None,
    ) -> Tensor:
        if self.training or torch.is_grad_enabled():
            return self.model.rollout(
                input_ids, attention_mask, num_steps, soft_token_gradient=soft_token_gradient, drafter=drafter
            )
        return self._generate_on_engine(input_ids, attention_mask, num_steps)

    @torch.compiler.disable
    def _generate_on_engine(self, input_ids: Tensor, attention_mask: Tensor, num_steps: int) -> Tensor:
        real = attention_mask.bool().cpu()
        rows = [ids[mask].tolist() for ids, mask in zip(input_ids.cpu(), real, strict=True)]
        with self.model.inference() as engine:
            return engine.states(
                rows,
                num_steps,
                temperature=self.temperature,
                include_prompt=self.include_prompt_state,
                jacobi=Jacobi.of(self.model.config),
            )

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Writes what `GIRCSE.save_pretrained` writes (the adapter, or the whole model where it has none), the token
        limit and the plain modelling files.

        Raises:
            ValueError: the base model of an adapter has no name or path to load it from again.
        """
        name_base_model(self.causal_lm, output_path)
        self.model.save_pretrained(output_path)
        self.save_length(output_path)
        save_code(output_path)

    @classmethod
    def _load(
        cls,
        name: str,
        where: dict[str, Any],
        *,
        trust_remote_code: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        config_kwargs: dict[str, Any] | None = None,
        is_trainable: bool = False,
        **kwargs: Any,
    ) -> GIRCSEModule:
        """
        Raises:
            ValueError: an option is given that the rollout does not support.
        """
        options = dict(model_kwargs or {})
        dtype = options.pop("dtype", None) or options.pop("torch_dtype", None) or "auto"
        attention = options.pop("attn_implementation", None)
        unknown = sorted([*options, *(processor_kwargs or {}), *(config_kwargs or {})])
        if unknown:
            raise ValueError(
                f"model_kwargs, processor_kwargs, config_kwargs: got {', '.join(unknown)}, expected dtype only; "
                "build a gircse.GIRCSE from a model and tokenizer of your own and put it into a GIRCSEModule"
            )
        folder = cls.load_dir_path(name, **where)
        if folder is None:
            raise FileNotFoundError(f"model_name_or_path: {name} does not exist")
        base, tokenizer, config = load_pretrained(
            folder,
            adapter=None,
            dtype=dtype,
            device="cpu",  # sentence-transformers moves it
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
            is_trainable=is_trainable,
        )
        length = cls.load_config(folder, config_filename=LENGTH_CONFIG)
        return cls(GIRCSE(base, tokenizer, config).eval(), **length)


for _name in GIRCSEModule.config_keys:
    setattr(GIRCSEModule, _name, _of_the_model(_name))
