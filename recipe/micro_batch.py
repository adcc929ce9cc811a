"""Rows a rank takes at a time, and whether it computes activations twice, where the run leaves that open.

Both follow from the memory estimate of recipe/estimate.py and the card's memory, before anything is allocated: never from
trying until it crashes.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from recipe.config import Config, ConfigError, parse_ramp
from recipe.estimate import GIB, USABLE_MEMORY, memory_by_part
from recipe.plan import GPT2_VOCAB_SIZE

MOST_TOKENS = 131_072
"""Tokens of the largest micro-steps whose speed was measured, 1 to 2% above that of half as many (docs/results.md)."""
ENOUGH_TOKENS = 4096
"""Assumed: shorter micro-steps leave a GPU idle by more than computing the activations twice costs, a third more work."""
CPU_ROWS = 8
UNKNOWN_VOCAB_SIZE = 2**18
"""Of a tokenizer that has not been read; few are larger."""


@dataclass(frozen=True)
class Card:
    """The smallest of the GPUs."""

    memory: int
    """Bytes."""
    bf16: bool = True
    """Whether it multiplies bf16."""


@dataclass(frozen=True)
class Fit:
    """What a card holds."""

    micro_batch_size: int
    """Rows."""
    activation_checkpointing: bool
    memory: int
    """Bytes at the peak, estimated."""


def fit(config: Config, ranks: int, card: int, vocab_size: int = GPT2_VOCAB_SIZE, zero1: bool = True) -> Fit | None:
    """The micro batch for a card, and whether activations are computed twice; what the config gives is kept.

    Args:
        card: its memory, bytes.
        zero1: whether the ranks share out masters and moments.
    Returns:
        None if not even one row fits, or the micro batch that the config gives does not.
    """
    choices = [config.micro_batch_size] if config.micro_batch_size else _choices(config, ranks)
    limit = USABLE_MEMORY * card

    def largest(checkpointing: bool) -> Fit | None:
        for rows in reversed(choices):
            trial = replace(config, micro_batch_size=rows, activation_checkpointing=checkpointing)
            memory = _memory(trial, ranks if zero1 else 1, vocab_size)
            if memory <= limit:
                return Fit(rows, checkpointing, memory)
        return None

    if config.activation_checkpointing is not None:
        return largest(config.activation_checkpointing)
    plain = largest(False)
    if plain and plain.micro_batch_size * config.sequence_length >= min(ENOUGH_TOKENS, choices[-1] * config.sequence_length):
        return plain
    twice = largest(True)
    return twice if plain is None or twice and twice.micro_batch_size > plain.micro_batch_size else plain


def resolve(config: Config, ranks: int, card: Card | None) -> Config:
    """The run with its micro batch and activation checkpointing settled; batch_tokens must be divisible already.

    Args:
        card: None on a CPU.
    Raises:
        ConfigError: if not even one row fits.
    """
    if card is None:
        rows = config.micro_batch_size or max(n for n in _choices(config, ranks) if n <= CPU_ROWS)
        return replace(config, micro_batch_size=rows, activation_checkpointing=bool(config.activation_checkpointing))
    vocab_size, settled = _vocab_size(config), config
    if config.precision == "auto" and not card.bf16:
        config = replace(config, precision="fp32")
    zero1 = under_zero1()
    found = fit(config, ranks, card.memory, vocab_size, zero1)
    if found is None and config.micro_batch_size is None:
        least = replace(config, micro_batch_size=1, activation_checkpointing=config.activation_checkpointing is not False)
        needed = _memory(least, ranks if zero1 else 1, vocab_size) / GIB
        raise ConfigError(
            f"micro_batch_size: one row takes {needed:.1f} GiB of memory, of which a card has "
            f"{USABLE_MEMORY * card.memory / GIB:.1f} to use; take a larger card, more of them under "
            "ZeRO-1, or a smaller model (scripts/plan.py --table shows what fits)"
        )
    if found is None:
        # It was asked for: the estimate may be wrong, and then the best chance is the smallest footprint.
        return replace(settled, activation_checkpointing=config.activation_checkpointing is not False)
    return replace(settled, micro_batch_size=found.micro_batch_size, activation_checkpointing=found.activation_checkpointing)


def count_gpus() -> int:
    """That this process may use. Loads torch only where there may be one, and makes no context on any."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "" or not (shutil.which("nvidia-smi") or os.path.exists("/dev/nvidiactl")):
        return 0
    import torch

    return torch.cuda.device_count()


def find_card() -> Card | None:
    """The smallest GPU that this process may use; None without one. Loads torch only where there is one."""
    if not count_gpus():
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    # Before the first look at a card, or every rank of the node would keep a context on the first one.
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return Card(min(card.total_memory for card in cards), all(card.major >= 8 for card in cards))


def check_alike(settled: list[tuple[int, bool]]) -> None:
    """Whether every rank has settled for the same rows and the same way with activations.

    Raises:
        ConfigError: if the nodes' cards differ.
    """
    if len(set(settled)) > 1:
        rows = min(rows for rows, _ in settled)
        twice = str(any(twice for _, twice in settled)).lower()
        raise ConfigError(
            f"micro_batch_size: the cards differ in memory; give --micro_batch_size {rows} --activation_checkpointing {twice}, "
            "which fits all of them"
        )


def predicted_memory(config: Config, ranks: int, vocab_size: int) -> float:
    """GiB on each card at the peak, of a run that `resolve` has settled."""
    return _memory(config, ranks if under_zero1() else 1, vocab_size) / GIB


def under_zero1() -> bool:
    """Whether this process was launched with a DeepSpeed file."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def _choices(config: Config, ranks: int) -> list[int]:
    """Powers of two of rows that divide what a rank takes of every batch, up to MOST_TOKENS; 1 at least."""
    tokens = math.gcd(config.batch_tokens, *(tokens for tokens, _ in parse_ramp(config.batch_ramp)))
    rows = tokens // (config.sequence_length * ranks)
    return [1] + [n for n in (2**k for k in range(1, 31)) if rows % n == 0 and n * config.sequence_length <= MOST_TOKENS]


def _memory(config: Config, shards: int, vocab_size: int) -> int:
    precision = "fp32" if config.precision == "fp32" else "bf16"
    # Of torch's kernels and of what is not compiled the one that takes more, where it is either.
    plain = config.kernels == "plain" or config.compile is False
    return sum(memory_by_part(config, shards, vocab_size, precision, plain).values())


def _vocab_size(config: Config) -> int:
    from recipe.data.token_index import is_prepared, read_index  # which imports numpy; plan.py must stay quick

    if is_prepared(config.data):
        return read_index(Path(config.data).expanduser(), "data")["vocab_size"]
    if config.tokenizer.startswith("train:"):
        return int(config.tokenizer.removeprefix("train:"))
    in_folder = _vocab_size_in(Path(config.tokenizer))
    return in_folder or (GPT2_VOCAB_SIZE if config.tokenizer.endswith("gpt2") else UNKNOWN_VOCAB_SIZE)


def _vocab_size_in(folder: Path) -> int | None:
    """Tokens of a tokenizer's files as JSON, transformers not being loaded yet; None if they cannot be read like that, which is
    for the tokenizer's own loading to report."""
    try:
        if (folder / "tokenizer.json").is_file():
            contents = json.loads((folder / "tokenizer.json").read_bytes())
            return len({*contents["model"]["vocab"], *(token["content"] for token in contents["added_tokens"])})
        return len(json.loads((folder / "vocab.json").read_bytes()))
    except (OSError, ValueError, LookupError, TypeError):
        return None
