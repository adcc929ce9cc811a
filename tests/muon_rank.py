"""A rank that trains a tiny GPT-2 with Muon, or what else VARIANTS names, through an engine of the project, and notes all that
test_muon_engines.py and test_variants.py ask.

    accelerate launch --config_file ... tests/muon_rank.py FOLDER PRECISION VARIANT

writes FOLDER/results.pt on rank 0. The rows are made here, so that the test can train on the same.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from recipe.config import Config  # noqa: E402
from recipe.distributed import Distributed  # noqa: E402
from recipe.engine import Engine, make_engine  # noqa: E402
from recipe.model import build_model  # noqa: E402
from recipe.optim import muon  # noqa: E402
from recipe.optim.schedule import hyperparameters  # noqa: E402
from recipe.plan import make_plan  # noqa: E402
from recipe.signals import leave  # noqa: E402

VOCABULARY, ROWS, STEPS, SAVED_STEP, LONG = 200, 16, 20, 10, 50

CONFIG = Config(
    n_layer=3,  # the middle one lies across the boundary of two slices
    n_head=2, n_embd=32, n_positions=32, sequence_length=32, batch_tokens=ROWS * 32, micro_batch_size=4, max_steps=LONG,
    optimizer="muon", learning_rate=2e-3, muon_learning_rate=0.02, muon_weight_decay=0.1, muon_momentum_warmup_steps=8,
    warmup_steps=5, schedule="linear", max_grad_norm=0.5, compile=False,
)  # fmt: skip

_ADAMW = {"embedding_learning_rate": 6e-3, "cautious_weight_decay": True, "weight_decay": 0.01}

VARIANTS = {
    "muon": CONFIG,
    # Decay so weak that an update which rounds to the other side of zero, and lets a weight decay or not, does not show.
    "adamw": replace(CONFIG, optimizer="adamw", **_ADAMW),
    "candidates": replace(
        CONFIG, muon_variant="normuon", muon_weight_decay=0.004, zero_init_projections=True, z_loss=1e-2, **_ADAMW
    ),
}


def rows_of(step: int) -> torch.Tensor:
    """The batch of a step: token ids [ROWS, 33] that walk through the vocabulary in steps a model can learn."""
    generator = torch.Generator().manual_seed(step)
    start = torch.randint(VOCABULARY, (ROWS, 1), generator=generator)
    strides = torch.randint(1, 4, (ROWS, 32), generator=generator)
    return torch.cat([start, start + strides.cumsum(1)], dim=1) % VOCABULARY


def train(engine: Engine, config: Config, first: int, last: int) -> dict[str, list[float]]:
    """Steps `first` to `last`; the global loss, norm and skipped flag of each."""
    distributed, plan = engine.distributed, engine.plan
    history: dict[str, list[float]] = {"loss": [], "norm": [], "skipped": []}
    for step in range(first, last):
        own = rows_of(step)[distributed.rank :: distributed.num_ranks].split(config.micro_batch_size)
        result = engine.train_step(own, hyperparameters(step, config, plan))
        history["loss"].append(float(distributed.mean(result.loss.clone())))
        history["norm"].append(float(result.grad_norm))
        history["skipped"].append(float(result.skipped))
    return history


def poison(engine: Engine):
    """Let the last rank's losses be NaN; returns the cure."""
    forward = engine.model.forward
    if engine.distributed.rank == engine.distributed.num_ranks - 1:
        engine.model.forward = lambda rows: forward(rows) * float("nan")
    return lambda: engine.model.__dict__.pop("forward", None)


def count_work(engine: Engine, config: Config, step: int) -> list[int]:
    """How many matrices each rank orthogonalises in a step."""
    work, original = np.zeros(engine.distributed.num_ranks, dtype=np.int64), muon.orthogonalize

    def count(matrices: torch.Tensor, table: tuple) -> torch.Tensor:
        work[engine.distributed.rank] += len(matrices)
        return original(matrices, table)

    muon.orthogonalize = count
    train(engine, config, step, step + 1)
    muon.orthogonalize = original
    return engine.distributed.sum(work).tolist()


def count_waits(engine: Engine, config: Config, first: int, last: int) -> int:
    """How often DeepSpeed waits for the device within steps."""
    from deepspeed.accelerator import get_accelerator

    waits: list[int] = []
    accelerator = get_accelerator()
    accelerator.synchronize = lambda *_: waits.append(1)
    train(engine, config, first, last)
    del accelerator.synchronize
    return len(waits)


def main(folder: Path, precision: str, variant: str) -> None:
    distributed = Distributed()
    torch.set_num_threads(1)  # two threads on a busy machine wait for each other more than they compute
    config = replace(VARIANTS[variant], precision=precision)
    plan = make_plan(config, distributed.num_ranks)
    engine = make_engine(build_model(config, VOCABULARY, 0), config, plan, distributed, precision)
    results: dict = {"engine": type(engine).__name__, "start": engine.full_state()}
    start = distributed.broadcast(results["start"])

    results["history"] = train(engine, config, 0, SAVED_STEP)
    results["saved"] = engine.full_state()
    for name, values in train(engine, config, SAVED_STEP, STEPS).items():
        results["history"][name] += values
    results["end"] = engine.full_state()

    # Back to the checkpoint, over what the later steps left.
    engine.load_full_state(distributed.broadcast(results["saved"]))
    results["loaded"] = engine.full_state()
    results["history_again"] = train(engine, config, SAVED_STEP, STEPS)
    results["end_again"] = engine.full_state()

    # A checkpoint of one process.
    if distributed.num_ranks > 1:
        engine.load_full_state(torch.load(folder.parent / f"cpu-{precision}-{variant}" / "results.pt")["saved"])
        results["loaded_other"] = engine.full_state()
        results["history_other"] = train(engine, config, SAVED_STEP, STEPS)

    # A gradient that is not finite on one rank.
    cure = poison(engine)
    results["before_poison"] = engine.full_state()
    results["history_poisoned"] = train(engine, config, 0, 1)
    results["after_poison"] = engine.full_state()
    cure()
    results["history_cured"] = train(engine, config, 0, 1)
    results["after_cure"] = engine.full_state()

    if variant == "muon":
        results["work"] = count_work(engine, config, 1)
        if distributed.deepspeed:
            results["waits"] = count_waits(engine, config, 1, 3)
        engine.load_full_state(start)
        engine.optimizer.ns_dtype = torch.bfloat16
        results["history_bf16"] = train(engine, config, 0, LONG)
    if distributed.is_main:
        torch.save(results, folder / "results.pt")
    distributed.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
    leave(0)
