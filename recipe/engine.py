"""How a step is computed on this machine: DeepSpeed ZeRO-1, data parallel, or one process; GPU or CPU.

The only file that knows which. The accelerate file decides: `distributed_type: DEEPSPEED` is ZeRO-1, several processes
without it are data parallel with a replicated optimizer, one process is the same with one rank. All of them mean the same
by a precision: bf16 is bf16 weights, products and activations with fp32 master weights (which start from the bf16 ones),
fp32 gradient sums and fp32 moments; fp32 is fp32 throughout. The matrices that Muon trains, and its momentum, are shared out
among the ranks also where the rest of the optimizer is replicated.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from recipe.config import Config, ConfigError
from recipe.model import PretrainingModel
from recipe.optim.groups import ParameterGroup, make_optimizer, parameter_groups, set_hyperparameters, state_kinds
from recipe.optim.muon import STATE_KINDS, initial_state
from recipe.optim.schedule import Hyperparameters
from recipe.plan import Plan

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""After this long a rank that waits for the others gives up."""


@dataclass
class StepResult:
    """What a step did, on the device, so that looking is the only thing that waits for it."""

    loss: torch.Tensor
    """Mean training loss of this rank's rows, nats per token, scalar."""
    grad_norm: torch.Tensor
    """Global gradient norm before clipping, scalar."""
    skipped: torch.Tensor
    """1 if the gradient was not finite and nothing was updated, else 0; scalar."""


class Distributed:
    """The processes of the run: who I am, and what we tell each other."""

    def __init__(self):
        # DeepSpeed calls collectives by names that newer torch deprecates.
        warnings.filterwarnings("ignore", message=".*is deprecated. Please use.*", category=FutureWarning)
        self.cuda = torch.cuda.is_available()
        self.deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
        if not self.cuda:
            # DeepSpeed picks its accelerator when it is imported.
            os.environ["DS_ACCELERATOR"] = "cpu"
            local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))
        from accelerate import PartialState

        # On a CPU the group must exist before the Accelerator, which otherwise takes every DeepSpeed process for rank 0.
        state = PartialState(cpu=not self.cuda, timeout=COLLECTIVE_TIMEOUT)
        self.rank, self.num_ranks, self.device = state.process_index, state.num_processes, state.device
        if self.deepspeed and not dist.is_initialized():
            # ZeRO-1 in one process that no launcher started.
            dist.init_process_group("nccl" if self.cuda else "gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
        self._cpu_group = dist.new_group(backend="gloo") if self.num_ranks > 1 and self.cuda else None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: np.ndarray) -> np.ndarray:
        """The element-wise sum of every rank's int64 array, on the CPU."""
        if self.num_ranks == 1:
            return values
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        dist.all_reduce(tensor, group=self._cpu_group)
        return tensor.numpy()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return bool(self.sum(np.array([int(flag)], dtype=np.int64))[0])

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank. Only our own ranks talk here, so unpickling is safe."""
        if self.num_ranks == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._cpu_group)
        return box[0]

    def on_main(self, function, *arguments) -> Any:
        """Run a function on rank 0 and give its result, or its error, to every rank."""
        result, error = None, None
        if self.is_main:
            try:
                result = function(*arguments)
            except Exception as caught:
                error = caught
        result, error = self.broadcast((result, error))
        if error is not None:
            raise error
        return result

    def on_each_node(self, function) -> None:
        """Run a function on the first rank of each node, however long it takes; its error is raised on every rank."""
        first = int(os.environ.get("LOCAL_RANK", "0")) == 0
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(function) if first else None
            # Waiting in one collective would end with its time-out, in a long download.
            while self.any(future is not None and not future.done()):
                time.sleep(0.2)
        error = future.exception() if future else None
        failed = np.zeros(self.num_ranks, dtype=np.int64)
        failed[self.rank] = error is not None
        failed = np.flatnonzero(self.sum(failed))
        if len(failed) and self.num_ranks > 1:
            box = [error]
            dist.broadcast_object_list(box, src=int(failed[0]), group=self._cpu_group)
            error = box[0]
        if error is not None:
            raise error

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean of every rank's tensor, on the device."""
        if self.num_ranks > 1:
            dist.all_reduce(values)
            values /= self.num_ranks
        return values

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.any(False)

    def close(self) -> None:
        """Leave the group; what follows is each rank's own."""
        if dist.is_initialized():
            dist.destroy_process_group()


