"""What a run needs and costs on a machine that has not been rented yet: memory, time, money. Imports no torch.

Speeds are measured where docs/results.md has a measurement, and marked as estimates everywhere else.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from recipe.config import FINEWEB, INSTALLED_DOCS, Config, ConfigError, parse_ramp
from recipe.data.sources import file_format, is_local, local_text_files
from recipe.gpus import GPUS, Gpu
from recipe.plan import (
    GPT2_VOCAB_SIZE,
    Plan,
    count_parameters,
    flops_of_run,
    flops_per_token,
    make_plan,
    padded_vocab_size,
)

if TYPE_CHECKING:
    from recipe.micro_batch import Fit

GIB = 2**30
NODE = 8
"""GPUs of one machine."""
USABLE_MEMORY = 0.93
"""Of a card's memory; the rest is CUDA's context, the caching allocator's gaps and NCCL's buffers."""
BUCKET = 500_000_000
"""Gradients that DeepSpeed exchanges at a time in fp32 (recipe/zero1.py); in bf16 they are exchanged where they lie."""
ACTIVATIONS, PLAIN_ACTIVATIONS = 16, 28
"""Numbers that a layer keeps for the backward pass, a token and unit of width: compiled or by our kernels, and by torch's."""


MEASURED = {
    ("H100-80GB", 12, 768): 570_600,
    ("H100-80GB", 24, 1024): 221_600,
    ("H200-141GB", 12, 768): 590_400,
    ("H200-141GB", 24, 1024): 219_300,
}
"""Tokens/s of one GPU under ZeRO-1 with AdamW, by GPU, n_layer and n_embd, of whole steps of 524,288 tokens, through
pretrain.py or scripts/benchmark.py (docs/results.md)."""

MEASURED_MACHINES = {("H200-141GB", 12, 768, 2): 1_158_800, ("H200-141GB", 12, 768, 4): 2_321_500}
"""Tokens/s of several GPUs of one host under ZeRO-1 with AdamW, by GPU, n_layer, n_embd and GPUs, of whole steps of 524,288
tokens, by scripts/scaling.py (docs/results.md); recipe/scaling.py computes the others."""

SIZES = {"124M": (12, 12, 768), "350M": (24, 16, 1024), "774M": (36, 20, 1280), "1558M": (48, 25, 1600)}
"""n_layer, n_head and n_embd of GPT-2's sizes (Radford et al. 2019)."""

FINEWEB_BYTES_PER_TOKEN = 27.6e9 / 10_371_489_838
"""Of FineWeb's sample-10BT as parquet: its size by its dataset card, over its GPT-2 tokens."""

FINEWEB_TOKENS = 10_371_489_838 + 14_868_862
"""Of that sample: GPT-2's, and an end of text for each document."""

BYTES_PER_TOKEN = {"parquet": 2.7, "txt": 4.4, "jsonl": 4.8, "jsonl.gz": 1.9}
"""Of English files, about, by format (recipe/data/sources.py)."""

SCALING_FIT = (1.8172, 482.01, 0.3478, 2085.43, 0.3658)
"""E, A, alpha, B, beta of loss = E + A / N^alpha + B / D^beta (Besiroglu et al. 2024, a refit of Hoffmann et al. 2022). On
other text and another tokenizer: it ranks runs, its values are not those of FineWeb."""
FIT_SOURCE = "the scaling fit of Besiroglu et al. 2024 (of other text with another tokenizer: it ranks)"


@dataclass(frozen=True)
class Machine:
    """Equal GPUs that train together."""

    name: str
    gpu: Gpu
    gpus: int
    gpu_name: str

    @property
    def usable(self) -> float:
        """Bytes of each GPU that the training may fill."""
        return USABLE_MEMORY * self.gpu.memory * GIB


