"""The search: stage files, what is run next, what follows from the results. The runs themselves: test_search_runs.py."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch import ROOT, environment
from recipe.config import Config, ConfigError
from recipe.parsing import load_config
from recipe.plan import make_plan
from recipe.search import places, processes, running
from recipe.search.comparison import End, ends_of, fit_group, literature_floor, noise_of, predict, ratios_of, trained
from recipe.search.places import find_places
from recipe.search.processes import Forked, Interrupted, Pool, run_forked, signals_noted
from recipe.search.report import SECTIONS, section_pattern, write_report
from recipe.search.results import append, check_unchanged, key_of, overrides_of, read_results
from recipe.search.running import Search, fits, predicted_seconds
from recipe.search.statistics import (
    Noise,
    Point,
    PowerLaw,
    Reached,
    bootstrap,
    fit_power_law,
    gain,
    interval,
    residual_deviation,
    seed_noise,
    t_95,
    tokens_along,
    tokens_to_reach,
)
from recipe.search.trials import Job, Stage, jobs_of, load_stages, parse_tokens, show_tokens
from recipe.watchdog import has_ended

STAGES = sorted((ROOT / "configs" / "search").glob("*.yaml"))
STAGE = """
stage: tiny
base: base.yaml
baseline: cosine
budgets: [20k, 40k]
seeds: [0, 1]
points: 4
set: {batch_tokens: 1024, micro_batch_size: 4, sequence_length: 64, n_embd: 32, n_head: 2, n_layer: 2}
trials:
  - {name: cosine, group: llmc, set: {learning_rate: 6.0e-4, warmup_steps: 0.1, schedule: cosine}}
  - name: muon
    group: fast
    branch: true
    seeds: [0]
    seeds_at: {40k: [0, 1]}
    set: {optimizer: muon, schedule: trapezoidal, warmup_steps: 2, decay_steps: 0.4}
