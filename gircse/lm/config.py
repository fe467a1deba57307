"""`GircseConfig`: the settings of a GIRCSE model besides its weights, `gircse_config.json` in a saved folder."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from numbers import Real
from pathlib import Path

from gircse.integers import check_integer
from gircse.lm.prompts import DEFAULT_TEMPLATE, check_template
from gircse.ops.pooling import POOLINGS

CONFIG_NAME = "gircse_config.json"
DECODINGS = ("sequential", "jacobi", "auto")


@dataclass(frozen=True)
class GircseConfig:
    """Settings of a GIRCSE model.

    Attributes:
        num_steps: K, soft tokens per text; 0 is the encoder-only baseline (the prompt's last hidden state).
        pooling: how the steps become one vector: "mean" (default), "last" or "weighted" (docs/method.md §4).
        temperature: logit temperature T of the soft tokens, > 0.
        prompt_template: how an instruction and a text become a prompt; holds {instruction} and {text} once each.
        append_eos: append the end-of-sequence token to every prompt (EOS pooling of encoder-only baselines).
        include_prompt_state: pool the prompt's last state h_0 too, as the first of K states: h_0, g_1..g_{K-1}, made
            by K - 1 soft tokens (as LaSER does). The default pools g_1..g_K.
        query_max_length, passage_max_length: the most tokens of a prompt with and without an instruction, as in
            training; a call's `max_length` overrides them.
        decoding: how texts are encoded: "sequential", one soft token after the other; "jacobi", all together in a few
            passes (docs/engine.md), whose embeddings differ by about `jacobi_tolerance`; "auto", whichever is faster
            for the number of texts in a batch, so that embeddings depend on it to the tolerance.
        jacobi_tolerance: in [0, 2]: a text is done when a pass moves its embedding by less, 1 - cosine.
    """

    num_steps: int = 5
    pooling: str = "mean"
    temperature: float = 1.0
    prompt_template: str = DEFAULT_TEMPLATE
    append_eos: bool = False
    include_prompt_state: bool = False
    query_max_length: int = 512
    passage_max_length: int = 512
    decoding: str = "sequential"
    jacobi_tolerance: float = 1e-3

    def __post_init__(self) -> None:
        for name, least in (("num_steps", 0), ("query_max_length", 1), ("passage_max_length", 1)):
            object.__setattr__(self, name, check_integer(name, getattr(self, name), least=least))
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling: got {self.pooling!r}, expected one of {', '.join(map(repr, POOLINGS))}")
        number = isinstance(self.temperature, Real) and not isinstance(self.temperature, bool)
        try:
            temperature = float(self.temperature) if number else 0.0
        except OverflowError:  # an integer beyond the range of floats
            temperature = math.inf
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature: got {self.temperature!r}, expected a finite number > 0")
        object.__setattr__(self, "temperature", temperature)
        for name in ("append_eos", "include_prompt_state"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected true or false")
        check_template(self.prompt_template)
        if self.decoding not in DECODINGS:
            raise ValueError(f"decoding: got {self.decoding!r}, expected one of {', '.join(map(repr, DECODINGS))}")
        tolerance = self.jacobi_tolerance
        if isinstance(tolerance, bool) or not isinstance(tolerance, Real) or not 0 <= tolerance <= 2:
            raise ValueError(f"jacobi_tolerance: got {tolerance!r}, expected a number from 0 to 2 (a cosine distance)")
        object.__setattr__(self, "jacobi_tolerance", float(tolerance))

    @classmethod
    def load(cls, folder: str | Path) -> GircseConfig | None:
        """The config of a saved folder, or None if it has none, as a plain PEFT adapter or causal LM.

        Raises:
            ValueError: the file is no JSON object, or holds an unknown key or a bad value; the message names the file.
        """
        path = Path(folder) / CONFIG_NAME
        if not path.is_file():
            return None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(values, dict):
                raise ValueError(f"got {type(values).__name__}, expected a JSON object")
            unknown = sorted(set(values) - {field.name for field in fields(cls)})
            if unknown:
                raise ValueError(f"unknown keys {', '.join(unknown)} (written by a newer gircse?)")
            return cls(**values)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: {error}") from None

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    def max_length(self, instruction: str | None, given: int | None = None) -> int:
        """The most tokens of a prompt: the given limit, else the config's for one with or without instruction."""
        if given is not None:
            return given
        return self.query_max_length if instruction else self.passage_max_length

    def with_steps(self, num_steps: int | None) -> GircseConfig:
        return self if num_steps is None else replace(self, num_steps=num_steps)

    def with_decoding(self, decoding: str | None, jacobi_tolerance: float | None) -> GircseConfig:
        """Raises ValueError: a bad value, or a tolerance for sequential decoding, which has none."""
        config = replace(
            self,
            decoding=self.decoding if decoding is None else decoding,
            jacobi_tolerance=self.jacobi_tolerance if jacobi_tolerance is None else jacobi_tolerance,
        )
        if jacobi_tolerance is not None and config.decoding == "sequential":
            raise ValueError(
                f"jacobi_tolerance: got {jacobi_tolerance!r} with decoding='sequential', expected None, or decoding="
                "'jacobi' or 'auto'"
            )
        return config
