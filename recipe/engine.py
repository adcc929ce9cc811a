"""How a step is computed on this machine: DeepSpeed ZeRO-1 (recipe/zero1.py), data parallel, or one process; GPU or CPU.

No other file knows which. The accelerate file decides: `distributed_type: DEEPSPEED` is ZeRO-1, several processes
without it are data parallel with a replicated optimizer, one process is the same with one rank. All of them mean the same
by a precision: bf16 is bf16 weights, products and activations with fp32 master weights (which start from the bf16 ones),
fp32 gradient sums and fp32 moments; fp32 is fp32 throughout. The matrices that Muon trains, and its momentum, are shared out
among the ranks also where the rest of the optimizer is replicated.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.profiler import record_function

from recipe.config import Config, compiles
from recipe.distributed import Distributed
from recipe.gradient_sums import GradientSums
from recipe.host_memory import HostMemory
from recipe.kernels import choose_kernels, know_operators
from recipe.model import PretrainingModel
from recipe.optim.groups import ParameterGroup, make_optimizer, parameter_groups, set_hyperparameters
from recipe.optim.muon import SECOND_MOMENTS, initial_state
from recipe.optim.schedule import Hyperparameters
from recipe.plan import Plan

OPTIMIZER = "optimizer"
"""Name of the optimizer's part of a step in a profile."""


@dataclass
class StepResult:
    """What a step did, on the device, so that looking is the only thing that waits for it."""

    loss: torch.Tensor
    """Mean training loss of this rank's rows, nats per token, scalar."""
    grad_norm: torch.Tensor
    """Global gradient norm before clipping, scalar."""
    skipped: torch.Tensor
    """1 if the gradient was not finite, or made so for a loss above the limit, and nothing was updated, else 0; scalar."""
    limit: torch.Tensor | None = None
    """The loss above which the step counts as a spike, scalar; None if nobody looks for spikes."""

    def limit_or_inf(self) -> torch.Tensor:
        return torch.full_like(self.loss, float("inf")) if self.limit is None else self.limit