"""


def write_stage(folder: Path, text: str = STAGE, name: str = "tiny.yaml") -> Path:
    (folder / "base.yaml").write_text("learning_rate: 1.0e-3\n", encoding="utf-8")
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def problems_of(path: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_stages([path])
    return caught.value.problems


# --- stage files ------------------------------------------------------------------------------------------------------


def test_a_stage_becomes_jobs(tmp_path: Path) -> None:
    (stage,) = load_stages([write_stage(tmp_path)])
    assert (stage.name, stage.compare, stage.baseline) == ("tiny", "trials", "tiny/cosine")
    cosine, muon = (jobs_of(trial) for trial in stage.trials)
    assert [(j.kind, j.seed, j.budget, j.steps) for j in cosine] == [
        ("run", 0, 20_000, 20), ("run", 0, 40_000, 40), ("run", 1, 20_000, 20), ("run", 1, 40_000, 40),
    ]  # fmt: skip
    # The decays are the last 40% of each budget; seed 1 has the larger budget alone, and a shorter list of checkpoints.
    assert [(j.kind, j.seed, j.budget, j.start, j.save_at, j.tokens) for j in muon] == [
        ("stable", 0, 0, 0, (12, 24), 24 * 1024), ("branch", 0, 20_000, 12, (), 8 * 1024),
        ("branch", 0, 40_000, 24, (), 16 * 1024), ("stable", 1, 0, 0, (24,), 24 * 1024),
        ("branch", 1, 40_000, 24, (), 16 * 1024),
    ]  # fmt: skip


def test_a_job_is_a_command_of_pretrain(tmp_path: Path) -> None:
    (stage,) = load_stages([write_stage(tmp_path)])
    run = jobs_of(stage.trials[0])[1]
    config = load_config(run.arguments(tmp_path / "run", None, {"data": "text"}))
    assert (config.learning_rate, config.data, config.eval_every, config.keep_model, config.resume) == (
        6e-4, "text", 10, False, "none",
    )  # fmt: skip
    stable, short, *_ = jobs_of(stage.trials[1])
    stable_config = load_config(stable.arguments(tmp_path / "stable", None, {}))
    assert (stable_config.max_steps, stable_config.max_tokens, stable_config.save_at) == (24, None, "12,24")
    assert make_plan(stable_config, 1).decay_steps == 0
    branch = load_config(short.arguments(tmp_path / "short", tmp_path / "stable" / "step", {}))
    assert (branch.resume, branch.max_tokens) == (str(tmp_path / "stable" / "step"), 20_000)
    assert make_plan(branch, 1).warmup_steps == make_plan(stable_config, 1).warmup_steps == 2


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("seeds: [0, 1]", "seed: [0, 1]", "seed: unknown; did you mean seeds?"),
        ("seeds: [0, 1]", "seeds: [0, -1]", "cosine: seeds: -1 is not whole numbers"),
        ("seeds: [0, 1]", "seeds: 0", "cosine: seeds: 0 is not a list"),
        ("[20k, 40k]", "[20k, 40x]", "cosine: budgets: '40x' is not tokens such as 25M"),
        ("[20k, 40k]", "[20k, 20k]", "cosine: budgets: holds one twice"),
        ("seeds_at: {40k", "seeds_at: {50k", "muon: seeds_at: '50k' is not one of the trial's budgets"),
        ("points: 4", "points: many", "cosine: points: 'many' is not a whole number"),
        ("base: base.yaml", "base: other.yaml", "other.yaml: no such config file"),
        ("baseline: cosine", "baseline: sine", "baseline: there is no trial tiny/sine"),
        ("baseline: cosine", "compare: groups2", "compare: 'groups2' is neither trials nor groups"),
        ("baseline: cosine", "", "baseline: not given"),
        ("name: muon", "name: cosine", "name: cosine is given to two trials"),
        ("name: muon", "name: mu on", "name: 'mu on' is not a name"),
        ("group: llmc", "group: llm.c", "cosine: group: 'llm.c' is not one of llmc, adamw, fast"),
        ("branch: true", "branch: 1", "muon: branch: 1 is not true or false"),
        ("learning_rate: 6.0e-4", "learning_rat: 6.0e-4", "cosine: learning_rat: unknown field"),
        ("learning_rate: 6.0e-4", "learning_rate: fast", "cosine: learning_rate: 'fast' (command line) is not a number"),
        ("learning_rate: 6.0e-4", "max_steps: 5", "cosine: max_steps: (the trial) follows from the trial's budgets"),
        ("learning_rate: 6.0e-4", "data: x", "cosine: data: is the same for all trials"),
        ("warmup_steps: 0.1", "warmup_steps: 30", "cosine: warmup_steps: 30 steps of warm-up do not fit"),
        ("batch_tokens: 1024", "batch_tokens: 1000", "cosine: batch_tokens: 1000 is not a multiple"),
        ("schedule: trapezoidal, ", "", "muon: schedule: cosine has no stable part to branch off"),
        ("warmup_steps: 2,", "warmup_steps: 0.1,", "muon: warmup_steps: a share of the run differs with the budget"),
        ("decay_steps: 0.4", "decay_steps: 0", "muon: decay_steps: 0 leaves branches nothing to decay over"),
    ],
)
def test_a_mistake_is_named_with_file_trial_and_field(tmp_path: Path, old: str, new: str, expected: str) -> None:
    assert old in STAGE
    problems = problems_of(write_stage(tmp_path, STAGE.replace(old, new)))
    assert any(expected in problem for problem in problems), problems
    assert all(problem.startswith(str(tmp_path)) for problem in problems)


def test_files_that_are_no_stages(tmp_path: Path) -> None:
    assert "cannot be read" in problems_of(tmp_path / "missing.yaml")[0]
    assert "not valid YAML" in problems_of(write_stage(tmp_path, "stage: ["))[0]
    assert "found list" in problems_of(write_stage(tmp_path, "- a"))[0]
    twice = [write_stage(tmp_path), write_stage(tmp_path, name="again.yaml")]
    with pytest.raises(ConfigError, match="tiny is in two files"):
        load_stages(twice)


def test_all_problems_at_once(tmp_path: Path) -> None:
    text = STAGE.replace("group: llmc", "group: none").replace("decay_steps: 0.4", "decay_steps: -1")
    assert len(problems_of(write_stage(tmp_path, text))) == 2


def test_the_project_s_stages_are_sound() -> None:
    stages = load_stages(STAGES)
    assert [stage.name.split("-")[0] for stage in stages] == ["1", "2", "3", "3", "4", "5"]
    assert stages[4].compare == "groups" and {t.group for t in stages[4].trials} == {"llmc", "adamw", "fast"}
    trials = {f"{stage.name}/{trial.name}": trial for stage in stages for trial in stage.trials}
    for stage in stages:
        if stage.compare == "groups":
            continue
        baseline = trials[stage.baseline]
        assert len(baseline.seeds) >= 3 or stage.baseline == "4-budgets/fast", "the noise rests on it"
        for trial in stage.trials:
            if stage.name != "1-baselines" and trial is not baseline:
                differing = [k for k, v in trial.fields.items() if baseline.fields.get(k) != v]
                # Two that were tried alone as well, the schedule in stage 1.
                together = trial.name == "trapezoidal-sequence-ramp-256"
                assert together or len(differing) == 1, f"{trial.name}: one thing at a time"
    warmup = 700 / 19_560
    assert all(t.fields["warmup_steps"] == round(warmup, 4) for s in stages for t in s.trials if t.group == "llmc")


def test_tokens_as_words() -> None:
    assert [parse_tokens(t) for t in ("25M", "1.5B", "800k", 12)] == [25_000_000, 1_500_000_000, 800_000, 12]
    assert [show_tokens(t) for t in (25_034_752, 1.5e9, 800)] == ["25.03M", "1.5B", "800"]
    for bad in ("25", "M", "25m", True, 0, -1, 2.5, None, [1]):
        with pytest.raises(ValueError):
            parse_tokens(bad)


# --- what is run next -------------------------------------------------------------------------------------------------


def record_of(job, **fields) -> dict:
    return {
        "stage": job.trial.stage, "name": job.trial.name, "group": job.trial.group, "seed": job.seed, "kind": job.kind,
        "budget": job.budget, "state": "finished", "device": "card", "own_tokens": job.tokens, "own_train_seconds": 10.0,
        "wall_seconds": 15.0, "overrides": {},
    } | fields  # fmt: skip


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return load_stages([write_stage(tmp_path)])[0]


def search(stage: Stage, tmp_path: Path, **options) -> Search:
    return Search(
        [stage], tmp_path / "results.jsonl", tmp_path / "scratch", {"data": str(tmp_path)}, say=lambda _: None, **options
    )


def finish(stage: Stage, tmp_path: Path, jobs, **fields) -> None:
    for job in jobs:
        append(tmp_path / "results.jsonl", record_of(job, overrides=overrides_of(job.trial), **fields))


def test_what_is_in_the_results_is_not_run_again(stage: Stage, tmp_path: Path) -> None:
    assert len(search(stage, tmp_path).jobs_left()) == 9
    cosine, muon = (jobs_of(trial) for trial in stage.trials)
    finish(stage, tmp_path, cosine[:1])
    assert search(stage, tmp_path).next_job().label == "tiny-cosine-seed0-40k"
    finish(stage, tmp_path, cosine[1:2], state="failed", reason="no memory")
    assert search(stage, tmp_path).next_job().label == "tiny-muon-seed0-stable"
    assert search(stage, tmp_path, retry_failed=True).next_job().label == "tiny-cosine-seed0-40k"


def test_the_first_seed_of_all_trials_comes_before_the_second(stage: Stage, tmp_path: Path) -> None:
    assert [(job.trial.name, job.seed, job.kind) for job in search(stage, tmp_path).jobs_left()] == [
        ("cosine", 0, "run"), ("cosine", 0, "run"), ("muon", 0, "stable"), ("muon", 0, "branch"), ("muon", 0, "branch"),
        ("cosine", 1, "run"), ("cosine", 1, "run"), ("muon", 1, "stable"), ("muon", 1, "branch"),
    ]  # fmt: skip


def test_the_first_runs_of_the_project_s_stages_tell_most(tmp_path: Path) -> None:
    def first_eight(number: int) -> list[str]:
        jobs = Search(load_stages([STAGES[number - 1]]), tmp_path / "none", tmp_path, {"data": str(tmp_path)}).jobs_left()
        return [job.trial.name for job in jobs[:8]]

    grid = {f"adamw-{rate}" for rate in ("6e-4", "1.2e-3", "1.8e-3", "2.4e-3", "3e-3")}
    assert {"llmc-cosine", "llmc-constant"} | grid < set(first_eight(1)), "no rate waits for the second seed of another"
    assert {"muon", "muon-rate-0.01", "muon-rate-0.03", "rate-1.2e-3", "rate-3e-3", "batch-32k"} < set(first_eight(2))


def test_a_branch_needs_its_checkpoint(stage: Stage, tmp_path: Path) -> None:
    cosine, muon = (jobs_of(trial) for trial in stage.trials)
    finish(stage, tmp_path, [*cosine, muon[0]])
    found = search(stage, tmp_path)
    assert found.next_job().kind == "stable", "its checkpoints are lost: it is run again"
    for start in (12, 24):
        folder = tmp_path / "scratch" / "runs" / "tiny-muon-seed0-stable" / "checkpoints" / f"step-{start:08d}"
        folder.mkdir(parents=True)
        (folder / "MANIFEST.json").write_text("{}")
    assert found.next_job().label == "tiny-muon-seed0-20k" and found.checkpoint(muon[2]) == folder
    finish(stage, tmp_path, muon[1:3])
    assert [job.seed for job in search(stage, tmp_path).jobs_left()] == [1, 1]
    finish(stage, tmp_path, [muon[3]], state="failed", reason="loss is not finite")
    assert search(stage, tmp_path).jobs_left() == [], "no branch of what has failed"


def test_no_run_is_started_that_would_end_too_late(stage: Stage) -> None:
    cosine, muon = (jobs_of(trial) for trial in stage.trials)
    known = [record_of(cosine[0], own_tokens=20_480, own_train_seconds=10.0, wall_seconds=15.0)]
    # 40,960 tokens at 2,048 tokens/s, 5 s beside them, a tenth more.
    assert predicted_seconds(cosine[1], known) == pytest.approx(1.1 * 25)
    slower = record_of(muon[0], own_tokens=10_240, own_train_seconds=10.0, wall_seconds=13.0)
    assert predicted_seconds(muon[2], [*known, slower]) == pytest.approx(1.1 * (16 + 4)), "the like of it counts first"
    elsewhere = record_of(cosine[1], own_tokens=1, device="another card")
    assert predicted_seconds(cosine[1], [elsewhere, *known]) == pytest.approx(1.1 * 25)
    assert predicted_seconds(cosine[1], [record_of(cosine[0], state="failed")]) is None
    crowded = record_of(cosine[0], own_tokens=20_480, own_train_seconds=20.0, wall_seconds=30.0, side_by_side=2)
    assert predicted_seconds(cosine[1], [crowded, *known], at_once=2) == pytest.approx(1.1 * 50), "not by one that was alone"
    assert predicted_seconds(cosine[1], [crowded, *known], at_once=3) == pytest.approx(1.1 * (40 + 7.5)), "for want of others"
    assert fits(None, 0, 100) and not fits(None, 101, 100) and fits(1e9, 1e9, None)
    assert fits(27.5, 72.5, 100) and not fits(27.6, 72.5, 100)


def test_a_stable_part_needs_time_for_a_branch_as_well(stage: Stage, tmp_path: Path) -> None:
    def seconds_needed() -> float | None:
        found = search(stage, tmp_path)
        return found.seconds_needed(found.next_job())

    cosine, muon = (jobs_of(trial) for trial in stage.trials)
    assert seconds_needed() is None
    finish(stage, tmp_path, cosine[:1])
    assert seconds_needed() == pytest.approx(1.1 * (20 + 5))
    finish(stage, tmp_path, cosine[1:2])
    # 24 steps to the last checkpoint and 8 of the first decay, at 2 a second or more; start-up twice.
    assert seconds_needed() == pytest.approx(1.1 * (12 + 5 + 4 + 5))


def test_trials_that_were_edited_are_refused(stage: Stage, tmp_path: Path) -> None:
    (job, *_) = jobs_of(stage.trials[0])
    finish(stage, tmp_path, [job])
    edited = load_stages([write_stage(tmp_path, STAGE.replace("6.0e-4", "7.0e-4"))])[0]
    with pytest.raises(ConfigError, match=r"tiny.yaml: cosine: .*learning_rate is 0.0006 there and 0.0007 here"):
        search(edited, tmp_path)
    check_unchanged([stage], read_results(tmp_path / "results.jsonl"))


def test_fields_of_the_recipe_belong_into_the_stage(stage: Stage, tmp_path: Path) -> None:
    for name, value in (("learning_rate", "1"), ("seed", "1"), ("learning_rat", "1")):
        with pytest.raises(ConfigError, match=f"{name}: .*"):
            Search([stage], tmp_path / "results.jsonl", tmp_path, {name: value})


def test_the_results_file(tmp_path: Path, stage: Stage) -> None:
    path = tmp_path / "results.jsonl"
    job = jobs_of(stage.trials[0])[0]
    append(path, record_of(job, val_loss=1.0))
    with open(path, "a") as handle:
        handle.write('{"stage": "tiny", "na')  # of a machine that was taken away
    append(path, record_of(job, state="failed", reason="x"))
    assert read_results(path)[job.key]["val_loss"] == 1.0, "a failure does not replace a result"
    append(path, record_of(job, val_loss=2.0))
    assert read_results(path)[job.key]["val_loss"] == 2.0 and key_of(read_results(path)[job.key]) == job.key
    path.write_text(json.dumps({"step": 1}) + "\n")
    with pytest.raises(ConfigError, match="not a file of results"):
        read_results(path)


def test_a_forked_process_tells_how_it_ended(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def talk(words: list[str]) -> int:
        print("words:", *words)
        return 7

    assert run_forked(["a", "b"], log, talk) == 7 and log.read_text() == "words: a b\n"
    assert run_forked([], log, lambda _: os.kill(os.getpid(), signal.SIGKILL)) == -signal.SIGKILL

    def fail(_: list[str]) -> int:
        raise RuntimeError("broken")

    assert run_forked([], log, fail) == 1 and "RuntimeError: broken" in log.read_text()


def tell_when(ready: Path) -> threading.Thread:
    def tell() -> None:
        while not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=tell)
    thread.start()
    return thread


def test_a_signal_reaches_the_run(tmp_path: Path) -> None:
    def wait(_: list[str]) -> int:
        stopped = []
        signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
        (tmp_path / "ready").touch()
        while not stopped:
            time.sleep(0.01)
        (tmp_path / "stopped").touch()
        return 75

    tell_when(tmp_path / "ready")
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="SIGTERM"):
        run_forked([], tmp_path / "log", wait)
    assert (tmp_path / "stopped").exists() and signal.getsignal(signal.SIGTERM) is before


def test_a_closed_terminal_stops_the_search_unless_nohup_has_it_ignored() -> None:
    with signals_noted() as received:
        signal.raise_signal(signal.SIGHUP)
    assert received == [signal.SIGHUP]
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals_noted() as received:
            signal.raise_signal(signal.SIGHUP)
        assert not received and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_ends_a_process_that_has_no_handler_yet(tmp_path: Path) -> None:
    def set_up(_: list[str]) -> int:
        (tmp_path / "ready").touch()
        time.sleep(30)
        return 0

    tell_when(tmp_path / "ready")
    began = time.monotonic()
    with pytest.raises(Interrupted, match="SIGTERM"):
        run_forked([], tmp_path / "log", set_up)
    assert time.monotonic() - began < 20


def test_a_run_that_was_done_when_the_signal_came_counts(tmp_path: Path) -> None:
    def finish_first(_: list[str]) -> int:
        told = []
        signal.signal(signal.SIGTERM, lambda *_: told.append(1))
        (tmp_path / "ready").touch()
        while not told:
            time.sleep(0.01)
        return 0

    tell_when(tmp_path / "ready")
    with signals_noted() as received:
        assert run_forked([], tmp_path / "log", finish_first) == 0
        assert received == [signal.SIGTERM], "the search stops after it"


def test_nothing_that_a_run_has_started_is_left(tmp_path: Path) -> None:
    def leave(_: list[str]) -> int:
        print(subprocess.Popen(["sleep", "60"]).pid)
        return 0

    assert run_forked([], tmp_path / "log", leave) == 0
    left = int((tmp_path / "log").read_text())
    deadline = time.monotonic() + 5
    while not has_ended(left) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert has_ended(left)


def test_each_process_has_a_place_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CARD", "none")

    def report(words: list[str]) -> int:
        (name,) = words
        (tmp_path / name).write_text(os.environ["CARD"])
        while name != "third" and not (tmp_path / f"{name}-may-end").exists():
            time.sleep(0.01)
        return 0

    def wait_for(name: str) -> str:
        deadline = time.monotonic() + 20
        while not ((tmp_path / name).exists() and (tmp_path / name).read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return (tmp_path / name).read_text()

    with Pool([], [{"CARD": "a"}, {"CARD": "b"}]) as pool:
        for name in ("first", "second"):
            assert pool.has_room
            pool.start(name, [name], tmp_path / f"{name}.log", report)
        assert not pool.has_room
        assert (wait_for("first"), wait_for("second")) == ("a", "b"), "both are under way"
        (tmp_path / "second-may-end").touch()
        ended = pool.wait()
        assert (ended.what, ended.code, ended.at_once) == ("second", 0, 2) and pool.has_room
        pool.start("third", ["third"], tmp_path / "third.log", report)
        assert pool.wait().what == "third" and wait_for("third") == "b", "in the place that was free"
        (tmp_path / "first-may-end").touch()
        ended = pool.wait()
        assert (ended.what, ended.at_once, pool.running) == ("first", 2, []), "the others came later"
    assert os.environ["CARD"] == "none"


def sleep_long(ready: Path, stubborn: bool = False):
    """A main that sleeps until it is told to stop, or for a minute."""

    def main(_: list[str]) -> int:
        stopped = []
        signal.signal(signal.SIGTERM, lambda *_: None if stubborn else stopped.append(1))
        print(os.getpid(), subprocess.Popen(["sleep", "60"]).pid, flush=True)
        ready.touch()
        deadline = time.monotonic() + 60
        while not stopped and time.monotonic() < deadline:
            time.sleep(0.01)
        return 75

    return main


def pids_in(*logs: Path) -> list[int]:
    return [int(word) for log in logs for word in log.read_text().split()]


def all_end(pids: list[int]) -> bool:
    deadline = time.monotonic() + 5
    while not all(map(has_ended, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return all(map(has_ended, pids))


def test_a_signal_stops_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "STOP_PATIENCE_S", 0.5)
    logs = [tmp_path / f"{name}.log" for name in range(3)]
    received: list[int] = []
    with Pool(received, [{}, {}, {}]) as pool:
        for number, log in enumerate(logs):
            pool.start(number, [], log, sleep_long(tmp_path / f"ready-{number}", stubborn=number == 1))
        while not all((tmp_path / f"ready-{number}").exists() for number in range(3)):
            time.sleep(0.01)
        os.kill(pool.running[2].pid, signal.SIGKILL)
        assert (pool.wait().code, len(pool.running)) == (-signal.SIGKILL, 2), "of one that was killed the others know nothing"
        received.append(signal.SIGTERM)
        assert not pool.has_room, "nothing is started any more"
        codes = {(ended := pool.wait()).what: ended.code for _ in range(2)}
    assert codes == {0: 75, 1: -signal.SIGKILL}, "one stops; one does not, and is killed"
    assert len(pids_in(*logs)) == 6 and all_end(pids_in(*logs))


def test_nothing_is_left_of_a_pool_that_an_error_ends(tmp_path: Path) -> None:
    logs = [tmp_path / "0.log", tmp_path / "1.log"]
    with pytest.raises(OSError, match="full"), Pool([], [{}, {}]) as pool:
        for number, log in enumerate(logs):
            pool.start(number, [], log, sleep_long(tmp_path / f"ready-{number}"))
        while not all((tmp_path / f"ready-{number}").exists() for number in range(2)):
            time.sleep(0.01)
        raise OSError("the disk is full")
    assert len(pids_in(*logs)) == 4 and all_end(pids_in(*logs))


# --- runs side by side ------------------------------------------------------------------------------------------------

COUNTED: list[int] = []


def three_cards() -> int:
    COUNTED.append(1)
    return 3


def no_card() -> int:
    return 0


def test_every_gpu_is_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "count_gpus", three_cards)

    def cards(wanted: int | None, visible: str | None) -> list[str]:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        found = find_places(wanted)
        share = str(max(1, os.cpu_count() // len(found)))
        assert {place["OMP_NUM_THREADS"] for place in found} == {share}, "each takes its share of the cores"
        return [place["CUDA_VISIBLE_DEVICES"] for place in found]

    assert cards(None, None) == ["0", "1", "2"] and cards(2, None) == ["0", "1"] and cards(3, None) == ["0", "1", "2"]
    assert cards(None, "7,GPU-ab, 5") == ["7", "GPU-ab", "5"] and cards(1, "7,2,5") == ["7"]
    assert cards(None, "4,5,6,99") == ["4", "5", "6"], "no run on a card that is not there"
    with pytest.raises(
        ConfigError, match="side_by_side: 4 is more than this host's 3 GPUs, .*; give 3 at most, or leave it at auto"
    ):
        find_places(4)
    assert not COUNTED, "this process, which forks the runs, asks no driver"


def test_without_a_gpu_runs_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "count_gpus", no_card)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert find_places(None) == [{"LOCAL_WORLD_SIZE": "1"}] and find_places(2) == [{"LOCAL_WORLD_SIZE": "2"}] * 2


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "all", ""])
def test_a_number_of_runs_that_is_none_is_refused(value: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "search.py"), str(STAGES[0]), f"--side_by_side={value}"]
    command += ["--results", str(tmp_path / "results.jsonl"), "--list"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and not done.stdout
    assert f"side_by_side: {value!r} (command line) is neither auto nor a whole number above 0" in done.stderr


class Host:
    """Stands in for the Pool, on a clock of its own: a step takes a second and all else of a run 5 s. A run leaves in its
    folder what pretrain.py does. Whenever the search waits, nothing that could run may be left.

    Attributes:
        events: (seconds, "start" or "end", label, place), in order.
        codes: exit codes other than 0, by label.
        done: labels of what is in the results before the search.
        may_idle: whether the search has a reason to leave a place free.
        at_end: called with a label when its run has ended.
    """

    def __init__(self, stage: Stage, monkeypatch: pytest.MonkeyPatch, count: int):
        self.jobs = {job.label: job for trial in stage.trials for job in jobs_of(trial)}
        self.count, self.now, self.may_idle = count, 0.0, False
        self.events, self.codes, self.done, self.at_end = [], {}, set(), lambda label: None
        self.running: list[Forked] = []
        self._told = False
        self._configs: dict[str, Config] = {}
        for name, value in {
            "time": SimpleNamespace(monotonic=lambda: self.now),
            "Pool": self.open,
            "preload": lambda: None,
            "find_places": lambda wanted: [{"CARD": str(n)} for n in range(wanted)],
            "data_tokens": lambda config: 10_000,
        }.items():
            monkeypatch.setattr(running, name, value)
        monkeypatch.setattr(Search, "_prepare_text", lambda self: {})
        for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
            monkeypatch.setenv(name, "as it was")

    def open(self, received: list[int], given: list[dict[str, str]]) -> Host:
        assert given == [{"CARD": str(n)} for n in range(self.count)]
        self.received = received
        return self

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._told = True

    @property
    def stopping(self) -> bool:
        return self._told or bool(self.received)

    @property
    def has_room(self) -> bool:
        return not self.stopping and len(self.running) < self.count

    def labels(self, kind: str) -> list[str]:
        return [label for _, event, label, _ in self.events if event == kind]

    def could_run(self) -> list[str]:
        """What is neither done nor started, nor waits for a stable part."""
        seen, over = self.done | set(self.labels("start")), self.done | set(self.labels("end"))
        left = [job for label, job in self.jobs.items() if label not in seen]
        return [j.label for j in left if j.kind != "branch" or f"tiny-{j.trial.name}-seed{j.seed}-stable" in over]

    def start(self, job: Job, arguments: list[str], log: Path) -> None:
        assert self.has_room and job.label not in self.labels("start")
        config = self._configs[job.label] = load_config(arguments)
        if job.kind == "branch":
            assert (Path(config.resume) / "MANIFEST.json").is_file()
        for step in job.save_at:  # those of a stable part are there before its end
            saved = Path(config.output_dir) / "checkpoints" / f"step-{step:08d}"
            saved.mkdir(parents=True)
            (saved / "MANIFEST.json").touch()
        place = min(set(range(self.count)) - {one.place for one in self.running})
        self.events.append((self.now, "start", job.label, place))
        self.running.append(Forked(job, 0, place, self.now))
        for one in self.running:
            one.at_once = max(one.at_once, len(self.running))

    def wait(self) -> Forked:
        assert self.may_idle or not self.has_room or not self.could_run()
        ends = {id(one): one.began + 5 + one.what.tokens / 1024 for one in self.running}
        one = min(self.running, key=lambda one: ends[id(one)])
        self.running.remove(one)
        self.now = self.now if self.stopping else ends[id(one)]
        self.events.append((self.now, "end", one.what.label, one.place))
        one.code, one.seconds = self.codes.get(one.what.label, 0), self.now - one.began
        self._leave_files(one.what, one.code)
        self.at_end(one.what.label)
        return one

    def _leave_files(self, job: Job, code: int) -> None:
        config = self._configs[job.label]
        if job.kind == "branch":
            assert (Path(config.resume) / "MANIFEST.json").is_file(), "deleted while a branch needed it"
        if code:
            return
        folder = Path(config.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "environment.json").write_text(json.dumps({"hardware": {"gpu": "card"}}))
        (folder / "status.json").write_text(json.dumps({"state": "finished"}))
        steps = [
            {"step": n, "tokens": n * 1024, "train_loss": 3.0, "step_seconds": 1.0, "tokens_per_second": 1024.0}
            for n in range(job.start + 1, job.steps + 1)
        ]
        last = {"step": job.steps, "tokens": job.steps * 1024, "val_loss": 3.0}
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*steps, last]))


def run_search(stage: Stage, tmp_path: Path, count: int, **options) -> tuple[int, list[str]]:
    """How many runs are left, and what was said."""
    said: list[str] = []
    results, scratch = tmp_path / "results.jsonl", tmp_path / "scratch"
    found = Search([stage], results, scratch, {"data": str(tmp_path)}, side_by_side=count, say=said.append, **options)
    return found.run(), said


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_no_place_is_idle_and_no_branch_early(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    order = [job.label for job in search(stage, tmp_path).jobs_left()]
    host = Host(stage, monkeypatch, count)
    left, said = run_search(stage, tmp_path, count)
    started = host.labels("start")
    assert left == 0 and sorted(started) == sorted(order) == sorted(host.labels("end")), "each of them, once"
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [r["state"] for r in records] == ["finished"] * 9 and max(r["side_by_side"] for r in records) == min(count, 6)
    assert len(said) == 18 and [line.split(":")[0] for line in said] == [label for _, _, label, _ in host.events]
    if count == 1:
        assert started == order and [event for _, event, _, _ in host.events] == ["start", "end"] * 9
        assert all(r["side_by_side"] == 1 for r in records)
    else:
        free = [label for label in order if host.jobs[label].kind != "branch"]
        assert [label for label in started if label in free] == free, "what waits for nothing is started in order"
        # The stable part and the longer branch of a seed are its longest way.
        assert count < 6 or host.now == max(45, 29 + 21)
    for one in (job for job in host.jobs.values() if job.kind == "branch"):
        stable = f"tiny-muon-seed{one.seed}-stable"
        events = [(event, label) for _, event, label, _ in host.events]
        assert events.index(("end", stable)) < events.index(("start", one.label))
    busy: dict[int, str] = {}
    for _, event, label, place in host.events:
        assert (busy.setdefault(place, label) if event == "start" else busy.pop(place)) == label, "one run in a place"
    assert not list((tmp_path / "scratch" / "runs").iterdir()), "nothing needs the stable parts any more"


def test_a_stable_part_stays_for_a_branch_that_is_tried_again(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cosine, muon = (jobs_of(trial) for trial in stage.trials)
    finish(stage, tmp_path, cosine)
    finish(stage, tmp_path, muon[1:3], state="failed", reason="no memory")
    host = Host(stage, monkeypatch, 2)
    host.done = {job.label for job in cosine}
    # The second branch is still under way when the first is done, though the results hold an end of it; Host looks.
    left, _ = run_search(stage, tmp_path, 2, retry_failed=True)
    assert left == 0 and len(host.labels("end")) == 5


def test_side_by_side_the_time_limit_leaves_room_for_a_branch(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cosine, muon = (jobs_of(trial) for trial in stage.trials)
    finish(stage, tmp_path, cosine[:1], own_train_seconds=200.0, wall_seconds=205.0)  # alone: that tells nothing here
    finish(stage, tmp_path, cosine[1:2], own_tokens=40_960, own_train_seconds=40.0, wall_seconds=45.0, side_by_side=2)
    host = Host(stage, monkeypatch, 2)
    host.may_idle = True
    left, said = run_search(stage, tmp_path, 2, time_limit=60)
    # A tenth more than a second a step and 5 s: at 25 s another 49.5 s are too much, also for the other place; the branches
    # were reckoned with.
    assert host.events == [
        (0, "start", muon[0].label, 0), (0, "start", cosine[2].label, 1), (25, "end", cosine[2].label, 1),
        (29, "end", muon[0].label, 0), (29, "start", muon[1].label, 0), (29, "start", muon[2].label, 1),
        (42, "end", muon[1].label, 0), (50, "end", muon[2].label, 1),
    ]  # fmt: skip
    late = f"{cosine[3].label}: would take about 50 s, and 10 s are left; the same command goes on from here"
    assert left == 3 and said[-1] == late and said.count(late) == 1 and len(said) == 9


def test_a_shorter_run_takes_the_time_that_is_too_little_for_the_next(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cosine, _ = (jobs_of(trial) for trial in stage.trials)
    finish(stage, tmp_path, cosine[:1], own_tokens=20_480, own_train_seconds=20.0, wall_seconds=25.0)
    host = Host(stage, monkeypatch, 1)
    host.may_idle = True
    left, said = run_search(stage, tmp_path, 1, time_limit=40)
    # 49.5 s for 40k, 46 for the stable part and a branch, 27.5 for the 20k of the second seed.
    assert host.labels("start") == [cosine[2].label] and left == 7
    assert said[-1] == f"{cosine[1].label}: would take about 50 s, and 15 s are left; the same command goes on from here"


def test_a_signal_ends_the_search_with_what_is_done_in_the_results(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Host(stage, monkeypatch, 3)
    first, second, third = (job.label for job in search(stage, tmp_path).jobs_left()[:3])
    host.codes = {third: -signal.SIGTERM}

    def tell(label: str) -> None:
        if label == first:
            host.received.append(signal.SIGTERM)

    host.at_end = tell
    with pytest.raises(Interrupted, match="SIGTERM"):
        run_search(stage, tmp_path, 3)
    assert host.labels("start") == [first, second, third] and len(host.labels("end")) == 3
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(r["kind"], r["budget"], r["state"]) for r in records] == [("run", 20_000, "finished"), ("run", 40_000, "finished")]


def test_a_run_that_others_have_stopped_stops_the_search(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(stage, monkeypatch, 2)
    first, second = (job.label for job in search(stage, tmp_path).jobs_left()[:2])
    host.codes = {first: 75}
    with pytest.raises(Interrupted, match=first):
        run_search(stage, tmp_path, 2)
    assert host.stopping and host.labels("start") == host.labels("end") == [first, second]
    assert [record["budget"] for record in read_results(tmp_path / "results.jsonl").values()] == [40_000]


def test_a_run_that_is_killed_has_failed_and_the_others_go_on(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Host(stage, monkeypatch, 2)
    first = search(stage, tmp_path).next_job()
    host.codes = {first.label: -signal.SIGKILL}
    left, said = run_search(stage, tmp_path, 2)
    records = read_results(tmp_path / "results.jsonl")
    assert left == 0 and len(records) == 9 and [r["state"] for r in records.values()].count("failed") == 1
    assert records[first.key]["reason"] == "killed by SIGKILL" and f"{first.label}: failed at step 0: killed by SIGKILL" in said


def test_runs_that_fail_one_after_another_stop_the_others(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Host(stage, monkeypatch, 3)
    labels = [job.label for job in search(stage, tmp_path).jobs_left()]
    host.codes = {labels[0]: 2, labels[2]: 2}
    with pytest.raises(ConfigError, match="2 runs in a row have failed before their first step"):
        run_search(stage, tmp_path, 3)
    assert host.stopping and [one.what.label for one in host.running] == [labels[1], labels[5]]
    assert [(r["state"], r["curve"]) for r in read_results(tmp_path / "results.jsonl").values()] == [("failed", [])] * 2


# --- what follows from the results ------------------------------------------------------------------------------------

LAWS = {"llmc": PowerLaw(2.9, 900.0, 0.35), "adamw": PowerLaw(2.8, 700.0, 0.35), "fast": PowerLaw(2.7, 500.0, 0.35)}
BUDGETS = [25_000_000 * 2**n for n in range(4)]


def test_seed_noise_is_pooled() -> None:
    assert seed_noise([[1.0], [2.0]]) is None
    noise = seed_noise([[1.0, 3.0], [5.0], [10.0, 10.0, 13.0]])
    assert noise.freedom == 3 and noise.deviation == pytest.approx(math.sqrt((2 + 6) / 3))


def test_a_verdict_needs_more_than_the_noise() -> None:
    noise = Noise(0.01, 4)
    margin = 2.776 * 0.01 * math.sqrt(1 / 3 + 1)
    assert gain([3.0, 3.0, 3.0], [2.99], noise).margin == pytest.approx(margin)
    assert [gain([3.0] * 3, [3.0 - g], noise).verdict for g in (margin - 1e-4, margin + 1e-4, -margin - 1e-4)] == [
        "within the noise", "better", "worse",
    ]  # fmt: skip
    assert gain([3.0], [2.0], None).verdict.startswith("unknown")
    assert t_95(1) == 12.706 and t_95(31) == pytest.approx(2.040, abs=2e-3)


def test_tokens_to_a_loss_between_ends_of_runs() -> None:
    ends = [Point(100e6, 3.0), Point(25e6, 4.0), Point(50e6, 3.5)]
    assert tokens_to_reach(3.75, ends).tokens == pytest.approx(25e6 * math.sqrt(2))
    assert tokens_to_reach(3.5, ends) == Reached(pytest.approx(50e6)) and tokens_to_reach(4.0, ends) == Reached(25e6)
    assert tokens_to_reach(4.1, ends) == Reached(25e6, "at most")
    assert tokens_to_reach(2.9, ends) == Reached(100e6, "more than")
    assert tokens_to_reach(3.0, []) == Reached(None)


def test_tokens_to_a_loss_along_a_run() -> None:
    curve = [Point(0, 11.0), Point(10, 5.0), Point(20, 4.0), Point(30, 4.5), Point(40, 3.0)]
    assert tokens_along(4.5, curve) == Reached(15, "at most")
    assert tokens_along(3.75, curve) == Reached(35, "at most"), "not where the loss has risen again"
    assert tokens_along(2.0, curve) == Reached(40, "more than")


@pytest.mark.parametrize("law", [*LAWS.values(), PowerLaw(1.2, 30.0, 0.12)])
def test_a_fit_finds_what_the_losses_were_made_from(law: PowerLaw) -> None:
    points = [Point(t, law.loss(t)) for t in BUDGETS]
    free, given = fit_power_law(points), fit_power_law(points[:2], law.floor)
    for found in (free, given):
        assert (found.floor, found.scale, found.exponent) == pytest.approx((law.floor, law.scale, law.exponent), rel=1e-4)
    assert given.tokens(law.loss(1e9)) == pytest.approx(1e9, rel=1e-4) and law.tokens(law.floor) == math.inf
    with pytest.raises(ValueError, match="do not determine 3"):
        fit_power_law(points[:2])


def test_the_bootstrap_covers_the_truth_and_grows_with_the_noise() -> None:
    law = LAWS["fast"]
    points = [Point(t, law.loss(t)) for t in BUDGETS]
    widths = []
    for deviation in (0.001, 0.004):
        low, high = interval([one.exponent for one in bootstrap(points, deviation, draws=200)])
        assert low < law.exponent < high
        widths.append(high - low)
    assert 2.5 < widths[1] / widths[0] < 6
    assert interval([one.exponent for one in bootstrap(points, 0.0, draws=3)]) == pytest.approx((law.exponent,) * 2, rel=1e-6)


def test_residuals() -> None:
    law = PowerLaw(3.0, 0.0, 0.3)
    points = [Point(1e6, 3.1), Point(2e6, 2.9), Point(3e6, 3.1), Point(4e6, 2.9)]
    assert residual_deviation(points, law, 2) == pytest.approx(math.sqrt(0.04 / 2))
    assert residual_deviation(points, law, 4) is None


def synthetic(group: str, budget: int, seed: int = 0, stage: str = "recipes", noise: float = 0.0, **fields) -> dict:
    """The record of a run that ends where its group's law says."""
    loss, seconds = LAWS[group].loss(budget) + noise, budget / (450_000 if group != "fast" else 400_000)
    half = round(budget / 2)
    return {
        "stage": stage, "name": group, "group": group, "seed": seed, "kind": "run", "budget": budget, "state": "finished",
        "steps": budget // 65_536, "tokens": budget, "epochs": budget / 80e6, "val_loss": loss,
        "curve": [[0, 0, 11.0], [1, half, LAWS[group].loss(half) + 0.3], [2, budget, loss]],
        "tokens_per_second": budget / seconds, "train_seconds": seconds, "own_tokens": budget, "own_train_seconds": seconds,
        "wall_seconds": seconds + 9, "validation_sha256": "a", "device": "card", "overrides": {"learning_rate": 1e-3},
        "commit": "0123456789abc", "date": "2026-11-24T00:00:00+00:00",
    } | fields  # fmt: skip


