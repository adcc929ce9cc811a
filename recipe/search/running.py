"""Running the trials: as many side by side as there are places, each in a process forked from this one, which has loaded the
libraries once.

A launch costs 25 to 35 s, most of it imports and compilation. Here a run starts with the libraries of its parent and finds what
earlier runs have compiled, and the text is tokenised once for all. The parent never touches a GPU: a process forked from one
that has could not use any.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from recipe.config import NOT_PART_OF_THE_RUN, Config, ConfigError, config_fields
from recipe.data.token_index import TOKENIZER, is_prepared
from recipe.estimate import data_tokens
from recipe.search.places import find_places
from recipe.search.processes import Forked, Interrupted, Pool, preload, run_forked, signals_noted, stop_if
from recipe.search.results import Record, append, check_unchanged, key_of, make_record, read_results
from recipe.search.trials import OWN_FIELDS, TEXT_FIELDS, Job, Stage, Trial, jobs_of, show_tokens

STOPPED = 75
"""Exit code of a run that a signal has stopped."""
RESERVE = 1.1
"""A run is taken to last this much longer than earlier ones say."""
RECENT = 8
"""Runs whose start-up counts for the next one's."""
FAILURES = 2
"""Runs in a row that may fail before they have trained: after that the fault is hardly the trials'."""


