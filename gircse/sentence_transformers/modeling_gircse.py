"""GIRCSE embeddings (arXiv 2509.24291) as a sentence-transformers module, in plain PyTorch.

This file is saved beside the weights, so that a folder runs where the `gircse` package is not installed:

    SentenceTransformer(folder, trust_remote_code=True)

It needs torch, transformers and sentence-transformers >= 6 only (and peft for a LoRA adapter). Every text is a prompt
to a causal LM. The LM then "speaks" K soft tokens: softmax over its vocabulary times its own input embeddings, appended
to the sequence. The embedding is the mean of the last hidden states at the K generated positions, scaled to length 1.
With `gircse` installed, `gircse.load(folder)` gives the same embeddings faster, and trains.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer, SentenceTransformerModelCardData
from sentence_transformers.base.modules import InputModule
from sentence_transformers.util.quantization import quantize_embeddings
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

POOLINGS = ("mean", "last", "weighted")
FILE = "modeling_gircse.py"
LENGTH_CONFIG = "sentence_bert_config.json"
IN_ENCODE = "in_encode"  # a feature: `encode` is asked for all steps and goes on to scale and cut them


class StepEmbeddings(Tensor):
    """[B, K, D] embeddings after 1..K steps, on their way through `encode(return_steps=True)` and nowhere else.

    `encode(normalize_embeddings=True)` scales along dimension 1, which here are the steps; this class scales every
    embedding instead. What a module behind or `truncate_dim` makes of them is of this class as long as it has the same
    texts and steps. `encode` takes the texts out one by one, and these are plain tensors; it returns nothing else.
    """

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is F.normalize:
            kwargs["dim"] = -1
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            for steps in (*args, *kwargs.values()):
                if isinstance(steps, cls) and isinstance(result, Tensor):
                    same = result.ndim == steps.ndim and result.shape[:2] == steps.shape[:2]
                    return result.as_subclass(cls) if same else result
            return result


class Output(dict):
    """What `forward` returns; names what there is when `encode` asks for something else."""

    def __missing__(self, name: str) -> Any:
        raise ValueError(
            f"output_value: got {name!r}, expected 'sentence_embedding', or None for {', '.join(self)}; a GIRCSE model "
            "has no embedding for each token of a text"
        )


class ModelCard(SentenceTransformerModelCardData):
    """The card that is saved with the model, with lines in its usage example that load this model."""

    def generate_usage_snippet(self) -> str:
        snippet = super().generate_usage_snippet()
        stock = re.search(r"^model = SentenceTransformer\((.*)\)$", snippet, flags=re.MULTILINE)
        if stock is None:
            return snippet
        ours = (
            f"model = SentenceTransformer({stock[1]}, trust_remote_code=True)  # runs the repository's {FILE}\n"
            f"# With the gircse package the same embeddings come faster, and no code of the repository is run:\n"
            f"# model = gircse.load({stock[1]})"
        )
        return snippet.replace(stock[0], ours)


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
        query_max_length, passage_max_length: tokens of a text with a prompt (the prompt included) and of one without.
        max_seq_length: tokens of either, in place of these two; longer ones are cut at the end, or where the
            tokenizer's `truncation_side` says.
    """

    # sentence-transformers writes a module into modules.json by its class's module: this is the file that `save` puts
    # beside the weights, so that the folder loads without gircse.
    __module__ = "modeling_gircse"

    config_file_name = "gircse_config.json"
    config_keys = [  # noqa: RUF012
        "num_steps", "pooling", "temperature", "prompt_template", "append_eos", "include_prompt_state",
        "query_max_length", "passage_max_length",
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
        self.max_seq_length = max_seq_length

    def __reduce_ex__(self, protocol: Any) -> Any:
        if type(self) is not GIRCSEModule:
            return super().__reduce_ex__(protocol)
        return blank, (), self.__dict__.copy()  # pickling by name would look for a module "modeling_gircse"

    def on_model_ready(self, model: Any) -> None:
        """Called by sentence-transformers once the model around this module is there."""
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
        return_steps: bool = False,
        max_length: int | None = None,
        processing_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Texts to token ids: the prompt in front, no special tokens, no chat template, padded on the right.

        Returns:
            `input_ids` and `attention_mask`, [B, N] int64 on the CPU. An empty prompt is its padding token. And what
            `encode(return_steps=True)` needs to tell `forward` that it will scale the result itself.

        Raises:
            TypeError: an input that is not a string. ValueError: one that is no Unicode text, `processing_kwargs`, more
                steps than positions, or tokens that the model has no embeddings for.
        """
        if processing_kwargs:
            raise ValueError("processing_kwargs: not supported here, set max_seq_length of the model instead")
        if prompt is not None:
            check_text("prompt", prompt)
        for index, text in enumerate(inputs):  # `encode` sorts before it makes batches, so errors show the text, too
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
        `sentence_embedding`, the last of them [B, D], or with `return_steps` all of them. float32 (or 64), length 1."""
        steps = self.num_steps if num_steps is None else check_steps(num_steps)
        states = self.generate(features["input_ids"], features["attention_mask"], steps)
        embeddings = F.normalize(pool_steps(states, self.pooling), dim=-1)
        sentence = embeddings if return_steps else embeddings[:, -1]
        if return_steps and IN_ENCODE in features:
            sentence = embeddings.as_subclass(StepEmbeddings)
        kept = {name: value for name, value in features.items() if name != IN_ENCODE}
        return Output(kept, step_embeddings=embeddings, sentence_embedding=sentence)

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
        """Writes the model (only the adapter, where it has one), tokenizer, settings and this file.

        Raises:
            ValueError: an adapter whose base model has no name or path to load it from again.
        """
        lm, state = self.causal_lm, None
        name_base_model(lm, output_path)
        if not hasattr(lm, "peft_config"):  # the layers of an adapter that was deleted may still be there
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
        adapter = cls.load_config(
            model_name_or_path, config_filename="adapter_config.json", cache_folder=cache_folder, **where
        )
        if adapter:  # its base is another repository, or another folder
            options |= {"subfolder": "", "revision": None}
            folder = str(cls.load_dir_path(model_name_or_path, cache_folder=cache_folder, **where))
            name = adapter.get("base_model_name_or_path")
            if not name:
                raise ValueError(f"{model_name_or_path}/adapter_config.json names no base model")
            if name.startswith(".") and Path(folder, name).is_dir():  # it lies inside the adapter's folder
                name = str(Path(folder, name))
            model = put_adapter_on(load_causal_lm(name, options), folder)
        else:
            model = load_causal_lm(model_name_or_path, options)
        if getattr(model.config, "attn_logit_softcapping", None):  # which SDPA has no argument for
            model.set_attn_implementation("eager")
        tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, **source, **(processor_kwargs or {}))
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
        """Tokens of a prompt: the positions must hold the steps as well."""
        positions = self.max_positions
        if positions is None:
            return max_length
        if num_steps >= positions:
            raise ValueError(f"num_steps: got {num_steps}, expected fewer than the model's {positions} positions")
        return min(positions - num_steps, max_length)