@pytest.fixture
def records() -> list[dict]:
    runs = [synthetic(group, budget) for group in LAWS for budget in BUDGETS]
    return runs + [synthetic(group, BUDGETS[2], seed=1, noise=0.002) for group in LAWS]


def test_ratios_are_those_of_the_laws(records: list[dict]) -> None:
    ratios = {(r.baseline, r.end.budget): r for r in ratios_of(ends_of(records))}
    assert len(ratios) == 8
    for (group, budget), ratio in ratios.items():
        true = LAWS["fast"].tokens(LAWS[group].loss(budget)) / budget
        if true * budget < BUDGETS[0]:
            assert ratio.ends == Reached(BUDGETS[0], "at most") and ratio.reached.bound == "at most"
            assert true <= ratio.tokens <= BUDGETS[0] / budget
        else:
            assert ratio.reached == ratio.ends and ratio.tokens == pytest.approx(true, rel=0.04)
            assert ratio.seconds == pytest.approx(ratio.tokens * 450 / 400), "it is slower a token"
            assert ratio.along.tokens > ratio.ends.tokens, "its schedule has not come to its end there"
        assert ratio.meets_goal == (ratio.tokens <= {"llmc": 0.40, "adamw": 0.65}[group])


def test_a_loss_that_is_not_reached_meets_no_goal() -> None:
    worse = [synthetic("fast", BUDGETS[0]), synthetic("llmc", BUDGETS[3], val_loss=3.0)]
    (ratio,) = ratios_of(ends_of(worse))
    assert ratio.reached.bound == "more than" and ratio.tokens == 0.125 and ratio.meets_goal is None, "longer runs may"
    (ratio,) = ratios_of(ends_of([*worse, synthetic("fast", BUDGETS[2])]))
    assert ratio.reached.bound == "more than" and ratio.tokens == 0.5 and ratio.meets_goal is False


