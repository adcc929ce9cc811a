"""Faults of whole programs: what `accelerate launch` and scripts/supervise.sh start, signal, kill and start again."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import make_documents
from launch import ROOT, TINY, accelerate_command, environment, kill_all, launch, losses, options
from recipe.checkpoint import find_newest
from recipe.files import sha256
from recipe.launches import descendants
from recipe.tokenizer import train_tokenizer

pytestmark = [pytest.mark.faults]
STEPS = 400


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(make_documents(200), 400).save_pretrained(folder)
    return folder


@pytest.fixture
def arguments(tmp_path: Path, tokenizer: Path, fineweb_folder: Path):
    def make(name: str = "run", **more: object) -> list[str]:
        fields = TINY | {
            "data": fineweb_folder, "tokenizer": tokenizer, "output_dir": tmp_path / name, "max_steps": STEPS,
            "save_every": 5, "log_every": 1, "max_epochs": 50, "precision": "fp32",
        }  # fmt: skip
        return options(**(fields | more))

    return make


def start(command: list[str], log: Path, **more: str) -> subprocess.Popen:
    with open(log, "w", encoding="utf-8") as handle:
        return subprocess.Popen(
            command, env=environment(**more), stdout=handle, stderr=subprocess.STDOUT, start_new_session=True
        )


def supervise(accelerate_file: str, *words: str) -> list[str]:
    return [
        "bash",
        str(ROOT / "scripts/supervise.sh"),
        str(ROOT / "configs" / "accelerate" / f"{accelerate_file}.yaml"),
        *words,
    ]


def wait_for(condition, what: str, log: Path, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {seconds} s\n{log.read_text()}"
        time.sleep(0.05)


def saved(run: Path, step: int):
    return (run / "checkpoints" / f"step-{step:08d}" / "MANIFEST.json").is_file


def ranks_of(launcher: int) -> list[int]:
    """The workers proper: the processes that run scripts/pretrain.py and no launcher."""
    found = []
    for pid in descendants(launcher):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if len(words) > 2 and any(w.endswith(b"pretrain.py") for w in words[:4]) and b"accelerate.commands.launch" not in words:
            found.append(pid)
    return sorted(found)


def gone(pids: list[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def status(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())


def assert_stopped(run: Path) -> None:
    told = status(run)
    assert (told["state"], told["exit_code"]) == ("stopped", 75), told
    found, _ = find_newest(run / "checkpoints")
    assert found.step == told["step"] < STEPS


@pytest.mark.promise(
    "All ranks save within 15 s and leave nobody behind", "`accelerate launch`: a signal to the launcher or a worker"
)
@pytest.mark.parametrize("accelerate_file, number, to_worker", [
    ("2cpu-zero1", signal.SIGTERM, False), ("2cpu-ddp", signal.SIGUSR1, True), ("2cpu-zero1", signal.SIGINT, False),
])  # fmt: skip
def test_a_signal(accelerate_file: str, number: int, to_worker: bool, arguments, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    process = start(accelerate_command(accelerate_file, *arguments()), log)
    wait_for(saved(run, 5), "checkpoint", log)
    pids = ranks_of(process.pid)
    assert len(pids) == 2
    os.kill(pids[-1] if to_worker else process.pid, number)
    began = time.monotonic()
    wait_for(lambda: gone(pids), "end of the workers", log, 25)
    assert time.monotonic() - began < 15, log.read_text()
    process.wait()
    assert_stopped(run)


@pytest.mark.promise("All ranks save", "The terminal is closed, or who reads the output is killed; then a signal")
@pytest.mark.parametrize("accelerate_file, number", [("cpu", signal.SIGHUP), ("2cpu-zero1", signal.SIGINT)])
def test_nobody_reads_any_more(accelerate_file: str, number: int, arguments, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen(
        accelerate_command(accelerate_file, *arguments(save_every=0)), env=environment(), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    heard = b""
    while b"step   3/" not in heard:
        heard += (line := process.stdout.readline())
        assert line, heard.decode()
    pids = ranks_of(process.pid)
    process.stdout.close()
    os.killpg(process.pid, number)
    wait_for(lambda: gone(pids), "end of the workers", run / "status.json", 25)
    process.wait()
    assert_stopped(run)


@pytest.mark.promise(
    "A launcher that dies leaves nobody behind after 20 s", "`accelerate launch`: SIGKILL, or SIGTERM with one process"
)
@pytest.mark.parametrize(
    "accelerate_file, number", [("cpu", signal.SIGKILL), ("cpu", signal.SIGTERM), ("2cpu-zero1", signal.SIGKILL)]
)
def test_a_launcher_dies(accelerate_file: str, number: int, arguments, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    process = start(accelerate_command(accelerate_file, *arguments()), log)
    wait_for(saved(run, 5), "checkpoint", log)
    pids = ranks_of(process.pid)
    assert pids
    os.kill(process.pid, number)
    assert process.wait(10) in (-number, 128 + number, 1)
    wait_for(lambda: gone(pids), "end of the workers", log, 20)
    assert_stopped(run)


STRUCK_IN_SET_UP = """
import os, sys
if "RANK" in os.environ and any(word.endswith("pretrain.py") for word in sys.orig_argv):
    import time
    import recipe.start
    find = recipe.start.Start.find
    def struck(self):
        if os.environ["RANK"] == "0":
            time.sleep(20)  # it does something that no signal interrupts
        time.sleep(2)
        {fault}
    recipe.start.Start.find = struck