def parse_machine(name: str) -> Machine:
    """`8xA100-80GB`, or `A100-80GB` for one.

    Raises:
        ConfigError: for a machine that is not in the table.
    """
    match = re.fullmatch(r"(?:(\d+)x)?(.+)", name)
    if not match or match[2] not in GPUS or match[1] == "0":
        raise ConfigError(f"machine: {name} is not COUNTxGPU with GPU one of {', '.join(GPUS)}; 8xA100-80GB is")
    return Machine(name, GPUS[match[2]], int(match[1] or 1), match[2])


def memory_by_part(
    config: Config, ranks: int, vocab_size: int = GPT2_VOCAB_SIZE, precision: str = "bf16", plain: bool = False
) -> dict[str, int]:
    """Bytes on each device at the peak: when the loss has been computed and nothing was let go.

    A layer keeps 16 numbers a token for each of its width: two LayerNorms' outputs (1 + 1), q, k and v (3), the attention's
    output (1), the sums after attention and MLP (1 + 1), and the GELU's input and output (4 + 4). With activation
    checkpointing only its input (1) and, while one layer is computed again, what that layer keeps.

    Args:
        ranks: that share masters and moments, as under ZeRO-1; 1 where each rank has them all.
        plain: torch's own kernels, not compiled: GELU keeps three intermediates more, 4 numbers each, and the head fp32
            logits, their softmax and the gradient, of which the z-loss has one of its own. (An fp8 head keeps its gradient
            twice, a byte each, beside the logits.)
    """
    padded = padded_vocab_size(vocab_size)
    parameters = count_parameters(config, padded)
    tokens = config.micro_batch_size * config.sequence_length
    size = 2 if precision == "bf16" else 4
    # In fp32 the masters are the weights, and gradients are summed where they lie.
    copies = {"weights": 2, "gradients": 2, "gradient sums": 4} if precision == "bf16" else {"weights": 4, "gradient sums": 4}
    masters = 4 if precision == "bf16" else 0
    kept = PLAIN_ACTIVATIONS if plain else ACTIVATIONS
    layers = config.n_layer + kept if config.activation_checkpointing else kept * config.n_layer
    memory = {
        **{part: copy * parameters for part, copy in copies.items()},
        "masters": masters * parameters // ranks,
        "moments": _moment_bytes(config, parameters) // ranks,
        "activations": layers * size * config.n_embd * tokens,
        "logits": (12 + 4 * bool(config.z_loss) if plain else size + 2 * config.fp8_head) * padded * tokens,
    }
    # Buckets are filled when the activations are gone, and need memory of their own only beyond those.
    bucket = 4 * min(BUCKET, parameters) if ranks > 1 and precision == "fp32" else 0
    return memory | {"buckets": max(0, bucket - memory["activations"] - memory["logits"])}


def _moment_bytes(config: Config, parameters: int) -> int:
    """Two fp32 moments of each parameter; Muon has one of the blocks' matrices."""
    saved = 4 * 12 * config.n_layer * config.n_embd**2 if config.optimizer == "muon" else 0
    return 8 * parameters - saved


def micro_batches(config: Config, ranks: int) -> list[int]:
    """The rows of a micro-batch that divide the batch and those of its ramp over `ranks`, largest first."""
    batches = [config.batch_tokens, *(tokens for tokens, _ in parse_ramp(config.batch_ramp))]
    rows, rest = divmod(math.gcd(*batches), config.sequence_length * ranks)
    return [n for n in range(rows, 0, -1) if rows % n == 0] if not rest else []


def largest_micro_batch(config: Config, machine: Machine, vocab_size: int = GPT2_VOCAB_SIZE) -> int | None:
    """The largest power of two of rows that fits the memory and divides the batch; None if not even one row does."""
    found = _fit(replace(config, micro_batch_size=None), machine, vocab_size)
    return found.micro_batch_size if found else None