def resolve_precision(precision: str, cuda: bool) -> str:
    """`auto` made concrete: bf16 where the hardware multiplies it, else fp32.

    Raises:
        ConfigError: for bf16 on a GPU that has none.
    """
    if cuda:
        has_bf16 = torch.cuda.get_device_capability()[0] >= 8
        if precision == "bf16" and not has_bf16:
            raise ConfigError(f"precision: {torch.cuda.get_device_name()} has no bf16; use --precision fp32")
    else:
        has_bf16 = torch.cpu._is_avx512_bf16_supported()
    return precision if precision != "auto" else "bf16" if has_bf16 else "fp32"


class Engine:
    """One optimizer step over this rank's part of the batch, and the training state by parameter name.

    Attributes:
        model: the PretrainingModel, in the precision of the run.
    """

    def __init__(self, model: PretrainingModel, config: Config, plan: Plan, distributed: Distributed, precision: str):
        self.distributed, self.plan, self.precision = distributed, plan, precision
        self.max_grad_norm = config.max_grad_norm
        self.model = model
        self.parameter_groups = parameter_groups(model, config)
        compiled = config.compile if config.compile is not None else distributed.cuda
        if compiled:
            # In place: parameter names stay, and the eager GPT2LMHeadModel inside stays usable for generation.
            model.compile(dynamic=False)

    def train_step(self, micro_batches: Sequence[torch.Tensor], values: Hyperparameters) -> StepResult:
        """Forward and backward over micro-batches of rows [micro batch, sequence + 1], as many on every rank, then update."""
        raise NotImplementedError

    def full_state(self) -> dict[str, torch.Tensor]:
        """Masters and moments in fp32 on the CPU of rank 0 (empty elsewhere), the same under every engine and number of
        ranks: `model.NAME`; `exp_avg.NAME` and `exp_avg_sq.NAME` of AdamW's parameters, `momentum_buffer.NAME` of Muon's,
        with NAME as in GPT2LMHeadModel; and AdamW's `step`. Collective."""
        state = {}
        for kind, name, tensor in self._full_tensors():
            if self.distributed.is_main:
                state[f"{kind}.{name.removeprefix('gpt2.')}"] = tensor.float().cpu().clone()
        if self.distributed.is_main:
            state["step"] = self._optimizer_step().detach().cpu().float().reshape(1).clone()
        return state

    def load_full_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take over a `full_state`, given on every rank."""
        raise NotImplementedError

    def _full_tensors(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        raise NotImplementedError

    def _optimizer_step(self) -> torch.Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def losses(self, rows: torch.Tensor) -> torch.Tensor:
        """Losses of rows [batch, sequence + 1] without gradients: fp32 [batch, sequence]."""
        self.model.eval()
        losses = self.model(rows)
        self.model.train()
        return losses


def make_engine(model: PretrainingModel, config: Config, plan: Plan, distributed: Distributed, precision: str) -> Engine:
    """The engine that the accelerate file asks for."""
    kind = Zero1Engine if distributed.deepspeed else ReplicatedEngine
    return kind(model, config, plan, distributed, precision)


class ReplicatedEngine(Engine):
    """One process, or data parallel with the whole of AdamW on each rank.

    Weights, masters and gradient sums of a group lie in one buffer each, so that a step is a handful of kernels and, over
    several ranks, a reduction of fp32 sums for each group. Of a group that Muon trains, a rank updates its slice.
    """

    def __init__(self, model: PretrainingModel, config: Config, plan: Plan, distributed: Distributed, precision: str):
        model.to(distributed.device, torch.bfloat16 if precision == "bf16" else torch.float32)
        super().__init__(model, config, plan, distributed, precision)
        self._groups = [_FlatGroup(group, distributed) for group in self.parameter_groups]
        options = [{"params": [flat.masters], **flat.group.options()} for flat in self._groups]
        self.optimizer = make_optimizer(options, config, precision, distributed.rank, distributed.num_ranks, distributed.cuda)
        for flat in self._groups:
            self.optimizer.state[flat.masters] = initial_state(flat.group.algorithm, flat.masters)

    def train_step(self, micro_batches: Sequence[torch.Tensor], values: Hyperparameters) -> StepResult:
        total = torch.zeros((), device=self.distributed.device)
        for rows in micro_batches:
            loss = self.model(rows).mean() / len(micro_batches)
            loss.backward()
            total += loss.detach()
            for group in self._groups:
                group.accumulate()
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
        return StepResult(total, norm, skipped)

    def _full_tensors(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        for group in self._groups:
            moments = self.optimizer.state[group.masters]
            kinds = STATE_KINDS[group.group.algorithm]
            for kind, own in (("model", group.masters), *((kind, moments[kind]) for kind in kinds)):
                for name, tensor in group.named_views(group.whole(own.detach())):
                    yield kind, name, tensor

    def _optimizer_step(self) -> torch.Tensor:
        return self.optimizer.state[self._groups[0].masters]["step"]

    @torch.no_grad()
    def load_full_state(self, state: dict[str, torch.Tensor]) -> None:
        for group in self._groups:
            moments = initial_state(group.group.algorithm, group.masters)
            for kind in ("model", *STATE_KINDS[group.group.algorithm]):
                flat = torch.zeros_like(group.gradients)
                for name, tensor in group.named_views(flat):
                    tensor.copy_(state[f"{kind}.{name.removeprefix('gpt2.')}"])
                (group.masters if kind == "model" else moments[kind]).copy_(group.own(flat))
            if "step" in moments:
                moments["step"].copy_(state["step"].reshape(()))
            self.optimizer.state[group.masters] = moments
            group.masters_to_weights()


class _FlatGroup:
    """The parameters of a group in flat buffers: weights in the model's precision, masters and gradient sums in fp32.

    Where Muon trains them, they are padded to a multiple of the ranks and a rank has the masters of its slice only.
    """

    def __init__(self, group: ParameterGroup, distributed: Distributed):
        self.group, self.named = group, group.named
        self._sharded = group.algorithm == "muon" and distributed.num_ranks > 1
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
        self._gradient_views = [view for _, view in self.named_views(self.gradients)]
        for (_, view), gradient, p in zip(self.named_views(self.weights), self._gradient_views, parameters, strict=True):
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
    def accumulate(self) -> None:
        """Add the bf16 gradients of a backward to the fp32 sums and drop them."""
        if self._in_place:
            return
        torch._foreach_add_(self._gradient_views, [p.grad for _, p in self.named])
        for _, p in self.named:
            p.grad = None

    @torch.no_grad()
    def masters_to_weights(self) -> None:
        if not self._in_place:
            self.own(self.weights).copy_(self.masters)
        if self._sharded:
            dist.all_gather_into_tensor(self.weights, self.own(self.weights))


class Zero1Engine(Engine):
    """DeepSpeed ZeRO-1 through Accelerate: each rank keeps the masters and moments of its part of the weights."""

    def __init__(self, model: PretrainingModel, config: Config, plan: Plan, distributed: Distributed, precision: str):
        super().__init__(model, config, plan, distributed, precision)
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        import deepspeed
        from accelerate import Accelerator
        from accelerate.utils import DeepSpeedPlugin

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        if not distributed.cuda:
            # Without this DeepSpeed compiles a shared-memory all-reduce for CPUs at its first use, which takes a minute
            # and a C++ compiler and races between the ranks. gloo does the same work.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # Precision, accumulation and clipping are the run's, not the machine's: what the launcher put into the environment
        # beside the choice of DeepSpeed itself would be refused next to a whole configuration.
        overridden = ("ACCELERATE_DEEPSPEED_", "ACCELERATE_CONFIG_DS_", "ACCELERATE_MIXED_")
        for name in [n for n in os.environ if n.startswith(overridden)]:
            del os.environ[name]
        plugin = DeepSpeedPlugin(hf_ds_config=deepspeed_config(config, plan, precision))
        self.accelerator = Accelerator(deepspeed_plugin=plugin, gradient_accumulation_steps=plan.accumulation)
        options = [{"params": [p for _, p in group.named], **group.options()} for group in self.parameter_groups]
        optimizer = make_optimizer(options, config, precision, distributed.rank, distributed.num_ranks, distributed.cuda)
        self._state_kinds = state_kinds(self.parameter_groups)
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints memory tables past its logger
            self.engine, _ = self.accelerator.prepare(model, optimizer)
        # DeepSpeed links parameters to their moments at the first step of the first group, when those of the second do
        # not exist yet under fp32. With moments from the start, every group is linked.
        base = self.engine.optimizer.optimizer
        for masters, group in zip(self._flat_masters(), self.parameter_groups, strict=True):
            base.state[masters] = initial_state(group.algorithm, masters)
        self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def train_step(self, micro_batches: Sequence[torch.Tensor], values: Hyperparameters) -> StepResult:
        total = torch.zeros((), device=self.distributed.device)
        set_hyperparameters(self.engine.optimizer.param_groups, values)
        if len(micro_batches) != self.engine.gradient_accumulation_steps():
            rows_per_micro_step = self.engine.train_micro_batch_size_per_gpu() * self.distributed.num_ranks
            self.engine.set_train_batch_size(len(micro_batches) * rows_per_micro_step)
            self.engine.micro_steps = 0  # of which DeepSpeed takes the remainder, to know the last of a step
        skipped_before = self.engine.skipped_steps
        for rows in micro_batches:
            loss = self.engine(rows).mean()
            self.engine.backward(loss)
            self.engine.step()
            total += loss.detach() / len(micro_batches)
        norm = torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32, device=total.device)
        skipped = torch.tensor(float(self.engine.skipped_steps - skipped_before), device=total.device)
        return StepResult(total, norm, skipped)

    def _flat_masters(self) -> list[torch.Tensor]:
        # Two optimizers of DeepSpeed, by precision, with a name each for the same thing.
        optimizer = self.engine.optimizer
        return getattr(optimizer, "fp32_groups_flat_partition", None) or optimizer.single_partition_of_fp32_groups

    def _full_tensors(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        for name, p in self.model.named_parameters():
            yield "model", name, safe_get_full_fp32_param(p)
            for kind in self._state_kinds[name]:
                yield kind, name, safe_get_full_optimizer_state(p, kind)

    def _optimizer_step(self) -> torch.Tensor:
        return self.engine.optimizer.optimizer.state[self._flat_masters()[0]]["step"]

    @torch.no_grad()
    def load_full_state(self, state: dict[str, torch.Tensor]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        for masters in self._flat_masters():
            moments = self.engine.optimizer.optimizer.state[masters]
            if "step" in moments:
                moments["step"].copy_(state["step"].reshape(()))
        for full_name, p in self.model.named_parameters():
            name = full_name.removeprefix("gpt2.")
            safe_set_full_fp32_param(p, state[f"model.{name}"])
            for kind in self._state_kinds[full_name]:
                safe_set_full_optimizer_state(p, state[f"{kind}.{name}"], kind)
            p.data.copy_(state[f"model.{name}"])


def deepspeed_config(config: Config, plan: Plan, precision: str) -> dict[str, Any]:
    """DeepSpeed's JSON for the run, with integers throughout: DeepSpeed would make 1 of a missing accumulation."""
    result: dict[str, Any] = {
        "train_batch_size": plan.rows_per_step,
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": config.max_grad_norm,
        "zero_optimization": {
            "stage": 1,
            # "auto" would be hidden^2, 589,824 elements for 124M: hundreds of small reductions.
            "reduce_bucket_size": 500_000_000,
            "allgather_bucket_size": 500_000_000,
            "overlap_comm": False,
        },
        "communication_data_type": "fp32",
        # torch.optim.AdamW, which DeepSpeed calls untested because it is not DeepSpeed's own.
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }
    if precision == "bf16":
        result["bf16"] = {"enabled": True}
        result["data_types"] = {"grad_accum_dtype": "fp32"}
    return result
