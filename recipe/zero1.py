"""DeepSpeed ZeRO-1 through Accelerate."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import record_function

from recipe.config import Config
from recipe.distributed import Distributed
from recipe.engine import OPTIMIZER, Engine, StepResult
from recipe.estimate import BUCKET
from recipe.gradient_sums import GradientSums
from recipe.model import PretrainingModel
from recipe.optim.groups import make_optimizer, set_hyperparameters
from recipe.optim.muon import initial_state
from recipe.optim.schedule import Hyperparameters
from recipe.plan import Plan


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
        self._element_state = {name: group.element_state for group in self.parameter_groups for name, _ in group.named}
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints memory tables past its logger
            self.engine, _ = self.accelerator.prepare(model, optimizer)
        # DeepSpeed links parameters to their moments at the first step of the first group, when those of the second do
        # not exist yet under fp32. With moments from the start, every group is linked.
        self.optimizer = self.engine.optimizer.optimizer
        for masters, group in zip(self._flat_masters(), self.parameter_groups, strict=True):
            self.optimizer.state[masters] = initial_state(group.algorithm, masters)
        self.engine.optimizer._lazy_init_hp_params_optimizer_state()
        if precision == "bf16":
            # DeepSpeed copies and adds one gradient after another, and zeroes them for the next backward to add to.
            sharded = self.engine.optimizer
            groups = zip(sharded.bf16_groups, sharded.fp32_groups_gradients, strict=True)
            sums = GradientSums((pair for group in groups for pair in zip(*group, strict=True)), model.kernels.triton)
            sharded.update_hp_grads = lambda clear_lp_grads=False: sums.add()
            self.engine.buffered_allreduce_fallback = self._reduce
            sharded.step = self._update

    def train_step(
        self, micro_batches: Sequence[torch.Tensor], values: Hyperparameters, limit: torch.Tensor | None = None
    ) -> StepResult:
        total = torch.zeros((), device=self.distributed.device)
        set_hyperparameters(self.engine.optimizer.param_groups, values)
        if len(micro_batches) != self.engine.gradient_accumulation_steps():
            rows_per_micro_step = self.engine.train_micro_batch_size_per_gpu() * self.distributed.num_ranks
            self.engine.set_train_batch_size(len(micro_batches) * rows_per_micro_step)
            self.engine.micro_steps = 0  # of which DeepSpeed takes the remainder, to know the last of a step
        skipped_before = self.engine.skipped_steps
        for rows in micro_batches:
            loss = self.engine(rows).mean()
            total += loss.detach() / len(micro_batches)
            if self.engine.is_gradient_accumulation_boundary():
                loss = self._gate(loss, total, limit)
            self.engine.backward(loss)
            with record_function(OPTIMIZER) if self.engine.is_gradient_accumulation_boundary() else contextlib.nullcontext():
                self.engine.step()
        if self.precision == "bf16":
            norm, skipped = self.engine.get_global_grad_norm(), self._skipped
        else:
            norm = torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32, device=total.device)
            skipped = torch.tensor(float(self.engine.skipped_steps - skipped_before), device=total.device)
        return StepResult(total, norm, skipped)

    @torch.no_grad()
    def _reduce(self, **_: Any) -> None:
        """Take the place of DeepSpeed's all-reduce, which copies all gradients into a bucket and back, on one rank too, and
        moves twice what is needed: here a rank gets the mean of its own part, in place. The rest of its sums is void."""
        if self.distributed.num_ranks > 1:
            optimizer = self.engine.optimizer
            for flat, own in zip(
                optimizer.fp32_groups_gradients_flat, optimizer.fp32_groups_gradient_flat_partition, strict=True
            ):
                dist.reduce_scatter_tensor(own, flat)
                own /= self.distributed.num_ranks

    @torch.no_grad()
    def _update(self) -> None:
        """Take the place of BF16_Optimizer.step, which looks at the gradient's norm from the host, parameter by parameter, and
        lets the device wait for that: 4% of a 124M step on an H100 (docs/results.md). The arithmetic is the same."""
        optimizer = self.engine.optimizer
        own = optimizer.fp32_groups_gradient_flat_partition
        squares = torch.stack([torch.linalg.vector_norm(part) for part in own]).square().sum()
        if self.distributed.num_ranks > 1:
            dist.all_reduce(squares)
        norm = squares.sqrt()
        if self.max_grad_norm:
            torch._foreach_mul_(own, (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        for masters, gradient in zip(optimizer.fp32_groups_flat_partition, own, strict=True):
            masters.grad = gradient
        # Fused AdamW and Muon leave everything alone where found_inf is 1.
        optimizer.optimizer.found_inf = self._skipped = (~norm.isfinite()).float()
        optimizer.optimizer.step()
        optimizer.update_lp_params()
        optimizer._global_grad_norm = norm

    def _flat_masters(self) -> list[torch.Tensor]:
        # Two optimizers of DeepSpeed, by precision, with a name each for the same thing.
        optimizer = self.engine.optimizer
        return getattr(optimizer, "fp32_groups_flat_partition", None) or optimizer.single_partition_of_fp32_groups

    def _full_tensors(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        for name, p in self.model.named_parameters():
            yield "model", name, safe_get_full_fp32_param(p)
            for kind in self._element_state[name]:
                yield kind, name, safe_get_full_optimizer_state(p, kind)

    def _optimizer_step(self) -> torch.Tensor:
        return self.optimizer.state[self._flat_masters()[0]]["step"]

    @torch.no_grad()
    def load_full_state(self, state: dict[str, torch.Tensor]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        for masters in self._flat_masters():
            moments = self.optimizer.state[masters]
            if "step" in moments:
                moments["step"].copy_(state["step"].reshape(()))
        for full_name, p in self.model.named_parameters():
            name = full_name.removeprefix("gpt2.")
            safe_set_full_fp32_param(p, state[f"model.{name}"])
            for kind in self._element_state[full_name]:
                safe_set_full_optimizer_state(p, state[f"{kind}.{name}"], kind)
            p.data.copy_(state[f"model.{name}"])
        self._load_neuron_state(state)


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
            "reduce_bucket_size": BUCKET,
            "allgather_bucket_size": BUCKET,
            "overlap_comm": False,
        },
        "communication_data_type": "fp32",
        # torch.optim.AdamW, which DeepSpeed calls untested because it is not DeepSpeed's own.
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
        # On by default, and it waits for the device before every micro-step: 3 ms of idling each on an H100.
        "timers": {"throughput": {"enabled": False}},
    }
    if precision == "bf16":
        result["bf16"] = {"enabled": True}
        result["data_types"] = {"grad_accum_dtype": "fp32"}
    return result
