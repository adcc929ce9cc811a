"""Runs that push while they train, resume from the Hub, and start from other weights."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hub_server import Fault, HubServer
from launch import PRETRAIN, TINY, losses, options
from push_helpers import (
    REPO,
    TOKEN,
    content,
    everything_sent,
    files_below,
    operations,
    paths,
    push,
    push_environment,
    the_repo,
    writes,
)
from recipe.files import sha256
from recipe.publish.contents import ContentsError
from recipe.publish.hub import HubError
from recipe.publish.outbox import Outbox, deliver_all
from recipe.run_folder import RunFolder
from test_push import EXPORT, STATE

PUSHING = {"push_to_hub": REPO, "push_every": 10, "push_patience": 0}


@pytest.fixture
def server():
    with HubServer() as server:
        yield server


def command(data: Path, folder: Path, **fields: object) -> list[str]:
    base = TINY | {"data": data, "output_dir": folder, "max_steps": 20, "save_every": 10, "eval_every": 10}
    return [sys.executable, PRETRAIN, *options(**(base | {"n_positions": 128, "precision": "fp32"} | fields))]


def train(server: HubServer, home: Path, data: Path, folder: Path, **fields: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(data, folder, **fields), env=push_environment(server, home), capture_output=True, text=True, timeout=200
    )


def same_weights(one: Path, other: Path, step: int = 20) -> bool:
    files = ("model.safetensors", "optimizer.safetensors")
    folders = [run / "checkpoints" / f"step-{step:08d}" for run in (one, other)]
    return all(sha256(folders[0] / name) == sha256(folders[1] / name) for name in files)


def wait_until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_a_run_pushes_while_it_trains_the_same_weights(server, tmp_path, fineweb_folder, trained_run):
    folder = tmp_path / "runs" / "gpt2-tiny"
    done = train(server, tmp_path, fineweb_folder, folder, **PUSHING, push_state="true")
    assert done.returncode == 0, done.stderr
    assert f"pushed to {REPO}" in done.stdout, done.stdout + (folder / "push.log").read_text()
    assert the_repo(server).private and set(the_repo(server).branches) == {"main", "step-10", "step-20"}
    for branch in the_repo(server).branches:
        assert paths(server, branch) == EXPORT | STATE
    assert not [o for o in operations(server) if o["key"].startswith("deleted")]
    assert same_weights(folder, trained_run), "pushing has changed the training"
    assert TOKEN.encode() not in everything_sent(server)
    assert not [path for path in files_below(tmp_path) if TOKEN.encode() in path.read_bytes()]


def test_another_machine_continues_a_pushed_run_to_the_same_weights(server, tmp_path, fineweb_folder, trained_run):
    first = shutil.copytree(trained_run, tmp_path / "first")
    assert push(server, tmp_path, first, "--checkpoint", "10", "--with_state").returncode == 0
    shutil.rmtree(first)
    folder, home = tmp_path / "runs" / "gpt2-tiny", tmp_path / "elsewhere"
    resume = {"resume": f"hub:{REPO}@step-10"}
    done = train(server, home, fineweb_folder, folder, **resume, push_to_hub=REPO)
    assert done.returncode == 0, done.stderr
    assert "at step 10" in done.stdout and "step 20/20" in done.stdout
    assert same_weights(folder, trained_run)
    assert losses(folder) == losses(trained_run), "the metrics of the first ten steps came along"
    assert f"pushed to {REPO}" in done.stdout, "the repository is known as the run's own"
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step-00000010", "step-00000020"]
    assert not list((folder / "cache").glob("hub-*"))
    # The same command again goes on from its own last checkpoint.
    done = train(server, home, fineweb_folder, folder, **resume)
    assert done.returncode == 0 and "at step 20" in done.stdout, done.stderr


@pytest.mark.slow
def test_resuming_from_what_is_not_there(server, tmp_path, fineweb_folder, trained_run):
    run = shutil.copytree(trained_run, tmp_path / "run")
    assert push(server, tmp_path, run).returncode == 0
    for resume, message in {
        f"hub:{REPO}@main": "has no training state at main",
        f"hub:{REPO}@step-7": "cannot be had",
        "hub:tester/nothing@main": "cannot be had",
    }.items():
        done = train(server, tmp_path, fineweb_folder, tmp_path / "new", resume=resume)
        assert done.returncode == 2 and message in done.stderr, done.stderr


def test_a_damaged_training_state_is_refused(server, tmp_path, fineweb_folder, trained_run):
    run = shutil.copytree(trained_run, tmp_path / "run")
    assert push(server, tmp_path, run, "--with_state").returncode == 0
    repo = the_repo(server)
    files = {path: blob.content for path, blob in repo.commits[repo.branches["main"]].items()}
    damaged = bytearray(files["training_state/optimizer.safetensors"])
    damaged[-1] ^= 1
    server.add_repo("model", REPO, files | {"training_state/optimizer.safetensors": bytes(damaged)})
    done = train(server, tmp_path, fineweb_folder, tmp_path / "new", resume=f"hub:{REPO}@main")
    assert done.returncode == 2 and "optimizer.safetensors is damaged" in done.stderr, done.stderr


REFUSALS = {
    "foreign": (None, "did not make"),
    "401": (Fault(status=401), "does not take the access token"),
    "403": (Fault(status=403), "may not write"),
}


@pytest.mark.parametrize("fault, message", REFUSALS.values(), ids=REFUSALS)
def test_a_new_run_that_may_not_push_does_not_start(server, tmp_path, fineweb_folder, fault, message):
    if fault is None:
        server.add_repo("model", REPO, {"README.md": b"# Mine"})
        the_repo(server).private = True
    server.fault = lambda request: fault
    done = train(server, tmp_path, fineweb_folder, tmp_path / "run", **PUSHING)
    assert done.returncode == 2 and "push_to_hub: " in done.stderr and message in done.stderr
    assert not (tmp_path / "run" / "config.yaml").exists()
    assert fault or not writes(server)


@pytest.mark.slow
def test_a_run_trains_on_without_a_hub_and_the_next_start_pushes_what_it_left(server, tmp_path, fineweb_folder, trained_run):
    folder = tmp_path / "runs" / "gpt2-tiny"
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nowhere = push_environment(server, tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{closed.getsockname()[1]}")
        started = command(fineweb_folder, folder, **PUSHING)
        done = subprocess.run(started, env=nowhere, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "cannot be reached" in done.stdout and "not pushed: final, step-00000010, step-00000020" in done.stdout
    assert same_weights(folder, trained_run)
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("finished", 0)
    assert [path.name for path in Outbox(RunFolder(folder)).entries()] == ["final", "step-00000010", "step-00000020"]
    # The checkpoint itself may go meanwhile.
    shutil.rmtree(folder / "checkpoints" / "step-00000010")
    done = train(server, tmp_path, fineweb_folder, folder, **PUSHING)
    assert done.returncode == 0, done.stderr
    assert not Outbox(RunFolder(folder)).entries(), (folder / "push.log").read_text()
    assert {b: paths(server, b) for b in the_repo(server).branches} == dict.fromkeys(("main", "step-10", "step-20"), EXPORT)


FAULTS = {
    "401": Fault(status=401), "403": Fault(status=403), "409": Fault(status=409), "412": Fault(status=412),
    "429": Fault(status=429, headers={"Retry-After": "600"}), "500": Fault(status=500), "reset": Fault(reset_at=0),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_no_fault_of_the_hub_changes_how_a_run_ends(server, tmp_path, fineweb_folder, trained_run, fault):
    """Of a finished run that is started again, the quickest that pushes."""
    run = shutil.copytree(trained_run, tmp_path / "run")
    server.fault = lambda request: fault
    done = train(server, tmp_path, fineweb_folder, run, **PUSHING)
    assert done.returncode == 0, done.stderr
    assert "not pushed: final" in done.stdout and [r for r in server.requests if r.fault]
    assert Outbox(RunFolder(run)).entries()
    server.fault = None
    environment = push_environment(server, tmp_path)
    pending = [sys.executable, str(Path(PRETRAIN).with_name("push.py")), str(run), "--pending"]
    done = subprocess.run(pending, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert content(server, "README.md") == (run / "export" / "README.md").read_bytes()
    assert paths(server) == EXPORT and not Outbox(RunFolder(run)).entries()


@pytest.mark.slow
def test_a_killed_run_leaves_a_process_that_pushes_and_ends(server, tmp_path, fineweb_folder):
    folder = tmp_path / "runs" / "gpt2-tiny"
    arguments = command(fineweb_folder, folder, **PUSHING, max_steps=4000, max_epochs=50)
    process = subprocess.Popen(arguments, env=push_environment(server, tmp_path), stdout=subprocess.DEVNULL)
    log = folder / "push.log"
    try:
        wait_until(log.exists, 120)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    wait_until(lambda: not Outbox(RunFolder(folder)).entries(), 120)
    assert "step-10" in the_repo(server).branches and paths(server, "step-10") == EXPORT
    wait_until(lambda: not [p for p in Path("/proc").glob("[0-9]*/cmdline") if _pushes(p, folder)])


def _pushes(cmdline: Path, folder: Path) -> bool:
    try:
        return b"recipe.publish.outbox" in (words := cmdline.read_bytes()) and str(folder).encode() in words
    except OSError:
        return False


# --- the outbox ---------------------------------------------------------------------------------------------------


def test_the_outbox_keeps_the_oldest_and_the_newest(trained_run, tmp_path):
    from recipe.checkpoint import Checkpoint
    from recipe.publish.push import Destination

    run = RunFolder(shutil.copytree(trained_run, tmp_path / "run"))
    outbox, source = Outbox(run), run.checkpoints / "step-00000010"
    given_up = [outbox.add_checkpoint(Checkpoint(source, step), Destination(REPO)) for step in range(10, 70, 10)]
    assert given_up == [[], [], [], [], ["step-00000020"], ["step-00000030"]]
    outbox.add_final(70, Destination(REPO))
    assert [p.name for p in outbox.entries()] == ["final", *(f"step-000000{n}" for n in (10, 40, 50, 60))]
    # Links, not copies; without state no optimizer.
    entry = outbox.path / "step-00000010" / "checkpoint"
    assert (entry / "model.safetensors").samefile(source / "model.safetensors")
    assert {p.name for p in entry.iterdir()} == {"MANIFEST.json", "state.json", "model.safetensors"}


def test_the_outbox_copies_where_there_are_no_links(trained_run, tmp_path, monkeypatch):
    from recipe.checkpoint import Checkpoint
    from recipe.publish.push import Destination

    def refuse(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))  # as rclone's mounts of buckets do

    monkeypatch.setattr(os, "link", refuse)
    run = RunFolder(shutil.copytree(trained_run, tmp_path / "run"))
    source = run.checkpoints / "step-00000010"
    assert Outbox(run).add_checkpoint(Checkpoint(source, 10), Destination(REPO)) == []
    kept = run.path / "outbox" / "step-00000010" / "checkpoint" / "model.safetensors"
    assert kept.read_bytes() == (source / "model.safetensors").read_bytes() and not kept.samefile(source / kept.name)


class Clock:
    """In place of the module time: it passes when somebody waits."""

    def __init__(self) -> None:
        self.now, self.ends_at = 1000.0, 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def training(self, seconds: float) -> bool:
        """Wait as the process of the outbox does: until the training ends, if that comes first."""
        if self.now < self.ends_at:
            self.now = min(self.now + seconds, self.ends_at)
            return self.now >= self.ends_at
        self.now += seconds
        return True


@pytest.fixture
def waiting(trained_run, tmp_path, monkeypatch):
    """A run with a finished model in its outbox, the clock, and the attempts to push that were made."""
    from recipe.publish import outbox
    from recipe.publish.push import Destination

    run, clock, attempts = RunFolder(shutil.copytree(trained_run, tmp_path / "run")), Clock(), []
    Outbox(run).add_final(20, Destination(REPO))
    monkeypatch.setattr(outbox, "time", clock)

    def fail_with(error: Exception) -> None:
        def deliver(folder, entry, say):
            attempts.append(clock.now)
            raise error

        monkeypatch.setattr(outbox, "_deliver", deliver)

    return run, clock, attempts, fail_with


@pytest.mark.parametrize("patience, expected", [(0, [0]), (10, [0, 2, 6]), (120, [0, 2, 6, 14, 30, 62])])
def test_attempts_become_rarer_and_end(waiting, patience, expected):
    run, clock, attempts, fail_with = waiting
    fail_with(HubError("no answer", passing=True))
    assert not deliver_all(run, patience, lambda line: None)
    assert [at - 1000 for at in attempts] == expected and Outbox(run).entries()


def test_patience_begins_when_the_training_ends(waiting):
    run, clock, attempts, fail_with = waiting
    clock.ends_at = 1000 + 3600
    fail_with(HubError("no answer", passing=True))
    assert not deliver_all(run, 10, lambda line: None, clock.training)
    assert [at - clock.ends_at for at in attempts if at >= clock.ends_at] == [0, 2, 6]
    assert 60 < len(attempts) < 75, "about one a minute"


def test_what_the_hub_refuses_is_tried_while_the_training_goes_on_and_once_at_its_end(waiting):
    run, clock, attempts, fail_with = waiting
    clock.ends_at = 1000 + 300
    fail_with(HubError("who are you"))
    assert not deliver_all(run, 120, lambda line: None, clock.training)
    assert attempts[-1] == clock.ends_at and len(attempts) > 5 and Outbox(run).entries()


def test_the_hub_is_given_the_time_that_it_asks_for(waiting):
    run, clock, attempts, fail_with = waiting
    fail_with(HubError("too many", passing=True, retry_after=50))
    assert not deliver_all(run, 120, lambda line: None)
    assert [at - 1000 for at in attempts] == [0, 50, 100]


def test_an_entry_that_cannot_be_pushed_does_not_hold_up_the_others(waiting):
    run, clock, attempts, fail_with = waiting
    fail_with(ContentsError("no whole export"))
    said = []
    assert deliver_all(run, 0, said.append)
    assert not Outbox(run).entries() and "is given up: no whole export" in said[0]


# --- init_from ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_starts_from_given_weights(server, tmp_path, fineweb_folder, trained_run):
    import torch
    from safetensors.torch import load_file

    assert push(server, tmp_path, shutil.copytree(trained_run, tmp_path / "run")).returncode == 0
    export = trained_run / "export"
    short = {"max_steps": 1, "learning_rate": 0, "warmup_steps": 0, "evaluate_tasks": "none", "tokenizer": str(export)}
    last = [json.loads(line) for line in (trained_run / "metrics.jsonl").read_text().splitlines() if "val_loss" in line][-1]
    for number, name in enumerate((str(export), REPO, f"{REPO}@main")):
        folder = tmp_path / f"from{number}"
        done = train(server, tmp_path, fineweb_folder, folder, init_from=name, **short)
        assert done.returncode == 0, done.stderr
        begin = next(json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if "val_loss" in line)
        assert begin["step"] == 0 and begin["val_loss"] == pytest.approx(last["val_loss"], abs=1e-6)
        ours, theirs = (load_file(p / "model.safetensors") for p in (folder / "checkpoints" / "step-00000001", export))
        assert torch.equal(ours["transformer.wte.weight"][:400], theirs["transformer.wte.weight"])
        assert not ours["transformer.wte.weight"][400:].any()
        assert f"trained on from `{name}`" in (folder / "export" / "README.md").read_text()


def test_weights_that_do_not_fit_are_refused_with_what_would(server, tmp_path, fineweb_folder, trained_run):
    bad = tmp_path / "bert"
    bad.mkdir()
    (bad / "config.json").write_text('{"model_type": "bert"}')
    export = trained_run / "export"
    for fields, message in (
        ({"init_from": export, "n_layer": 3, "n_positions": 256}, "has n_layer 2 (here 3), n_positions 128 (here 256)"),
        ({"init_from": export, "tokenizer": "train:300"}, "has a vocabulary of 400 and the tokenizer one of 300"),
        ({"init_from": bad}, "a model of type bert, not a gpt2"),
        ({"init_from": "tester/nothing"}, "cannot load folder or Hub id tester/nothing"),
    ):
        done = train(server, tmp_path, fineweb_folder, tmp_path / "new", **fields)
        assert done.returncode == 2 and "init_from: " in done.stderr and message in done.stderr
