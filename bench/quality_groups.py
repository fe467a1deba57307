"""Many runs of one arm at once: one frozen base, one LoRA adapter a run, one pass of all runs' texts.

A small model on a GPU is bound by the host, which launches kernels one after the other. So the runs of an arm (corpora
x seeds) share every launch: the rows of a batch are those of run 0, then of run 1, .., and an adapted layer applies to
each part its own adapter (`GroupedLora`). Gradients, clipping and AdamW are those of each run alone, as in
`gircse.train.train`; tests/bench/test_quality.py compares the two.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.quality_arms import Arm
from bench.quality_drafters import DRAFTERS, DROPPING
from bench.quality_tokens import GroupTokens
from gircse import ops
from gircse.lm.causal_lm import CausalLM
from gircse.lm.rollout import rollout
from gircse.train.config import TrainConfig
from gircse.train.distill_loss import distillation_loss
from gircse.train.learning_rate import learning_rate
from gircse.train.run_config import LORA_TARGETS

MAX_STEPS = 20  # K = 0..20 are measured


class OutOfTime(RuntimeError):
    """The study's deadline has passed."""


class GroupedLora(nn.Module):
    """A frozen linear layer with one float32 LoRA adapter a run, for inputs [runs * rows, .., in] of its dtype.

    Attributes:
        chosen: the runs whose rows the input has.
    """

    def __init__(self, base: nn.Linear, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)  # [runs, r, in], [runs, out, r]
        self.chosen = slice(None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        a, b = self.a[self.chosen].to(x.dtype), self.b[self.chosen].to(x.dtype)
        low = x.reshape(len(a), -1, x.shape[-1]) @ a.transpose(1, 2)
        return torch.baddbmm(y.reshape(len(a), -1, y.shape[-1]), low, b.transpose(1, 2), alpha=self.scale).view_as(y)


class Adapters:
    """The adapters of all runs, [runs, P] float32 with their gradients beside them, as the layers' own parameters.

    Attributes:
        names: path of each adapted layer.
    """

    def __init__(self, model: nn.Module, runs: int, config: TrainConfig) -> None:
        rank, scale = config.lora_r, config.lora_alpha / config.lora_r
        linears = [
            (name, layer)
            for name, layer in model.named_modules()
            if isinstance(layer, nn.Linear) and name.rsplit(".", 1)[-1] in LORA_TARGETS
        ]
        sizes = [rank * size for _, layer in linears for size in (layer.in_features, layer.out_features)]
        device = next(model.parameters()).device
        self.flat = nn.Parameter(torch.zeros(runs, sum(sizes), device=device))
        self.flat.grad = torch.zeros_like(self.flat)
        self.names = [name for name, _ in linears]
        values, gradients = (iter(each.split(sizes, dim=1)) for each in (self.flat.data, self.flat.grad))
        self.layers: list[GroupedLora] = []
        for name, layer in linears:
            a, b = next(values).view(runs, rank, -1), next(values).view(runs, -1, rank)
            lora = GroupedLora(layer, a, b, scale)
            for parameter, own in ((lora.a, a), (lora.b, b)):
                parameter.data = own
                parameter.grad = next(gradients).view(own.shape)
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, lora)
            self.layers.append(lora)

    def choose(self, runs: slice) -> None:
        """The runs whose rows the next passes have."""
        for layer in self.layers:
            layer.chosen = runs

    def reset(self, seeds: Sequence[int]) -> None:
        """Fresh adapters: A uniform as PEFT's, B zero; those of one seed are the same in every arm."""
        with torch.no_grad():
            self.flat.zero_()
            for run, seed in enumerate(seeds):
                generator = torch.Generator().manual_seed(seed)
                for layer in self.layers:
                    bound = 1 / math.sqrt(layer.a.shape[-1])
                    layer.a[run] = torch.empty(layer.a.shape[1:]).uniform_(-bound, bound, generator=generator)

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """The adapters of all runs that `torch.save(flat)` wrote."""
        self.flat.copy_(torch.load(path, map_location=self.flat.device))

    def save(self, folder: Path, run: int, config: TrainConfig) -> None:
        """The adapter of one run in PEFT's format, in float16, with the config that `GIRCSE.from_pretrained` reads."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for name, layer in zip(self.names, self.layers, strict=True):
            for side, value in (("A", layer.a), ("B", layer.b)):
                tensors[f"base_model.model.{name}.lora_{side}.weight"] = value[run].detach().half().cpu().contiguous()
        save_file(tensors, str(folder / "adapter_model.safetensors"))
        adapter = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": config.lora_r,
            "lora_alpha": config.lora_alpha,
            "lora_dropout": 0.0,
            "target_modules": list(LORA_TARGETS),
            "inference_mode": True,
        }
        (folder / "adapter_config.json").write_text(json.dumps(adapter), encoding="utf-8")
        (folder / "gircse_config.json").write_text(config.gircse_config().to_json(), encoding="utf-8")


class Trainer:
    """The base with the adapters of `tokens`' runs on it.

    Args:
        at_once: runs that share a pass, the parts of a group; None: all. On a CPU more than one only takes memory.
        deadline: seconds of `time.monotonic` after which `OutOfTime` is raised.
    """

    def __init__(
        self,
        model: Any,
        tokens: GroupTokens,
        config: TrainConfig,
        *,
        at_once: int | None = None,
        deadline: float = math.inf,
    ) -> None:
        model.requires_grad_(False)
        model.eval()
        self.lm = CausalLM.from_model(model)
        self.tokens, self.deadline = tokens, deadline
        self.adapters = Adapters(model, len(tokens.runs), config)
        self.device = self.adapters.flat.device
        count = at_once or len(tokens.runs)
        self.parts = [slice(first, first + count) for first in range(0, len(tokens.runs), count)]

    def _states(
        self, runs: slice, ids: Tensor, lengths: Tensor, steps: int, factor: float, arm: Arm, *, training: bool
    ) -> Tensor:
        """[runs, texts, N] ids of the group -> h_0, g_1..g_K of some runs, [runs, texts, K + 1, D], float32."""
        if time.monotonic() > self.deadline:
            raise OutOfTime
        self.adapters.choose(runs)
        ids, lengths = ids[runs], lengths[runs]
        count, ids, lengths = len(ids), ids.flatten(0, 1), lengths.flatten()
        mask = torch.arange(ids.shape[1], device=self.device) < lengths[:, None]
        drafter = DRAFTERS.get(arm.drafter)
        if training and arm.drafter in DROPPING:
            states = DROPPING[arm.drafter](self.lm, ids, lengths, steps, arm.soft_temperature)
            return states.float().unflatten(0, (count, -1))
        result = rollout(
            self.lm, ids, mask, steps,
            temperature=arm.soft_temperature, soft_token_gradient=0.0 if drafter else factor, drafter=drafter,
        )  # fmt: skip
        return result.with_prompt.float().unflatten(0, (count, -1))

    def train(self, arm: Arm, config: TrainConfig, targets: Tensor | None = None) -> dict[str, Any]:
        """Trains every run; with `targets` [steps, runs, texts, D], a teacher's embeddings, by distillation.

        Returns:
            "losses" [steps][runs][K], "grad_norm" [steps][runs], "step_seconds": the median, all runs together; on a
            CPU of processor time, which other processes do not change.
        """
        flat = self.adapters.flat
        flat.grad.zero_()
        optimizer = torch.optim.AdamW([flat], lr=config.learning_rate, weight_decay=config.weight_decay)
        total = config.max_steps or 0
        losses, norms, times = [], [], []
        clock = time.perf_counter if self.device.type == "cuda" else time.process_time
        for step in range(total):
            began = clock()
            batch = self.tokens.batch(step, self.device)
            steps = config.steps_at(step)
            factor = config.soft_token_gradient_at(step, total)
            measured = []
            for runs in self.parts:
                states = self._states(runs, batch.ids, batch.lengths, steps, factor, arm, training=True)
                states = states[:, :, 1:] if steps else states
                objective = (
                    _contrastive(states, batch.mask[runs], config)
                    if targets is None
                    else _distillation(states, targets[step, runs].to(self.device))
                )
                with warnings.catch_warnings():
                    # the gradients are parts of one matrix, which clipping and AdamW take at once
                    warnings.filterwarnings("ignore", message="grad and param do not obey")
                    torch.stack([loss for loss, _ in objective]).sum().backward()
                measured += [each for _, each in objective]
            with torch.no_grad():
                norm = flat.grad.norm(dim=1)
                flat.grad *= (config.max_grad_norm / (norm + 1e-6)).clamp(max=1)[:, None]
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step, total)
            optimizer.step()
            flat.grad.zero_()
            losses.append(torch.stack(measured).detach())
            norms.append(norm)
            if step % 5 == 4:
                torch.cuda.synchronize() if self.device.type == "cuda" else None
            times.append(clock() - began)
        return {
            "losses": [each.tolist() for each in losses],
            "grad_norm": torch.stack(norms).tolist(),
            "step_seconds": sorted(times)[len(times) // 2],
        }

    @torch.no_grad()
    def encode(self, ids: Tensor, lengths: Tensor, steps: int, arm: Arm) -> Tensor:
        """[runs, n, N] ids -> h_0, g_1..g_K of each, [runs, n, K + 1, D] float32 on the device."""
        batches = list(zip(ids.split(128, dim=1), lengths.split(128, dim=1), strict=True))
        parts = [
            torch.cat([self._states(runs, *batch, steps, 1.0, arm, training=False) for batch in batches], dim=1)
            for runs in self.parts
        ]
        return torch.cat(parts)

    def embeddings(self, steps: int, count: int, arm: Arm) -> Tensor:
        """z_K of the texts of the first `count` batches, [count, runs, texts, D]."""
        parts = []
        for first in range(0, count, 4):
            batches = [self.tokens.batch(step, self.device) for step in range(first, min(count, first + 4))]
            ids = torch.cat([each.ids for each in batches], dim=1)
            lengths = torch.cat([each.lengths for each in batches], dim=1)
            z = self.encode(ids, lengths, steps, arm)[:, :, 1:].mean(dim=2)
            parts.append(z.unflatten(1, (len(batches), -1)).transpose(0, 1))
        return torch.cat(parts)


Objective = list[tuple[Tensor, Tensor]]  # of each run, loss and parts


def _contrastive(states: Tensor, mask: Tensor, config: TrainConfig) -> Objective:
    """(objective, its parts L_1..L_K) of each run, states [runs, queries and as many passages, K, D]."""
    split, results = states.shape[1] // 2, []
    target = torch.arange(split, device=states.device)
    for run, own in enumerate(states):
        losses = ops.stepwise_info_nce(
            own[:split], own[split:], target,
            temperature=config.contrastive_temperature, pooling=config.pooling,
            mask=mask[run],
        )  # fmt: skip
        counted = losses if config.stepwise else losses[-1:]
        loss = ops.icr_objective(counted, reg_weight=config.reg_weight, reduction=config.reduction)
        results.append((loss, losses.detach()))
    return results


def _distillation(states: Tensor, wanted: Tensor) -> Objective:
    split, results = states.shape[1] // 2, []
    for own, target in zip(states[:, :, 0], wanted, strict=True):
        loss = distillation_loss(
            own[:split], own[split:], target[:split], target[split:], temperature=0.02, kl_weight=1.0
        )
        results.append((loss.total, torch.stack([loss.cosine, loss.kl]).detach()))
    return results