def test_of_a_group_the_lower_end_counts_at_each_budget() -> None:
    runs = [synthetic("llmc", b) for b in BUDGETS[:2]]
    runs += [synthetic("adamw", BUDGETS[0], name="constant") | {"group": "llmc"}]
    runs += [synthetic("llmc", BUDGETS[1], noise=0.1, name="constant")]
    assert [(e.name, e.budget) for e in ends_of(runs)["llmc"]] == [("constant", BUDGETS[0]), ("llmc", BUDGETS[1])]


def test_equal_runs_of_two_stages_tell_of_the_noise() -> None:
    equal = [synthetic("llmc", BUDGETS[0], stage="first"), synthetic("llmc", BUDGETS[0], name="again", noise=0.02)]
    found = noise_of([*equal, synthetic("llmc", BUDGETS[0], name="hot", noise=1, overrides={"learning_rate": 2e-3})])
    assert found.freedom == 1 and found.deviation == pytest.approx(0.02 / math.sqrt(2))
    assert noise_of([equal[0], synthetic("llmc", BUDGETS[1])]) is None, "of other budgets"


def test_losses_on_other_validation_text_do_not_compare(records: list[dict]) -> None:
    assert len(trained(records)) == 15
    assert len(trained([*records, synthetic("fast", 9, kind="stable"), synthetic("fast", 9, state="failed")])) == 15
    with pytest.raises(ConfigError, match="2 different texts"):
        trained([*records, synthetic("fast", 9, validation_sha256="b")])