class Search:
    """The jobs of some stages, what of them is done, and the next.

    Args:
        results: the file of results.
        scratch: folder for run folders, tokens and compiled code; checkpoints of stable parts are there as long as a branch
            needs them.
        more: fields of all trials, over the stages' own.
        time_limit: seconds after which nothing is running any more, by what earlier runs have taken. None: no limit.
        retry_failed: run again what has failed.
        side_by_side: how many runs go on at once. None: one on each GPU, or one.
        say: takes lines for the user.
    Raises:
        ConfigError: for fields that are wrong or differ from those of the results.
    """

    def __init__(
        self,
        stages: list[Stage],
        results: Path,
        scratch: Path,
        more: dict[str, str],
        time_limit: float | None = None,
        retry_failed: bool = False,
        side_by_side: int | None = None,
        say: Callable[[str], None] = print,
    ):
        self.stages, self.results, self.scratch, self.more = stages, results, scratch.absolute(), more
        self._limit, self._retry, self._side_by_side, self._say = time_limit, retry_failed, side_by_side, say
        self.records = read_results(results)
        check_unchanged(stages, self.records)
        self._text = _one_text(stages, more)
        self._tried: set = set()
        self._running: set = set()
        """Keys of the jobs under way."""
        self._at_once = 1
        self._began = time.monotonic()

    def run(self) -> int:
        """Start what is not done yet, in order, until all is or whatever is left would go beyond the time limit, and wait for
        its end.

        Returns:
            how many runs are left.
        Raises:
            Interrupted: if a signal came.
            ConfigError: if there are fewer GPUs than runs side by side, the text cannot be tokenised, or one run after another
                fails before it trains; runs that are under way then are stopped, without a record.
        """
        self.scratch.mkdir(parents=True, exist_ok=True)
        if self.next_job() is None:
            return 0
        with signals_noted() as received:
            self._run_all(received)
        return len(self.jobs_left())

    def _run_all(self, received: list[int]) -> None:
        # Every run finds what the ones before it have compiled.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(self.scratch / "compiled"))
        os.environ.setdefault("TRITON_CACHE_DIR", str(self.scratch / "compiled" / "triton"))
        preload()
        stop_if(received)
        places = find_places(self._side_by_side)
        self._at_once = len(places)
        text = self._prepare_text()
        self._text_tokens = data_tokens(replace(self._text, data=str(text.get("data", self._text.data))))
        with Pool(received, places) as pool:
            stopped = self._keep_busy(pool, text)
        stop_if(received)
        if stopped:
            raise Interrupted(stopped)

    def _keep_busy(self, pool: Pool, text: dict[str, Any]) -> str | None:
        """Run jobs until none is left or a signal has come.

        Returns:
            the label of a run that others have told to stop, which is taken to be meant for all; None if there was none.
        """
        failed, stopped = 0, None
        while True:
            late = self._start_jobs(pool, text)
            if not pool.running:
                if late:
                    self._say(late)
                return stopped
            ended = pool.wait()
            job = ended.what
            self._running.remove(job.key)
            if ended.code and pool.stopping:
                continue  # it was not done: no result
            if ended.code == STOPPED:
                stopped = job.label
                pool.stop()
                continue
            record = self._note(ended)
            # Step 0 is validated before it is trained.
            failed = failed + 1 if record["state"] == "failed" and not record["curve"] else 0
            if failed == FAILURES:
                raise ConfigError(
                    f"search: {failed} runs in a row have failed before their first step; mend that and give --retry_failed; "
                    f"{self._log(job)} ends with: {record['reason']}"
                )

    def _start_jobs(self, pool: Pool, text: dict[str, Any]) -> str | None:
        """Start what comes next in every free place; one that would end too late waits behind those that would not.

        Returns:
            what to say of the first that would end too late, if there is one. Once a run has ended it is looked at again: then
            more is known, and a branch of that run, whose time was reckoned with, comes before it.
        """
        late = None
        for job in self._startable():
            if not pool.has_room:
                break
            elapsed, needed = time.monotonic() - self._began, self.seconds_needed(job)
            if fits(needed, elapsed, self._limit):
                self._start(pool, job, text)
            elif late is None:
                takes = "" if needed is None else f"would take about {needed:.0f} s, and "
                left = max(0.0, self._limit - elapsed)
                late = f"{job.label}: {takes}{left:.0f} s are left; the same command goes on from here"
        return late

    def jobs_left(self) -> list[Job]:
        """What is not done, in order: of each stage the first seed of all trials, then the second, so that a search that is cut
        short has tried more. A stable part is done when no branch needs it; failed, it takes its branches along."""
        left = []
        for stage in self.stages:
            for place in range(max(len(trial.all_seeds) for trial in stage.trials)):
                for trial in stage.trials:
                    left += [job for seed in trial.all_seeds[place : place + 1] for job in self._jobs_left(trial, seed)]
        return left

    def _jobs_left(self, trial: Trial, seed: int) -> list[Job]:
        own = [job for job in jobs_of(trial) if job.seed == seed]
        stable = [job for job in own if job.kind == "stable"]
        open_jobs = [job for job in own if job.kind != "stable" and not self._done(job)]
        if not stable or not open_jobs:
            return open_jobs
        missing = any(self.checkpoint(job) is None for job in open_jobs)
        if self._failed(stable[0]) or (missing and stable[0].key in self._tried):
            return []
        return stable + open_jobs if missing else open_jobs

    def seconds_needed(self, job: Job) -> float | None:
        """That a job takes, as far as earlier ones tell; a stable part with its first branch, for alone it leaves no result,
        and its checkpoints may not outlast the machine."""
        jobs = [job]
        if job.kind == "stable":
            jobs += [other for other in self._jobs_left(job.trial, job.seed) if other.kind == "branch"][:1]
        known = [predicted_seconds(one, list(self.records.values()), self._at_once) for one in jobs]
        return None if None in known else sum(known)

    def next_job(self) -> Job | None:
        """The first that can be started now."""
        return next(self._startable(), None)

    def _startable(self) -> Iterator[Job]:
        """Those that can be started, in order, each looked at when its turn comes: one that was started may bar others."""
        return (job for job in self.jobs_left() if self._can_start(job))

    def _can_start(self, job: Job) -> bool:
        """Whether it is not under way and, for a branch, its stable part has ended: its curve begins with that one's."""
        if job.key in self._running:
            return False
        return job.kind != "branch" or (self._stable_of(job).key not in self._running and self.checkpoint(job) is not None)

    def checkpoint(self, branch: Job) -> Path | None:
        """The checkpoint that a branch goes on from, if it is there."""
        path = self._folder(self._stable_of(branch)) / "checkpoints" / f"step-{branch.start:08d}"
        return path if (path / "MANIFEST.json").is_file() else None

    def _stable_of(self, branch: Job) -> Job:
        return next(job for job in jobs_of(branch.trial) if job.kind == "stable" and job.seed == branch.seed)

    def _done(self, job: Job) -> bool:
        if job.key in self._running:
            return False  # whatever became of it before
        record = self.records.get(job.key)
        again = self._retry and job.key not in self._tried
        return record is not None and not (again and record["state"] == "failed")

    def _failed(self, job: Job) -> bool:
        return self._done(job) and self.records[job.key]["state"] == "failed"

    def _folder(self, job: Job) -> Path:
        return self.scratch / "runs" / job.label

    def _log(self, job: Job) -> Path:
        return self.scratch / "logs" / f"{job.label}.log"

    def _start(self, pool: Pool, job: Job, text: dict[str, Any]) -> None:
        folder, checkpoint = self._folder(job), None
        if job.kind == "branch":
            checkpoint = self.checkpoint(job)
        if job.kind != "stable":
            shutil.rmtree(folder, ignore_errors=True)  # what a search that was killed has left
        log = self._log(job)
        log.parent.mkdir(exist_ok=True)
        arguments = job.arguments(folder, checkpoint, self.more | text)
        self._say(f"{job.label}: {show_tokens(job.tokens)} tokens, to step {job.steps}")
        self._tried.add(job.key)
        self._running.add(job.key)
        pool.start(job, arguments, log)

    def _note(self, ended: Forked) -> Record:
        """Add what a run has come to to the results."""
        job: Job = ended.what
        stable = self.records.get(self._stable_of(job).key) if job.kind == "branch" else None
        log = self._log(job)
        record = make_record(
            job, self._folder(job), ended.code, ended.seconds, stable, log, self._text_tokens, side_by_side=ended.at_once
        )
        append(self.results, record)
        self.records[key_of(record)] = record
        self._say(f"{job.label}: {describe(record)}")
        self._tidy(job)
        return record

    def _tidy(self, job: Job) -> None:
        """Delete the run folder, but for a model to keep and for checkpoints that a branch still needs."""
        if job.kind == "stable":
            if self._failed(job):
                shutil.rmtree(self._folder(job), ignore_errors=True)
            return
        if not job.trial.keep:
            shutil.rmtree(self._folder(job), ignore_errors=True)
        if job.kind == "branch":
            stable = self._stable_of(job)
            others = [j for j in jobs_of(job.trial) if j.kind == "branch" and j.seed == job.seed]
            if all(self._done(other) for other in others):
                shutil.rmtree(self._folder(stable), ignore_errors=True)

    def _prepare_text(self) -> dict[str, Any]:
        """Tokenise the text, validation and all, unless that is done; the fields that name the tokens."""
        if is_prepared(self._text.data):
            return {}
        values = {name: getattr(self._text, name) for name in sorted(TEXT_FIELDS)}
        name = hashlib.sha256(json.dumps(values).encode()).hexdigest()[:12]
        folder = self.scratch / f"tokens-{name}"
        if not is_prepared(str(folder)):
            self._say(f"tokenising {self._text.data}")
            log = self.scratch / "tokenising.log"
            self._text.output_dir = str(folder)
            if run_forked([], log, lambda _: _tokenise(self._text)):
                raise ConfigError(f"data: {self._text.data} could not be tokenised: {_last_line(log)}")
        # The tokens' own tokenizer, if it has no name that others know: every run would load both to compare them.
        own = os.path.exists(os.path.expanduser(self._text.tokenizer))
        return {"data": folder, "validation_data": None, "tokenizer": folder / TOKENIZER if own else self._text.tokenizer}


