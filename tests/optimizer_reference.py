"""The optimizers as a reference that does the obvious thing, matrix by matrix, in one process and fp32; and the ranks to hold
against it."""

from __future__ import annotations

import math
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from launch import ROOT, accelerate_command, environment
from muon_rank import LONG, STEPS, VOCABULARY, rows_of
from recipe.config import Config
from recipe.model import build_model


def newton_schulz(matrix: torch.Tensor) -> torch.Tensor:
    """Five iterations of Keller Jordan's quintic in fp32."""
    x = matrix / (matrix.norm() + 1e-7)
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x if wide else x.T


class Reference:
    """A momentum for each matrix as (out, in), queries, keys and values apart, and AdamW for the rest, or for all."""

    def __init__(self, config: Config):
        self.config = config
        self.model = build_model(config, VOCABULARY, 0)
        named = dict(self.model.named_parameters())
        self.blocks = {n: p for n, p in named.items() if ".h." in n and p.dim() == 2}
        tables = [p for n, p in named.items() if p.dim() == 2 and n not in self.blocks]
        vectors = [p for p in named.values() if p.dim() == 1]
        assert (len(self.blocks), len(tables), len(vectors)) == (4 * config.n_layer, 2, 8 * config.n_layer + 2)
        embedding = config.embedding_learning_rate or config.learning_rate
        groups = [
            {"params": tables, "weight_decay": config.weight_decay, "peak": embedding},
            {"params": vectors, "weight_decay": 0.0, "peak": config.learning_rate},
        ]
        if config.optimizer == "adamw":
            groups.append(
                {"params": list(self.blocks.values()), "weight_decay": config.weight_decay, "peak": config.learning_rate}
            )
        self.adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, foreach=False)
        self.momentum: dict[tuple[str, int], torch.Tensor] = {}
        self.moments: dict[tuple[str, int], torch.Tensor] = {}

    def step(self, step: int) -> tuple[float, float]:
        """The loss, and the norm before clipping."""
        share = (step + 1) / 5 if step < 5 else 1 - (step - 5) / 45
        momentum = 0.85 + 0.1 * min(1, step / 8)
        self.model.zero_grad()
        rows = rows_of(step)
        loss = self.model(rows).mean()
        if self.config.z_loss:
            logits = self.model.gpt2(input_ids=rows[:, :-1], use_cache=False).logits[..., :VOCABULARY]
            cross_entropy = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
            (cross_entropy + self.config.z_loss * logits.logsumexp(-1).square().mean()).backward()
        else:
            loss.backward()
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in self.model.parameters()))
        for p in self.model.parameters():
            p.grad *= min(1, 0.5 / norm)
        for group in self.adamw.param_groups:
            group["lr"] = group["peak"] * share
        self._adamw()
        if self.config.optimizer == "muon":
            for name, p in self.blocks.items():
                width = 32 if "c_attn" in name else p.shape[1]
                for part in range(p.shape[1] // width):
                    columns = slice(part * width, (part + 1) * width)
                    self._muon((name, part), p.detach()[:, columns].T, p.grad[:, columns].T, 0.02 * share, momentum)
        return loss.item(), norm

    @torch.no_grad()
    def _adamw(self) -> None:
        if not self.config.cautious_weight_decay:
            return self.adamw.step()
        decays = [group["weight_decay"] for group in self.adamw.param_groups]
        before = {p: p.clone() for p in self.model.parameters()}
        for group in self.adamw.param_groups:
            group["weight_decay"] = 0
        self.adamw.step()
        for group, decay in zip(self.adamw.param_groups, decays, strict=True):
            group["weight_decay"] = decay
            for p in group["params"]:
                agree = self.adamw.state[p]["exp_avg"] * before[p] >= 0
                p[agree] -= group["lr"] * decay * before[p][agree]

    def _muon(self, key: tuple[str, int], weight: torch.Tensor, gradient: torch.Tensor, rate: float, momentum: float) -> None:
        m = self.momentum.setdefault(key, torch.zeros_like(gradient))
        m.mul_(momentum).add_(gradient, alpha=1 - momentum)
        update = newton_schulz((1 - momentum) * gradient + momentum * m)
        if self.config.muon_variant == "normuon":
            moments = self.moments.setdefault(key, torch.zeros(len(update), 1))
            moments.mul_(0.95).add_(update.square().mean(dim=1, keepdim=True), alpha=0.05)
            normalized = update / (moments.sqrt() + 1e-10)
            update = normalized * update.norm() / (normalized.norm() + 1e-10)
        scale = max(1, weight.shape[0] / weight.shape[1]) ** 0.5
        agree = scale * update * weight >= 0 if self.config.cautious_weight_decay else torch.ones_like(weight)
        weight.copy_(weight - rate * self.config.muon_weight_decay * agree * weight - rate * scale * update)

    def state(self) -> dict[str, torch.Tensor]:
        """Weights and state by the names of a checkpoint."""
        named = {n.removeprefix("gpt2."): p for n, p in self.model.named_parameters()}
        found = {f"model.{name}": p.detach().clone() for name, p in named.items()}
        for name, p in named.items():
            moments = {kind: moment for kind, moment in self.adamw.state.get(p, {}).items() if kind != "step"}
            found |= {f"{kind}.{name}": moment.clone() for kind, moment in moments.items()}
        for name in self.blocks if self.config.optimizer == "muon" else ():
            parts = [m.T for (n, _), m in self.momentum.items() if n == name]
            found[f"momentum_buffer.{name.removeprefix('gpt2.')}"] = torch.cat(parts, dim=1)
            if self.config.muon_variant == "normuon":
                parts = [v.flatten() for (n, _), v in self.moments.items() if n == name]
                found[f"second_momentum_buffer.{name.removeprefix('gpt2.')}"] = torch.cat(parts)
        return found


def train_reference(config: Config, steps: int = LONG) -> dict:
    """Losses and norms of `steps` steps, and weights and state after STEPS."""
    torch.set_num_threads(1)  # two on a busy machine wait for each other more than they compute
    trained = Reference(config)
    history, end = [], {}
    for step in range(steps):
        history.append(trained.step(step))
        if step + 1 == STEPS:
            end = trained.state()
    return {"loss": [loss for loss, _ in history], "norm": [norm for _, norm in history], "end": end}


def launcher(base: Path, variant: str) -> Callable[[str, str], dict]:
    """Gives what the ranks of muon_rank.py noted, by accelerate file and precision; each is launched once."""

    def get(accelerate_file: str, precision: str) -> dict:
        folder = base / f"{accelerate_file}-{precision}-{variant}"
        if not folder.is_dir():
            if accelerate_file != "cpu":
                get("cpu", precision)  # whose checkpoint is continued
            folder.mkdir()
            script = str(ROOT / "tests" / "muon_rank.py")
            command = [*accelerate_command(accelerate_file, script=script), str(folder), precision, variant]
            done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)
            assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return torch.load(folder / "results.pt")

    return get


def largest(a: list[float], b: list[float], count: int) -> float:
    assert min(len(a), len(b)) >= count
    return max(abs(x - y) for x, y in zip(a[:count], b[:count], strict=True))


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