def test_the_prediction_is_that_of_the_laws(records: list[dict]) -> None:
    ends, noise = ends_of(records), noise_of(records)
    fits_of = {g: fit_group(g, ends[g], noise, None) for g in ("fast", "llmc")}
    base = str(ROOT / "configs" / "gpt2-124m-fast.yaml")
    held, continued = predict(ratios_of(ends), fits_of["fast"], fits_of["llmc"], base, {"8xA100-80GB": 14.0})
    true = LAWS["fast"].tokens(LAWS["llmc"].loss(10.25e9))
    assert continued.low < true < continued.high
    assert held.tokens == pytest.approx(10.25e9 * ratios_of(ends)[3].tokens) and held.low is None
    ((machine, cost),) = held.costs
    assert "taken to hold at 10.25B" in held.basis and "continued to 10.25B" in continued.basis
    assert machine == "8xA100-80GB" and cost.tokens == pytest.approx(held.tokens, rel=1e-3)
    assert cost.dollars == pytest.approx(14 * cost.hours)


def test_a_floor_that_the_budgets_do_not_determine_is_not_fitted() -> None:
    line = [End("x", b, b, [5 - 0.3 * math.log2(b / 25e6)], 1.0, []) for b in BUDGETS]
    assert fit_group("fast", line, None, None) is None, "straight in the logarithm: no floor"
    assert fit_group("fast", line, None, literature_floor(124_439_808)).given_floor == pytest.approx(2.555, abs=2e-3)
    assert fit_group("fast", line[:1], None, 2.5) is None and fit_group("fast", line, None, 4.2) is None


