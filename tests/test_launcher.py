"""What scripts/supervise.sh and node.py make of launches that end in every way, by launchers that take a second."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import ROOT, environment

STAND_IN = """
import os, pathlib, signal, subprocess, sys, time
folder, kind = pathlib.Path({folder!r}), {kind!r}
count = len(list(folder.glob("launch-*")))
(folder / f"launch-{{count}}").touch()
told = pathlib.Path(os.environ["PRETRAIN_EXIT_FILE"])
if kind == "lone":  # no worker yet
    (folder / "ready").touch()
    time.sleep(60)
if kind in ("stops", "again"):
    worker = "import pathlib, signal, sys, time\\ngot = []\\n"
    worker += "signal.signal(signal.SIGUSR1, lambda *_: got.append(1))\\npathlib.Path(sys.argv[1], 'ready').touch()\\n"
    worker += "while not got: time.sleep(0.02)\\ntime.sleep(1)\\n"
    worker += "pathlib.Path(sys.argv[1], 'signals').write_text(str(len(got)))\\n"
    worker += "pathlib.Path(sys.argv[2]).write_text('75')\\n"
    sys.exit(subprocess.run([sys.executable, "-c", worker, str(folder), str(told)]).returncode + 1)
if kind == "outlived":  # a worker that saves behind a launcher that was killed
    worker = "import fcntl, pathlib, sys, time\\nlock = open(sys.argv[1] + '/.lock', 'a')\\nfcntl.flock(lock, fcntl.LOCK_EX)\\n"
    worker += "pathlib.Path(sys.argv[1], 'ready').touch()\\ntime.sleep(1.5)\\npathlib.Path(sys.argv[2]).write_text('75')\\n"
    subprocess.Popen([sys.executable, "-c", worker, str(folder), str(told)], start_new_session=True)
    while not (folder / "ready").exists(): time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGKILL)
if kind == "swept":  # where its code cannot be noted
    told.parent.rmdir()
if kind == "older":  # resumed from a checkpoint behind the newest, it sets that one aside, and gets further each time
    kept = [int(path.name[5:]) for path in (folder / "checkpoints").iterdir()]
    (folder / "checkpoints" / f"step-{{kept[0]:08d}}").rename(folder / f"set-aside-{{count}}")
    step = folder / "checkpoints" / f"step-{{1000 + 500 * count:08d}}"
    step.mkdir()
    (step / "MANIFEST.json").touch()
    told.write_text("0" if count == 5 else "1")
    sys.exit(count != 5)
if kind == "half":  # killed while it noted its code
    told.touch()
    sys.exit(1)
if kind == "fault":
    step = folder / "checkpoints" / f"step-{{count + 1:08d}}"
    if count < 2:
        step.mkdir(parents=True)
        (step / "MANIFEST.json").touch()
        (folder / "checkpoints" / "step-00000001-mine").mkdir(exist_ok=True)
        (folder / "checkpoints" / "step-00000001-mine" / "MANIFEST.json").touch()
    told.write_text("1")
    sys.exit(1)
"""
DRIVER = """
import sys, time
from pathlib import Path
from recipe import nodes, supervision
from recipe.run_folder import RunFolder
who, folder, launcher, pause = sys.argv[1:]
command = lambda *_: [sys.executable, "-c", Path(launcher).read_text()]
nodes.launch_command = supervision.launch_command = command
if who == "supervise":
    sys.exit(supervision.supervise("file", [], RunFolder(Path(folder)), float(pause)))