@functools.wraps(SentenceTransformer.encode, assigned=["__doc__"])
def encode_steps_apart(model: Any, *args: Any, **kwargs: Any) -> Any:
    """The model's own `encode`, but where `return_steps` meets a `precision` of fewer bits: every step is quantised by
    itself, as `encode(num_steps=k, precision=..)` would quantise it. The library knows no steps and would take the
    ranges of the values from the wrong axis."""
    encode = type(model).encode
    call = inspect.signature(encode).bind(model, *args, **kwargs)
    call.apply_defaults()
    wanted = call.arguments
    precision, to_tensor, to_numpy = (wanted[name] for name in ("precision", "convert_to_tensor", "convert_to_numpy"))
    stepwise = kwargs.get("return_steps") and wanted["output_value"] == "sentence_embedding"
    if not stepwise or precision in (None, "float32") or len(wanted["inputs"]) == 0:
        return encode(model, *args, **kwargs)
    wanted.update(precision="float32", convert_to_tensor=False, convert_to_numpy=True)
    steps = encode(*call.args, **call.kwargs)  # [n, K, D], or of a single text [K, D]
    texts = steps.reshape(-1, *steps.shape[-2:])
    quantized = np.stack([quantize_embeddings(step, precision=precision) for step in texts.swapaxes(0, 1)], axis=1)
    quantized = quantized.reshape(*steps.shape[:-1], -1)
    if to_tensor:
        return torch.from_numpy(quantized)
    return quantized if to_numpy else list(torch.from_numpy(quantized))


