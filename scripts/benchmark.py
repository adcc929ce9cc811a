"""Measure the recipe on this machine, on real text.

    python scripts/benchmark.py loader configs/gpt2-124m.yaml [--field value ...] [--seconds 20] [--json]
    python scripts/benchmark.py model  configs/gpt2-124m.yaml [--field value ...] [--steps 50] [--json]
    accelerate launch --config_file configs/accelerate/1gpu.yaml \
        scripts/benchmark.py step configs/gpt2-124m.yaml [--field value ...] [--steps 100] [--json]
    accelerate launch ... scripts/benchmark.py losses configs/gpt2-124m.yaml --batch_tokens 65536 [--steps 200] [--json]
    python scripts/benchmark.py parity configs/gpt2-124m.yaml --batch_tokens 16384 --micro_batch_size 16 [--steps 300] [--json]

loader: tokens/s from the text (raw or prepared) to finished rows, as one rank, and the time to the first batch.
model:  forward and backward of one micro-batch, and a profile of it.
step:   whole optimizer steps, data included, under the engine of the accelerate file, and a profile of one.
parity: losses of the fast path against transformers' own attention and loss, on the same rows; with --json each step's.
losses: training losses of --steps steps by this engine and number of ranks, to be compared with another's (scripts/scaling.py).
"""

import json
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not scripts/, where evaluate.py would hide the package evaluate
os.environ.setdefault("HF_HUB_DISABLE_UPDATE_CHECK", "1")

from recipe.signals import leave


def take_option(words: list[str], name: str, default: str) -> str:
    """Remove `--name VALUE` from the words and give the value."""
    if name not in words:
        return default
    index = words.index(name)
    value = words[index + 1] if index + 1 < len(words) else ""
    del words[index : index + 2]
    return value


def print_table(result: dict) -> None:
    """The figures a line each, then where the device's time goes."""
    parts, kernels, paths, exchanges = (result.pop(name, None) for name in ("parts", "kernels", "paths", "communication"))
    if paths:
        del result["losses"]  # of every path at every step: for --json
    for name, value in result.items():
        print(f"{name:24} {value:,.3f}" if isinstance(value, float) else f"{name:24} {'n/a' if value is None else value}")
    for name, difference in (paths or {}).items():
        print(f"{name}: " + ", ".join(f"{key} {value:.5g}" for key, value in difference.items()))
    for rank, exchange in enumerate(exchanges or []):
        every = exchange["all"]
        print(f"rank {rank}: communication {every['ms']:.2f} ms, of which {every['exposed_ms']:.2f} with nothing computed")
    if parts:
        total = sum(parts.values())
        print("\npart                         ms   share")
        for name, ms in sorted(parts.items(), key=lambda part: -part[1]):
            print(f"{name:20} {ms:10.2f} {ms / total:7.1%}")
        print("\nkernel                       ms   calls")
        for ms, calls, name in kernels[:20]:
            print(f"{ms:31.2f} {calls:7}  {name[:80]}")


def main(words: list[str]) -> int:
    kind = words[0] if words else ""
    if kind not in ("loader", "model", "step", "losses", "parity") or {"-h", "--help"} & set(words):
        print(__doc__.strip())
        return 0 if {"-h", "--help"} & set(words) else 2
    words = words[1:]
    as_json = "--json" in words
    words = [word for word in words if word != "--json"]
    seconds, steps = float(take_option(words, "--seconds", "20")), int(take_option(words, "--steps", "50"))

    from recipe.benchmark import benchmark_loader, benchmark_training
    from recipe.config import ConfigError
    from recipe.data.corpus import DataError
    from recipe.distributed import Distributed
    from recipe.parity import compare_paths, training_losses
    from recipe.plan import load_run

    try:
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        config, plan = load_run(words, ranks)
        if kind == "loader":
            main_rank, result = True, benchmark_loader(config, plan, seconds)
        else:
            distributed = Distributed()
            main_rank = distributed.is_main
            if kind == "parity":
                result = compare_paths(config, plan, distributed, steps)
            elif kind == "losses":
                result = training_losses(config, plan, distributed, steps)
            else:
                result = benchmark_training(config, plan, distributed, steps, whole=kind == "step")
            distributed.close()
    except (ConfigError, DataError) as error:
        print(error, file=sys.stderr)
        return 2
    if main_rank and as_json:
        print(json.dumps(result))
    elif main_rank:
        print_table(result)
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