def fits(needed: float | None, elapsed: float, limit: float | None) -> bool:
    """Whether a run that takes `needed` seconds, None if nobody knows, ends before the limit."""
    if limit is None:
        return True
    return elapsed < limit and (needed is None or elapsed + needed <= limit)


def predicted_seconds(job: Job, records: list[Record], at_once: int = 1) -> float | None:
    """How long a job takes, by those before it: start-up, validation and the rest as the median of the latest, and its tokens
    at the speed of the most alike. None if there were none.

    Args:
        at_once: how many runs, itself among them, share the host.
    """
    known = [r for r in records if r["state"] == "finished" and r["own_train_seconds"] > 0]
    if not known:
        return None
    device = known[-1]["device"]
    known = [r for r in known if r["device"] == device]
    # On a CPU, and in what a GPU's run does on one, those with fewer beside them were faster.
    known = [r for r in known if r.get("side_by_side", 1) >= at_once] or known
    alike = [r for r in known if (r["stage"], r["name"]) == (job.trial.stage, job.trial.name)]
    alike = alike or [r for r in known if r["group"] == job.trial.group] or known
    speed = min(r["own_tokens"] / r["own_train_seconds"] for r in alike)
    other = statistics.median(r["wall_seconds"] - r["own_train_seconds"] for r in known[-RECENT:])
    return RESERVE * (job.tokens / speed + other)


def describe(record: Record) -> str:
    """What came of a run, in a line."""
    if record["state"] == "failed":
        return f"failed at step {record['steps']}: {record['reason']}"
    return (
        f"validation loss {record['val_loss']:.4f} after {show_tokens(record['tokens'])} tokens, "
        f"{record['tokens_per_second']:,.0f} tokens/s, {record['wall_seconds']:.0f} s"
    )


def _tokenise(config: Config) -> int:
    from recipe.cli import report_fault
    from recipe.data.preparation import prepare

    try:
        prepare(config, len(os.sched_getaffinity(0)))
    except Exception as error:
        report_fault(error, 0)
        return 1
    return 0


def _one_text(stages: list[Stage], more: dict[str, str]) -> Config:
    """The configuration of the text, which all trials share.

    Raises:
        ConfigError: if they do not, or a field is wrong.
    """
    texts: dict[tuple, tuple[str, Config]] = {}
    problems: list[str] = []
    for name in more:
        if name not in config_fields():
            problems.append(f"{name}: unknown field (command line); scripts/pretrain.py --help lists the fields")
        elif name in OWN_FIELDS or name not in TEXT_FIELDS | NOT_PART_OF_THE_RUN:
            problems.append(f"{name}: (command line) is part of the trials; put it into the stage's file, below `set`")
    for stage in stages if not problems else ():
        for trial in stage.trials:
            config, found = trial.config(trial.budgets[0], trial.seeds[0], **more)
            problems += [f"{stage.file}: {trial.name}: {problem}" for problem in found]
            texts.setdefault(tuple(getattr(config, name) for name in sorted(TEXT_FIELDS)), (stage.file, config))
    if len(texts) > 1:
        (first, a), (second, b) = list(texts.values())[:2]
        differing = [name for name in sorted(TEXT_FIELDS) if getattr(a, name) != getattr(b, name)]
        problems.append(f"{second}: {differing[0]}: differs from that of {first}; give --{differing[0]} for all of them")
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    return next(iter(texts.values()))[1]


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "nothing was printed"
