"""Runs that are killed, frozen, damaged, stalled, filled up and told to stop, on ranks that are forked from one parent."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from conftest import make_documents, write_fineweb
from fault_jobs import STEPS, Job, checkpoint_path, hashes, status
from launch import losses, metrics
from recipe.checkpoint import CheckpointError, find_newest, verify
from recipe.files import read_json_lines
from recipe.tokenizer import train_tokenizer
from recipe.watchdog import KILLED_S

pytestmark = pytest.mark.faults
both_engines = pytest.mark.parametrize("engine", ["zero1", "ddp"])
TERM, KILL, STOP, INT, USR1 = signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP, signal.SIGINT, signal.SIGUSR1


class Bench:
    """Starts jobs on one text with one tokenizer, and keeps the undisturbed run of each engine."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.text = write_fineweb(folder / "text", files=2, documents=100)
        self.short_text = write_fineweb(folder / "short", files=1, documents=24, row_group_size=4)
        self.tokenizer = folder / "tokenizer"
        train_tokenizer(make_documents(200), 400).save_pretrained(self.tokenizer)
        self._undisturbed: dict[tuple, Job] = {}

    def job(self, folder: Path, engine: str, ranks: int = 2, faults: list = (), **fields: object) -> Job:
        return Job(folder, fields.pop("text", self.text), engine, ranks, faults, tokenizer=self.tokenizer, **fields)

    def undisturbed(self, engine: str, ranks: int = 2, **fields: object) -> Path:
        """The folder of a run that nothing disturbed, with a checkpoint of each step; not to be changed."""
        key = (engine, ranks, *sorted(fields.items()))
        if key not in self._undisturbed:
            folder = self._folder / f"undisturbed-{len(self._undisturbed)}"
            self._undisturbed[key] = self.job(folder, engine, ranks, **fields).succeed()
        return self._undisturbed[key].folder

    def copy(self, engine: str, folder: Path, *steps: int, **fields: object) -> Path:
        """A run folder with some of the undisturbed run's checkpoints."""
        source = self.undisturbed(engine, **fields)
        (folder / "checkpoints").mkdir(parents=True)
        shutil.copy(source / "config.yaml", folder)
        shutil.copytree(source / "cache" / "tokenizer", folder / "cache" / "tokenizer")
        for step in steps:
            shutil.copytree(checkpoint_path(source, step), checkpoint_path(folder, step))
        return folder


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


def assert_one_valid(folder: Path, at_least: int = 1) -> int:
    found, _ = find_newest(folder / "checkpoints")
    assert found is not None and found.step >= at_least
    return found.step


# --- resuming -----------------------------------------------------------------------------------------------------


@pytest.mark.promise("A resumed run is the undisturbed run, bit for bit", "resumed from each of 12 steps")
@both_engines
def test_resume_from_each_step(bench: Bench, engine: str, tmp_path: Path) -> None:
    undisturbed = bench.undisturbed(engine)
    for step in range(1, STEPS + 1):
        folder, noted = bench.copy(engine, tmp_path / str(step), step), tmp_path / f"{step}.json"
        job = bench.job(folder, engine, faults=[(rank, "note_state", {"path": str(noted)}) for rank in range(2)]).succeed()
        state = json.loads(noted.read_text())
        assert job.fired(0) and state["step"] == step and state["fresh"] != state["loaded"] and state["rng"]
        theirs = {r["step"]: r["train_loss"] for r in metrics(undisturbed) if "train_loss" in r}
        ours = {r["step"]: r["train_loss"] for r in metrics(folder) if "train_loss" in r}
        assert ours == {n: loss for n, loss in theirs.items() if n > step}
        assert hashes(folder, STEPS) == hashes(undisturbed, STEPS)