# --- docs/recipe.md ---------------------------------------------------------------------------------------------------


def test_the_report_of_a_stage_of_candidates(tmp_path: Path) -> None:
    text = STAGE.replace("branch: true\n    seeds: [0]\n    seeds_at: {40k: [0, 1]}", "budgets: [20k]\n    seeds: [0]")
    (stage,) = load_stages([write_stage(tmp_path, text)])
    results, document = tmp_path / "results.jsonl", tmp_path / "recipe.md"
    document.write_text((ROOT / "docs" / "recipe.md").read_text())
    losses = {("cosine", 20_000): [3.00, 3.02], ("cosine", 40_000): [2.9, 2.9], ("muon", 20_000): [2.5]}
    with pytest.raises(ConfigError, match="holds none"):
        write_report([stage], results, document, {})

    def finish_some(*jobs) -> None:
        for job in jobs:
            loss = losses[job.trial.name, job.budget][job.seed]
            made = synthetic(job.trial.group, job.budget, job.seed, "tiny", name=job.trial.name, val_loss=loss)
            append(results, made | {"overrides": overrides_of(job.trial)})

    first, *rest, last = (job for trial in stage.trials for job in jobs_of(trial))
    finish_some(first)
    assert write_report([stage], results, document, {}) == [document], "the baseline alone: a page without figures"
    finish_some(last)
    write_report([stage], results, document, {})
    text = document.read_text()
    assert "The baseline ends at 3.0000 after 20k (1 seed). 3 of the stage's 5 runs are missing." in text
    assert "| muon | 20k | 1 | 2.5000 | +0.5000 |  | unknown: no seed noise |" in text
    finish_some(*rest)
    written = write_report([stage], results, document, {})
    assert "The baseline ends at 3.0100 after 20k (2 seeds).\n" in document.read_text()
    assert [p.name for p in written] == ["recipe.md", "gains-tiny.png"]
    # 0.0002 over 2 degrees of freedom: 0.01; times t 4.303 and the root of 1/2 + 1.
    assert "**0.0100 nats** (2 degrees" in document.read_text()
    assert "| muon | 20k | 1 | 2.5000 | +0.5100 | ±0.0527 | better |" in document.read_text()
    assert document.read_text().count("No results yet.") == 3, "no recipes are compared"


