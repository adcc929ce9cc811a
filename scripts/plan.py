"""What a run needs and costs, before anything is rented. Needs no GPU and loads no torch.

python scripts/plan.py configs/gpt2-124m.yaml --machine 8xA100-80GB --price_per_hour 14
python scripts/plan.py configs/gpt2-124m.yaml --table                        GPT-2's sizes on many machines
python scripts/plan.py configs/gpt2-124m.yaml --machine 8xH100-80GB --price_per_hour 24 --budget 20
python scripts/plan.py configs/gpt2-124m.yaml --machine 8xH100-80GB --deadline 2h

python scripts/plan.py configs/gpt2-124m.yaml --machine H100-80GB --growth 1,8,64,512     what a token costs as GPUs grow

Fields of the run may be given as to pretrain.py (`--max_tokens 5000000000`); --json prints everything as one object.
"""

import argparse
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from recipe.config import ConfigError
from recipe.estimate import FIT_SOURCE, SIZES, Estimate, best_within, estimate, parse_machine, with_size
from recipe.gpus import GPUS
from recipe.parsing import parse_config
from recipe.scaling import grow, growth_lines

TABLE_COUNTS = (1, 8, 16, 64)


def parse_hours(text: str) -> float:
    """`2h`, `90m`, or `1h30m`, in hours."""
    match = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?", text)
    if not text or not match:
        raise ConfigError(f"deadline: {text} is not a time such as 2h, 90m or 1h30m")
    return float(match[1] or 0) + float(match[2] or 0) / 60


def parse_counts(text: str) -> tuple[int, ...]:
    """`1,8,64` as numbers of GPUs."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise ConfigError(f"growth: {text} is not a list of numbers of GPUs such as 1,8,64,512")
    return tuple(int(count) for count in text.split(","))


def lines(run: Estimate) -> list[str]:
    """The estimate for people."""
    memory = (
        [f"memory a GPU      {run.memory_total / 2**30:.1f} GiB{'' if run.fits else ': DOES NOT FIT'}"] if run.memory else []
    )
    parts = [f"  {part:15} {size / 2**30:.2f} GiB" for part, size in (run.memory or {}).items()]
    twice = ", activations computed twice" if run.activation_checkpointing else ""
    micro = f"{run.micro_batch_size} rows, {run.accumulation} accumulation{twice}" if run.micro_batch_size else "none fits"
    return [
        f"machine           {run.machine}",
        f"parameters        {run.parameters:,}",
        f"micro batch       {micro}",
        *memory,
        *parts,
        f"tokens/s          {run.tokens_per_second:,.0f}  ({run.basis})",
        f"causal MFU        {run.mfu:.1%}",
        f"tokens a step     {run.tokens_per_step:,}",
        f"steps             {run.steps:,}",
        f"tokens            {run.tokens:,}",
        f"epochs            {'unknown before the text is opened' if run.epochs is None else f'{run.epochs:.2f}'}",
        f"FLOPs             {run.flops:.3g}",
        f"time              {run.hours:.2f} hours",
        f"money             {'unknown: give --price_per_hour' if run.dollars is None else f'{run.dollars:,.2f} dollars'}",
        f"disk              {run.disk_bytes / 1e9:.1f} GB  ({run.checkpoint_bytes / 1e9:.1f} GB a checkpoint)",
        f"download          {run.download_bytes / 1e9:.1f} GB at {run.download_bytes_per_second / 1e6:.1f} MB/s, for FineWeb's "
        "text from the Hub",
    ]


def estimate_all(config) -> dict[str, dict[str, Estimate]]:
    """Of each of GPT-2's sizes on each machine."""
    names = [f"{count}x{gpu}" for gpu, kind in GPUS.items() for count in (TABLE_COUNTS if not kind.cores else (1,))]
    return {name: {size: estimate(with_size(config, size), parse_machine(name)) for size in SIZES} for name in names}


def table(runs: dict[str, dict[str, Estimate]]) -> list[str]:
    """A row for each machine, a column for each size: tokens/s and hours. `*` is measured."""
    rows = ["machine           " + "".join(f"{size:>24}" for size in SIZES)]
    for name, sizes in runs.items():
        cells = []
        for run in sizes.values():
            mark = "*" if run.measured else " "
            cells.append(f"{run.tokens_per_second:,.0f}{mark} {run.hours:,.1f} h" if run.fits else "does not fit ")
        rows.append(f"{name:18}" + "".join(f"{cell:>24}" for cell in cells))
    return [
        *rows,
        "",
        f"tokens/s and hours for {next(iter(sizes.values())).tokens:,} tokens; * measured, else estimated",
    ]


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--machine", help="COUNTxGPU, as 8xA100-80GB")
    parser.add_argument("--price_per_hour", type=float, help="dollars, for the whole machine (default: the config's)")
    parser.add_argument("--table", action="store_true", help="GPT-2's sizes on many machines")
    parser.add_argument("--growth", help="numbers of GPUs, as 1,8,64,512; a step's parts and the cost of a token on each")
    parser.add_argument("--budget", type=float, help="dollars; the best run that they buy")
    parser.add_argument("--deadline", help="2h, 90m; the best run that ends by then")
    parser.add_argument("--json", action="store_true")
    arguments, rest = parser.parse_known_args(words)
    try:
        config, problems = parse_config(rest)
        price = config.price_per_hour if arguments.price_per_hour is None else arguments.price_per_hour
        wants_machine = not arguments.table
        if wants_machine and not arguments.machine:
            problems.append("machine: missing; give --machine 8xA100-80GB, or --table for many")
        for one, others in {"table": ("machine", "growth", "budget", "deadline"), "growth": ("budget", "deadline")}.items():
            given = [f"--{name}" for name in others if getattr(arguments, name) is not None]
            if getattr(arguments, one) and given:
                problems.append(f"{one}: does not go with {' and '.join(given)}; leave one out")
        if arguments.budget is not None and not price:
            problems.append("budget: dollars become hours by --price_per_hour, which is missing")
        if problems:
            raise ConfigError(*problems)
        if arguments.table:
            runs = estimate_all(config)
            as_dicts = {name: {size: run.as_dict() for size, run in sizes.items()} for name, sizes in runs.items()}
            print(json.dumps(as_dicts) if arguments.json else "\n".join(table(runs)))
            return 0
        machine = parse_machine(arguments.machine)
        if arguments.growth:
            counts = parse_counts(arguments.growth)
            found = [asdict(one) for one in grow(config, machine.gpu_name, counts)]
            print(json.dumps(found) if arguments.json else "\n".join(growth_lines(config, machine.gpu_name, counts)))
            return 0
        if arguments.budget is not None or arguments.deadline:
            limits = [arguments.budget / price] if arguments.budget is not None else []
            limits += [parse_hours(arguments.deadline)] if arguments.deadline else []
            runs = best_within(config, machine, min(limits), price)
            if arguments.json:
                print(json.dumps([{"size": size, "fit_loss": loss, **run.as_dict()} for size, run, loss in runs]))
            else:
                print(f"within {min(limits):.2f} hours on {machine.name}, best first by {FIT_SOURCE}:")
                for size, run, loss in runs:
                    money = "" if run.dollars is None else f", {run.dollars:,.2f} dollars"
                    print(f"  {size:6} {run.tokens:>16,} tokens  fit {loss:.3f}  {run.hours:.2f} h{money}  ({run.basis})")
            return 0
        run = estimate(config, machine, price)
        print(json.dumps(run.as_dict()) if arguments.json else "\n".join(lines(run)))
    except ConfigError as error:
        from recipe.cli import report_problems

        report_problems(error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
