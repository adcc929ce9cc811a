"""Which parameter is trained by which algorithm, and the optimizer of the run."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn

from recipe.config import Config
from recipe.optim.cautious import CautiousAdamW
from recipe.optim.muon import ELEMENT_STATE, SECOND_MOMENTS, MuonAdamW
from recipe.optim.orthogonalize import coefficients
from recipe.optim.schedule import Hyperparameters
from recipe.optim.sharing import BlockMatrix


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that are trained alike."""

    named: list[tuple[str, nn.Parameter]]
    weight_decay: float
    algorithm: str = "adamw"
    """adamw, muon or normuon."""
    rate: str = "learning_rate"
    """Which of the Hyperparameters is its learning rate."""
    cautious: bool = False
    """Whether weights decay only where the update shrinks them as well."""

    def options(self) -> dict:
        """The keys of the optimizer's group beside its parameters."""
        options = {"weight_decay": self.weight_decay, "algorithm": self.algorithm, "rate": self.rate}
        if self.cautious:
            options |= {"weight_decay": 0.0, "cautious_decay": self.weight_decay}
        if self.algorithm != "adamw":
            options["matrices"] = [_block_matrix(name, p) for name, p in self.named]
        return options

    @property
    def element_state(self) -> tuple[str, ...]:
        """What the optimizer remembers for each element: the moments of AdamW, or the momentum of Muon."""
        return ELEMENT_STATE[self.algorithm]

    @property
    def neuron_state(self) -> tuple[str, ...]:
        """What it remembers for each neuron: NorMuon's second moments."""
        return (SECOND_MOMENTS,) if self.algorithm == "normuon" else ()


def parameter_groups(model: nn.Module, config: Config) -> list[ParameterGroup]:
    """AdamW: what has two dimensions with decay, biases and LayerNorms without. Muon takes the blocks' matrices out of the
    first; embeddings, positions and vectors stay with AdamW. Embeddings with a rate of their own are a group of their own."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    vectors = [(n, p) for n, p in named if p.dim() < 2]
    matrices = [(n, p) for n, p in named if p.dim() >= 2]
    cautious = config.cautious_weight_decay
    if config.optimizer == "adamw" and config.embedding_learning_rate is None:
        return [ParameterGroup(matrices, config.weight_decay, cautious=cautious), ParameterGroup(vectors, 0.0)]
    in_blocks = [(n, p) for n, p in matrices if re.search(r"transformer\.h\.\d+\.", n)]
    tables = [(n, p) for n, p in matrices if not re.search(r"transformer\.h\.\d+\.", n)]
    if config.optimizer == "adamw":
        blocks = ParameterGroup(in_blocks, config.weight_decay, cautious=cautious)
    else:
        blocks = ParameterGroup(in_blocks, config.muon_weight_decay, config.muon_variant, "muon_learning_rate", cautious)
    return [
        ParameterGroup(tables, config.weight_decay, rate="embedding_learning_rate", cautious=cautious),
        ParameterGroup(vectors, 0.0),
        blocks,
    ]


def _block_matrix(name: str, parameter: nn.Parameter) -> BlockMatrix:
    inputs, outputs = parameter.shape  # transformers' Conv1D multiplies from the left
    parts = 3 if name.endswith("attn.c_attn.weight") else 1
    return BlockMatrix(name, inputs, outputs // parts, parts)


def make_optimizer(
    groups: list[dict], config: Config, precision: str, rank: int, num_ranks: int, cuda: bool
) -> torch.optim.Optimizer:
    """The optimizer of the run.

    Args:
        groups: for each ParameterGroup its `options` and `params`: for Muon this rank's slice of the flat parameters (or
            what ZeRO-1 will replace by that), for AdamW what this rank is to update.
    """
    keywords = {
        "lr": config.learning_rate, "betas": (config.beta1, config.beta2), "eps": config.epsilon, "fused": True
    }  # fmt: skip
    if config.optimizer == "adamw":
        return (CautiousAdamW if config.cautious_weight_decay else torch.optim.AdamW)(groups, **keywords)
    # A CPU has no fast bf16 products worth the loss of digits, nor has an fp32 run asked for any.
    automatic = "bf16" if cuda and precision == "bf16" else "fp32"
    ns_dtype = automatic if config.muon_ns_dtype == "auto" else config.muon_ns_dtype
    table = coefficients(config.muon_polynomial, config.muon_ns_steps)
    return MuonAdamW(groups, table, torch.bfloat16 if ns_dtype == "bf16" else torch.float32, rank, num_ranks, **keywords)


def set_hyperparameters(optimizer_groups: list[dict], values: Hyperparameters) -> None:
    """Give the optimizer's groups the values of a step."""
    for group in optimizer_groups:
        group["lr"] = getattr(values, group["rate"])
        if group["algorithm"] != "adamw":
            group["momentum"] = values.muon_momentum


def state_kinds(groups: list[ParameterGroup]) -> dict[str, tuple[str, ...]]:
    """What the optimizer remembers of each parameter, by name."""
    return {name: group.element_state + group.neuron_state for group in groups for name, _ in group.named}