sys.exit(nodes.run_node(nodes.Node(0, 1, 1, "127.0.0.1", 1), "file", Path("script"), [], folder))
"""


def start(tmp_path: Path, who: str, kind: str, pause: float = 0) -> subprocess.Popen:
    launcher = tmp_path / "launcher.py"
    launcher.write_text(STAND_IN.format(folder=str(tmp_path), kind=kind))
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, who, str(tmp_path), str(launcher), str(pause)],
        env=environment(PYTHONPATH=str(ROOT), PET_SHUTDOWN_TIMEOUT="1"), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.02)


def launches(tmp_path: Path) -> int:
    return len(list(tmp_path.glob("launch-*")))


@pytest.mark.parametrize("who", ["supervise", "node"])
@pytest.mark.parametrize("kind, number", [("stops", signal.SIGTERM), ("lone", signal.SIGUSR1)])
def test_a_signal_ends_it_once_the_workers_have_saved(tmp_path: Path, who: str, kind: str, number: int) -> None:
    process = start(tmp_path, who, kind)
    wait_for(tmp_path / "ready")
    process.send_signal(number)
    assert process.wait(20) == 75, process.stderr.read()
    assert launches(tmp_path) == 1 and (kind == "lone" or (tmp_path / "signals").read_text() == "1")


@pytest.mark.parametrize("who, signals", [("supervise", "2"), ("node", "1")])
def test_a_second_signal_is_meant_by_people_and_not_by_schedulers(tmp_path: Path, who: str, signals: str) -> None:
    process = start(tmp_path, who, "again")
    wait_for(tmp_path / "ready")
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    assert process.wait(20) == 75, process.stderr.read()
    assert (tmp_path / "signals").read_text() == signals


def test_what_a_worker_says_behind_its_launcher_counts(tmp_path: Path) -> None:
    process = start(tmp_path, "supervise", "outlived")
    assert process.wait(20) == 75, process.stderr.read()
    assert launches(tmp_path) == 1


def test_restarts_count_from_the_newest_checkpoint(tmp_path: Path) -> None:
    process = start(tmp_path, "supervise", "fault")
    assert process.wait(30) == 1
    told = process.stderr.read()
    # Two launches get further; then one after another three that do not.
    assert launches(tmp_path) == 5, told
    assert "3 restarts without a checkpoint behind step 2; giving up" in told and told.count("restart 1 of 3") == 2


def test_a_run_that_went_back_gets_further_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-00005000").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00005000" / "MANIFEST.json").touch()
    process = start(tmp_path, "supervise", "older")
    assert process.wait(30) == 0, process.stderr.read()
    assert launches(tmp_path) == 6


def test_a_node_that_went_back_is_started_again(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-00005000").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00005000" / "MANIFEST.json").touch()
    assert start(tmp_path, "node", "older").wait(30) == 75


def test_a_run_whose_code_could_not_be_noted_is_not_done_twice(tmp_path: Path) -> None:
    assert start(tmp_path, "supervise", "swept").wait(30) == 0
    assert launches(tmp_path) == 1


def test_a_closed_terminal_is_a_signal_like_others(tmp_path: Path) -> None:
    process = start(tmp_path, "supervise", "stops")
    process.stderr.close()
    wait_for(tmp_path / "ready")
    process.send_signal(signal.SIGHUP)
    assert process.wait(20) == 75 and (tmp_path / "signals").read_text() == "1"


def test_a_code_that_was_half_written_is_a_fault(tmp_path: Path) -> None:
    process = start(tmp_path, "supervise", "half")
    assert process.wait(30) == 1
    assert launches(tmp_path) == 4 and "(code unknown); restart 3 of 3" in process.stderr.read()


def test_a_signal_in_the_pause_starts_nothing_more(tmp_path: Path) -> None:
    process = start(tmp_path, "supervise", "half", pause=60)
    assert "restart 1 of 3" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75 and launches(tmp_path) == 1


@pytest.mark.parametrize("words, told", [
    ([], "bash scripts/supervise.sh configs/accelerate"),
    (["configs/accelerate/cpu.yaml"], "bash scripts/supervise.sh configs/accelerate"),
    (["configs/accelerate/cpus.yaml", "configs/quickstart.yaml"], "configs/accelerate/cpus.yaml: not an accelerate file"),
    (["configs/accelerate/cpu.yaml", "configs/quickstart.yaml"], "SUPERVISE_PAUSE: '1m' (environment) is not a number"),
])  # fmt: skip
def test_bad_words_are_told(words: list[str], told: str) -> None:
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "supervise.sh"), *words], cwd=ROOT, capture_output=True, text=True,
        env=environment(PYTHON=sys.executable, SUPERVISE_PAUSE="1m"), timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and told in done.stderr


def test_a_code_for_nobody_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from recipe.cli import note_exit

    monkeypatch.setenv("PRETRAIN_EXIT_FILE", str(tmp_path / "gone" / "code"))
    note_exit(75)
    monkeypatch.setenv("PRETRAIN_EXIT_FILE", str(tmp_path / "code"))
    note_exit(75)
    assert (tmp_path / "code").read_text() == "75\n" and os.listdir(tmp_path) == ["code"]
