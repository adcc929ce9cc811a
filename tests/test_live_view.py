"""The live view: what it says, that it is redrawn in place and garbled by nothing, and where it must not appear."""

import io
import json
import math
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch import PRETRAIN, ROOT, TINY, environment, metrics, options
from recipe.monitor.console import Console
from recipe.monitor.live import LiveRun
from recipe.monitor.metrics import WallClock
from recipe.monitor.run_record import RunRecord
from recipe.monitor.view import ASCII, HISTORY, UNICODE, LossHistory, View, clip, columns, paint, printable
from run_helpers import training_record, write_run
from terminal import PseudoTerminal, screen

BATCH = 524_288


def view(steps: int = 0, **fields: object) -> View:
    made = View("gpt2-124m", max_steps=1000, total_tokens=1000 * BATCH, **fields)
    made.add([training_record(step, BATCH) for step in range(1, steps + 1)])
    return made


def text(view: View, width: int = 79, **given: object) -> list[str]:
    return [paint(line, colour=False) for line in view.lines(width, UNICODE, ("", "training"), **given)]


def test_it_says_all_that_matters():
    made = view(500, price_per_hour=14.0, gpu_memory_gib=79.3, sample="Once upon a time")
    made.add([{"step": 500, "val_loss": 4.3210}, {"step": 400, "hellaswag_acc_norm": 0.2612, "hellaswag_n": 10_042}])
    lines = text(made, seconds=3600.0)
    assert re.fullmatch(r"gpt2-124m  █{22}░{23}  50\.0%  step 500/1,000", lines[0])
    assert re.fullmatch(rf"loss     {made.last['train_loss']:.4f}  [▁-█]+  lr 4\.29e-04 · norm 0\.\d\d", lines[1])
    assert re.fullmatch(r"speed    1,[56]\d\d,\d{3} tok/s · MFU 45\.0% · data wait 0\.1% · memory 61\.2 of 79 GiB", lines[2])
    left = made.seconds_left
    assert math.isclose(left, 500 * BATCH / 1.6e6, rel_tol=0.05)
    times = f"1h00m so far, {left // 60:.0f}m{left % 60:02.0f}s left"
    assert lines[3] == f"time     {times} · money $14.00 so far, ${14 * left / 3600:.2f} left"
    assert lines[4:] == [
        "eval     val loss 4.3210 @500 · HellaSwag lm-eval 0.2612 @400", "sample   Once upon a time", "now      training",
    ]  # fmt: skip


def test_a_small_evaluation_of_the_same_step_does_not_stand_for_the_whole_one():
    made = view(500)
    whole = {"step": 400, "hellaswag_acc_norm": 0.2612, "hellaswag_n": 10_042, "hellaswag_kind": "whole"}
    made.add([whole, {"step": 400, "hellaswag_acc_norm": 0.5, "hellaswag_n": 64, "hellaswag_kind": "mini"}])
    assert text(made)[4] == "eval     HellaSwag lm-eval 0.2612 @400"
    made.add([{"step": 500, "hellaswag_acc_norm": 0.5, "hellaswag_n": 64, "hellaswag_kind": "mini"}])
    assert text(made)[4] == "eval     HellaSwag lm-eval 0.5000 (64 items of our own) @500"


def test_a_sample_is_the_newest_of_where_the_run_is(tmp_path):
    run = write_run(tmp_path / "run", 60, records=[training_record(step, BATCH) for step in range(1, 31)])
    for step in (20, 40):
        sample = {"step": step, "samples": [{"prompt": "The", "continuation": f" one of {step}"}]}
        (run / "eval" / f"samples-step-{step:08d}.json").write_text(json.dumps(sample))
    record = RunRecord.read(run)
    phases = SimpleNamespace(phase="train", step=30)
    live = LiveRun(record.config, record.plan, run, WallClock(run / "metrics.jsonl", 0.0), phases)
    live.reload()
    said = lambda: "\n".join(paint(line, colour=False) for line in live.lines(79, UNICODE))  # noqa: E731
    assert "one of 20" in said(), "it went back from step 40"
    phases.phase, phases.step = "sample", 40
    said()
    phases.phase = "data"
    assert "one of 40" in said(), "taken before the records of the last steps are written"


