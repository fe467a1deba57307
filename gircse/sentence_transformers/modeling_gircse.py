"""GIRCSE embeddings (arXiv 2509.24291) as a sentence-transformers module, in plain PyTorch.

This file is saved beside the weights, so that a folder runs where the `gircse` package is not installed:

    SentenceTransformer(folder, trust_remote_code=True)

It needs torch, transformers and sentence-transformers >= 6 only (and peft for a LoRA adapter). Every text is a prompt
to a causal LM. The LM then "speaks" K soft tokens: softmax over its vocabulary times its own input embeddings, appended
to the sequence. The embedding is the mean of the last hidden states at the K generated positions, scaled to length 1.
With `gircse` installed, `gircse.load(folder)` gives the same embeddings faster, and trains.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sentence_transformers.base.modules import InputModule
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

POOLINGS = ("mean", "last", "weighted")
LENGTH_CONFIG = "sentence_bert_config.json"


class StepEmbeddings(Tensor):
    """[B, K, D] embeddings after 1..K steps, for `encode(return_steps=True)`.

    `encode(normalize_embeddings=True)` scales along dimension 1, which here are the steps; this class scales every
    embedding instead.
    """

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is F.normalize:
            kwargs["dim"] = -1
        return super().__torch_function__(func, types, args, kwargs)


class GIRCSEModule(InputModule):
    """The input module of a GIRCSE model: texts to embeddings of length 1.

    `encode` of the `SentenceTransformer` around it takes `num_steps` (K, other than the saved one) and `return_steps`
    (the embeddings after 1..K steps, [n, K, D]).

    Args:
        model: a causal LM with a head (`PreTrainedModel`), with or without LoRA layers in it.
        tokenizer: its tokenizer, with a padding token.
        num_steps: K; 0 embeds a text by the last hidden state of its last token.
        pooling: "mean", "last" or "weighted" (weights grow linearly with the step).
        temperature: logit temperature of the soft tokens.
        prompt_template: how an instruction and a text become a prompt, see `format_prompt`.
        append_eos: append the end-of-sequence token to every prompt.
        include_prompt_state: pool the prompt's last state as the first of the K.
        max_seq_length: tokens of a prompt, its instruction included; longer ones are cut at the end. None: no limit but
            the model's positions.
    """

    config_file_name = "gircse_config.json"
    config_keys = ["num_steps", "pooling", "temperature", "prompt_template", "append_eos", "include_prompt_state"]  # noqa: RUF012
    forward_kwargs = {"num_steps", "return_steps"}  # noqa: RUF012
    save_in_root = True
    tokenizer: Any

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        num_steps: int = 5,
        pooling: str = "mean",
        temperature: float = 1.0,
        prompt_template: str = "Instruct: {instruction}\nQuery:{text}",
        append_eos: bool = False,
        include_prompt_state: bool = False,
        max_seq_length: int | None = 512,
    ) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"pooling: got {pooling!r}, expected one of {', '.join(map(repr, POOLINGS))}")
        self.model: Any = model
        self.tokenizer = tokenizer
        self.num_steps = check_steps(num_steps)
        self.pooling = pooling
        self.temperature = temperature
        self.prompt_template = prompt_template
        self.append_eos = append_eos
        self.include_prompt_state = include_prompt_state
        self.max_seq_length = max_seq_length

    @property
    def causal_lm(self) -> Any:
        """The transformers model."""
        return self.model

    @property
    def processor(self) -> Any:
        return self.tokenizer

    @property
    def max_positions(self) -> int | None:
        """Tokens and steps of a text together, at most."""
        return position_limit(self.causal_lm.config)

    def get_embedding_dimension(self) -> int:
        return self.causal_lm.get_output_embeddings().weight.shape[1]

    def format_prompt(self, instruction: str) -> str:
        """The sentence-transformers prompt (a prefix of the text) that puts a text under an instruction.

        Raises:
            ValueError: the template goes on after the text, which no prefix can say.
        """
        before, after = self.prompt_template.split("{text}")
        if after:
            raise ValueError(
                f"prompt_template: {self.prompt_template!r} goes on after the text, and sentence-transformers' prompts "
                "are prefixes; write the texts out with the template and encode them without a prompt"
            )
        return before.replace("{instruction}", instruction)

    def preprocess(
        self,
        inputs: Sequence[Any],
        prompt: str | None = None,
        *,
        num_steps: int | None = None,
        max_length: int | None = None,
        processing_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Texts to token ids: the prompt in front, no special tokens, no chat template, padded on the right.

        Returns:
            `input_ids` and `attention_mask`, [B, N] int64 on the CPU. An empty prompt is its padding token.

        Raises:
            TypeError: an input that is not a string. ValueError: `processing_kwargs`, or more steps than positions.
        """
        if processing_kwargs:
            raise ValueError("processing_kwargs: not supported here, set max_seq_length of the model instead")
        for index, text in enumerate(inputs):
            if not isinstance(text, str):
                raise TypeError(f"inputs[{index}]: got {type(text).__name__}, expected str")
        eos = [self.tokenizer.eos_token_id] if self.append_eos else []
        limit = self._token_limit(max_length, self.num_steps if num_steps is None else check_steps(num_steps))
        keep = None if limit is None else limit - len(eos)
        texts = [(prompt or "") + text for text in inputs]
        rows = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        if keep is not None and any(len(row) > keep for row in rows):
            warnings.warn(f"texts longer than {limit} tokens are cut at the end", stacklevel=2)
        rows = [row[:keep] + eos or [self.tokenizer.pad_token_id] for row in rows]
        lengths = torch.tensor([len(row) for row in rows])
        input_ids = nn.utils.rnn.pad_sequence(
            [torch.tensor(row) for row in rows], batch_first=True, padding_value=self.tokenizer.pad_token_id
        )
        return {
            "input_ids": input_ids,
            "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
        }

    def forward(
        self, features: dict[str, Any], num_steps: int | None = None, return_steps: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Adds to the features `step_embeddings` [B, K, D], the embeddings after 1..K steps ([B, 1, D] for K = 0), and
        `sentence_embedding`, the last of them [B, D], or with `return_steps` all of them. float32 (or 64), length 1."""
        steps = self.num_steps if num_steps is None else check_steps(num_steps)
        states = self.generate(features["input_ids"], features["attention_mask"], steps)
        embeddings = F.normalize(pool_steps(states, self.pooling), dim=-1)
        sentence = embeddings.as_subclass(StepEmbeddings) if return_steps else embeddings[:, -1]
        return {**features, "step_embeddings": embeddings, "sentence_embedding": sentence}

    def generate(self, input_ids: Tensor, attention_mask: Tensor, num_steps: int) -> Tensor:
        """The states that are pooled: [B, N] token ids -> [B, K, D], the last hidden states at the generated positions.

        With `include_prompt_state` that of the last token and K - 1 of these; with K = 0 that of the last token alone,
        [B, 1, D]. Differentiable.
        """
        if self.training and any(getattr(module, "gradient_checkpointing", False) for module in self.modules()):
            raise RuntimeError(
                "gradient checkpointing switches off the transformers cache that this module generates on; "
                "train with the gircse package, whose rollout does without it: gircse.load(folder)"
            )
        lm = self.causal_lm
        input_ids, mask = pad_left(input_ids, attention_mask)
        position = (mask.cumsum(1) - 1).clamp_min(0)
        cache = DynamicCache()

        def last_state(**inputs: Tensor) -> Tensor:
            output = lm.base_model(
                attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True, **inputs
            )
            return output.last_hidden_state[:, -1]

        hidden, steps = last_state(input_ids=input_ids), []
        if self.include_prompt_state and num_steps:
            steps.append(hidden)
        for _ in range(num_steps - len(steps)):
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            position = position[:, -1:] + 1
            hidden = last_state(inputs_embeds=soft_token(lm, hidden, self.temperature)[:, None])
            steps.append(hidden)
        return torch.stack(steps or [hidden], dim=1)

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Writes the model (only the adapter, where it has one), tokenizer, settings.

        Raises:
            ValueError: an adapter whose base model has no name or path to load it from again.
        """
        name_base_model(self.causal_lm, output_path)
        self.causal_lm.save_pretrained(output_path)
        self.save_tokenizer(output_path)
        self.save_config(output_path)
        self.save_length(output_path)

    def save_length(self, output_path: str) -> None:
        text = json.dumps({"max_seq_length": self.max_seq_length}, indent=2) + "\n"
        (Path(output_path) / LENGTH_CONFIG).write_text(text, encoding="utf-8")

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
        **kwargs: Any,
    ) -> GIRCSEModule:
        """See `SentenceTransformer`; `model_kwargs` go to `AutoModelForCausalLM.from_pretrained`."""
        check_backend(backend)
        where: dict[str, Any] = {
            "subfolder": subfolder,
            "token": token,
            "revision": revision,
            "local_files_only": local_files_only,
        }
        config = cls.load_config(model_name_or_path, cache_folder=cache_folder, **where)
        config |= cls.load_config(model_name_or_path, config_filename=LENGTH_CONFIG, cache_folder=cache_folder, **where)
        source = {**where, "cache_dir": cache_folder, "trust_remote_code": trust_remote_code}
        options = {**source, "dtype": "auto", **(config_kwargs or {}), **(model_kwargs or {})}
        model = AutoModelForCausalLM.from_pretrained(model_name_or_path, **options)
        if getattr(model.config, "attn_logit_softcapping", None):  # which SDPA has no argument for
            model.set_attn_implementation("eager")
        tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, **source, **(processor_kwargs or {}))
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return cls(model.eval(), tokenizer, **config)

    def _token_limit(self, max_length: int | None, num_steps: int) -> int | None:
        """Tokens of a prompt: the positions must hold the steps as well."""
        limit = self.max_seq_length if max_length is None else max_length
        positions = self.max_positions
        if positions is None:
            return limit
        if num_steps >= positions:
            raise ValueError(f"num_steps: got {num_steps}, expected fewer than the model's {positions} positions")
        return min(positions - num_steps, positions if limit is None else limit)


