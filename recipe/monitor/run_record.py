"""What a run folder says about its run, at any time of it. Imports no torch."""

from __future__ import annotations

import fcntl
import itertools
import json
import time
from bisect import bisect_right
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from recipe.config import FINEWEB, Config, ConfigError
from recipe.evaluation.records import precedence, read_results, scored_items, scores_kind
from recipe.files import read_json, read_json_lines
from recipe.parsing import parse_config
from recipe.plan import GPT2_VOCAB_SIZE, Plan, count_parameters, make_plan

STARTS = "starts.jsonl"
GPT2_VOCAB_SHA256 = "140f02bb05c0d82c3e45f14050c6be40a9b6fe2773b7dfce0fbb815918c30199"
"""Of GPT-2's tokens, as recipe.run_folder.describe_tokenizer has it."""


def record_start(run: Path, step: int, environment: dict[str, Any]) -> None:
    """Append a line to starts.jsonl: when, from which step, where, and how many steps and seconds of training the run does
    again. To be called before metrics.jsonl is cut back to `step`."""
    records = read_json_lines(run / "metrics.jsonl")
    lost = [r for r in records if "train_loss" in r and r["step"] > step]
    line = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": step,
        "ranks": environment["ranks"],
        "engine": environment["engine"],
        "device": device_name(environment),
        "commit": environment["commit"],
        "lost_steps": len(lost),
        "lost_seconds": round(sum(r["step_seconds"] for r in lost), 3),
    }
    with open(run / STARTS, "a", encoding="utf-8") as handle:
        handle.write(json.dumps(line) + "\n")


def device_name(environment: dict[str, Any]) -> str:
    """`NVIDIA H100 80GB HBM3`, or `CPU (2 cores)`."""
    hardware = environment.get("hardware", {})
    return hardware.get("gpu") or f"CPU ({hardware.get('cores', '?')} cores)"


def sample_files(run: Path, step: int) -> list[Path]:
    """eval/samples-step-*.json up to a step, the newest last: later ones are of steps that the run went back from."""
    return [p for p in sorted((run / "eval").glob("samples-step-*.json")) if int(p.stem.rpartition("-")[2]) <= step]