def test_the_report_of_the_recipes(tmp_path: Path, records: list[dict]) -> None:
    results, document = tmp_path / "results.jsonl", tmp_path / "recipe.md"
    stage = next(s for s in load_stages(STAGES) if s.compare == "groups")
    for record in records:
        append(results, record | {"stage": stage.name, "name": f"{record['group']}-synthetic"})
    failure = synthetic("fast", 25_000_000, stage=stage.name, name="hot", state="failed", reason="loss is nan | too hot")
    append(results, failure)
    prose = (ROOT / "docs" / "recipe.md").read_text()
    for name in SECTIONS:  # without the tables of what the project itself has found
        prose = section_pattern(name).sub(r"\1\2", prose)
    document.write_text(prose)
    prices = {"8xA100-80GB": 14.0, "8xH100-80GB": 24.0}
    written = write_report([stage], results, document, prices)
    text = document.read_text()
    assert [p.name for p in written] == ["recipe.md", "losses.png"] and all(p.stat().st_size > 1000 for p in written)
    assert "![Validation loss against tokens](recipe/losses.png)" in text
    assert "**0.0014 nats** (3 degrees of freedom" in text
    llmc = next(line for line in text.splitlines() if line.startswith("| llmc | 200M |") and "goal" not in line)
    assert llmc.endswith("| 40% | met |")
    assert re.search(r"\| fast \| 4 \| 2\.[67]\d\d \| 2\.\d+ to 2\.\d+ \|", text) and "| fast | 4 | 2.554 (given) |" in text
    assert text.count("predicted") >= 4 and "8xH100-80GB, predicted" in text
    assert "loss is nan \\| too hot" in text
    outside = [line for line in prose.splitlines() if line and not line.startswith("<!--")]
    assert [line for line in text.splitlines() if line in set(outside)] == outside, "the prose is as it was"
    write_report([stage], results, document, prices)
    assert document.read_text() == text, "again, the same"
    document.write_text(text.replace("<!-- end fit -->", ""))
    with pytest.raises(ConfigError, match="lacks <!-- begin fit -->"):
        write_report([stage], results, document, prices)


def test_the_document_has_every_section() -> None:
    text = (ROOT / "docs" / "recipe.md").read_text()
    for name in SECTIONS:
        assert text.count(f"<!-- begin {name} -->\n") == text.count(f"<!-- end {name} -->") == 1
