"""What several GPUs of one host bring, measured in one short run: each stage launches what users launch.

A stage that fails tells why and does not keep the others from running.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipe.config import ConfigError
from recipe.files import read_json_lines
from recipe.launches import Launch, LaunchError, accelerate_command
from recipe.micro_batch import find_card, resolve
from recipe.parsing import load_config
from recipe.plan import make_plan

STAGES = {"speed": 300, "profile": 120, "losses": 180, "topology": 180, "kill": 90}
"""Seconds that each may take, unless told otherwise."""
ENGINES = ("ZeRO-1", "DDP")
TOLERANCE = 5e-3
"""Of a training loss against the same step's on another number of ranks, nats per token."""
LOSSES_TOKENS = 65_536
"""Tokens a step where losses are compared, if the run's are not fewer: 200 steps on one H100 take half a minute."""
SMALLER = "smaller-micro-batches"
PROFILED_AFTER = 2
"""Timed steps before the profiled one, where nothing else is measured."""


class Unfit(Exception):
    """Why a stage cannot be run on this machine."""


@dataclass
class ScalingRun:
    """The stages, as methods by their names, over `counts` processes of this host, the largest last."""

    configs: list[str]
    """YAML files; the first one's run is also continued and killed."""
    fields: dict[str, str]
    """That override theirs."""
    counts: tuple[int, ...]
    folder: Path
    """For logs and run folders."""
    gpus: int
    """Of this host; 0: CPU processes over gloo."""
    engines: tuple[str, ...] = ENGINES
    """That are timed and profiled."""
    speed_steps: int = 12
    """Timed steps on one rank; N ranks take N times as many, so that cards are as warm."""
    losses_steps: int = 200
    topology_steps: int = 180
    kill_steps: int = 20
    """Steps after which a rank is killed."""
    environment: dict[str, str] = field(default_factory=dict)
    """Of every launch, on top of this process'."""
    measured: dict[tuple[str, str, int], dict[str, Any]] = field(default_factory=dict)
    """Results of `benchmark.py step` by config, engine and ranks."""

    def __post_init__(self) -> None:
        compiled = {
            "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "compiled"),
            "TRITON_CACHE_DIR": str(self.folder / "compiled" / "triton"),
        }
        self.environment = {
            # Its multicast fails on hosts whose fabric manager is not set up for it, and then every collective does.
            "NCCL_NVLS_ENABLE": "0",
            # One cache of compiled kernels for all launches.
            **{name: os.environ.get(name, path) for name, path in compiled.items()},
            **self.environment,
        }  # fmt: skip
        self.fields = {"max_epochs": "1000", **self.fields}

    @property
    def most(self) -> int:
        return self.counts[-1]

    def check(self) -> None:
        """Derive every run that the stages need, before anything is started.

        Raises:
            ConfigError: as pretrain.py would, for a batch that does not divide by a number of ranks, for one.
        """
        if self.fields.get("tokenizer", "").startswith("train:"):
            raise ConfigError("tokenizer: every launch would train its own; name a folder, as cache/tokenizer of a run is one")
        for config in self.configs:
            read = load_config([config, *_words(self.fields)])
            for ranks in {1, *self.counts}:
                make_plan(read, ranks)
            load = load_config([config, *_words(self.fields | self._losses_batch(config))])
            for ranks in (1, self.most):
                make_plan(load, ranks)

    # --- stages -----------------------------------------------------------------------------------------------------

    def speed(self, deadline: float) -> dict[str, Any]:
        """Whole steps of each config under each engine, on one rank and on each count."""
        wanted = [(config, engine, n) for n in {1, *self.counts} for engine in self.engines for config in self.configs]
        errors = self._measure(wanted, lambda ranks: self.speed_steps * ranks, deadline)
        rows = []
        for config, engine, ranks in sorted(self.measured, key=lambda key: (self.configs.index(key[0]), key[1:])):
            found = self.measured[config, engine, ranks]
            one = self.measured.get((config, engine, 1))
            rows.append(
                {
                    "config": Path(config).stem, "engine": engine, "ranks": ranks,
                    "tokens_per_second": found["tokens_per_second"], "step_ms": found["step_ms"],
                    "efficiency": one and efficiency(found["tokens_per_second"], one["tokens_per_second"], ranks),
                    "data_wait_fraction": found["data_ms"] / found["step_ms"],
                    "peak_memory_bytes": found["peak_memory_bytes"], "mfu": found["mfu"], "device": found["device"],
                    "precision": found["precision"],
                }
            )  # fmt: skip
        return {"rows": rows, "problem": "; ".join(errors) or None}

    def profile(self, deadline: float) -> dict[str, Any]:
        """Communication in a step of the most ranks: of those that were timed, or of a few steps more."""
        wanted = [(config, engine, self.most) for config in self.configs for engine in self.engines]
        errors = self._measure([one for one in wanted if one not in self.measured], lambda _: PROFILED_AFTER, deadline)
        rows = []
        for config, engine, ranks in wanted:
            if found := self.measured.get((config, engine, ranks)):
                everyone = found["communication"]
                # The rank that waits least for others shows best what the exchange itself takes.
                rank = min(range(len(everyone)), key=lambda n: everyone[n]["all"]["ms"])
                about = {"config": Path(config).stem, "engine": engine, "ranks": ranks, "step_ms": found["step_ms"]}
                longest = max(one["all"]["ms"] for one in everyone)
                rows.append(about | {"rank": rank, "longest_ms": longest, **everyone[rank], "parts": found["parts"]})
        return {"rows": rows, "problem": "; ".join(errors) or None}

    def losses(self, deadline: float) -> dict[str, Any]:
        """Training losses of one rank and of the most, on the same rows; and of one rank that sums in another order, which is
        what rounding alone does."""
        if self.most < 2:
            raise Unfit("it takes two ranks to compare with one")
        sizes = {config: self._micro_batch_size(config) for config in self.configs}
        jobs = [((config, 1), self._losses_command(config, 1, size)) for config, size in sizes.items()]
        jobs += [
            ((config, SMALLER), self._losses_command(config, 1, largest_proper_divisor(size)))
            for config, size in sizes.items()
            if size > 1
        ]
        curves, errors = self._launch_all("losses", jobs, 1, deadline)
        # The control tells what to make of the others, and fails nothing if it could not be had.
        errors = [why for why in errors if SMALLER not in why]
        jobs = [((config, self.most), self._losses_command(config, self.most, size)) for config, size in sizes.items()]
        done, failed = self._launch_all("losses", jobs, self.most, deadline)
        curves |= done
        errors += failed
        rows = []
        for config in self.configs:
            one, many, smaller = (curves.get((config, key)) for key in (1, self.most, SMALLER))
            if one and many:
                apart = compare(one["losses"], many["losses"])
                apart["rounding"] = smaller and compare(one["losses"], smaller["losses"])
                about = {"config": Path(config).stem, "ranks": self.most, "precision": many["precision"]}
                about |= {"first_loss": one["losses"][0], "last_loss": one["losses"][-1]}
                rows.append(about | {"batch_tokens": int(self._losses_batch(config)["batch_tokens"]), **apart})
                errors += [f"{Path(config).stem}: {why}" for why in [_too_far(apart)] if why]
        return {"rows": rows, "problem": "; ".join(errors) or None}

    def topology(self, deadline: float) -> dict[str, Any]:
        """A run of the most ranks; and one from its first checkpoint on half of them, stopped, and then on all again."""
        if self.most < 2:
            raise Unfit("it takes two ranks to continue on half of them")
        every = self.topology_steps // 3
        common = {"save_every": every, "log_every": 1, "max_steps": self.topology_steps, "keep_checkpoints": 3}
        undisturbed, moved = self.folder / "undisturbed", self.folder / "moved"
        with self._pretrain("topology-undisturbed", self.most, output_dir=undisturbed, **common) as launch:
            launch.succeed(deadline)
        first = undisturbed / "checkpoints" / f"step-{every:08d}"
        half = self.most // 2
        with self._pretrain("topology-half", half, output_dir=moved, resume=first, **common) as launch:
            launch.wait_until(lambda: _last_step(moved) >= every + every // 2, f"step {every + every // 2}", deadline)
            launch.process.send_signal(signal.SIGTERM)
            launch.wait(deadline)
        status = read_status(moved)
        if status["state"] != "stopped":
            was = f"{status['state']} at step {status['step']}"
            raise LaunchError(f"on {half} ranks it was {was} and not stopped {status['reason']}; more --topology_steps help")
        with self._pretrain("topology-back", self.most, output_dir=moved, **common) as launch:
            said = launch.succeed(deadline)
        if f"at step {status['step']}" not in next((line for line in said.splitlines() if "continuing from" in line), ""):
            raise LaunchError(f"back on {self.most} ranks it did not continue at step {status['step']}; {launch.last_words()}")
        expected, found = _training_losses(undisturbed), _training_losses(moved)
        steps = range(every + 1, self.topology_steps + 1)
        parts = {half: [n for n in steps if n <= status["step"]], self.most: [n for n in steps if n > status["step"]]}
        rows = [
            {"ranks": ranks, "from_step": part[0], "to_step": part[-1]}
            | compare([expected[n] for n in part], [found[n] for n in part], part[0])
            for ranks, part in parts.items()
        ]
        problems = [f"on {row['ranks']} ranks: {why}" for row in rows for why in [_too_far(row)] if why]
        return {"rows": rows, "last_loss": expected[self.topology_steps], "problem": "; ".join(problems) or None}

    def kill(self, deadline: float) -> dict[str, Any]:
        """SIGKILL to the last rank in mid-training."""
        if self.most < 2:
            raise Unfit("it takes a second rank to tell of the first one's death")
        run, rank = self.folder / "killed", self.most - 1
        # Steps enough not to end before, and not more than any text has.
        with self._pretrain("kill", self.most, output_dir=run, save_every=0, max_steps=20_000) as launch:
            launch.wait_until(lambda: _last_step(run) >= self.kill_steps, f"step {self.kill_steps}", deadline)
            os.kill(launch.worker(rank), signal.SIGKILL)
            began = time.monotonic()
            code = launch.wait(deadline)
            seconds = time.monotonic() - began
            status = read_status(run)
            right = code != 0 and status["state"] == "failed" and status["rank"] == rank
            about = {"rank": rank, "ranks": self.most, "seconds": seconds, "launcher_code": code, "status": status}
            told = f"status.json says {status['state']}, rank {status['rank']}; {launch.last_words()}"
        return {"rows": [about], "problem": None if right else told}

    # --- launches ---------------------------------------------------------------------------------------------------

    def _file(self, engine: str, ranks: int) -> str:
        if engine == "ZeRO-1":
            return "8xh100-zero1" if self.gpus else "2cpu-zero1"
        if ranks == 1:
            return "1gpu-ddp" if self.gpus else "cpu"
        return "2cpu-ddp"  # data parallel on GPUs too, where there are some

    def _losses_batch(self, config: str) -> dict[str, str]:
        return {"batch_tokens": str(min(LOSSES_TOKENS, load_config([config, *_words(self.fields)]).batch_tokens))}

    def _micro_batch_size(self, config: str) -> int:
        """Rows of the most ranks' micro-batches where losses are compared. On fewer ranks they are as many: what is compiled
        once serves all launches, and only what the ranks sum among themselves is summed in another order."""
        loaded = load_config([config, *_words(self.fields | self._losses_batch(config))])
        return resolve(loaded, self.most, find_card() if self.gpus else None).micro_batch_size

    def _losses_command(self, config: str, ranks: int, micro_batch_size: int) -> list[str]:
        fields = self.fields | self._losses_batch(config) | {"micro_batch_size": str(micro_batch_size)}
        words = ["losses", config, *_words(fields), "--steps", str(self.losses_steps), "--json"]
        return accelerate_command(self._file("ZeRO-1", ranks), ranks, "benchmark.py", *words)

    def _measure(self, wanted: list[tuple[str, str, int]], steps: Callable[[int], int], deadline: float) -> list[str]:
        """`benchmark.py step` for each config, engine and ranks into `measured`; what failed."""
        errors = []
        for ranks in sorted({n for *_, n in wanted}):
            jobs = []
            for config, engine, count in wanted:
                if count == ranks:
                    words = ["step", config, *_words(self.fields), "--steps", str(steps(ranks)), "--json"]
                    command = accelerate_command(self._file(engine, ranks), ranks, "benchmark.py", *words)
                    jobs.append(((config, engine, ranks), command))
            done, failed = self._launch_all("step", jobs, ranks, deadline)
            self.measured |= done
            errors += failed
        return errors

    def _launch_all(
        self, name: str, jobs: list[tuple[tuple, list[str]]], ranks: int, deadline: float
    ) -> tuple[dict[tuple, dict[str, Any]], list[str]]:
        """Launches that print JSON, one after another; those of one rank side by side, each on a GPU of its own. Results by
        the jobs' keys, and what failed."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        cards = visible.split(",") if visible else [str(n) for n in range(self.gpus)]
        at_once = len(cards) if ranks == 1 and self.gpus else 1
        done, errors = {}, []
        for begin in range(0, len(jobs), at_once):
            if time.monotonic() > deadline:
                errors.append(f"{name} on {ranks} ranks: no time was left for {len(jobs) - begin} of {len(jobs)} launches")
                break
            with ExitStack() as stack:
                launches = []
                for number, (key, command) in enumerate(jobs[begin : begin + at_once]):
                    card = {"CUDA_VISIBLE_DEVICES": cards[number]} if ranks == 1 and self.gpus else {}
                    label = "-".join([name, *(Path(str(part)).stem for part in key)])
                    log = self.folder / "logs" / f"{label}.log"
                    launches.append((key, label, stack.enter_context(Launch(command, log, self.environment | card))))
                for key, label, launch in launches:
                    try:
                        done[key] = last_json(launch.succeed(deadline))
                    except LaunchError as error:
                        errors.append(f"{label}: {error}")
        return done, errors

    def _pretrain(self, name: str, ranks: int, **fields: object) -> Launch:
        # Half of the run is warm-up: at a hot rate rounding alone would set the losses apart.
        batch = self._losses_batch(self.configs[0]) | {"micro_batch_size": self._micro_batch_size(self.configs[0])}
        short = {"validation_tokens": batch["batch_tokens"]}
        own = batch | {"eval_every": 0, "sample_every": 0, "evaluate_tasks": "none", "warmup_steps": 0.5, "schedule": "cosine"}
        given = {name: value for name, value in self.fields.items() if name != "max_tokens"}  # in whose place is max_steps
        words = [self.configs[0], *_words(short | given | own | fields)]
        command = accelerate_command(self._file("ZeRO-1", ranks), ranks, "pretrain.py", *words)
        return Launch(command, self.folder / "logs" / f"{name}.log", self.environment)


def run_stages(
    run: ScalingRun, stages: dict[str, float], time_limit: float, finished: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Run the stages, each until its own limit or the end of the whole.

    Args:
        stages: seconds by name, in their order.
        finished: called after each with all results so far.
    Returns:
        by stage: what its method gives; `state` ok, failed, or not run; `problem`, why; `seconds`.
    """
    began, results = time.monotonic(), {}
    for name, limit in stages.items():
        start = time.monotonic()
        deadline = min(start + limit, began + time_limit)
        try:
            if deadline - start < 1:
                raise Unfit(f"the {time_limit:.0f} s of the whole were over")
            found = getattr(run, name)(deadline)
            results[name] = {"state": "failed" if found["problem"] else "ok", **found}
        except Unfit as error:
            results[name] = {"state": "not run", "problem": str(error)}
        except Exception as error:  # of whatever kind: the next stage may do
            results[name] = {"state": "failed", "problem": f"{type(error).__name__}: {error}"}
        results[name]["seconds"] = time.monotonic() - start
        finished(results)
    return results


def efficiency(speed: float, one: float, ranks: int) -> float:
    """Of `ranks` GPUs: their tokens/s over as many times those of one."""
    return speed / (ranks * one)


def largest_proper_divisor(number: int) -> int:
    """Of a number above 1: below it, and it divides what the number divides."""
    return next(number // divisor for divisor in range(2, number + 1) if number % divisor == 0)


def compare(expected: list[float], found: list[float], first: int = 1) -> dict[str, Any]:
    """How far two curves of losses are apart, of which the first step has the number `first`.

    Raises:
        ValueError: if they are not as long, or empty.
    """
    apart = [abs(a - b) for a, b in zip(expected, found, strict=True)]
    largest = max(apart)
    return {
        "steps": len(apart), "largest": largest, "at_step": first + apart.index(largest), "mean": statistics.fmean(apart)
    }  # fmt: skip


def _too_far(apart: dict[str, Any]) -> str | None:
    # Written so that NaN is too far.
    if apart["largest"] <= TOLERANCE:
        return None
    return f"a loss differs by {apart['largest']:.2g} at step {apart['at_step']}, more than {TOLERANCE:g}"


def last_json(printed: str) -> dict[str, Any]:
    """The last line that is an object.

    Raises:
        LaunchError: if there is none.
    """
    for line in reversed(printed.splitlines()):
        if line.startswith("{"):
            return json.loads(line)
    raise LaunchError("it printed no result")


def read_status(run: Path) -> dict[str, Any]:
    """status.json of a run.

    Raises:
        LaunchError: if there is none.
    """
    try:
        return json.loads((run / "status.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise LaunchError(f"no status.json in {run}") from error


def _training_losses(run: Path) -> dict[int, float]:
    return {r["step"]: r["train_loss"] for r in read_json_lines(run / "metrics.jsonl") if "train_loss" in r}


def _last_step(run: Path) -> int:
    return max(_training_losses(run), default=0)


def _words(fields: dict[str, object]) -> list[str]:
    return [word for name, value in fields.items() for word in (f"--{name}", str(value))]