def test_speed_mfu_and_wait_are_of_the_same_steps():
    made = view()
    made.add([training_record(n, BATCH, tokens_per_second=1.6e6, mfu=0.45, data_wait_fraction=0.0) for n in range(1, 50)])
    made.add([training_record(50, BATCH, tokens_per_second=8e5, mfu=0.225, step_seconds=0.66, data_wait_fraction=0.5)])
    wait = 0.5 * 0.66 / (49 * 0.33 + 0.66)
    assert text(made)[2].startswith(f"speed    1,600,000 tok/s · MFU 45.0% · data wait {wait:.1%} ")


def test_before_the_first_step_it_knows_little_and_says_it():
    assert text(view()) == ["gpt2-124m  " + "░" * 47 + "   0.0%  step 0/1,000", "time     0s so far", "now      training"]


def test_numbers_that_are_not_finite_are_said():
    made = view(3)
    made.add([training_record(4, BATCH, train_loss=None, grad_norm=None, skipped=1)])
    assert re.fullmatch(r"loss     not finite  [▁-█]{3}  lr \S+ · norm not finite · 1 skipped", text(made)[1])


@pytest.mark.parametrize("width", [1, 5, 20, 39, 60, 79, 159, 400])
def test_no_line_is_wider_than_the_terminal(width):
    made = view(700, price_per_hour=14.0, gpu_memory_gib=79.3, sample="東京タワー " * 40 + "🙂" * 90)
    made.add([{"step": 500, "val_loss": 4.3210}, {"step": 400, "hellaswag_acc_norm": 0.2612, "hellaswag_n": 64}])
    lines = text(made, width)[: 6 if width < 30 else None]
    assert all(columns(line) <= width for line in lines)
    assert width < 79 or (columns(lines[0]) == width and columns(lines[1]) == width)


def test_wide_characters_and_control_characters_of_a_sample():
    assert columns("東京a\u0301") == 5
    assert paint(clip([("", "東京東京")], 5, "…"), False) == "東京…"
    assert printable("a\x1b[2Jb\r\nc\td\u202ee\x07") == "a [2Jb c d e"


def test_the_sparkline_falls_with_the_loss_and_forgets_nothing():
    history = LossHistory()
    for step in range(50_000):
        history.add(11.0 - step / 5000)
    history.add(None)
    line = history.sparkline(60, UNICODE.levels)
    assert len(line) == 60 and line[0] == "█" and line[-1] == "▁"
    assert list(line) == sorted(line, reverse=True)
    assert len(history._means) < HISTORY


@pytest.fixture
def live(monkeypatch):
    """Gives, when called in the test, a console that draws on a terminal, and that terminal, whose `close` tells what was
    written. (Before the test pytest sets sys.stdout itself.)"""

    def begin(encoding: str = "utf-8", **variables: str | None) -> tuple[Console, PseudoTerminal]:
        terminal = PseudoTerminal()
        monkeypatch.delenv("NO_COLOR", raising=False)
        for name, value in {"TERM": "xterm-256color", **variables}.items():
            monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name)
        for name in ("stdout", "stderr"):
            stream = open(terminal.slave, "w", encoding=encoding, closefd=False)  # noqa: SIM115
            monkeypatch.setattr(sys, name, stream)
        return Console(is_main=True), terminal

    return begin


def show(console: Console, made: View) -> None:
    console.go_live(lambda width, glyphs, over: made.lines(width, glyphs, None if over else ("accent", "training")))


