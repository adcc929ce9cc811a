"""What a run amounts to, computed from its configuration alone: parameters, steps, tokens, FLOPs. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from recipe.config import Config, ConfigError, parse_ramp
from recipe.data.sources import check_data_exists
from recipe.evaluation.items import local_files
from recipe.monitor.trackers import tracker_problems
from recipe.parsing import parse_config

GPT2_VOCAB_SIZE = 50_257
VOCAB_MULTIPLE = 128
"""The vocabulary is padded to a multiple of this: 50,257 becomes 50,304, which the matrix units like better."""


@dataclass(frozen=True)
class Plan:
    """Derived numbers of a run."""

    num_processes: int
    """Ranks."""
    tokens_per_step: int
    """Tokens an optimizer step, after the ramp."""
    accumulation: int
    """Micro-steps a rank takes for an optimizer step, after the ramp."""
    rows_per_step: int
    """Rows of `sequence_length` targets an optimizer step, over all ranks, after the ramp."""
    max_steps: int
    """Optimizer steps of the run."""
    warmup_steps: int
    """Steps of linear warm-up."""
    decay_steps: int
    """Steps of decay at the end of the trapezoidal schedule; 0 under the others."""
    total_tokens: int
    """Tokens of the run."""
    sequence_length: int
    """Targets of a sequence, after the sequence ramp."""
    ramp: tuple[tuple[int, int], ...] = ()
    """Smaller batches at first: tokens a step, and for how many steps."""
    sequence_ramp: tuple[tuple[int, int], ...] = ()
    """Shorter sequences at first: targets of each, and for how many steps."""

    def tokens_at(self, step: int) -> int:
        """Tokens of optimizer step `step`, counted from 0."""
        return _value_at(step, self.ramp, self.tokens_per_step)

    def rows_at(self, step: int) -> int:
        """Rows of optimizer step `step`, counted from 0, over all ranks."""
        return self.tokens_at(step) * self.rows_per_step // self.tokens_per_step

    def sequence_length_at(self, step: int) -> int:
        """Targets of a sequence at optimizer step `step`, counted from 0; it divides `sequence_length`."""
        return _value_at(step, self.sequence_ramp, self.sequence_length)

    def tokens_after(self, steps: int) -> int:
        """Tokens of the first `steps` steps."""
        total = 0
        for tokens, count in self.ramp:
            part = min(steps, count)
            total += part * tokens
            steps -= part
        return total + steps * self.tokens_per_step

    def lines(self, config: Config, vocab_size: int | None) -> list[str]:
        """The numbers as `name value` lines; `vocab_size` None stands for GPT-2's, not yet read."""
        parameters = count_parameters(config, vocab_size or GPT2_VOCAB_SIZE)
        decay = f", {self.decay_steps:,} decay" if self.decay_steps else ""
        ramp, sequence_ramp = (
            ", then ".join(f"{tokens:,} tokens for {steps:,} steps" for tokens, steps in stages)
            for stages in (self.ramp, self.sequence_ramp)
        )
        assumed = "" if vocab_size else f"  (assuming GPT-2's vocabulary of {GPT2_VOCAB_SIZE:,})"
        return [
            f"parameters        {parameters:,}{assumed}",
            f"ranks             {self.num_processes}",
            f"tokens a step     {self.tokens_per_step:,}  ({config.micro_batch_size} rows x {config.sequence_length} "
            f"tokens x {self.num_processes} ranks x {self.accumulation} accumulation)",
            *([f"batch ramp        {ramp}"] if ramp else []),
            *([f"sequence ramp     {sequence_ramp}"] if sequence_ramp else []),
            f"steps             {self.max_steps:,}  ({self.warmup_steps:,} of them warm-up{decay})",
            f"tokens in all     {self.total_tokens:,}",
        ]


def _value_at(step: int, ramp: tuple[tuple[int, int], ...], after: int) -> int:
    """The value of a ramp at a step counted from 0, `after` behind its end."""
    for value, steps in ramp:
        if step < steps:
            return value
        step -= steps
    return after