def _fit(config: Config, machine: Machine, vocab_size: int) -> Fit | None:
    """What the machine's cards hold: with the micro batch of the config if it divides and fits, else the largest that does."""
    from recipe.micro_batch import fit  # which is built on memory_by_part

    if machine.gpu.cores:
        twice = bool(config.activation_checkpointing)  # never by itself, see micro_batch.resolve
        config = replace(config, precision="fp32", kernels="plain", compile=False, activation_checkpointing=twice)
    given = config.micro_batch_size
    if given and config.batch_tokens % (given * config.sequence_length * machine.gpus) == 0:
        found = fit(config, machine.gpus, machine.gpu.memory * GIB, vocab_size)
        if found:
            return found
    if config.batch_tokens % (config.sequence_length * machine.gpus):
        return None
    return fit(replace(config, micro_batch_size=None), machine.gpus, machine.gpu.memory * GIB, vocab_size)


def _memory(config: Config, machine: Machine, vocab_size: int) -> dict[str, int]:
    on_cpu = bool(machine.gpu.cores)
    return memory_by_part(config, machine.gpus, vocab_size, precision="fp32" if on_cpu else "bf16", plain=on_cpu)


def tokens_per_second(config: Config, machine: Machine, vocab_size: int = GPT2_VOCAB_SIZE) -> tuple[float, bool]:
    """Tokens/s of the machine, and whether that was measured, on this very machine with such steps.

    By recipe/scaling.py where that of so many GPUs was not; with the micro batch of the config, or one row.
    """
    from recipe.scaling import MEASURED_LENGTH, MEASURED_STEP, gpu_speed, step_time  # which takes the GPUs from here

    _, measured = gpu_speed(config, machine, vocab_size)
    measured &= config.batch_tokens == MEASURED_STEP and config.sequence_length == MEASURED_LENGTH and not config.sequence_ramp
    measured &= config.optimizer == "adamw" and not (config.activation_checkpointing or config.fp8_head)
    speed = MEASURED_MACHINES.get((machine.gpu_name, config.n_layer, config.n_embd, machine.gpus))
    if measured and speed:
        return speed, True
    return config.batch_tokens / step_time(config, machine, vocab_size).total, measured and machine.gpus == 1


@dataclass(frozen=True)
class Estimate:
    """What a run amounts to on a machine."""

    machine: str
    parameters: int
    micro_batch_size: int | None
    """Rows; None if the model does not fit."""
    accumulation: int | None
    activation_checkpointing: bool
    memory: dict[str, int] | None
    """Bytes on each GPU by part."""
    memory_total: int | None
    fits: bool
    tokens_per_second: float
    measured: bool
    basis: str
    """Where the speed comes from."""
    mfu: float
    tokens_per_step: int
    """After the ramp."""
    steps: int
    tokens: int
    data_tokens: int | None
    """Of one pass over the text, as far as that is known."""
    epochs: float | None
    """Passes over the text."""
    flops: float
    hours: float
    dollars: float | None
    checkpoint_bytes: int
    """Of each: fp32 masters and moments."""
    disk_bytes: int
    """Of all that the run keeps at a time, one being written and the export included."""
    download_bytes: float
    """If the text is FineWeb's and comes from the Hub."""
    download_bytes_per_second: float
    """While training."""

    def as_dict(self) -> dict:
        return asdict(self)