@dataclass
class RunRecord:
    """The files of a run folder, read once; those that are not there yet are empty."""

    path: Path
    config: Config
    fields: dict[str, Any]
    """config.yaml as it is."""
    environment: dict[str, Any]
    status: dict[str, Any]
    records: list[dict[str, Any]] = field(repr=False)
    """The lines of metrics.jsonl."""

    @classmethod
    def read(cls, path: Path, with_metrics: bool = True) -> RunRecord:
        """
        Args:
            with_metrics: whether to read metrics.jsonl, which may be long.
        Raises:
            ConfigError: if there is no run at `path`.
        """
        check_run(path)
        config, _ = parse_config([str(path / "config.yaml")])  # a run of another version may have other fields
        fields = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8")) or {}
        records = read_json_lines(path / "metrics.jsonl") if with_metrics else []
        return cls(path, config, fields, read_json(path / "environment.json"), read_json(path / "status.json"), records)

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def ranks(self) -> int:
        return self.environment.get("ranks", 1)

    @cached_property
    def plan(self) -> Plan | None:
        """The run's derived numbers, None if its configuration is not one of this version."""
        try:
            return make_plan(self.config, self.ranks)
        except (ConfigError, ZeroDivisionError, TypeError):
            return None

    @property
    def parameters(self) -> int:
        """Of the model; of an older run, which does not know its vocabulary, with GPT-2's unless it trains its own."""
        name = self.config.tokenizer
        assumed = int(name.removeprefix("train:")) if name.startswith("train:") else GPT2_VOCAB_SIZE
        return count_parameters(self.config, self.environment.get("vocab_size", assumed))

    @property
    def is_fineweb(self) -> bool:
        """Whether the losses compare with llm.c's: of FineWeb's text in GPT-2's tokens."""
        text = str(self.environment.get("text") or self.config.data).partition(":")[0].partition("@")[0]
        known = self.environment.get("vocab_sha256")
        gpt2 = known == GPT2_VOCAB_SHA256 if known else not self.config.tokenizer.startswith("train:")
        return gpt2 and self.config.validation_data is None and text == FINEWEB.partition(":")[0]

    def having(self, name: str) -> list[dict[str, Any]]:
        """The records with a number in the field `name`, in the order of their steps."""
        return sorted((r for r in self.records if r.get(name) is not None), key=lambda r: r["step"])

    @cached_property
    def training(self) -> list[dict[str, Any]]:
        """The record of each step."""
        return sorted((r for r in self.records if "train_loss" in r), key=lambda r: r["step"])

    @property
    def begun_at(self) -> int:
        """The step that the folder's own records follow: above 0 if the run branched off another one's checkpoint."""
        return self.training[0]["step"] - 1 if self.training else 0

    @property
    def own_tokens(self) -> int:
        """Tokens of the steps that the folder has records of, whose time is known."""
        if not self.training:
            return 0
        first, last = self.training[0]["tokens"], self.training[-1]["tokens"]
        before = self.plan.tokens_after(self.begun_at) if self.plan else max(0, first - self.config.batch_tokens)
        return last - before

    @cached_property
    def machines(self) -> list[tuple[int, str]]:
        """Ranks and device of the starts that trained a step up to the last record, kept or lost, each machine once; 0 ranks of
        what is not known, because the first steps came with the training state from the Hub."""
        last = self._steps[-1] if self.training else 0
        reached = [later["step"] + later["lost_steps"] for later in self.starts[1:]] + [last]
        trained = [s for s, end in zip(self.starts, reached, strict=False) if s["step"] < min(end, last)]
        found = [(s["ranks"], s["device"]) for s in trained]
        if trained and trained[0]["step"] > self.begun_at:
            found.insert(0, (0, "another machine"))
        return list(dict.fromkeys(found)) or [(self.ranks, device_name(self.environment))]

    @property
    def machine(self) -> str:
        """The machines in words."""
        return ", then ".join(f"{ranks} × {device}" if ranks else device for ranks, device in self.machines)

    def tokens_at(self, record: dict[str, Any]) -> int:
        """Tokens trained when a record was written; those of older runs lack them in some records."""
        if "tokens" in record:
            return record["tokens"]
        position = bisect_right(self._steps, record["step"])
        return self.training[position - 1]["tokens"] if position else 0

    @cached_property
    def _steps(self) -> list[int]:
        return [r["step"] for r in self.training]

    @cached_property
    def has_wall_clock(self) -> bool:
        """Whether the records carry the time of all starts, with evaluations and saves, or that of the steps alone is known."""
        return bool(self.training) and all("wall_seconds" in r for r in self.training)

    @cached_property
    def _step_clock(self) -> list[float]:
        """Seconds of training steps up to the end of each."""
        return list(itertools.accumulate(r["step_seconds"] for r in self.training))

    def seconds_at(self, record: dict[str, Any], wall: bool) -> float:
        """Seconds into the run when a record was written, by the wall clock or of training steps alone."""
        position = bisect_right(self._steps, record["step"])
        if not wall:
            return self._step_clock[position - 1] if position else 0.0
        if "wall_seconds" in record:
            return record["wall_seconds"]
        return self.training[position - 1]["wall_seconds"] if position else 0.0

    @property
    def seconds(self) -> float:
        """Seconds of the whole run so far, by the wall clock if it is known."""
        if self.has_wall_clock:
            return max(r.get("wall_seconds", 0.0) for r in self.records)
        return self._step_clock[-1] if self.training else 0.0

    @cached_property
    def starts(self) -> list[dict[str, Any]]:
        return read_json_lines(self.path / STARTS)

    @cached_property
    def skipped_rows(self) -> list[dict[str, Any]]:
        return read_json_lines(self.path / "skipped_rows.jsonl")

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        """What eval/samples-step-*.json hold, by step, up to where the run is."""
        last = max((r["step"] for r in self.records), default=0)
        return [r for p in sample_files(self.path, last) if (r := read_json(p))]

    @cached_property
    def results(self) -> list[dict[str, Any]]:
        """What the evaluations at the end have written, a task each."""
        return read_results(self.path / "eval")

    def newest_scores(self, name: str) -> dict[str, Any]:
        """The record whose HellaSwag in the field `name` stands for the run; empty without any."""
        last_first = reversed(self.having(name))
        return max(last_first, key=lambda r: precedence(r, self.config.evaluate_data), default={})

    def scores(self, name: str) -> dict[tuple[str, int], list[dict[str, Any]]]:
        """The records with HellaSwag in the field `name` by the kind and number of their items: in the loop and at the end they
        may differ, and the numbers with them."""
        found: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for r in self.having(name):
            found.setdefault((scores_kind(r, self.config.evaluate_data), scored_items(r)), []).append(r)
        return found

    def dollars(self, seconds: float, price_per_hour: float | None = None) -> float | None:
        """None without a price, and for a run on several machines, which one price cannot fit."""
        price = self.config.price_per_hour if price_per_hour is None else price_per_hour
        return None if price is None or len(self.machines) > 1 else price * seconds / 3600

    def state(self) -> str:
        """running, finished, stopped, failed; `gone` if the run has not said how it ended and no process trains; `starting`
        before it has said anything."""
        state = self.status.get("state", "starting")
        if state == "running" and not is_locked(self.path):
            # A process lets go of its folder last: it may have said how it ended since its status was read.
            self.status = read_json(self.path / "status.json")
            state = self.status.get("state", "starting")
            return "gone" if state == "running" else state
        return state

    def state_line(self) -> str:
        """The state in a sentence, with the reason if there is one."""
        state = self.state()
        status = self.status
        at = f"at step {status.get('step', 0):,}"
        reason = f": {status['reason']}" if status.get("reason") else ""
        if state == "failed":
            rank = f" on rank {status['rank']}" if status.get("rank") is not None else ""
            return f"failed {at}{rank}{reason}"
        if state == "gone":
            return f"ended without a word, last seen {at} {_ago(self.path)}: killed, or its machine is gone"
        if state == "stopped":
            by = f" by {status['reason']}" if status.get("reason") else ""
            return f"stopped {at}{by}; the same command goes on from there"
        return {"running": f"running, {at}", "finished": f"finished {at}"}.get(state, "starting")


def check_run(path: Path) -> None:
    """
    Raises:
        ConfigError: if there is no run at `path`, with those that lie near.
    """
    if (path / "config.yaml").is_file():
        return
    around = path if path.is_dir() else path.parent
    near = sorted(str(p.parent) for p in around.glob("*/config.yaml")) if around.is_dir() else []
    hint = f"there are {', '.join(near[:5])}" if near else "a run is a folder that pretrain.py writes, such as runs/quickstart"
    what = "holds no run (no config.yaml)" if path.is_dir() else "no such run"
    raise ConfigError(f"{path}: {what}; {hint}")


def is_locked(run: Path) -> bool:
    """Whether a process trains in a run folder; True if that cannot be seen."""
    try:
        with open(run / ".lock", encoding="utf-8") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _ago(run: Path) -> str:
    from recipe.monitor.metrics import format_duration

    times = [p.stat().st_mtime for p in (run / "status.json", run / "metrics.jsonl") if p.is_file()]
    return f"{format_duration(max(0.0, time.time() - max(times)))} ago" if times else ""