def soft_token(lm: Any, hidden: Tensor, temperature: float) -> Tensor:
    """[B, D] hidden states -> [B, D] what the embedding layer gives for a mixture of all tokens."""
    config, embedding = lm.config, lm.get_input_embeddings()
    logits = at_least_float32(lm.get_output_embeddings()(hidden))
    if getattr(config, "logits_scaling", None) is not None:  # Granite
        logits = logits / config.logits_scaling
    elif getattr(config, "logit_scale", None):  # Cohere
        logits = logits * config.logit_scale
    softcap = getattr(config, "final_logit_softcapping", None)
    if softcap is not None:  # Gemma 2
        logits = softcap * torch.tanh(logits / softcap)
    weights = torch.softmax(logits / temperature, dim=-1).to(hidden.dtype)
    if hasattr(embedding, "base_layer"):  # an adapter on the table: its weight is not the whole of it
        return weights @ embedding(torch.arange(weights.shape[-1], device=hidden.device)).to(hidden.dtype)
    scale = torch.as_tensor(getattr(embedding, "embed_scale", 1.0)).to(hidden.dtype)  # Gemma
    return float(scale) * (weights @ embedding.weight)


def position_limit(config: Any) -> int | None:
    """`max_position_embeddings`, or less where rotary frequencies change beyond some length: transformers chooses them
    for a whole batch by its longest row, so rows would change each other."""
    whole = getattr(config, "max_position_embeddings", None)
    limits, parameters = [whole], getattr(config, "rope_parameters", None) or {}
    for kind in [parameters, *parameters.values()]:
        name = kind.get("rope_type", "") if isinstance(kind, dict) else ""
        if name == "longrope":
            original = kind.get("original_max_position_embeddings")
            limits.append(original or getattr(config, "original_max_position_embeddings", None))
        if "dynamic" in name and whole is not None:
            limits.append(whole - 1)
    return min((limit for limit in limits if limit is not None), default=None)


