"""What a token costs as the GPUs grow: a step taken apart into what one GPU computes and what all of them exchange.

The parts: a GPU's speed, measured on one H100 and one H200, and what a step costs however few tokens it has, measured on the
H100 (docs/results.md); the bytes that the ranks reduce and gather, counted on two ranks (tests/test_scaling.py); rates of the
links, from data sheets. Of several GPUs two and four H200s have been measured, where 124M reached 98.5% and, on three hosts,
98.9%, 97.1% and 98.3% of so many times one card's speed and this says 99.7% and 98.9%: cards wait for the slowest one. Not in
the model: that, a network shared with others, slow storage. Imports no torch.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass, replace

from recipe.config import Config, ConfigError
from recipe.estimate import MEASURED, NODE, Machine, parse_machine
from recipe.plan import GPT2_VOCAB_SIZE, count_parameters, flops_per_token, make_plan, padded_vocab_size

MEASURED_STEP, MEASURED_LENGTH = 524_288, 1024
"""Tokens of the steps, and of their rows, at which a GPU's speed was measured."""
FIXED_SECONDS, OPTIMIZER_SECONDS = 0.7e-3, 2.5e-3
"""Of each step, 124M on an H100, whatever its tokens: in the first 50 s of two runs 118.1 ms for 65,536 tokens and 922.2 ms for
524,288 leave 3.2 ms for none (2.0 to 4.4, by the seconds compared: a card slows as it warms), and of those 2.5 ms are AdamW's,
clipping's and the casts', by a profile, which ZeRO-1 divides. Taken to grow with the parameters."""
FIXED_PARAMETERS = 124_439_808
MUON_SECONDS = 5.2e-3
"""What a step of 124M takes longer with Muon, measured on one H100 at 65,536 tokens: 123.1 ms instead of 117.9. Taken to grow
as the products of its matrices do, and to be divided as the matrices are."""
MUON_PRODUCTS = 12 * 768**3
"""n_layer times n_embd cubed of that model."""
KERNELS_A_LAYER, LAUNCH_SECONDS = 30, 5e-6
"""Assumed: kernels of a compiled layer, forward and backward, and what each takes the host; a bound where rows are few."""
HOP_SECONDS = 20e-6
"""Assumed: latency of a collective for each doubling of the ranks."""
COLLECTIVES = 3
"""Of a kind in a step, at most: one for each group of parameters that are trained alike (recipe/optim/groups.py)."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step by part, nothing overlapping."""

    computing: float
    """Forward and backward of a rank's rows."""
    fixed: float
    """What does not depend on the tokens: the host's work, the gradients' norm."""
    optimizer: float
    """The rank's part of it."""
    reducing: float
    """Reduce-scatter of the fp32 gradients."""
    gathering: float
    """All-gather of the bf16 weights."""

    @property
    def total(self) -> float:
        return self.computing + self.fixed + self.optimizer + self.reducing + self.gathering


def exchanged_bytes(config: Config, ranks: int, vocab_size: int = GPT2_VOCAB_SIZE) -> tuple[int, int]:
    """Bytes that a rank gives to the reduction of a step and gets by gathering, in bf16 under ZeRO-1: fp32 gradients and bf16
    weights, whatever the batch."""
    if ranks == 1:
        return 0, 0
    parameters = count_parameters(config, padded_vocab_size(vocab_size))
    return 4 * parameters, 2 * parameters


def gpu_speed(config: Config, machine: Machine, vocab_size: int = GPT2_VOCAB_SIZE) -> tuple[float, bool]:
    """Tokens/s of one GPU with AdamW in steps of MEASURED_STEP tokens, and whether that comes from a measurement."""
    flops = flops_per_token(config, vocab_size)
    if measured := MEASURED.get((machine.gpu_name, config.n_layer, config.n_embd)):
        # Longer rows have more of the attention, at the same MFU.
        return measured * (flops_per_token(config, vocab_size, MEASURED_LENGTH) / flops), True
    return machine.gpu.mfu * machine.gpu.peak / flops, False


