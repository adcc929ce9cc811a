"""Measure what several GPUs of this host bring, in under ten minutes (--time_limit); stages that find no time say so.

    python scripts/scaling.py configs/gpt2-124m.yaml configs/gpt2-124m-fast.yaml --processes 8 --data my_text \
        --output scaling.json [--tokenizer ...] [--field value ...]
    python scripts/scaling.py configs/gpt2-124m.yaml --processes 2,4,8 --stages speed:500,profile --data my_text

The stages, each with the seconds that it may take behind a colon if not its own:

speed     tokens/s of whole steps on 1 rank and on each number of processes, under each of --engines, for each config
profile   the communication in a step of the most ranks by kind, overlapped and exposed
losses    training losses of the most ranks against those of one, ZeRO-1, and of one against its own with other micro-batches
topology  a checkpoint of the first config's run continued on half of the ranks and then on all again
kill      SIGKILL to one rank: the job ends, and status.json names it

One that fails says so in the table, and the next one starts. Without a GPU the processes are CPU processes over gloo. Writes
FILE.json after each stage, FILE.md beside it, and logs and run folders to --folder. Ends with 0 if all stages were ok.
"""

import argparse
import importlib.metadata
import os
import platform
import shlex
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)
os.environ.setdefault("HF_HUB_DISABLE_UPDATE_CHECK", "1")

from recipe.config import ConfigError
from recipe.files import output_file, write_json, write_text
from recipe.micro_batch import count_gpus
from recipe.scaling_run import ENGINES, STAGES, ScalingRun, run_stages
from recipe.scaling_table import markdown
from recipe.signals import leave


def parse_stages(text: str) -> dict[str, float]:
    """`speed,profile:60` as seconds by stage."""
    stages = {}
    for word in text.split(","):
        name, _, seconds = word.partition(":")
        if name not in STAGES:
            raise ConfigError(f"stages: {name!r} is not one of {', '.join(STAGES)}; separate them by commas")
        try:
            stages[name] = float(seconds) if seconds else STAGES[name]
        except ValueError:
            raise ConfigError(f"stages: {word} does not give seconds; {name}:{STAGES[name]} would") from None
    return stages


def parse_counts(text: str, gpus: int) -> tuple[int, ...]:
    """`2,4,8` as numbers of processes, at most as many as there are GPUs."""
    try:
        counts = tuple(sorted({int(word) for word in text.split(",")}))
    except ValueError:
        raise ConfigError(f"processes: {text} is not a list of numbers such as 2,4,8") from None
    if counts[0] < 1 or (gpus and counts[-1] > gpus):
        raise ConfigError(f"processes: {text} is more than this host's {gpus} GPUs or less than one; give up to {gpus}")
    return counts


def parse_engines(text: str) -> tuple[str, ...]:
    """`ZeRO-1,DDP` as names."""
    engines = tuple(text.split(","))
    if unknown := [name for name in engines if name not in ENGINES]:
        raise ConfigError(f"engines: {unknown[0]!r} is not one of {', '.join(ENGINES)}; separate them by commas")
    return engines


def parse_fields(words: list[str]) -> tuple[list[str], dict[str, str]]:
    """Configs and `--field value` pairs."""
    configs, fields, words = [], {}, list(words)
    while words:
        word = words.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            configs.append(word)
        elif not equals and not words:
            raise ConfigError(f"{name}: no value given on the command line; write --{name} VALUE")
        else:
            fields[name] = value if equals else words.pop(0)
    if not configs:
        raise ConfigError("config: none given; configs/gpt2-124m.yaml is one")
    return configs, fields


def describe(gpus: int, run: ScalingRun) -> dict:
    """About the machine and this measurement, but for what only the stages know."""
    packages = ("torch", "accelerate", "deepspeed", "transformers")
    versions = {"Python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
    device = f"CPU ({os.cpu_count()} cores)"
    if gpus:
        import torch

        device = torch.cuda.get_device_name()
        versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    command = shlex.join(["python", "scripts/scaling.py", *sys.argv[1:]])
    shown = {"NCCL_NVLS_ENABLE": run.environment["NCCL_NVLS_ENABLE"]}
    return {
        "command": command, "date": time.strftime("%Y-%m-%d"), "device": device, "host_gpus": gpus, "versions": versions,
        "environment": shown, "processes": list(run.counts),
    }  # fmt: skip


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--processes", default=None, help="8, or 2,4,8; all GPUs if left out, two on a CPU")
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--engines", default=",".join(ENGINES), help="of speed and profile; the others take ZeRO-1")
    parser.add_argument("--time_limit", type=float, default=570, help="seconds for all of them")
    parser.add_argument("--speed_steps", type=int, default=12, help="timed steps on one rank; N ranks take N times as many")
    parser.add_argument("--losses_steps", type=int, default=200)
    parser.add_argument("--topology_steps", type=int, default=180)
    parser.add_argument("--kill_steps", type=int, default=20, help="steps before a rank is killed")
    parser.add_argument("--output", type=output_file, default=Path("scaling.json"))
    parser.add_argument("--folder", type=Path, default=None, help="for logs and run folders; a temporary one if left out")
    parser.add_argument("--cpu", action="store_true", help="use no GPU")
    arguments, rest = parser.parse_known_args(words)
    began = time.monotonic()
    # Launches are ended on the way out, also when this process is told to stop.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        gpus = 0 if arguments.cpu else count_gpus()
        counts = parse_counts(arguments.processes or str(gpus or 2), gpus)
        stages = parse_stages(arguments.stages)
        engines = parse_engines(arguments.engines)
        configs, fields = parse_fields(rest)
        folder = arguments.folder or Path(tempfile.mkdtemp(prefix="scaling-"))
        hidden = {} if gpus else {"CUDA_VISIBLE_DEVICES": ""}
        steps = {name: getattr(arguments, f"{name}_steps") for name in ("speed", "losses", "topology", "kill")}
        run = ScalingRun(
            configs, fields, counts, folder.absolute(), gpus, engines, environment=hidden,
            **{f"{name}_steps": count for name, count in steps.items()},
        )  # fmt: skip
        run.check()
    except ConfigError as error:
        from recipe.cli import report_problems

        report_problems(error)
        return 2
    about = describe(gpus, run)
    print(f"NCCL_NVLS_ENABLE={run.environment['NCCL_NVLS_ENABLE']}; logs and runs in {folder}", flush=True)

    def finished(results: dict) -> None:
        name, last = list(results.items())[-1]
        print(f"{name}: {last['state']} after {last['seconds']:.0f} s {last['problem'] or ''}", flush=True)
        result = {"about": about | {"seconds": time.monotonic() - began}, "stages": results}
        write_json(arguments.output, result)
        write_text(arguments.output.with_suffix(".md"), markdown(result))

    results = run_stages(run, stages, arguments.time_limit, finished)
    print(arguments.output.with_suffix(".md").read_text(encoding="utf-8"))
    return 0 if all(result["state"] == "ok" for result in results.values()) else 1


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