class Engine:
    """One optimizer step over this rank's part of the batch, and the training state by parameter name.

    Attributes:
        model: the PretrainingModel, in the precision of the run.
        optimizer: of torch, over this rank's part of the masters.
        compiled: whether torch.compile makes its forward.
    """

    def __init__(self, model: PretrainingModel, config: Config, plan: Plan, distributed: Distributed, precision: str):
        self.distributed, self.plan, self.precision = distributed, plan, precision
        self.max_grad_norm = config.max_grad_norm
        self.model = model
        model.use(choose_kernels(config, precision, distributed.device))
        self.parameter_groups = parameter_groups(model, config)
        self.compiled = compiles(config, distributed.cuda)
        if self.compiled:
            # A length of sequences is a graph of its own, and past the limit (8) torch would refuse to compile.
            lengths = len({length for length, _ in plan.sequence_ramp})
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 + 2 * lengths)
            know_operators()
            # Parameter names stay, the eager GPT2LMHeadModel inside stays usable for generation, and DeepSpeed's hooks,
            # which cannot be compiled, stay outside.
            model.forward = torch.compile(model.forward, dynamic=False, fullgraph=True)

    def train_step(
        self, micro_batches: Sequence[torch.Tensor], values: Hyperparameters, limit: torch.Tensor | None = None
    ) -> StepResult:
        """Forward and backward over micro-batches of rows [micro batch, sequence + 1], as many on every rank, then update.

        Args:
            limit: a loss, nats per token, scalar on the device: if the mean of all ranks' lies above it, nothing is updated.
        """
        raise NotImplementedError

    def _gate(self, loss: torch.Tensor, total: torch.Tensor, limit: torch.Tensor | None) -> torch.Tensor:
        """The loss of a step's last micro-batch, made NaN where `total`, the step's loss on this rank, lies above `limit` as a
        mean over the ranks: then the gradient is not finite, and the step is left out without a look from the host."""
        if limit is None:
            return loss
        mean = self.distributed.mean(total.detach().clone())
        return loss * torch.where(mean > limit, float("nan"), 1.0)

    def full_state(self, memory: HostMemory | None = None) -> dict[str, torch.Tensor]:
        """Masters and moments in fp32 on the CPU of rank 0 (empty elsewhere), the same under every engine and number of
        ranks: `model.NAME`; `exp_avg.NAME` and `exp_avg_sq.NAME` of AdamW's parameters, `momentum_buffer.NAME` of Muon's,
        with NAME as in GPT2LMHeadModel, and with NorMuon `second_momentum_buffer.NAME`, a value for each output; and AdamW's
        `step`. Collective.

        Args:
            memory: for its tensors, which overwrite those of an earlier full state there.
        """
        state = {}
        for kind, name, tensor in itertools.chain(self._full_tensors(), self._neuron_tensors()):
            if self.distributed.is_main:
                key = f"{kind}.{name.removeprefix('gpt2.')}"
                place = memory.tensor(key, tensor.shape) if memory else torch.empty(tensor.shape, dtype=torch.float32)
                state[key] = place.copy_(tensor, non_blocking=True)
        if self.distributed.is_main:
            state["step"] = self._optimizer_step().detach().cpu().float().reshape(1).clone()
        if self.distributed.cuda:
            torch.cuda.current_stream().synchronize()
        return state

    def load_full_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take over a `full_state`, given on every rank."""
        raise NotImplementedError

    def _neuron_tensors(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """NorMuon's second moments, each of which one rank has."""
        for group in self._normuon_groups():
            moments = self.optimizer.second_moments(group)
            if self.distributed.num_ranks > 1:
                dist.all_reduce(moments)  # with zeros: nothing is rounded
            for matrix, part in zip(group["matrices"], moments.split([m.neurons for m in group["matrices"]]), strict=True):
                yield SECOND_MOMENTS, matrix.name, part

    def _load_neuron_state(self, state: dict[str, torch.Tensor]) -> None:
        for group in self._normuon_groups():
            names = [matrix.name.removeprefix("gpt2.") for matrix in group["matrices"]]
            self.optimizer.load_second_moments(group, torch.cat([state[f"{SECOND_MOMENTS}.{name}"] for name in names]))

    def _normuon_groups(self) -> list[dict]:
        return [group for group in self.optimizer.param_groups if group["algorithm"] == "normuon"]

    def _full_tensors(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        raise NotImplementedError

    def _optimizer_step(self) -> torch.Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def losses(self, rows: torch.Tensor) -> torch.Tensor:
        """Losses of rows [batch, sequence + 1] without gradients: fp32 [batch, sequence]."""
        if self.compiled and self.model.kernels.head != "fp8":
            # The graph that trains, of which nothing is kept: compiling another takes 14 s before the first step. There is no
            # dropout, and only an fp8 head computes otherwise in training.
            with torch.enable_grad():
                return self.model(rows).detach()
        self.model.eval()
        losses = self.model(rows)
        self.model.train()
        return losses


def make_engine(model: PretrainingModel, config: Config, plan: Plan, distributed: Distributed, precision: str) -> Engine:
    """The engine that the accelerate file asks for."""
    if not distributed.deepspeed:
        return ReplicatedEngine(model, config, plan, distributed, precision)
    from recipe.zero1 import Zero1Engine

    return Zero1Engine(model, config, plan, distributed, precision)


class ReplicatedEngine(Engine):
    """One process, or data parallel with the whole of AdamW on each rank.

    Weights, masters and gradient sums of a group lie in one buffer each, so that a step is a handful of kernels and, over
    several ranks, a reduction of fp32 sums for each group. Of a group that Muon trains, a rank updates its slice.
    """

    def __init__(self, model: PretrainingModel, config: Config, plan: Plan, distributed: Distributed, precision: str):
        model.to(distributed.device, torch.bfloat16 if precision == "bf16" else torch.float32)
        super().__init__(model, config, plan, distributed, precision)
        self._groups = [_FlatGroup(group, distributed) for group in self.parameter_groups]
        self._sums = None
        if precision == "bf16":
            self._sums = GradientSums(
                (pair for group in self._groups for pair in group.parameters_and_sums), self.model.kernels.triton
            )
        options = [{"params": [flat.masters], **flat.group.options()} for flat in self._groups]
        self.optimizer = make_optimizer(options, config, precision, distributed.rank, distributed.num_ranks, distributed.cuda)
        for flat in self._groups:
            self.optimizer.state[flat.masters] = initial_state(flat.group.algorithm, flat.masters)

    def train_step(
        self, micro_batches: Sequence[torch.Tensor], values: Hyperparameters, limit: torch.Tensor | None = None
    ) -> StepResult:
        total = torch.zeros((), device=self.distributed.device)
        for number, rows in enumerate(micro_batches, 1):
            loss = self.model(rows).mean() / len(micro_batches)
            total += loss.detach()
            if number == len(micro_batches):
                loss = self._gate(loss, total, limit)
            loss.backward()
            if self._sums:
                self._sums.add()
        with record_function(OPTIMIZER):
            return self._update(total, values)

    def _update(self, loss: torch.Tensor, values: Hyperparameters) -> StepResult:
        for group in self._groups:
            self.distributed.mean(group.gradients)
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g.gradients) for g in self._groups]))
        if self.max_grad_norm:
            scale = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            for group in self._groups:
                group.gradients *= scale
        skipped = (~norm.isfinite()).float()
        # Fused AdamW leaves weights, moments and its step alone where found_inf is 1: no look from the host is needed.
        self.optimizer.found_inf = skipped
        set_hyperparameters(self.optimizer.param_groups, values)
        for group in self._groups:
            group.masters.grad = group.own(group.gradients)
        self.optimizer.step()
        for group in self._groups:
            group.masters_to_weights()
            group.gradients.zero_()
        return StepResult(loss, norm, skipped)

    def _full_tensors(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        for group in self._groups:
            moments = self.optimizer.state[group.masters]
            kinds = group.group.element_state
            for kind, own in (("model", group.masters), *((kind, moments[kind]) for kind in kinds)):
                for name, tensor in group.named_views(group.whole(own.detach())):
                    yield kind, name, tensor

    def _optimizer_step(self) -> torch.Tensor:
        return self.optimizer.state[self._groups[0].masters]["step"]

    @torch.no_grad()
    def load_full_state(self, state: dict[str, torch.Tensor]) -> None:
        for group in self._groups:
            moments = initial_state(group.group.algorithm, group.masters)
            for kind in ("model", *group.group.element_state):
                flat = torch.zeros_like(group.gradients)
                for name, tensor in group.named_views(flat):
                    tensor.copy_(state[f"{kind}.{name.removeprefix('gpt2.')}"])
                (group.masters if kind == "model" else moments[kind]).copy_(group.own(flat))
            if "step" in moments:
                moments["step"].copy_(state["step"].reshape(()))
            self.optimizer.state[group.masters] = moments
            group.masters_to_weights()
        self._load_neuron_state(state)


class _FlatGroup:
    """The parameters of a group in flat buffers: weights in the model's precision, masters and gradient sums in fp32.

    Where Muon trains them, they are padded to a multiple of the ranks and a rank has the masters of its slice only.
    """

    def __init__(self, group: ParameterGroup, distributed: Distributed):
        self.group, self.named = group, group.named
        self._sharded = group.algorithm != "adamw" and distributed.num_ranks > 1
        parts, part = (distributed.num_ranks, distributed.rank) if self._sharded else (1, 0)
        parameters = [p for _, p in self.named]
        weights = [p.detach().flatten() for p in parameters]
        self._size = sum(p.numel() for p in parameters)
        self.weights = torch.cat([*weights, weights[0].new_zeros(-self._size % parts)])
        if distributed.num_ranks > 1:
            dist.broadcast(self.weights, src=0)
        slice_size = self.weights.numel() // parts
        self._own = slice(part * slice_size, (part + 1) * slice_size)
        self.gradients = torch.zeros_like(self.weights, dtype=torch.float32)
        self._in_place = self.weights.dtype == torch.float32
        self.masters = self.own(self.weights) if self._in_place else self.own(self.weights).float()
        sums = [view for _, view in self.named_views(self.gradients)]
        self.parameters_and_sums = list(zip(parameters, sums, strict=True))
        for (_, view), gradient, p in zip(self.named_views(self.weights), sums, parameters, strict=True):
            p.data = view
            if self._in_place:
                p.grad = gradient  # backward adds straight into the sums

    def own(self, flat: torch.Tensor) -> torch.Tensor:
        """This rank's slice of a flat buffer: all of it where the optimizer is replicated."""
        return flat[self._own]

    def whole(self, own: torch.Tensor) -> torch.Tensor:
        """The flat buffer of which every rank gives its slice."""
        if not self._sharded:
            return own
        flat = torch.empty_like(self.weights, dtype=own.dtype)
        dist.all_gather_into_tensor(flat, own)
        return flat

    def named_views(self, flat: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """The parameters' parts of a flat buffer, in their shapes."""
        parts = flat[: self._size].split([p.numel() for _, p in self.named])
        for (name, p), part in zip(self.named, parts, strict=True):
            yield name, part.view_as(p)

    @torch.no_grad()
    def masters_to_weights(self) -> None:
        if not self._in_place:
            self.own(self.weights).copy_(self.masters)
        if self._sharded:
            dist.all_gather_into_tensor(self.weights, self.own(self.weights))