def pool_steps(states: Tensor, pooling: str) -> Tensor:
    """[B, K, D] states -> [B, K, D], entry k pooled from the first k of them; float32 (or 64)."""
    states = at_least_float32(states)
    if pooling == "last":
        return states
    ordinal = torch.arange(1, states.shape[1] + 1, dtype=states.dtype, device=states.device)[:, None]
    if pooling == "mean":
        return states.cumsum(1) / ordinal
    return (states * ordinal).cumsum(1) / (ordinal * (ordinal + 1) / 2)


def at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def pad_left(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Moves the padding of each row to its front: the last token is then the last column, and distances between slots
    are distances between positions (sliding windows count slots)."""
    real = attention_mask != 0
    order = real.to(torch.uint8).argsort(dim=1, stable=True)
    return input_ids.gather(1, order), real.gather(1, order).long()


def name_base_model(lm: Any, output_path: str) -> None:
    """Makes sure that a saved adapter names the model it belongs to.

    Raises:
        ValueError: the base model was built in memory, or would be overwritten.
    """
    for config in getattr(lm, "peft_config", {}).values():
        config.base_model_name_or_path = config.base_model_name_or_path or lm.name_or_path
        name = config.base_model_name_or_path
        if name and Path(name).is_dir():  # which resolves from elsewhere, too
            name = config.base_model_name_or_path = str(Path(name).resolve())
        if not name:
            raise ValueError(
                "base model: it was built in memory and has no name or path, so the saved adapter could not be loaded "
                "again. Save the base by itself before the adapter is added and load it from there, or set its "
                "name_or_path to a folder that holds it"
            )
        if Path(name).is_dir() and Path(name).resolve() == Path(output_path).resolve():
            raise ValueError(
                f"path: {output_path} is the base model's own folder, expected another one for the adapter"
            )


def check_steps(num_steps: Any) -> int:
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 0:
        raise ValueError(f"num_steps: got {num_steps!r}, expected an integer >= 0")
    return num_steps


def check_backend(backend: str) -> None:
    if backend != "torch":
        raise ValueError(f"backend: got {backend!r}, expected 'torch': soft tokens are no graph that ONNX could hold")