def make_plan(config: Config, num_processes: int) -> Plan:
    """Derive the numbers of a run over `num_processes` ranks; without a micro_batch_size, for one row at a time.

    Raises:
        ConfigError: if batch_tokens, or a batch of the ramp, is not micro_batch_size x sequence_length x ranks x a whole
            accumulation, or the warm-up and the decay do not fit the run.
    """
    problems = _batch_problems(config, num_processes) + _schedule_problems(config)
    if problems:
        raise ConfigError(*problems)
    max_steps = _max_steps(config)
    plan = Plan(
        num_processes=num_processes,
        tokens_per_step=config.batch_tokens,
        accumulation=config.batch_tokens // ((config.micro_batch_size or 1) * config.sequence_length * num_processes),
        rows_per_step=config.batch_tokens // config.sequence_length,
        max_steps=max_steps,
        warmup_steps=_count_steps(config.warmup_steps, max_steps),
        decay_steps=_decay_steps(config, max_steps),
        total_tokens=0,
        sequence_length=config.sequence_length,
        ramp=_ramp(config),
        sequence_ramp=parse_ramp(config.sequence_ramp),
    )
    return replace(plan, total_tokens=plan.tokens_after(max_steps))


def _batch_problems(config: Config, num_processes: int) -> list[str]:
    problems = []
    if config.micro_batch_size is None:  # settled when the batch is known to be divisible
        config = replace(config, micro_batch_size=1)
    tokens_per_micro_step = config.micro_batch_size * config.sequence_length * num_processes
    accumulation, rest = divmod(config.batch_tokens, tokens_per_micro_step)
    if rest or not accumulation:
        lower = accumulation * tokens_per_micro_step
        choices = [str(n) for n in (lower, lower + tokens_per_micro_step) if n]
        divisors = [
            n for n in range(config.micro_batch_size, 0, -1)
            if config.batch_tokens % (n * config.sequence_length * num_processes) == 0
        ]  # fmt: skip
        remedy = f"batch_tokens {' or '.join(choices)}"
        remedy += f", or micro_batch_size {divisors[0]}" if divisors else ""
        rows, uneven = divmod(config.batch_tokens, config.micro_batch_size * config.sequence_length)
        fewer = [] if uneven else [n for n in range(num_processes - 1, 0, -1) if rows % n == 0]
        more = [] if uneven else [n for n in range(num_processes + 1, 2 * num_processes + 1) if rows % n == 0]
        ranks = [str(n) for n in (*fewer[:1], *more[:1])]
        remedy += f", or {' or '.join(ranks)} ranks" if ranks else ""
        problems.append(
            f"batch_tokens: {config.batch_tokens} is not a multiple of micro_batch_size {config.micro_batch_size} x "
            f"sequence_length {config.sequence_length} x {num_processes} ranks = {tokens_per_micro_step}; {remedy} works"
        )
    for tokens, _ in _ramp(config):
        accumulation, rest = divmod(tokens, tokens_per_micro_step)
        if rest:
            lower = accumulation * tokens_per_micro_step
            choices = " or ".join(str(n) for n in (lower, lower + tokens_per_micro_step) if n)
            problems.append(
                f"batch_ramp: {tokens} is not a multiple of micro_batch_size x sequence_length x ranks = "
                f"{tokens_per_micro_step}; {choices} works"
            )
    return problems


def _ramp(config: Config) -> tuple[tuple[int, int], ...]:
    try:
        return parse_ramp(config.batch_ramp)
    except ValueError:
        return ()  # among the problems of the configuration already