def estimate(
    config: Config, machine: Machine, price_per_hour: float | None = None, vocab_size: int = GPT2_VOCAB_SIZE
) -> Estimate:
    """The run on the machine, with the micro batch of the config if it fits and divides, else the largest that does.

    Args:
        price_per_hour: dollars for the whole machine.
    """
    found = _fit(config, machine, vocab_size)
    chosen, memory = None, None
    if found:
        chosen = found.micro_batch_size
        config = replace(config, micro_batch_size=chosen, activation_checkpointing=found.activation_checkpointing)
        memory = _memory(config, machine, vocab_size)
    total = sum(memory.values()) if memory else None
    speed, measured = tokens_per_second(config, machine, vocab_size)  # with the rows that fit
    parameters = count_parameters(config, vocab_size)
    plan, text = _plan(config), data_tokens(config)
    tokens = plan.total_tokens
    flops = flops_per_token(config, vocab_size)
    hours = tokens / speed / 3600
    state = 4 * parameters + _moment_bytes(config, parameters)
    if measured:
        basis = "measured"
    elif (machine.gpu_name, config.n_layer, config.n_embd) in MEASURED:
        basis = "estimate: one GPU measured with AdamW, 524,288 tokens a step in rows of 1,024, the rest computed"
    else:
        basis = f"estimate: MFU {machine.gpu.mfu:.2f}, {machine.gpu.why}"
    return Estimate(
        machine=machine.name,
        parameters=parameters,
        micro_batch_size=chosen,
        accumulation=config.batch_tokens // (chosen * config.sequence_length * machine.gpus) if chosen else None,
        activation_checkpointing=bool(found and found.activation_checkpointing),
        memory=memory,
        memory_total=total,
        fits=found is not None,
        tokens_per_second=speed,
        measured=measured,
        basis=basis,
        mfu=speed * flops / (machine.gpu.peak * machine.gpus),
        tokens_per_step=plan.tokens_per_step,
        steps=plan.max_steps,
        tokens=tokens,
        data_tokens=text,
        # How much of the text other rows leave out depends on its documents; --dry_run looks at them.
        epochs=tokens / text if text and config.packing == "stream" else None,
        flops=flops_of_run(config, plan, vocab_size),
        hours=hours,
        dollars=hours * price_per_hour if price_per_hour is not None else None,
        checkpoint_bytes=state,
        disk_bytes=(config.keep_checkpoints + 1) * state + 4 * parameters,
        download_bytes=tokens * FINEWEB_BYTES_PER_TOKEN,
        download_bytes_per_second=speed * FINEWEB_BYTES_PER_TOKEN,
    )


def data_tokens(config: Config) -> int | None:
    """Tokens of one pass over `data`, if that can be told without reading it: FineWeb's sample and prepared folders; about, of
    local text by its size; None for the rest."""
    if config.data.split("@")[0] == FINEWEB.split("@")[0]:
        return FINEWEB_TOKENS
    if config.data == INSTALLED_DOCS or not is_local(config.data):
        return None
    from recipe.data.token_index import UNIT_COLUMNS, is_prepared, read_index

    if is_prepared(config.data):
        column = UNIT_COLUMNS.index("tokens")
        return sum(unit[column] for unit in read_index(Path(config.data).expanduser(), "data")["units"])
    found = sum(os.path.getsize(file) / BYTES_PER_TOKEN[file_format(file)] for file in local_text_files(config.data))
    return int(found) or None


def _plan(config: Config) -> Plan:
    # Steps and tokens do not depend on the number of ranks.
    return make_plan(replace(config, micro_batch_size=1), 1)


def with_size(config: Config, size: str) -> Config:
    """The run with the shape of another of GPT-2's sizes."""
    n_layer, n_head, n_embd = SIZES[size]
    return replace(config, n_layer=n_layer, n_head=n_head, n_embd=n_embd)


def best_within(
    config: Config, machine: Machine, hours: float, price_per_hour: float | None
) -> list[tuple[str, Estimate, float]]:
    """For each size that fits the machine, the run that lasts `hours`, with its loss by SCALING_FIT; best first."""
    found = []
    for size in SIZES:
        sized = with_size(config, size)
        speed, _ = tokens_per_second(sized, machine)
        steps = math.floor(hours * 3600 * speed / sized.batch_tokens)
        warmup = sized.warmup_steps if sized.warmup_steps < 1 else min(sized.warmup_steps, steps // 10)
        if steps < 1:
            continue
        sized = replace(sized, max_tokens=None, max_steps=steps, warmup_steps=warmup, batch_ramp=None, sequence_ramp=None)
        run = estimate(sized, machine, price_per_hour)
        if run.fits:
            found.append((size, run, predicted_loss(run.parameters, run.tokens)))
    return sorted(found, key=lambda item: item[2])


def predicted_loss(parameters: int, tokens: int) -> float:
    """SCALING_FIT's loss, nats a token of its own text and tokenizer."""
    floor, a, alpha, b, beta = SCALING_FIT
    return floor + a / parameters**alpha + b / tokens**beta
