"""Which kernels this machine trains with: chosen by what it has, unless the run says otherwise."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch

from recipe import cublaslt
from recipe.config import Config, ConfigError
from recipe.loss import Head


@dataclass(frozen=True)
class Kernels:
    """How the parts of the model that matter for speed are computed."""

    blocks: bool = False
    """Blocks by cuBLASLt and Triton (recipe/block.py); by torch otherwise."""
    head: Head = "plain"
    """The head's loss (recipe/loss.py)."""

    @property
    def triton(self) -> bool:
        """Whether Triton is there and wanted."""
        return self.head != "plain"

    def __str__(self) -> str:
        blocks = "cuBLASLt products with GELU inside, Triton passes" if self.blocks else "torch's products"
        head = {"plain": "torch's cross-entropy", "fused": "Triton cross-entropy", "fp8": "fp8 head, Triton cross-entropy"}
        return f"{blocks}, {head[self.head]}"


def choose_kernels(config: Config, precision: str, device: torch.device) -> Kernels:
    """The fastest kernels that the device has, or what `kernels` and `fp8_head` ask for.

    Raises:
        ConfigError: if the device hasn't what they ask for.
    """
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
    triton = device.type == "cuda" and importlib.util.find_spec("triton") is not None
    if config.fp8_head and (config.kernels == "plain" or not triton or precision != "bf16" or capability < (8, 9)):
        raise ConfigError(
            f"fp8_head: needs bf16, Triton, kernels other than plain and a GPU with fp8 (Ada, Hopper or newer); this is "
            f"{precision} on {name}; leave it out"
        )
    if config.kernels == "fused" and not triton:
        raise ConfigError(f"kernels: fused needs a GPU and Triton; this is {name}; leave it at auto")
    if config.kernels == "plain" or not triton:
        return Kernels()
    # On GPUs before Hopper a GELU in the product's epilogue costs more than it saves, says llm.c, which leaves it off there.
    blocks = precision == "bf16" and capability >= (9, 0) and cublaslt.available(device)
    return Kernels(blocks, "fp8" if config.fp8_head else "fused")


def know_operators() -> None:
    """Tell torch's compiler to call our operators as they are. It would find that out by itself, but torch 2.11 then writes
    down, for a message that nobody reads, what an operator's inputs were computed from, once for each path that leads there:
    behind a chain of operators that takes for ever (https://github.com/vllm-project/vllm/pull/42129)."""
    from torch._inductor import lowering

    # 2.13 writes it down only when asked to, so that nothing is lost where the list is gone.
    known = getattr(lowering, "FALLBACK_ALLOW_LIST", set())
    known.update(name.split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("recipe::"))
