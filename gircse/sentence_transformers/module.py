"""`GIRCSEModule`: the sentence-transformers module on the engine (encoding) and the differentiable rollout (training).

Texts, prompts, settings and what comes out are those of `modeling_gircse.GIRCSEModule`, which a saved folder carries
along; here only the generation is another one, and so are saving and loading.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from gircse.lm.load import load_pretrained
from gircse.model import GIRCSE
from gircse.sentence_transformers import modeling_gircse
from gircse.sentence_transformers.modeling_gircse import LENGTH_CONFIG, check_backend, name_base_model, save_code


def _of_the_model(name: str) -> Any:
    """A setting of the module that is the one of its GIRCSE model's config, both ways."""

    def read(module: GIRCSEModule) -> Any:
        return getattr(module.model.config, name)

    def write(module: GIRCSEModule, value: Any) -> None:
        module.model.config = replace(module.model.config, **{name: value})

    return property(read, write)


class GIRCSEModule(modeling_gircse.GIRCSEModule):
    """Puts a `gircse.GIRCSE` into a `SentenceTransformer`::

        model = SentenceTransformer(modules=[GIRCSEModule(GIRCSE.from_pretrained(path))])

    In eval mode without gradients it runs the generation engine; in training mode, or wherever a gradient is recorded,
    the differentiable rollout (so the two passes of gradient caching see the same function).

    Args:
        model: the GIRCSE model. A LoRA adapter on it is handed to transformers' own adapter methods (`add_adapter`,
            `set_adapter`, ... of the `SentenceTransformer`): `model.base` becomes the transformers model that the
            `PeftModel` wrapped, with the same LoRA layers in it.
        max_seq_length: tokens of a text, its prompt included; None: the config's `query_max_length` where there is a
            prompt, its `passage_max_length` where there is none.
    """

    __module__ = "modeling_gircse"  # what a saved folder names is the file beside the weights

    num_steps = _of_the_model("num_steps")
    pooling = _of_the_model("pooling")
    temperature = _of_the_model("temperature")
    prompt_template = _of_the_model("prompt_template")
    append_eos = _of_the_model("append_eos")
    include_prompt_state = _of_the_model("include_prompt_state")
    query_max_length = _of_the_model("query_max_length")
    passage_max_length = _of_the_model("passage_max_length")

    def __init__(self, model: GIRCSE, *, max_seq_length: int | None = None) -> None:
        if not isinstance(model, GIRCSE):
            raise TypeError(f"model: got {type(model).__name__}, expected gircse.GIRCSE")
        if hasattr(model.base, "get_base_model"):
            model.base = modeling_gircse.without_wrapper(model.base)
        super().__init__(model, model.tokenizer, max_seq_length=max_seq_length, **asdict(model.config))

    def __reduce_ex__(self, protocol: Any) -> Any:
        if type(self) is not GIRCSEModule:
            return super().__reduce_ex__(protocol)
        return _blank, (), self.__dict__.copy()  # pickling by name would look for a module "modeling_gircse"

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

    def generate(self, input_ids: Tensor, attention_mask: Tensor, num_steps: int) -> Tensor:
        if self.training or torch.is_grad_enabled():
            return self.model.rollout(input_ids, attention_mask, num_steps)
        return self._generate_on_engine(input_ids, attention_mask, num_steps)

    @torch.compiler.disable
    def _generate_on_engine(self, input_ids: Tensor, attention_mask: Tensor, num_steps: int) -> Tensor:
        real = attention_mask.bool().cpu()
        rows = [ids[mask].tolist() for ids, mask in zip(input_ids.cpu(), real, strict=True)]
        with self.model.inference() as engine:
            return engine.states(
                rows, num_steps, temperature=self.temperature, include_prompt=self.include_prompt_state
            )

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Writes what `GIRCSE.save_pretrained` writes (the adapter, or without one the whole model), the token limit
        and the plain modelling file.

        Raises:
            ValueError: an adapter whose base model has no name or path to load it from again.
        """
        name_base_model(self.causal_lm, output_path)
        self.model.save_pretrained(output_path)
        self.save_length(output_path)
        save_code(output_path)

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        init_defaults: dict[str, Any] | None = None,
        *,
        trust_remote_code: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        config_kwargs: dict[str, Any] | None = None,
        backend: str = "torch",
        is_trainable: bool = False,
        **kwargs: Any,
    ) -> GIRCSEModule:
        """What sentence-transformers calls to load this module out of a folder or a hub repository; see `gircse.load`.

        Raises:
            ValueError: options that the rollout cannot follow.
        """
        check_backend(backend)
        options = dict(model_kwargs or {})
        dtype = options.pop("dtype", None) or options.pop("torch_dtype", None) or "auto"
        attention = options.pop("attn_implementation", None)
        unknown = sorted([*options, *(processor_kwargs or {}), *(config_kwargs or {})])
        if unknown:
            raise ValueError(
                f"model_kwargs, processor_kwargs, config_kwargs: got {', '.join(unknown)}, expected dtype only; "
                "build a gircse.GIRCSE from a model and tokenizer of your own and put it into a GIRCSEModule"
            )
        where: dict[str, Any] = {
            "subfolder": subfolder,
            "token": token,
            "cache_folder": cache_folder,
            "revision": revision,
            "local_files_only": local_files_only,
        }
        folder = cls.load_dir_path(model_name_or_path, **where)
        if folder is None:
            raise FileNotFoundError(f"model_name_or_path: {model_name_or_path} does not exist")
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


def _blank() -> GIRCSEModule:
    return GIRCSEModule.__new__(GIRCSEModule)