def test_it_is_redrawn_in_place_and_garbled_by_nothing(live):
    console, terminal = live()
    made = view()
    console.say("before")
    show(console, made)
    for step in range(1, 41):
        made.add([training_record(step, BATCH)])
        console.progress("a progress line")
        if step % 10 == 0:
            console.say(f"said at {step}")
            print("a warning", file=sys.stderr, end="")
            print(f" in two parts at {step}", file=sys.stderr)
            print("50%|##", end="\r")
            print(f"100%|#### {step}")
    console.close()
    print("after")
    lines = screen(terminal.close())
    said = [line for n in (10, 20, 30, 40) for line in (f"said at {n}", f"a warning in two parts at {n}", f"100%|#### {n}")]
    assert lines == ["before", *said, *text(made)[:-1], "after", ""]


def test_threads_that_print_garble_nothing(live):
    console, terminal = live()
    made = view(5)
    show(console, made)
    threads = [threading.Thread(target=lambda n=n: [print(f"thread {n} line {i}") for i in range(50)]) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    console.close()
    lines = screen(terminal.close())
    assert sum(line.startswith("gpt2-124m") for line in lines) == 1
    printed = "".join(lines)
    assert all(f"thread {n} line {i}" in printed for n in range(4) for i in range(50))


def test_a_new_size_of_the_window_is_seen(live):
    console, terminal = live()
    made = view(40)
    show(console, made)
    terminal.resize(160, 30)
    console.redraw()
    terminal.resize(160, 4)
    console.redraw()
    console.close()
    lines = screen(terminal.close(), 160)
    assert lines == [*text(made, 159)[:3], ""]  # as many as the window has room for


def test_a_narrower_window_has_wrapped_what_was_drawn(live):
    console, terminal = live()
    show(console, view(40))
    terminal.resize(30, 40)
    console.redraw()
    console.close()
    output = terminal.close()
    ups = [int(n) for n in re.findall(r"\x1b\[(\d+)A", output)]
    assert ups[0] == sum(-(-columns(line) // 30) for line in text(view(40)))  # 79 columns are three rows of 30 now
    assert ups[-1] == 5


def test_colours_unless_no_color(live):
    console, terminal = live(NO_COLOR="1")
    show(console, view(5))
    console.close()
    assert "\x1b[1m" not in terminal.close()


def test_colours(live):
    console, terminal = live()
    show(console, view(5))
    console.close()
    assert "\x1b[1mgpt2-124m" in terminal.close()


def test_a_terminal_without_unicode_gets_ascii(live):
    console, terminal = live("ascii")
    show(console, view(300))
    console.close()
    lines = screen(terminal.close())
    assert re.search("#+-+  30.0%", lines[0]) and re.search("[_.=*#-]{5}", lines[1])
    assert ASCII.dot in lines[1]


@pytest.mark.parametrize("kind", ["dumb", "unknown", "", None])
def test_a_terminal_that_cannot_move_its_cursor_gets_lines(live, kind):
    console, terminal = live(TERM=kind)
    show(console, view(5))
    console.progress("step 5/1000 | loss 4")
    console.close()
    assert terminal.close() == "step 5/1000 | loss 4\r\n"


def test_a_file_gets_lines(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    console = Console(is_main=True)
    show(console, view(5))
    console.progress("step 5/1000")
    console.close()
    assert sys.stdout.getvalue() == "step 5/1000\n"


def test_other_ranks_are_silent(live):
    _, terminal = live()
    console = Console(is_main=False)
    show(console, view(5))
    console.say("x")
    console.progress("y")
    console.close()
    assert terminal.close() == ""


def test_a_view_that_cannot_be_drawn_does_not_end_the_run(live):
    console, terminal = live()
    console.go_live(lambda width, glyphs, over: 1 / 0)
    console.say("still here")
    console.close()
    assert screen(terminal.close())[:2] == ["still here", "the view cannot be drawn: ZeroDivisionError: division by zero"]


def test_the_streams_are_what_they_were_afterwards(live):
    console, terminal = live()
    before = sys.stdout, sys.stderr
    show(console, view(5))
    assert sys.stdout is not before[0] and sys.stdout.fileno() == before[0].fileno()
    print("unfinished", end="")
    console.close()
    assert (sys.stdout, sys.stderr) == before
    assert screen(terminal.close())[-2:] == ["unfinished", ""]


@pytest.fixture(scope="module")
def trained(fineweb_folder, tmp_path_factory) -> tuple[Path, list[str]]:
    """A run in a terminal of 100 columns, and what it left there."""
    run = tmp_path_factory.mktemp("live") / "run"
    words = options(**TINY | {"max_steps": 12, "log_every": 2, "eval_every": 6, "save_every": 6, "price_per_hour": 3.6})
    terminal = PseudoTerminal(100, 40)
    try:
        done = subprocess.run(
            [sys.executable, PRETRAIN, *words, "--data", str(fineweb_folder), "--output_dir", str(run)],
            env=environment(TERM="xterm"), stdout=terminal.slave, stderr=terminal.slave, stdin=subprocess.DEVNULL, timeout=240,
        )  # fmt: skip
    finally:
        output = terminal.close()
    assert done.returncode == 0, output
    return run, screen(output, 100)


def test_a_run_in_a_terminal(trained):
    run, lines = trained
    shown = "\n".join(lines)
    assert len(re.findall(r"^run  █+ 100\.0%  step 12/12$", shown, re.MULTILINE)) == 1
    last = [r for r in metrics(run) if "train_loss" in r][-1]
    assert f"loss     {last['train_loss']:.4f}  " in shown
    assert re.search(r"time     (\d+m)?\d+s so far · money \$0\.\d\d so far", shown)
    assert not re.search(r"^step \d+/12 \|", shown, re.MULTILINE)  # the view stands for the progress lines
    said = re.findall(r"^step (\d+) \| validation loss", shown, re.MULTILINE)
    assert said == ["0", "6", "12"]
    assert lines.index(next(line for line in lines if line.startswith("exported"))) > lines.index(
        next(line for line in lines if line.startswith("run  █"))
    )


def test_the_records_of_a_run_have_its_wall_clock_and_its_starts(trained):
    run, _ = trained
    training = [r for r in metrics(run) if "train_loss" in r]
    clock = [r["wall_seconds"] for r in training]
    assert clock == sorted(clock) and clock[0] > 0
    assert not [r for r in metrics(run) if "val_loss" in r and "wall_seconds" in r]
    assert all(r["wall_seconds"] > 0 for r in metrics(run) if "save_seconds" in r)
    assert training[-1]["wall_seconds"] - training[0]["wall_seconds"] >= sum(r["step_seconds"] for r in training[1:]) - 0.1
    (start,) = [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()]
    assert (start["step"], start["ranks"], start["lost_steps"], start["lost_seconds"]) == (0, 1, 0, 0)


def test_a_run_into_a_pipe_gives_plain_lines_and_goes_on_counting(trained, fineweb_folder):
    """Continued from its first checkpoint, which is the loss of the steps behind it."""
    run, _ = trained
    before = metrics(run)
    checkpoint = run / "checkpoints" / "step-00000006"
    words = options(**TINY | {"max_steps": 12, "log_every": 2, "eval_every": 6, "save_every": 6, "resume": checkpoint})
    done = subprocess.run(
        [sys.executable, PRETRAIN, *words, "--data", str(fineweb_folder), "--output_dir", str(run)],
        env=environment(TERM="xterm"), capture_output=True, text=True, timeout=240, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr and "█" not in done.stdout
    assert re.findall(r"^step +(\d+)/12 \| loss \d", done.stdout, re.MULTILINE) == ["8", "10", "12"]
    second = [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()][1]
    lost = [r for r in before if r["step"] > 6 and "train_loss" in r]
    assert (second["step"], second["lost_steps"]) == (6, 6)
    assert math.isclose(second["lost_seconds"], sum(r["step_seconds"] for r in lost), abs_tol=0.01)
    seventh = next(r for r in metrics(run) if r["step"] == 7)
    assert seventh["wall_seconds"] > max(r.get("wall_seconds", 0.0) for r in before)
