"""GIRCSE embeddings (arXiv 2509.24291) as a sentence-transformers module, in plain PyTorch.

This file and those that it imports are saved beside the weights, so that a folder runs without the `gircse` package:

    SentenceTransformer(folder, trust_remote_code=True)

They need torch, transformers and sentence-transformers >= 6 only (and peft for a LoRA adapter). Every text is a prompt
to a causal LM. The LM generates K soft tokens: softmax over its vocabulary times its own input embeddings, appended to
the sequence. The embedding is the mean of the last hidden states at the K generated positions, scaled to length 1. With
`gircse` installed, `gircse.load(folder)` gives the same embeddings faster, and trains.
"""

from __future__ import annotations

import functools
import importlib
import json
import warnings
from collections.abc import Iterator, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformerModelCardData
from sentence_transformers.base.modules import InputModule
from torch import Tensor, nn
from transformers import AutoTokenizer, DynamicCache

from .modeling_gircse_encode import Output, StepEmbeddings, encode_steps_apart
from .modeling_gircse_folder import ModelCard, load_causal_lm, name_base_model, put_adapter_on, save_code
from .modeling_gircse_math import POOLINGS, pad_left, pool_steps, position_limit, soft_token

LENGTH_CONFIG = "sentence_bert_config.json"
ROLLOUT = "rollout"  # a feature: more arguments of `generate`, of the losses of the package for its module
IN_ENCODE = "in_encode"  # a feature: `encode` was called with `return_steps`, and will scale and cut the result


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
        query_max_length, passage_max_length: the most tokens of a text with a prompt, which is included, and without.
        decoding, jacobi_tolerance: kept for `gircse`, which can make soft tokens in another way (its docs/engine.md);
            this file always makes one after the other.
        max_seq_length: the most tokens of either, instead of these two. Longer texts are cut on the tokenizer's
            `truncation_side`.
    """

    # sentence-transformers writes the class's module into modules.json. This is the file beside the weights, so that
    # the folder loads without gircse.
    __module__ = "modeling_gircse"

    config_file_name = "gircse_config.json"
    config_keys = [  # noqa: RUF012
        "num_steps", "pooling", "temperature", "prompt_template", "append_eos", "include_prompt_state",
        "query_max_length", "passage_max_length", "decoding", "jacobi_tolerance",
    ]  # fmt: skip
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
        query_max_length: int = 512,
        passage_max_length: int = 512,
        decoding: str = "sequential",
        jacobi_tolerance: float = 1e-3,
        max_seq_length: int | None = None,
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
        self.query_max_length = query_max_length
        self.passage_max_length = passage_max_length
        self.decoding = decoding
        self.jacobi_tolerance = jacobi_tolerance
        self.max_seq_length = max_seq_length

    def __reduce_ex__(self, protocol: Any) -> Any:
        if type(self).__module__ != "modeling_gircse":
            return super().__reduce_ex__(protocol)
        # Pickling by name would import a module "modeling_gircse".
        return blank, (type(self).__init__.__module__,), self.__dict__.copy()

    def on_model_ready(self, model: Any) -> None:
        """sentence-transformers calls this when the model around this module is complete."""
        if type(model.model_card_data) is SentenceTransformerModelCardData:
            model.model_card_data.__class__ = ModelCard
        model.encode = functools.partial(encode_steps_apart, model)

    @property
    def causal_lm(self) -> Any:
        """The transformers model."""
        return self.model

    @property
    def processor(self) -> Any:
        return self.tokenizer

    @property
    def max_positions(self) -> int | None:
        """The most tokens and steps of a text together."""
        return position_limit(self.causal_lm.config)

    def get_embedding_dimension(self) -> int:
        return self.causal_lm.get_output_embeddings().weight.shape[1]

    def format_prompt(self, instruction: str) -> str:
        """The sentence-transformers prompt (a prefix of the text) that puts a text under an instruction.

        Raises:
            ValueError: the template goes on after the text, so that no prefix is equal to it.
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
        return_steps: bool = False,
        max_length: int | None = None,
        processing_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Texts to token ids: the prompt in front, no special tokens, no chat template, padded on the right.

        Returns:
            `input_ids` and `attention_mask`, [B, N] int64 on the CPU, where an empty prompt is the padding token. With
            `return_steps` also a mark for `forward` that `encode` will scale the result.

        Raises:
            TypeError: an input is not a string. ValueError: an input is no Unicode text, `processing_kwargs` are given,
                there are more steps than positions, or the model has no embeddings for a token.
        """
        if processing_kwargs:
            raise ValueError("processing_kwargs: not supported here, set max_seq_length of the model instead")
        if prompt is not None:
            check_text("prompt", prompt)
        for index, text in enumerate(inputs):  # `encode` sorts the texts first, so errors show the text, too
            check_text(f"inputs[{index}]", text)
        eos = [self.tokenizer.eos_token_id] if self.append_eos else []
        if max_length is None:
            max_length = self.max_seq_length
        if max_length is None:
            max_length = self.query_max_length if prompt else self.passage_max_length
        limit = self._token_limit(max_length, self.num_steps if num_steps is None else check_steps(num_steps))
        keep = limit - len(eos)
        texts = [(prompt or "") + text for text in inputs]
        rows = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        if any(len(row) > keep for row in rows):
            end = "beginning" if self.tokenizer.truncation_side == "left" else "end"
            warnings.warn(f"texts longer than {limit} tokens are cut at the {end}", stacklevel=2)
            rows = [row[max(len(row) - keep, 0) :] if end == "beginning" else row[:keep] for row in rows]
        rows = [row + eos or [self.tokenizer.pad_token_id] for row in rows]
        self._check_ids(rows)
        lengths = torch.tensor([len(row) for row in rows])
        input_ids = nn.utils.rnn.pad_sequence(
            [torch.tensor(row) for row in rows], batch_first=True, padding_value=self.tokenizer.pad_token_id
        )
        features: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
        }
        return {**features, IN_ENCODE: True} if return_steps else features

    def forward(
        self, features: dict[str, Any], num_steps: int | None = None, return_steps: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Adds to the features `step_embeddings` [B, K, D], the embeddings after 1..K steps ([B, 1, D] for K = 0), and
        `sentence_embedding`, the last of them [B, D], or all of them with `return_steps`. float32 (or 64), length 1."""
        steps = self.num_steps if num_steps is None else check_steps(num_steps)
        states = self.generate(features["input_ids"], features["attention_mask"], steps, **features.get(ROLLOUT, {}))
        embeddings = F.normalize(pool_steps(states, self.pooling), dim=-1)
        sentence = embeddings if return_steps else embeddings[:, -1]
        if return_steps and IN_ENCODE in features:
            sentence = embeddings.as_subclass(StepEmbeddings)
        kept = {name: value for name, value in features.items() if name not in (IN_ENCODE, ROLLOUT)}
        return Output(kept, step_embeddings=embeddings, sentence_embedding=sentence)

    def generate(self, input_ids: Tensor, attention_mask: Tensor, num_steps: int) -> Tensor:
        """The states that are pooled: [B, N] token ids -> [B, K, D], the last hidden states at the generated positions.

        With `include_prompt_state` the state of the last token comes first, and K - 1 of these follow. With K = 0 it is
        the state of the last token alone, [B, 1, D]. The result is differentiable.
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
        """Writes the model (only the adapter, where it has one), tokenizer, settings and the modelling files.

        Raises:
            ValueError: the base model of an adapter has no name or path to load it from again.
        """
        lm, state = self.causal_lm, None
        name_base_model(lm, output_path)
        if not hasattr(lm, "peft_config"):  # the layers of a deleted adapter may remain
            state = {key.replace(".base_layer.", "."): value for key, value in lm.state_dict().items()}
        lm.save_pretrained(output_path, state_dict=state)
        self.save_tokenizer(output_path)
        self.save_config(output_path)
        self.save_length(output_path)
        save_code(output_path)

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
        backend: str = "torch",
        **options: Any,
    ) -> GIRCSEModule:
        """sentence-transformers calls this to load the module from a folder or a hub repository."""
        if backend != "torch":
            raise ValueError(f"backend: got {backend!r}, expected 'torch': ONNX graphs cannot hold soft tokens")
        where = {"subfolder": subfolder, "token": token, "revision": revision, "local_files_only": local_files_only}
        return cls._load(model_name_or_path, {**where, "cache_folder": cache_folder}, **options)

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
        **kwargs: Any,
    ) -> GIRCSEModule:
        """`where` in the folder or repository `name`; `model_kwargs` go to `AutoModelForCausalLM.from_pretrained`."""
        config = cls.load_config(name, **where) | cls.load_config(name, config_filename=LENGTH_CONFIG, **where)
        source = {**where, "trust_remote_code": trust_remote_code}
        source["cache_dir"] = source.pop("cache_folder")
        options = {**source, "dtype": "auto", **(config_kwargs or {}), **(model_kwargs or {})}
        adapter = cls.load_config(name, config_filename="adapter_config.json", **where)
        if adapter:  # its base is another repository, or another folder
            options |= {"subfolder": "", "revision": None}
            folder = str(cls.load_dir_path(name, **where))
            base = adapter.get("base_model_name_or_path")
            if not base:
                raise ValueError(f"{name}/adapter_config.json names no base model")
            if base.startswith(".") and Path(folder, base).is_dir():  # the base lies inside the adapter's folder
                base = str(Path(folder, base))
            model = put_adapter_on(load_causal_lm(base, options), folder)
        else:
            model = load_causal_lm(name, options)
        if getattr(model.config, "attn_logit_softcapping", None):  # SDPA has no such argument
            model.set_attn_implementation("eager")
        tokenizer = AutoTokenizer.from_pretrained(name, **source, **(processor_kwargs or {}))
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return cls(model.eval(), tokenizer, **config)

    def _check_ids(self, rows: list[list[int]]) -> None:
        vocabulary = self.causal_lm.get_input_embeddings().weight.shape[0]
        low, high = min(map(min, rows), default=0), max(map(max, rows), default=0)
        if high >= vocabulary:
            raise ValueError(
                f"input_ids: got {low} to {high}, expected token ids from 0 to {vocabulary - 1}: the tokenizer has "
                "tokens that the model has no embeddings for"
            )

    def _token_limit(self, max_length: int, num_steps: int) -> int:
        """The most tokens of a prompt. The positions must hold the steps as well."""
        positions = self.max_positions
        if positions is None:
            return max_length
        if num_steps >= positions:
            raise ValueError(f"num_steps: got {num_steps}, expected fewer than the model's {positions} positions")
        return min(positions - num_steps, max_length)


def check_text(name: str, text: Any) -> None:
    """
    Raises:
        TypeError: not a string. ValueError: it holds half of a surrogate pair, which tokenizers refuse.
    """
    if isinstance(text, Iterator):
        kind = type(text).__name__
        raise TypeError(f"{name}: got {kind}, expected str: encode takes it for one text, hand over a list of it")
    if not isinstance(text, str):
        raise TypeError(
            f"{name}: got {type(text).__name__}, expected str; it is {shown(text)}. Every column of training data is "
            "read as texts: remove others, such as ids, from the data set"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        at = error.start
        raise ValueError(
            f"{name}: got {text[at]!r} at character {at} of {shown(text)}, expected Unicode text: half a pair"
        ) from None


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + ".."


def check_steps(num_steps: Any) -> int:
    if isinstance(num_steps, bool) or not isinstance(num_steps, Integral) or num_steps < 0:
        raise ValueError(f"num_steps: got {num_steps!r}, expected an integer >= 0")
    return int(num_steps)


def blank(module: str) -> GIRCSEModule:
    """An empty module of the class that is defined in a Python module, for pickle to fill."""
    kind = importlib.import_module(module).GIRCSEModule
    return kind.__new__(kind)