def _max_steps(config: Config) -> int:
    if config.max_steps:
        return config.max_steps
    steps, left = 0, config.max_tokens
    for tokens, count in _ramp(config):
        if left <= tokens * count:
            return steps - (-left // tokens)
        steps, left = steps + count, left - tokens * count
    return steps - (-left // config.batch_tokens)


def _count_steps(value: float, max_steps: int) -> int:
    """A field that is a count of steps, or a share of the run if below 1."""
    return round(value * max_steps) if value < 1 else int(value)


def _decay_steps(config: Config, max_steps: int) -> int:
    return _count_steps(config.decay_steps, max_steps) if config.schedule == "trapezoidal" else 0


def _schedule_problems(config: Config) -> list[str]:
    problems = []
    max_steps = _max_steps(config)
    warmup, decay = _count_steps(config.warmup_steps, max_steps), _decay_steps(config, max_steps)
    for name in ("warmup_steps", "decay_steps"):
        value = getattr(config, name)
        if value >= 1 and int(value) != value:
            problems.append(f"{name}: {value} is neither a whole number nor a share below 1")
    if warmup >= max_steps and not warmup == max_steps == 1:
        problems.append(
            f"warmup_steps: {warmup} steps of warm-up do not fit a run of {max_steps} steps; set fewer, or a share below 1 "
            "such as 0.05"
        )
    elif warmup + decay > max_steps:
        problems.append(
            f"decay_steps: {warmup} steps of warm-up and {decay} of decay do not fit a run of {max_steps} steps; set fewer, "
            "or a share below 1 such as 0.2"
        )
    return problems


def load_run(arguments: list[str], num_processes: int) -> tuple[Config, Plan]:
    """Read the configuration and derive the plan, before anything is downloaded or allocated.

    Raises:
        ConfigError: with all problems of both, and those of local paths.
    """
    config, problems = parse_config(arguments)
    # Numbers out of range are among the problems already; nothing sensible can be derived from them.
    micro = 1 if config.micro_batch_size is None else config.micro_batch_size
    if min(config.batch_tokens, micro, config.sequence_length) >= 1:
        problems += _batch_problems(config, num_processes)
        if (config.max_steps or config.max_tokens or 0) >= 1:
            problems += _schedule_problems(config)
    problems += check_data_exists("data", config.data)
    if config.validation_data is not None:
        problems += check_data_exists("validation_data", config.validation_data)
    problems += _evaluate_data_problems(config) + tracker_problems(config)
    if problems:
        raise ConfigError(*problems)
    from recipe.micro_batch import find_card, resolve

    config = resolve(config, num_processes, find_card())
    return config, make_plan(config, num_processes)


def _evaluate_data_problems(config: Config) -> list[str]:
    data, problems = config.evaluate_data, []
    if data not in (None, "mini"):
        try:
            local_files(Path(data))
        except ConfigError as error:
            problems += error.problems
    others = set(config.evaluate_tasks.split(",")) - {"hellaswag", "hellaswag_completion", "none"}
    if data is not None and others:
        problems.append(
            f"evaluate_data: local data stands for hellaswag, not for {', '.join(sorted(others))}; set --evaluate_tasks "
            "hellaswag"
        )
    return problems


def padded_vocab_size(vocab_size: int) -> int:
    """`vocab_size` rounded up to VOCAB_MULTIPLE."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def count_parameters(config: Config, vocab_size: int) -> int:
    """Parameters of the exported model: tied head, biases, no padding of the vocabulary."""
    width = config.n_embd
    block = 12 * width * width + 13 * width  # c_attn, c_proj, c_fc, c_proj, their biases and two LayerNorms
    return vocab_size * width + config.n_positions * width + config.n_layer * block + 2 * width


def flops_per_token(config: Config, vocab_size: int, sequence_length: int | None = None) -> int:
    """Training FLOPs a token, forward and backward: 6N + 6LCT.

    N counts the matrices a token is multiplied with, the head once; 6LCT is causal attention, which does half of the
    12LCT of full attention (Chowdhery et al. 2022, PaLM, appendix B).

    Args:
        sequence_length: T, where the sequence ramp makes it shorter than the configuration's.
    """
    width = config.n_embd
    matrices = 12 * config.n_layer * width * width + vocab_size * width
    return 6 * matrices + 6 * config.n_layer * width * (sequence_length or config.sequence_length)


def flops_of_run(config: Config, plan: Plan, vocab_size: int) -> float:
    """Training FLOPs of the whole run, its sequence ramp included."""
    total, step, stages = 0.0, 0, (*plan.sequence_ramp, (plan.sequence_length, plan.max_steps))
    for length, steps in stages:
        end = min(step + steps, plan.max_steps)
        total += (plan.tokens_after(end) - plan.tokens_after(step)) * float(flops_per_token(config, vocab_size, length))
        step = end
    return total