def load_causal_lm(name: str, options: dict[str, Any]) -> Any:
    """
    Raises:
        FileNotFoundError: a folder that is not there.
        ValueError: the checkpoint lacks weights; transformers would draw them at random and go on.
    """
    if (Path(name).is_absolute() or name.startswith(".")) and not Path(name).is_dir():
        raise FileNotFoundError(f"base model: {name} does not exist or is not a folder")
    loaded: Any = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **options)
    model, found = loaded
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"{name} lacks {len(missing)} weights of {type(model).__name__}, for example {missing[0]}")
    return model


def put_adapter_on(model: Any, folder: str) -> Any:
    """Loads the adapter as peft itself does, and returns the transformers model with its layers in it.

    Raises:
        ValueError: a kind of adapter that has no layers in the model, or one whose weights do not all find their place.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    with warnings.catch_warnings():  # PEFT asks for a name that transformers has replaced
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        wrapped = PeftModel.from_pretrained(model, folder)
    kind = wrapped.active_peft_config
    if kind.is_prompt_learning:
        raise ValueError(f"{folder}: got an adapter of type {kind.peft_type.value}, expected layers in the decoder")
    expected, stored = set(get_peft_model_state_dict(wrapped)), set(load_peft_weights(folder, device="cpu"))
    missing, unexpected = sorted(expected - stored), sorted(stored - expected)
    if missing or unexpected:
        raise ValueError(
            f"{folder}: the adapter does not fit {type(model).__name__}: {len(missing)} weights missing, "
            f"{len(unexpected)} unexpected, for example {(missing + unexpected)[0]}"
        )
    return without_wrapper(wrapped)


def without_wrapper(model: Any) -> Any:
    """The transformers model inside a `PeftModel`, as the owner of the layers: the state that its own `add_adapter`
    leaves, so that its methods, state dict and checkpoints are the same whichever way the adapter came."""
    inner = model.get_base_model()
    inner.peft_config = model.peft_config
    inner._hf_peft_config_loaded = True
    return inner


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
    if type(embedding).__module__.startswith("peft."):  # what an adapter does to a row, only its forward pass knows
        return weights @ embedding(torch.arange(weights.shape[-1], device=weights.device)).to(hidden.dtype)
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


def save_code(output_path: str) -> None:
    """Puts this file beside the weights and, where they are one route of a `Router`, into the folder of the whole
    model, where sentence-transformers looks for it."""
    code, folder = Path(__file__).read_bytes(), Path(output_path)
    (folder / FILE).write_bytes(code)
    whole = "config_sentence_transformers.json"
    if not (folder / whole).is_file() and (folder.resolve().parent / whole).is_file():
        (folder.resolve().parent / FILE).write_bytes(code)


def name_base_model(lm: Any, output_path: str) -> None:
    """Makes sure that a saved adapter names the model it belongs to.

    Raises:
        ValueError: the base model was built in memory, or would be overwritten.
    """
    for config in getattr(lm, "peft_config", {}).values():
        name = config.base_model_name_or_path or lm.name_or_path
        if name and Path(name).is_dir():
            name = str(Path(name).resolve())  # the same folder from wherever it is loaded
        config.base_model_name_or_path = name
        if not name:
            raise ValueError(
                "base model: it was built in memory and has no name or path, so the saved adapter could not be loaded "
                "again. Save the base by itself before the adapter is added and load it from there, or set its "
                "name_or_path to a folder that holds it"
            )
        if Path(name) == Path(output_path).resolve():
            raise ValueError(
                f"path: {output_path} is the base model's own folder, expected another one for the adapter"
            )


def check_text(name: str, text: Any) -> None:
    """
    Raises:
        TypeError: not a string. ValueError: it holds half of a surrogate pair, which no tokenizer takes.
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


def check_backend(backend: str) -> None:
    if backend != "torch":
        raise ValueError(f"backend: got {backend!r}, expected 'torch': soft tokens are no graph that ONNX could hold")


def blank() -> GIRCSEModule:
    return GIRCSEModule.__new__(GIRCSEModule)
