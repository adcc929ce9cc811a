"""A run seen from another shell: what is shown, how its end is told, and files that change under the reader's eyes."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import ROOT, metrics
from recipe.monitor.metrics import MetricsLog, WallClock
from recipe.monitor.run_record import RunRecord, record_start
from recipe.monitor.watch import Follower, WatchedRun
from run_helpers import training_record, write_run
from terminal import PseudoTerminal, screen

BATCH = 524_288
WATCH = [sys.executable, str(ROOT / "scripts" / "watch.py")]


def watch(*words: object, timeout: float = 60) -> subprocess.CompletedProcess:
    return subprocess.run([*WATCH, *map(str, words)], capture_output=True, text=True, timeout=timeout)


class Trainer:
    """Holds the lock of a run folder as a training process does, and writes what one writes."""

    def __init__(self, run: Path):
        self.run = run
        self._lock = open(run / ".lock", "a")  # noqa: SIM115
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def step(self, number: int) -> None:
        with open(self.run / "metrics.jsonl", "a") as handle:
            handle.write(json.dumps(training_record(number, BATCH)) + "\n")

    def end(self, state: str | None = None, step: int = 0, reason: str = "", rank: int = 0) -> None:
        if state:
            status = {"state": state, "exit_code": 1, "step": step, "tokens": 0, "reason": reason, "rank": rank}
            (self.run / "status.json").write_text(json.dumps(status))
        self._lock.close()


def records(steps: int) -> list[dict]:
    return [training_record(step, BATCH) for step in range(1, steps + 1)]


def test_a_finished_run(tmp_path):
    run = write_run(tmp_path / "run", 60, "--price_per_hour", "14")
    sample = {"step": 60, "samples": [{"prompt": "The", "continuation": " river\nrises"}]}
    (run / "eval" / "samples-step-00000060.json").write_text(json.dumps(sample))
    last = metrics(run)[-2]
    done = watch(run)
    assert done.returncode == 0 and not done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("run  ███") and lines[0].endswith("100.0%  step 60/60")
    assert f"loss     {last['train_loss']:.4f}" in lines[1] and "memory 61.2 of 79 GiB" in lines[2]
    assert lines[3] == "time     1m21s in all · money $0.32 in all"
    assert lines[5:] == ["sample   The river rises", "now      finished at step 60"]


@pytest.mark.parametrize(
    "state, reason, words, code",
    [
        ("failed", "OutOfMemoryError: 3 GiB", "failed at step 30 on rank 5: OutOfMemoryError: 3 GiB", 1),
        ("stopped", "signal SIGTERM", "stopped at step 30 by signal SIGTERM; the same command goes on from there", 75),
        ("running", "", "ended without a word, last seen at step 30 0s ago: killed, or its machine is gone", 1),
    ],
)
def test_how_a_run_ended_and_why(tmp_path, state, reason, words, code):
    run = write_run(tmp_path / "run", 60, records=records(30), state=state, step=30, reason=reason, rank=5)
    done = watch(run)
    assert done.returncode == code
    now = done.stdout.partition("now      ")[2]
    assert words == " ".join(now.split()).replace(" 1s ago", " 0s ago")


def test_a_running_run_once(tmp_path):
    run = write_run(tmp_path / "run", 60, records=records(30), state="running", step=30)
    trainer = Trainer(run)
    done = watch(run, "--once")
    trainer.end()
    assert done.returncode == 0
    assert "50.0%  step 30/60" in done.stdout and "now      running, at step 30; last line" in done.stdout


def test_it_starts_in_less_than_a_second_and_without_torch(tmp_path):
    run = write_run(tmp_path / "run", 60)
    code = (
        f"import sys; sys.argv = ['watch.py', {str(run)!r}, '--once']; sys.path.insert(0, ''); import runpy\n"
        f"try: runpy.run_path({WATCH[1]!r}, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print({'torch', 'transformers', 'numpy', 'pyarrow', 'matplotlib'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr == "set()\n"
    used = []
    for _ in range(3):
        before = os.times()
        watch(run, "--once")
        after = os.times()
        used.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(used) < 1.0


@pytest.mark.parametrize("make", [lambda p: p / "nowhere", lambda p: p, lambda p: p / "run" / "config.yaml"])
def test_no_such_run(tmp_path, make):
    run = write_run(tmp_path / "run", 20)
    done = watch(make(tmp_path))
    assert done.returncode == 2 and not done.stdout
    assert "run" in done.stderr and str(run) in done.stderr and len(done.stderr.splitlines()) == 1


def test_it_follows_a_run_into_a_pipe(tmp_path):
    run = write_run(tmp_path / "run", 60, records=records(3), state="running", step=3)
    trainer = Trainer(run)
    process = subprocess.Popen([*WATCH, str(run)], stdout=subprocess.PIPE, text=True)
    try:
        head = [process.stdout.readline() for _ in range(5)]
        assert head[-1].startswith("now      running, at step 3")
        trainer.step(4)
        assert process.stdout.readline().startswith("step  4/60 | loss ")
        with open(run / "metrics.jsonl", "a") as handle:
            handle.write('{"step": 4, "val_loss": 5.0}\n')  # no step: no line
        time.sleep(1.5)
        trainer.step(5)
        assert process.stdout.readline().startswith("step  5/60 | loss ")
        trainer.end("failed", 5, "TrainingError: the gradient was not finite", 0)
        rest, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert rest == "failed at step 5 on rank 0: TrainingError: the gradient was not finite\n"
    assert process.returncode == 1


def test_a_run_that_ends_between_two_looks_is_not_gone(tmp_path):
    run = write_run(tmp_path / "run", 60, records=records(3), state="running", step=3)
    trainer = Trainer(run)
    record = RunRecord.read(run)
    assert record.state() == "running"
    trainer.end("failed", 5, "TrainingError: the gradient was not finite", 0)
    assert record.state_line() == "failed at step 5 on rank 0: TrainingError: the gradient was not finite"


def test_it_follows_a_run_in_a_terminal(tmp_path):
    run = write_run(tmp_path / "run", 60, records=records(3), state="running", step=3)
    trainer = Trainer(run)
    terminal = PseudoTerminal(100)
    process = subprocess.Popen([*WATCH, str(run)], stdout=terminal.slave, env={**os.environ, "TERM": "xterm", "NO_COLOR": "1"})
    try:
        time.sleep(2)
        for step in range(4, 61):
            trainer.step(step)
        time.sleep(2)
        trainer.end("finished", 60)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        lines = screen(terminal.close(), 100)
    assert lines[0].endswith("100.0%  step 60/60") and lines[-2] == "now      finished at step 60"
    assert len(lines) == 6  # redrawn in place: progress, loss, speed, time, state


def test_leaving_it_leaves_the_run_alone(tmp_path):
    run = write_run(tmp_path / "run", 60, records=records(3), state="running", step=3)
    trainer = Trainer(run)
    process = subprocess.Popen(
        [*WATCH, str(run)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite in the background ignores it
    )
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    trainer.end()
    assert process.returncode == 130 and not errors


def test_lines_are_read_as_they_come(tmp_path):
    path = tmp_path / "metrics.jsonl"
    follower = Follower(path)
    assert follower.read() == ([], False)
    path.write_text('{"step": 1}\n{"step"')
    assert follower.read() == ([{"step": 1}], True)
    with open(path, "a") as handle:
        handle.write(": 2}\n")
    assert follower.read() == ([{"step": 2}], False)
    assert follower.read() == ([], False)


def test_a_run_that_goes_back_is_read_afresh(tmp_path):
    run = write_run(tmp_path / "run", 60, records=records(50), state="running", step=50)
    watched = WatchedRun(run)
    assert watched.update() and watched.view.last["step"] == 50
    MetricsLog(run / "metrics.jsonl", resume_step=20).close()
    assert watched.update() and watched.view.last["step"] == 20
    assert len(watched.view.losses._means) == 20
    assert not watched.update()


def test_a_sample_from_beyond_where_the_run_went_back_to_is_not_shown(tmp_path):
    run = write_run(tmp_path / "run", 60, records=records(50), state="running", step=50)
    for step in (20, 40):
        sample = {"step": step, "samples": [{"prompt": "The", "continuation": f" one of {step}"}]}
        (run / "eval" / f"samples-step-{step:08d}.json").write_text(json.dumps(sample))
    watched = WatchedRun(run)
    assert watched.update() and watched.view.sample == "The one of 40"
    MetricsLog(run / "metrics.jsonl", resume_step=30).close()
    assert watched.update() and watched.view.sample == "The one of 20"


def test_a_restart_is_recorded_with_what_it_does_again(tmp_path):
    run = write_run(tmp_path / "run", 60, records=records(50))
    environment = json.loads((run / "environment.json").read_text())
    record_start(run, 20, environment)
    with open(run / "metrics.jsonl", "a") as handle:
        handle.write('{"step": 51, "tr')
    record_start(run, 50, environment)
    first, second = RunRecord.read(run).starts
    assert (first["step"], first["lost_steps"], first["device"]) == (20, 30, "NVIDIA A100-SXM4-80GB")
    assert abs(first["lost_seconds"] - 30 * 0.33) < 0.01
    assert (second["lost_steps"], second["lost_seconds"]) == (0, 0)


def test_the_wall_clock_goes_on_over_starts(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "wall_seconds": 100.0}\n{"step": 2, "wall_seconds": 250.0}\n{"step": 2}\n')
    clock = WallClock(path, time.monotonic() - 30)
    assert 280 <= clock.seconds() < 285
    assert WallClock(tmp_path / "none", time.monotonic()).seconds() < 5


def test_steps_that_are_written_together_ended_one_after_the_other(tmp_path):
    path, seen = tmp_path / "metrics.jsonl", []
    log = MetricsLog(path, clock=WallClock(path, time.monotonic() - 100), listeners=[seen.extend])
    log.write([{"step": 1, "step_seconds": 2.0}, {"step": 2, "step_seconds": 3.0}, {"step": 3, "step_seconds": float("nan")}])
    log.write([{"step": 3, "step_seconds": 4.0}, {"step": 4, "step_seconds": 5.0}])
    log.close()
    assert seen == metrics(tmp_path)
    times = [r["wall_seconds"] for r in seen]
    assert abs(times[4] - times[3] - 5.0) < 0.01 and 100 <= times[4] < 105