@pytest.mark.promise(
    "No row is lost or repeated, and the final weights are the same", "10 SIGKILLs of all ranks at random moments"
)
@both_engines
def test_ten_random_kills(bench: Bench, engine: str, tmp_path: Path) -> None:
    steps, rng, folder = 55, random.Random(7), tmp_path / "run"
    undisturbed = bench.undisturbed(engine, max_steps=steps, save_every=5)
    slow = [(rank, "slow", {"place": "step", "seconds": 0.02}) for rank in range(2)]
    for kill in range(10):
        job = bench.job(folder, engine, faults=slow, max_steps=steps, save_every=5)
        job.wait_for_checkpoint(5 * (kill + 1))
        time.sleep(rng.random() * 0.15)
        assert not checkpoint_path(folder, steps).exists(), "the kill came too late"
        job.kill()
        assert all(process.exitcode == -KILL for process in job.processes)
    job = bench.job(folder, engine, max_steps=steps, save_every=5).succeed()
    assert "continuing from" in job.output()
    assert set(job.ledger()) == {(step, place) for step in range(steps) for place in range(16)}
    assert losses(folder) == losses(undisturbed)
    assert hashes(folder, steps) == hashes(undisturbed, steps)


@pytest.mark.promise("A resumed run is the undisturbed run, bit for bit", "three resumes in a row across an epoch")
@both_engines
def test_three_resumes_across_an_epoch(bench: Bench, engine: str, tmp_path: Path) -> None:
    fields, folder, epochs = {"text": bench.short_text, "validation_tokens": 64, "batch_tokens": 1024}, tmp_path / "run", []
    undisturbed = bench.undisturbed(engine, **fields)
    for _ in range(3):
        job = bench.job(folder, engine, faults=[(1, "send", {"number": KILL, "place": "step", "call": 4})], **fields)
        assert job.wait()[1] == -KILL and job.fired(1)
        epochs.append(find_newest(folder / "checkpoints")[0].state()["data"]["epoch"])
    job = bench.job(folder, engine, **fields).succeed()
    assert epochs[-1] > epochs[0], "no epoch has ended"
    assert len(job.ledger()) == STEPS * 32
    assert hashes(folder, STEPS) == hashes(undisturbed, STEPS)


@pytest.mark.promise(
    "A checkpoint goes on on other ranks and another engine, its state exact", "1, 2 and 4 ranks, ZeRO-1 and DDP"
)
def test_other_topologies(bench: Bench, tmp_path: Path) -> None:
    folder, path = (
        tmp_path / "run",
        [("zero1", 1), ("zero1", 2), ("zero1", 4), ("ddp", 2), ("ddp", 1), ("ddp", 4), ("zero1", 2)],
    )
    for number, (engine, ranks) in enumerate(path, 1):
        noted = tmp_path / f"{number}.json"
        stop = (0, "send", {"number": TERM, "place": "step", "call": 2})
        notes = [(rank, "note_state", {"path": str(noted)}) for rank in range(ranks)]
        last = number == len(path)
        job = bench.job(folder, engine, ranks, faults=notes if last else [stop, *notes], max_steps=36)
        assert job.wait() == [0 if last else 75] * ranks, job.output()
        if number > 1:
            state = json.loads(noted.read_text())
            saved = verify(checkpoint_path(folder, state["step"])).full_state()
            assert state["fresh"] != state["loaded"] == digest(saved)
    assert losses(folder) == pytest.approx(losses(bench.undisturbed("ddp", max_steps=36)), abs=2e-4)


def digest(state: dict) -> str:
    total = hashlib.sha256()
    for name in sorted(state):
        total.update(name.encode() + state[name].numpy().tobytes())
    return total.hexdigest()


# --- damaged checkpoints ------------------------------------------------------------------------------------------


