"""A rank that takes two steps of a tiny GPT-2 and counts the bytes that it gives to collectives and gets from them.

    accelerate launch --config_file ... tests/scaling_rank.py FILE OPTIMIZER

writes FILE on rank 0: the bytes of the second step, by collective.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from recipe.config import Config  # noqa: E402
from recipe.distributed import Distributed  # noqa: E402
from recipe.engine import make_engine  # noqa: E402
from recipe.model import build_model  # noqa: E402
from recipe.optim.schedule import hyperparameters  # noqa: E402
from recipe.plan import make_plan  # noqa: E402
from recipe.signals import leave  # noqa: E402

VOCABULARY = 500
CONFIG = Config(
    n_layer=3, n_head=2, n_embd=64, n_positions=32, sequence_length=32, batch_tokens=16 * 32, micro_batch_size=4, max_steps=4,
    warmup_steps=1, compile=False,
)  # fmt: skip

counted: Counter[str] = Counter()


def size(tensors: object) -> int:
    tensors = tensors if isinstance(tensors, list | tuple) else [tensors]
    return sum(tensor.nbytes for tensor in tensors)


def count(name: str, position: int, keyword: str) -> None:
    """Let a collective note the bytes of one of its arguments."""
    original = getattr(dist, name)

    def counting(*args, **kwargs):
        counted[name] += size(kwargs[keyword] if keyword in kwargs else args[position])
        return original(*args, **kwargs)

    setattr(dist, name, counting)


if __name__ == "__main__":
    path, optimizer = sys.argv[1:]
    # Before DeepSpeed takes some of them over.
    for name, position, keyword in (
        ("all_reduce", 0, "tensor"), ("reduce", 0, "tensor"), ("broadcast", 0, "tensor"), ("reduce_scatter_tensor", 1, "input"),
        ("all_gather_into_tensor", 0, "output_tensor"), ("all_gather", 0, "tensor_list"), ("all_to_all_single", 0, "output"),
    ):  # fmt: skip
        count(name, position, keyword)
    CONFIG.optimizer = optimizer
    distributed = Distributed()
    plan = make_plan(CONFIG, distributed.num_ranks)
    engine = make_engine(build_model(CONFIG, VOCABULARY, 0), CONFIG, plan, distributed, "bf16")
    own = torch.arange(16 * 33).view(16, 33)[distributed.rank :: distributed.num_ranks] % VOCABULARY
    for step in range(2):
        counted.clear()
        engine.train_step(own.split(CONFIG.micro_batch_size), hyperparameters(step, CONFIG, plan))
    if distributed.is_main:
        Path(path).write_text(json.dumps(counted))
    distributed.close()
    leave(0)
