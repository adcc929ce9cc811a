"""Whether two ways train alike: losses step by step, on the same rows, of the fast and the plain path, or of one launch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from recipe.benchmark import open_stream
from recipe.config import Config
from recipe.distributed import Distributed, resolve_precision
from recipe.engine import make_engine
from recipe.loss import with_z_loss
from recipe.model import PretrainingModel, build_model
from recipe.optim.schedule import hyperparameters
from recipe.plan import Plan


def compare_paths(config: Config, plan: Plan, distributed: Distributed, steps: int) -> dict[str, Any]:
    """Train `steps` steps from the same weights on the same rows: as transformers would (eager attention, softmax in fp32,
    its loss), the same with the rows of each micro-batch in reverse, which is what rounding alone does, and by the kernels of
    this machine.

    Returns:
        by path: the largest and the mean difference of the training loss from the plain path, and the step of the largest;
        and every path's loss at every step.
    """
    precision = resolve_precision(config.precision, distributed.cuda)
    with open_stream(config, distributed) as (stream, encoder):
        batches = [torch.from_numpy(stream.next_batch(plan.rows_at(step))) for step in range(steps)]

    def train(plain: bool, reverse: bool) -> torch.Tensor:
        torch._dynamo.reset()
        own = replace(config, kernels="plain", fp8_head=False) if plain else config
        model = build_model(own, encoder.vocab_size, encoder.end_of_text)
        if plain:
            _make_plain(model)
        engine = make_engine(model, own, plan, distributed, precision)
        losses = []
        for step, rows in enumerate(batches):
            micro_batches = distributed.to_device(rows.numpy()).split(config.micro_batch_size)
            if reverse:
                micro_batches = [m.flip(0) for m in micro_batches]
            losses.append(engine.train_step(micro_batches, hyperparameters(step, config, plan)).loss)
        used.append(str(model.kernels))
        return distributed.mean(torch.stack(losses)).cpu()

    used: list[str] = []
    plain = train(plain=True, reverse=False)
    paths = {
        "plain, rows reversed": train(plain=True, reverse=True),
        "this machine's kernels": train(plain=False, reverse=False),
    }
    return {
        "steps": steps,
        "tokens_per_step": plan.tokens_per_step,
        "first_loss": float(plain[0]),
        "last_loss": float(plain[-1]),
        "kernels_used": used[-1],
        "paths": {name: _difference(losses - plain) for name, losses in paths.items()},
        "losses": {"plain": plain.tolist(), **{name: losses.tolist() for name, losses in paths.items()}},
    }


def _difference(signed: torch.Tensor) -> dict[str, float]:
    largest = int(signed.abs().argmax())
    return {
        "largest": float(signed[largest].abs()), "at_step": largest + 1, "mean": float(signed.abs().mean()),
        "mean_signed": float(signed.mean()),
    }  # fmt: skip


def training_losses(config: Config, plan: Plan, distributed: Distributed, steps: int) -> dict[str, Any]:
    """Train `steps` steps of the run.

    Returns:
        losses, the mean of all ranks' for each step; engine, precision, micro_batch_size.
    """
    precision = resolve_precision(config.precision, distributed.cuda)
    with open_stream(config, distributed) as (stream, encoder):
        model = build_model(config, encoder.vocab_size, encoder.end_of_text)
        engine = make_engine(model, config, plan, distributed, precision)
        losses = []
        for step in range(steps):
            rows = distributed.to_device(stream.next_batch(plan.rows_at(step)))
            losses.append(engine.train_step(rows.split(config.micro_batch_size), hyperparameters(step, config, plan)).loss)
        losses = distributed.mean(torch.stack(losses)).tolist()
    about = {"engine": type(engine).__name__, "precision": precision, "micro_batch_size": config.micro_batch_size}
    return about | {"losses": losses}


def _make_plain(model: PretrainingModel) -> None:
    """Attention, softmax and loss as transformers has them."""
    model.gpt2.set_attn_implementation("eager")

    def forward(rows: torch.Tensor) -> torch.Tensor:
        logits = model.gpt2(input_ids=rows[:, :-1].contiguous(), use_cache=False).logits[..., : model.vocab_size].float()
        logits, targets = logits.flatten(0, 1), rows[:, 1:].contiguous()
        losses = F.cross_entropy(logits, targets.flatten(), reduction="none")
        return with_z_loss(losses, logits, model.z_loss).view_as(targets)

    model.forward = forward