"""


@pytest.mark.promise(
    "A rank that fails before the training is no stop", "`accelerate launch`: an error, and SIGKILL, of a rank in set-up"
)
@pytest.mark.parametrize("fault", ["raise OSError('no such device')", "os.kill(os.getpid(), 9)"])
def test_a_fault_in_set_up(fault: str, arguments, tmp_path: Path) -> None:
    """The launcher's SIGTERM, which ends the others, comes from it; schedulers start a run again that was stopped."""
    log, noted = tmp_path / "log", tmp_path / "code"
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text(STRUCK_IN_SET_UP.format(fault=fault))
    path = f"{tmp_path / 'path'}{os.pathsep}{ROOT}"
    process = start(accelerate_command("2cpu-ddp", *arguments()), log, PRETRAIN_EXIT_FILE=str(noted), PYTHONPATH=path)
    assert process.wait(60) != 0
    assert "rank 0 stopped by SIGTERM" in log.read_text() and noted.read_text() == "1\n", log.read_text()


@pytest.mark.promise("The rank at fault is named, and the launcher ends", "`accelerate launch`: SIGSTOP of a rank")
def test_a_frozen_rank(arguments, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    process = start(accelerate_command("2cpu-zero1", *arguments(watchdog_seconds=6)), log)
    wait_for(saved(run, 5), "checkpoint", log)
    pids = ranks_of(process.pid)
    os.kill(pids[1], signal.SIGSTOP)
    began = time.monotonic()
    assert process.wait(60) != 0
    assert time.monotonic() - began < 20
    assert status(run)["state"] == "failed" and "no sign of life from rank 1" in status(run)["reason"]
    wait_for(lambda: gone(pids), "end of the workers", log, 20)


@pytest.mark.promise("supervise.sh goes on from the newest checkpoint", "`supervise.sh`: SIGKILL of a worker, twice")
def test_supervise_restarts(arguments, tmp_path: Path) -> None:
    run, log, steps = tmp_path / "run", tmp_path / "log", 60
    launch("2cpu-ddp", *arguments("undisturbed", max_steps=steps))
    process = start(supervise("2cpu-ddp", *arguments(max_steps=steps)), log, PYTHON=sys.executable, SUPERVISE_PAUSE="0")
    for step in (5, 20):
        wait_for(saved(run, step), f"checkpoint {step}", log)
        os.kill(ranks_of(process.pid)[0], signal.SIGKILL)
    assert process.wait(120) == 0, log.read_text()
    assert len(re.findall(r"supervise: .*restart 1 of 3", log.read_text())) == 2
    assert losses(run) == losses(tmp_path / "undisturbed")
    name = f"checkpoints/step-{steps:08d}/model.safetensors"
    assert sha256(run / name) == sha256(tmp_path / "undisturbed" / name)


@pytest.mark.promise(
    "supervise.sh passes signals on and waits for the save", "`supervise.sh`: SIGUSR1 and SIGTERM to the script"
)
@pytest.mark.parametrize("accelerate_file, number", [("2cpu-zero1", signal.SIGUSR1), ("cpu", signal.SIGTERM)])
def test_supervise_passes_signals_on(accelerate_file: str, number: int, arguments, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    process = start(supervise(accelerate_file, *arguments()), log, PYTHON=sys.executable)
    wait_for(saved(run, 5), "checkpoint", log)
    pids = ranks_of(process.pid)
    process.send_signal(number)
    assert process.wait(40) == 75, log.read_text()
    assert pids
    wait_for(lambda: gone(pids), "end of the workers", log, 2)  # the lock is free a moment before the process is gone
    assert_stopped(run)


@pytest.mark.promise(
    "supervise.sh gives up after three restarts without progress", "`supervise.sh`: a run that fails each time"
)
def test_supervise_gives_up(arguments, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    process = start(accelerate_command("cpu", *arguments()), log)
    wait_for(saved(run, 5), "checkpoint", log)
    kill_all(process)
    before = find_newest(run / "checkpoints")[0].step
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()  # nothing can be logged: a fault that no restart mends
    process = start(supervise("cpu", *arguments()), log, PYTHON=sys.executable, SUPERVISE_PAUSE="0")
    assert process.wait(200) == 1, log.read_text()
    assert "supervise: 3 restarts without a checkpoint" in log.read_text()
    assert log.read_text().count("of 3 from step") == 3 and find_newest(run / "checkpoints")[0].step == before


def test_supervise_tells_a_bad_configuration_once(arguments, tmp_path: Path) -> None:
    done = subprocess.run(
        supervise("cpu", *arguments(save_evry=3)), env=environment(PYTHON=sys.executable), capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.count("did you mean save_every?") == 1