def step_time(config: Config, machine: Machine, vocab_size: int = GPT2_VOCAB_SIZE) -> StepTime:
    """A step of the run with its micro batch; without one, of rows enough."""
    ranks, parameters = machine.gpus, count_parameters(config, vocab_size)
    scale = parameters / FIXED_PARAMETERS
    fixed, optimizer = FIXED_SECONDS * scale, OPTIMIZER_SECONDS * scale
    rate, _ = gpu_speed(config, machine, vocab_size)
    a_token = (MEASURED_STEP / rate - fixed - optimizer) / MEASURED_STEP
    if config.optimizer == "muon":
        optimizer += MUON_SECONDS * config.n_layer * config.n_embd**3 / MUON_PRODUCTS
    if config.activation_checkpointing:
        # The blocks' forward once more, a third of what the blocks take forward and backward.
        a_token *= 1 + (1 - 6 * vocab_size * config.n_embd / flops_per_token(config, vocab_size)) / 3
    tokens = config.batch_tokens / ranks
    computing = tokens * a_token
    if config.micro_batch_size:
        micro_steps = tokens / (config.micro_batch_size * config.sequence_length)
        computing = max(computing, micro_steps * config.n_layer * KERNELS_A_LAYER * LAUNCH_SECONDS)
    reduced, gathered = exchanged_bytes(config, ranks, vocab_size)
    link, share = machine.gpu.bus if ranks <= NODE else machine.gpu.network, (ranks - 1) / ranks
    latency = COLLECTIVES * HOP_SECONDS * math.log2(ranks)
    return StepTime(
        computing=computing,
        fixed=fixed,
        optimizer=optimizer / ranks,
        # Around a ring every byte passes each link once.
        reducing=share * reduced / link + latency,
        gathering=share * gathered / link + latency,
    )


@dataclass(frozen=True)
class Growth:
    """A run on some number of GPUs."""

    gpus: int
    micro_batch_size: int | None = None
    seconds: StepTime | None = None
    """Of a step."""
    tokens_per_second: float | None = None
    cost: float | None = None
    """Of a token, against that on one GPU, or on the fewest that hold the model."""
    problem: str | None = None
    """Why there is none, and what would work."""


def grow(config: Config, gpu_name: str, counts: tuple[int, ...]) -> list[Growth]:
    """The run on each number of GPUs of a kind, with the micro batch that its memory and its share of the batch allow."""
    from recipe.micro_batch import fit  # which is built on the estimate, and that on this

    found: list[Growth] = []
    first: float | None = None
    for gpus in sorted({1, *counts}):
        machine = parse_machine(f"{gpus}x{gpu_name}")
        free = replace(config, micro_batch_size=None)
        try:
            make_plan(free, gpus)
        except ConfigError as error:
            found.append(Growth(gpus, problem="; ".join(error.problems)))
            continue
        held = fit(free, gpus, machine.gpu.memory * 2**30)
        if held is None:
            found.append(Growth(gpus, problem="does not fit"))
            continue
        settled = replace(free, micro_batch_size=held.micro_batch_size, activation_checkpointing=held.activation_checkpointing)
        seconds = step_time(settled, machine)
        cost = seconds.total * gpus / config.batch_tokens
        first = first or cost
        found.append(Growth(gpus, held.micro_batch_size, seconds, config.batch_tokens / seconds.total, cost / first))
    return [growth for growth in found if growth.gpus in counts]


def growth_lines(config: Config, gpu_name: str, counts: tuple[int, ...]) -> list[str]:
    """`grow` for people."""
    names = "computing, fixed, optimizer, reducing, gathering"
    lines = [f"{'GPUs':>6}{'rows':>6}{'tokens/s':>14}{'step ms':>10}  {names:50}cost of a token"]
    for one in grow(config, gpu_name, counts):
        if one.seconds is None:
            lines.append(f"{one.gpus:>6}  {one.problem}")
            continue
        parts = ", ".join(f"{1000 * part:.1f}" for part in astuple(one.seconds))
        step = f"{1000 * one.seconds.total:>10.1f}  {parts:50}"
        lines.append(f"{one.gpus:>6}{one.micro_batch_size:>6}{one.tokens_per_second:>14,.0f}{step}x {one.cost:.2f}")
    return lines