class Malicious:
    def __init__(self, marker: str):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def damages(marker: Path) -> list:
    def replace_by_pickle(path: Path) -> None:
        path.write_bytes(pickle.dumps(Malicious(str(marker))))

    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[len(content) // 2 if path.name != "MANIFEST.json" else 0] ^= 1
        path.write_bytes(content)

    return [
        Path.unlink,
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        flip,
        lambda path: path.write_bytes(b""),
        replace_by_pickle,
    ]


FILES = ["MANIFEST.json", "model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"]


@pytest.mark.promise(
    "A damaged checkpoint is named and passed over", "each file deleted, cut, a bit flipped, emptied, made a malicious pickle"
)
@pytest.mark.parametrize("name", FILES)
@both_engines
def test_damaged_files(bench: Bench, engine: str, name: str, tmp_path: Path) -> None:
    marker, steps = tmp_path / "unpickled", [7, 8, 9, 10, 11]
    folder = bench.copy(engine, tmp_path / "run", 6, *steps)
    for step, damage in zip(steps, damages(marker), strict=True):
        damage(checkpoint_path(folder, step) / name)
        with pytest.raises(CheckpointError):
            verify(checkpoint_path(folder, step))
    output = bench.job(folder, engine).succeed().output()
    assert output.count("passed over:") == 5 and "continuing from" in output and "at step 6" in output
    assert all(f"step-{step:08d}" in output for step in steps)
    assert not marker.exists()
    assert hashes(folder, STEPS) == hashes(bench.undisturbed(engine), STEPS)


# --- saving -------------------------------------------------------------------------------------------------------

POINTS = [
    *((0, place, call) for place, call in
      [("gather", 4), ("weights", 7), ("state", 7), ("hash", 14), ("state", 8), ("renamed", 4), ("rotate", 4)]),
    *((1, place, call) for place, call in
      [("save", 4), ("gather", 4), ("step", 5), ("read", 5), ("micro-step", 20), ("validate", 2)]),
]  # fmt: skip


@pytest.mark.promise("One valid checkpoint is left, whoever dies when", "SIGKILL of one rank at a point of the save")
@pytest.mark.parametrize("rank, place, call", POINTS)
@both_engines
def test_killed_in_a_save(bench: Bench, engine: str, rank: int, place: str, call: int, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    # A save takes longer than a step here, so that the other rank is killed while rank 0 writes.
    faults = [(rank, "send", {"number": KILL, "place": place, "call": call})]
    faults += [(0, "slow", {"place": "sync", "seconds": 0.03})] if rank else []
    fields = {"eval_every": 4} if place == "validate" else {}
    job = bench.job(folder, engine, faults=faults, keep_checkpoints=1, **fields)
    codes = job.wait()
    assert job.fired(rank) and codes[rank] == -KILL and codes[1 - rank] in (1, -KILL), job.output()
    assert f"lost rank {rank}" in job.output()
    assert_one_valid(folder)
    if engine == "ddp" or place == "state":
        bench.job(folder, engine, keep_checkpoints=1, **fields).succeed()
        assert hashes(folder, STEPS) == hashes(bench.undisturbed(engine), STEPS)


@pytest.mark.promise("The old checkpoint stays, one clear error", "disk full in the middle of a file")
@both_engines
def test_disk_full_in_mid_save(bench: Bench, engine: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    job = bench.job(folder, engine, faults=[(0, "full_disk", {"call": 7})])
    assert job.wait() == [1, 1] and job.fired(0), job.output()
    assert assert_one_valid(folder) == 2
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == [f"step-0000000{n}" for n in (1, 2)]
    assert "the checkpoint of step 3 could not be written" in status(folder)["reason"]
    bench.job(folder, engine).succeed()
    assert hashes(folder, STEPS) == hashes(bench.undisturbed(engine), STEPS)


@pytest.mark.promise("Too little room is told before the run, and before a save", "a disk with 1 MiB left")
@pytest.mark.parametrize("call, code", [(1, 2), (5, 1)])
def test_little_space(bench: Bench, call: int, code: int, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    job = bench.job(folder, "ddp", faults=[(0, "little_space", {"call": call, "free": 100_000})])
    assert job.wait() == [code, code] and job.fired(0), job.output()
    assert "the disk has 0 MiB left" in job.output()
    if call > 1:
        assert assert_one_valid(folder) == call - 2


@pytest.mark.promise("Rotation keeps the newest, every n-th and the best, and leaves strangers alone", "strays in the folder")
@both_engines
def test_rotation_with_strays(bench: Bench, engine: str, tmp_path: Path) -> None:
    folder = bench.copy(engine, tmp_path / "run", 1)
    strays = ["step-abc", "step-00000001.bak", "best", ".step-00000002.tmp.mine"]
    for name in strays:
        (folder / "checkpoints" / name).mkdir(parents=True)
    (folder / "checkpoints" / "notes.txt").write_text("mine")
    job = bench.job(folder, engine, keep_checkpoints=2, keep_every=4, keep_best="true", eval_every=1).succeed()
    best = min((r for r in metrics(folder) if "val_loss" in r and r["step"]), key=lambda r: r["val_loss"])["step"]
    kept = sorted({4, 8, 11, 12, best})
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == sorted(
        [*strays, "notes.txt", *(f"step-{n:08d}" for n in kept)]
    )
    assert "could not be deleted" not in job.output()


@pytest.mark.promise("A failed delete does not stop the run", "folders that cannot be deleted")
@both_engines
def test_undeletable_folder(bench: Bench, engine: str, tmp_path: Path) -> None:
    job = bench.job(tmp_path / "run", engine, faults=[(0, "undeletable", {})], keep_checkpoints=1).succeed()
    assert job.fired(0) and "could not be deleted" in job.output()
    assert assert_one_valid(tmp_path / "run") == STEPS


@pytest.mark.promise(
    "Going back is a decision: auto stays on the new line", "--resume of an older checkpoint in the same folder"
)
def test_rewind(bench: Bench, tmp_path: Path) -> None:
    folder = bench.copy("ddp", tmp_path / "run", 4, 8, 10)
    kill = [(0, "send", {"number": KILL, "place": "step", "call": 3})]
    job = bench.job(folder, "ddp", faults=kill, resume=checkpoint_path(folder, 4))
    assert job.wait()[0] == -KILL and job.fired(0)
    assert "set aside" in job.output()
    assert assert_one_valid(folder) < 8
    assert verify(folder / "checkpoints" / "superseded-step-00000010").step == 10
    bench.job(folder, "ddp").succeed()
    assert find_newest(folder / "checkpoints")[0].state()["lineage"][0] == 4
    assert hashes(folder, STEPS) == hashes(bench.undisturbed("ddp"), STEPS)


@pytest.mark.promise(
    "Who goes back or branches off does so once: the same command goes on", "SIGKILL before and after the first save"
)
def test_resume_path_is_taken_up_once(bench: Bench, tmp_path: Path) -> None:
    parent, folder = bench.undisturbed("ddp"), tmp_path / "run"
    words = {"resume": checkpoint_path(parent, 4), "save_every": 4}
    for call in (3, 6):  # nothing of its own is saved at first: it starts there again
        job = bench.job(folder, "ddp", faults=[(0, "send", {"number": KILL, "place": "step", "call": call})], **words)
        assert job.wait()[0] == -KILL and job.fired(0)
    assert assert_one_valid(folder) == 8
    job = bench.job(folder, "ddp", **words).succeed()
    assert "was taken up already: going on from step 8" in job.output()
    assert [start["step"] for start in read_json_lines(folder / "starts.jsonl")] == [4, 4, 8]
    assert hashes(folder, STEPS) == hashes(parent, STEPS)
    assert not list((folder / "checkpoints").glob("superseded-*")), "nothing was thrown away"
    # Other words are another decision.
    job = bench.job(folder, "ddp", skip_rows="160-175", **words).succeed()
    assert [start["step"] for start in read_json_lines(folder / "starts.jsonl")] == [4, 4, 8, 4]
    assert hashes(folder, STEPS) != hashes(parent, STEPS)


# --- signals ------------------------------------------------------------------------------------------------------


@pytest.mark.promise(
    "A signal to one rank: all save, then all exit 75",
    "SIGTERM, SIGINT, SIGUSR1 in set-up, mid-accumulation, validation and save",
)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    "number, place, call", [(TERM, "set-up", 1), (TERM, "micro-step", 18), (INT, "validate", 2), (USR1, "sync", 10)]
)
@both_engines
def test_a_signal_to_one_rank(
    bench: Bench, engine: str, ranks: int, number: int, place: str, call: int, tmp_path: Path
) -> None:
    folder, rank = tmp_path / "run", 0 if place in ("sync", "set-up") else ranks - 1
    fields = {"eval_every": 4} if place == "validate" else {}
    began = time.monotonic()
    job = bench.job(folder, engine, ranks, faults=[(rank, "send", {"number": number, "place": place, "call": call})], **fields)
    assert job.wait() == [75] * ranks and job.fired(rank), job.output()
    assert time.monotonic() - began < 30
    stopped = status(folder)
    assert (stopped["state"], stopped["exit_code"]) == ("stopped", 75)
    if place != "set-up":
        assert assert_one_valid(folder) == stopped["step"] < STEPS
    if engine == "zero1" or place == "set-up":
        bench.job(folder, engine, ranks, **fields).succeed()
        assert hashes(folder, STEPS) == hashes(bench.undisturbed(engine, ranks), STEPS)


def validated(run: Path) -> list[tuple]:
    return [(r["step"], r["val_loss"]) for r in metrics(run) if "val_loss" in r]


@pytest.mark.promise("An evaluation does not hold up the save, and is made up for", "SIGTERM in the middle of a validation")
@both_engines
def test_signal_in_the_middle_of_a_validation(bench: Bench, engine: str, tmp_path: Path) -> None:
    folder, fields = tmp_path / "run", {"eval_every": 4}
    undisturbed = validated(bench.undisturbed(engine, **fields))
    assert [step for step, _ in undisturbed] == [0, 4, 8, STEPS]
    # 16 rows, 4 a batch, by two ranks: 2 batches a validation, so that this is the first of step 4.
    faults = [
        (1, "sleep", {"place": "losses", "call": 3, "seconds": 1}),
        (1, "send", {"number": TERM, "place": "losses", "call": 3}),
    ]
    job = bench.job(folder, engine, faults=faults, **fields)
    assert job.wait() == [75, 75] and job.fired(1), job.output()
    assert assert_one_valid(folder) == 4 and validated(folder) == undisturbed[:1]
    bench.job(folder, engine, **fields).succeed()
    assert validated(folder) == undisturbed


@pytest.mark.promise("An evaluation does not hold up the save, and is made up for", "SIGTERM between validation and HellaSwag")
def test_what_was_evaluated_before_a_signal_is_not_evaluated_again(bench: Bench, tmp_path: Path) -> None:
    folder, fields = tmp_path / "run", {"eval_every": 4, "hellaswag_every": 4, "evaluate_data": "mini", "hellaswag_items": 8}
    undisturbed = bench.undisturbed("ddp", **fields)
    faults = [
        (1, "sleep", {"place": "hellaswag", "call": 1, "seconds": 1}),
        (1, "send", {"number": TERM, "place": "hellaswag", "call": 1}),
    ]
    job = bench.job(folder, "ddp", faults=faults, **fields)
    assert job.wait() == [75, 75] and job.fired(1), job.output()
    assert assert_one_valid(folder) == 4 and validated(folder) == validated(undisturbed)[:2]
    bench.job(folder, "ddp", **fields).succeed()
    assert validated(folder) == validated(undisturbed)
    scored = [[(r["step"], r["hellaswag_acc"]) for r in metrics(run) if "hellaswag_acc" in r] for run in (folder, undisturbed)]
    assert scored[0] == scored[1] and [step for step, _ in scored[0]] == [4, 8, STEPS]


@pytest.mark.promise("An emergency save works while another is being written", "SIGTERM during a slow write")
@both_engines
def test_signal_during_a_write(bench: Bench, engine: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    faults = [(0, "slow", {"place": "write", "seconds": 1.5}), (1, "send", {"number": TERM, "place": "step", "call": 6})]
    job = bench.job(folder, engine, faults=faults, save_every=4)
    assert job.wait() == [75, 75] and job.fired(0) and job.fired(1), job.output()
    assert [p.name for p in sorted((folder / "checkpoints").iterdir())] == ["step-00000004", "step-00000006"]
    saves = [r for r in metrics(folder) if "save_stall_seconds" in r]
    assert saves[0]["save_seconds"] > 1.5 > 1 > saves[0]["save_stall_seconds"], "the training waited for the write"


@pytest.mark.promise("A save that outlasts the grace costs no older checkpoint", "SIGKILL a second after the SIGTERM")
@both_engines
def test_grace_exceeded(bench: Bench, engine: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    job = bench.job(folder, engine, faults=[(0, "sleep", {"place": "sync", "call": 14, "seconds": 60})], save_every=2)
    job.wait_for(lambda: job.fired(0))
    job.signal(TERM)
    time.sleep(1)
    job.kill()
    assert all(process.exitcode == -KILL for process in job.processes)
    assert assert_one_valid(folder) == 6
    bench.job(folder, engine, save_every=2).succeed()
    assert hashes(folder, STEPS) == hashes(bench.undisturbed(engine), STEPS)


@pytest.mark.promise("A second signal ends the process at once", "two SIGTERMs, 3.5 s apart, in a hung save")
def test_second_signal(bench: Bench, tmp_path: Path) -> None:
    job = bench.job(tmp_path / "run", "ddp", faults=[(0, "sleep", {"place": "write", "call": 2, "seconds": 60})])
    job.wait_for(lambda: job.fired(0))
    job.signal(TERM)
    time.sleep(3.5)
    assert all(process.is_alive() for process in job.processes)
    began = time.monotonic()
    job.signal(TERM)
    assert job.wait() == [128 + TERM] * 2 and time.monotonic() - began < 2


@pytest.mark.promise("--max_hours saves and stops in time", "a run that would take longer")
def test_max_hours(bench: Bench, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    slow = [(0, "slow", {"place": "step", "seconds": 0.2})]
    job = bench.job(folder, "ddp", faults=slow, max_steps=500, save_every=0, max_hours=8 / 3600)
    assert job.wait() == [75, 75] and job.fired(0)
    # From when the processes began; the parent they are forked from may have had to import everything first.
    seconds = max(line.get("wall_seconds", 0) for line in metrics(folder))
    assert seconds < 8
    assert status(folder)["reason"].startswith("max_hours") and assert_one_valid(folder) == status(folder)["step"] < 500


# --- dead, frozen and stalled -------------------------------------------------------------------------------------


IN_STEP = {"place": "micro-step", "call": 18, "after": 1.5}  # the last sign of life, one in 0.75 s, came from there


@pytest.mark.promise(
    "The rank at fault and what it did are named in time", "SIGKILL, SIGSTOP, a stalled read, a hung save of a rank"
)
@pytest.mark.parametrize(
    "rank, name, options, named, last",
    [
        (1, "send", IN_STEP | {"number": KILL}, "rank 1 in train at step", "killed"),
        (
            1,
            "send",
            IN_STEP | {"number": STOP},
            "rank 1 in train at step",
            "no sign of life",
        ),
        (
            0,
            "send",
            IN_STEP | {"number": STOP},
            "rank 0 in train at step",
            "no sign of life",
        ),
        (1, "sleep", {"place": "read", "call": 6, "seconds": 120}, "rank 1 in data at step", "no progress"),
        (1, "sleep", {"place": "draw", "call": 6, "seconds": 120}, "rank 1 in data at step", "no progress"),
        (0, "sleep", {"place": "write", "call": 3, "seconds": 120}, "rank 0 in", "writing a checkpoint"),
    ],
)
@both_engines
def test_the_watchdog(
    bench: Bench, engine: str, rank: int, name: str, options: dict, named: str, last: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    job = bench.job(folder, engine, faults=[(rank, name, options)], watchdog_seconds=6)
    job.wait_for(lambda: job.fired(rank))
    began = time.monotonic()
    codes = job.wait(30)
    assert time.monotonic() - began < 6 + 8  # the ranks that do not record it leave the one that does 2.5 s
    assert 0 not in codes and 75 not in codes
    told = status(folder)
    assert (told["state"], told["exit_code"], told["rank"]) == ("failed", 1, rank), told
    assert named in told["reason"] and last in told["reason"], told
    assert named in job.output()
    if last != "killed":  # of which the others may hear by a collective that fails
        assert "most recent call first" in job.output(), "the ranks tell where they stand"
    assert_one_valid(folder)


@both_engines
def test_a_rank_is_killed_while_the_others_hear_of_nothing(bench: Bench, engine: str, tmp_path: Path) -> None:
    """As those do that wait for their GPU, which waits for the rank."""
    folder = tmp_path / "run"
    at = {"place": "micro-step", "call": 18}
    job = bench.job(folder, engine, faults=[(1, "send", at | {"number": KILL}), (0, "sleep", at | {"seconds": 120})])
    job.wait_for(lambda: job.fired(0) and job.fired(1))
    began = time.monotonic()
    assert job.wait(30) == [1, -KILL]
    assert time.monotonic() - began < KILLED_S + 6
    told = status(folder)
    assert (told["state"], told["rank"]) == ("failed", 1) and "lost rank 1" in told["reason"], told
    assert "its process is gone" in told["reason"]


@pytest.mark.promise(
    "Text that cannot be read, or ends, stops all ranks with its reason", "a read error on one rank; the text runs out"
)
@both_engines
def test_data_that_fails_or_ends(bench: Bench, engine: str, tmp_path: Path) -> None:
    job = bench.job(tmp_path / "a", engine, faults=[(1, "fail", {"place": "read", "call": 6, "message": "the disk is broken"})])
    assert job.wait() == [1, 1] and job.fired(1)
    assert "the disk is broken" in job.output()
    faults = [(rank, "unmeasured", {}) for rank in range(2)]
    fields = {"text": bench.short_text, "validation_tokens": 64, "max_epochs": 1, "max_steps": 100}
    job = bench.job(tmp_path / "b", engine, faults=faults, **fields)
    assert job.wait() == [1, 1] and job.fired(0)
    assert "the text has run out" in status(tmp_path / "b")["reason"]
    assert_one_valid(tmp_path / "b")


# --- numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.promise("A step that is not finite changes nothing, on no rank", "NaN and Inf on one rank")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@both_engines
def test_not_finite_once(bench: Bench, engine: str, precision: str, value: float, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    faults = [(1, "poison", {"value": value, "steps": [4]})]
    job = bench.job(folder, engine, faults=faults, precision=precision, max_steps=6).succeed()
    assert job.fired(1)
    assert hashes(folder, 4) == hashes(folder, 5) != hashes(folder, 6)
    assert [r["skipped"] for r in metrics(folder) if "train_loss" in r] == [0, 0, 0, 0, 1, 0]


@pytest.mark.promise("Three in a row stop the run, or send it back without their rows", "NaN in three steps on one rank")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@both_engines
def test_not_finite_three_times(bench: Bench, engine: str, precision: str, tmp_path: Path) -> None:
    folder, fields = tmp_path / "run", {"precision": precision, "log_every": 2, "save_every": 2}
    faults = [(1, "poison", {"value": float("nan"), "steps": [5, 6, 7]})]
    job = bench.job(folder, engine, faults=faults, **fields)
    assert job.wait() == [1, 1] and job.fired(1)
    assert "not finite in 3 steps in a row up to step 8" in status(folder)["reason"]
    assert_one_valid(folder)

    back, rows = tmp_path / "back", [(rank, "scramble", {"steps": [5, 6, 7], "factor": "nan"}) for rank in range(2)]
    job = bench.job(back, engine, faults=rows, on_nonfinite="rollback", **fields).succeed()
    assert job.fired(1) and "back to step 4" in job.output()
    recorded = [json.loads(line)["rows"] for line in (back / "skipped_rows.jsonl").read_text().splitlines()]
    assert recorded == [[80, 95], [96, 111], [112, 127]]
    assert [r["skipped"] for r in metrics(back) if "train_loss" in r] == [0] * STEPS
    # A later start leaves them out as well.
    assert find_newest(back / "checkpoints")[0].state()["left_out"] == recorded
    shutil.rmtree(checkpoint_path(back, STEPS))
    bench.job(back, engine, on_nonfinite="rollback", **fields).succeed()


@pytest.mark.promise("A spike is left out, or sends the run back; its rows are recorded", "a loss three times as high")
@pytest.mark.parametrize("action", ["skip", "rollback"])
@both_engines
def test_spike(bench: Bench, engine: str, action: str, tmp_path: Path) -> None:
    folder, fields = tmp_path / "run", {"spike_action": action, "spike_window": 8, "spike_threshold": 20, "save_every": 1}
    faults = [(rank, "scramble", {"steps": [8], "factor": 3.0}) for rank in range(2)]
    job = bench.job(folder, engine, faults=faults, **fields).succeed()
    assert job.fired(1) and "spike: loss" in job.output()
    (record,) = [json.loads(line) for line in (folder / "skipped_rows.jsonl").read_text().splitlines()]
    assert (record["step"], record["rows"], record["action"], record["reason"]) == (9, [128, 143], action, "spike")
    assert record["loss"] > 2 * record["limit"] / 1.2
    state = verify(checkpoint_path(folder, STEPS)).state()
    assert len(state["spike_losses"]) == 8 and max(state["spike_losses"]) < record["limit"]
    if action == "skip":
        assert hashes(folder, 8) == hashes(folder, 9) != hashes(folder, 10)
    else:
        assert "back to step 8" in job.output() and state["left_out"] == [[128, 143]]
        assert max(losses(folder)) < record["limit"] + 1


# --- folders, clocks, leaks ---------------------------------------------------------------------------------------


@pytest.mark.promise(
    "A second run in a folder is refused, and another configuration, with the difference", "two runs on one folder"
)
@both_engines
def test_second_run_refused(bench: Bench, engine: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    go_on = tmp_path / "go-on"
    first = bench.job(folder, engine, faults=[(0, "hold", {"place": "step", "call": 5, "until": str(go_on)})])
    first.wait_for(lambda: first.fired(0))
    second = bench.job(folder, engine, faults=[(rank, "impatient", {}) for rank in range(2)])
    assert second.wait() == [2, 2] and "is being trained in by process" in second.output(), second.output()
    go_on.touch()
    assert first.wait() == [0, 0]
    other = bench.job(folder, engine, learning_rate=2e-3)
    assert other.wait() == [2, 2] and "learning_rate is 0.001 there and 0.002 now" in other.output()


@pytest.mark.promise(
    "Open files, threads and memory stay flat; a clock that is set does no harm", "3,000 steps; the clock set back and forth"
)
def test_long_run(bench: Bench, tmp_path: Path) -> None:
    folder, noted = tmp_path / "run", tmp_path / "resources.jsonl"
    faults = [
        (0, "note_resources", {"path": str(noted), "every": 100}),
        (0, "jump_the_clock", {"step": 50, "seconds": -86_400}),
        (1, "jump_the_clock", {"step": 60, "seconds": 86_400}),
    ]
    fields = {"max_steps": 3000, "save_every": 50, "keep_checkpoints": 2, "eval_every": 500, "log_every": 10}
    job = bench.job(folder, "ddp", faults=faults, watchdog_seconds=20, max_hours=1, **fields)
    assert job.wait(200) == [0, 0] and job.fired(0) and job.fired(1), job.output()[-3000:]
    records = [json.loads(line) for line in noted.read_text().splitlines()]
    early, late = records[5:10], records[-5:]
    assert max(r[1] for r in late) <= max(r[1] for r in early) + 1, "open files grow"
    assert max(r[2] for r in late) <= max(r[2] for r in early) + 1, "threads grow"
    assert max(r[3] for r in late) < max(r[3] for r in early) * 1.05, "memory grows"
    seconds = [r["step_seconds"] for r in metrics(folder) if "train_loss" in r]
    assert min(seconds) > 0 and max(seconds) < 60
