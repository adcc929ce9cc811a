"""The random generators of every rank, as tensors in a checkpoint.

Training draws nothing at random after the weights are made; what is added to it later, or by a user, continues as well.
"""

from __future__ import annotations

import random

import numpy as np
import torch

from recipe.distributed import Distributed


def gather_rng(distributed: Distributed) -> dict[str, torch.Tensor]:
    """The state of each rank's generators by `rank0.torch`, `rank0.numpy`, `rank0.python` and `rank0.cuda`. Collective."""
    ranks = distributed.gather(_own_state(distributed))
    return {f"rank{rank}.{name}": part for rank, own in enumerate(ranks) for name, part in own.items()}


def restore_rng(state: dict[str, torch.Tensor], distributed: Distributed) -> bool:
    """Set this rank's generators; whether the state had this rank's (it has not on more ranks or other hardware)."""
    prefix = f"rank{distributed.rank}."
    own = {name.removeprefix(prefix): part for name, part in state.items() if name.startswith(prefix)}
    expected = _own_state(distributed)
    if own.keys() != expected.keys() or any(own[name].numel() != expected[name].numel() for name in own):
        return False
    torch.set_rng_state(own["torch"].byte())
    if "cuda" in own:
        torch.cuda.set_rng_state(own["cuda"].byte())
    position, *keys = own["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, 0, 0.0))
    random.setstate((3, tuple(own["python"].tolist()), None))
    return True


def _own_state(distributed: Distributed) -> dict[str, torch.Tensor]:
    _, keys, position, *_ = np.random.get_state()
    state = {
        "torch": torch.get_rng_state().long(),
        "numpy": torch.tensor([position, *keys.tolist()]),
        "python": torch.tensor(random.getstate()[1]),
    }
    if distributed.cuda:
        state["cuda"] = torch.cuda.get_rng_state().long()
    return state
