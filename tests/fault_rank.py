"""One rank of a run, forked from a parent that has imported everything, with a fault put in its way.

A fault is a pair (name, arguments); the functions below carry them out. Each leaves the file FOLDER/fired-RANK when it has
fired, for the test to look at: a fault that never happened proves nothing.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

from recipe import checkpoint, cli, files, inputs, run_folder, train
from recipe.data.stream import RowStream
from recipe.engine import Engine, ReplicatedEngine
from recipe.evaluation import periodic
from recipe.evaluation.periodic import PeriodicEvaluation
from recipe.model import PretrainingModel
from recipe.rng import gather_rng
from recipe.signals import leave
from recipe.start import Start
from recipe.train import Run
from recipe.zero1 import Zero1Engine

FAULTS: dict[str, Callable] = {}


def fault(function: Callable) -> Callable:
    FAULTS[function.__name__] = function
    return function


def run_rank(rank: int, ranks: int, engine: str, port: int, folder: str, arguments: list[str], faults: list) -> None:
    """Be rank `rank` of `ranks` of `pretrain.py ARGUMENTS`; what it prints goes to FOLDER/rank-RANK.log.

    Args:
        engine: zero1 or ddp.
        faults: (rank, name, arguments) of what is to go wrong.
    """
    os.setsid()
    log = os.open(f"{folder}/rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1",
        ACCELERATE_USE_DEEPSPEED="true" if engine == "zero1" else "false",
    )  # fmt: skip
    # One thread: more wait for each other, on a busy machine, longer than they compute.
    os.environ["LOCAL_WORLD_SIZE"] = str(os.cpu_count())
    # Samples, and what follows the training, are not in question here.
    periodic.sample = lambda *arguments: []
    train.finish_run = lambda *arguments: None
    note_rows(Path(folder) / f"ledger-{rank}-{os.getpid()}.jsonl", rank, ranks)
    if any(options.get("place") == "read" for _, _, options in faults):
        # On every rank: each step waits for its text, as a step does whose rows were not there the last time.
        RowStream._foresee = lambda self, rows: None
    for where, name, options in faults:
        if where == rank:
            FAULTS[name](lambda: Path(f"{folder}/fired-{rank}").touch(), **options)
    leave(cli.main(arguments))


def note_rows(path: Path, rank: int, ranks: int) -> None:
    """Write the hash of each row that the rank trains on, with its step and its place in the batch."""
    original = Run._train_step
    take = RowStream.next_batch
    handle = open(path, "a", encoding="utf-8")  # noqa: SIM115  (until the process ends)
    current = {}

    def next_batch(self, rows, trace=None):
        batch = take(self, rows, trace)
        for place, row in enumerate(batch):
            digest = hashlib.sha256(row.tobytes()).hexdigest()[:16]
            handle.write(json.dumps([current["step"], place * ranks + rank, digest]) + "\n")
        handle.flush()
        return batch

    def train_step(self, step):
        current["step"] = step
        return original(self, step)

    RowStream.next_batch, Run._train_step = next_batch, train_step


def before(owner: object, name: str, action: Callable[[int], None]) -> None:
    """Call `action` with the number of the call, from 1, before each call of `owner.name`."""
    original, count = getattr(owner, name), [0]

    def wrapped(*arguments, **keywords):
        count[0] += 1
        action(count[0])
        return original(*arguments, **keywords)

    setattr(owner, name, wrapped)


def engine_class() -> type[Engine]:
    return Zero1Engine if os.environ["ACCELERATE_USE_DEEPSPEED"] == "true" else ReplicatedEngine


PLACES = {
    "gather": lambda: (engine_class(), "full_state"),
    "renamed": lambda: (checkpoint, "sync_folder"),
    "weights": lambda: (checkpoint, "save_file"),
    "state": lambda: (checkpoint, "write_json"),
    "sync": lambda: (checkpoint, "sync"),
    "hash": lambda: (checkpoint, "sha256"),
    "rotate": lambda: (checkpoint, "rotate"),
    "delete": lambda: (checkpoint, "remove"),
    "step": lambda: (Run, "_train_step"),
    "micro-step": lambda: (PretrainingModel, "forward"),
    "read": lambda: (RowStream, "_read"),
    "draw": lambda: (RowStream, "next_batch"),
    "validate": lambda: (PeriodicEvaluation, "_validate"),
    "hellaswag": lambda: (PeriodicEvaluation, "_evaluate_hellaswag"),
    "losses": lambda: (engine_class(), "losses"),
    "set-up": lambda: (checkpoint, "find_newest"),
    "save": lambda: (Run, "_save"),
    "write": lambda: (checkpoint, "save"),
}
"""Where a fault can strike."""


@fault
def send(fired: Callable, number: int, place: str, call: int, after: float = 0.0) -> None:
    """The rank gets a signal at the `call`-th time that it comes to the place, when it has been there for `after` seconds."""

    def action(count: int) -> None:
        if count == call:
            time.sleep(after)
            fired()
            os.kill(os.getpid(), number)
            if number == signal.SIGSTOP:
                time.sleep(1)  # the signal may come a moment after the call

    before(*PLACES[place](), action)


@fault
def sleep(fired: Callable, place: str, call: int, seconds: float) -> None:
    """The rank hangs at the place."""

    def action(count: int) -> None:
        if count == call:
            fired()
            time.sleep(seconds)

    before(*PLACES[place](), action)


@fault
def hold(fired: Callable, place: str, call: int, until: str) -> None:
    """The rank waits at the place until a file exists."""

    def action(count: int) -> None:
        if count == call:
            fired()
            while not Path(until).exists():
                time.sleep(0.1)

    before(*PLACES[place](), action)


@fault
def fail(fired: Callable, place: str, call: int, message: str) -> None:
    """The place raises."""

    def action(count: int) -> None:
        if count == call:
            fired()
            raise OSError(errno.EIO, message)

    before(*PLACES[place](), action)


@fault
def full_disk(fired: Callable, call: int) -> None:
    """The disk becomes full in the middle of the `call`-th file of weights: the kernel refuses what goes beyond 64 KiB."""

    def action(count: int) -> None:
        if count == call:
            fired()
            resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, resource.RLIM_INFINITY))

    def lift(count: int) -> None:
        # Of the failed save nothing but its files is refused.
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    before(checkpoint, "save_file", action)
    before(checkpoint.shutil, "rmtree", lift)


@fault
def undeletable(fired: Callable) -> None:
    """No folder can be deleted."""

    def action(count: int) -> None:
        fired()
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    before(checkpoint.shutil, "rmtree", action)


@fault
def poison(fired: Callable, value: float, steps: list[int]) -> None:
    """The loss of the rank is `value` in some steps, and with it the gradient."""
    forward, at = PretrainingModel.forward, {}

    def poisoned(self, rows):
        losses = forward(self, rows)
        if self.training and at.get("step") in steps:
            fired()
            return losses * value
        return losses

    PretrainingModel.forward = poisoned
    _note_step(at)


@fault
def scramble(fired: Callable, steps: list[int], factor: float | str) -> None:
    """The rows that come at some steps multiply the loss: those very rows, whenever they come again."""
    forward, at, bad = PretrainingModel.forward, {}, set()

    def scrambled(self, rows):
        losses = forward(self, rows)
        if not self.training:
            return losses
        digest = hashlib.sha256(rows.numpy().tobytes()).hexdigest()
        if at["step"] in steps and at["visits"].count(at["step"]) == 1:
            bad.add(digest)
        if digest in bad:
            fired()
            return losses * float(factor)
        return losses

    PretrainingModel.forward = scrambled
    _note_step(at)


def _note_step(at: dict) -> None:
    original = Run._train_step

    def train_step(self, step):
        at["step"] = step
        at.setdefault("visits", []).append(step)
        return original(self, step)

    Run._train_step = train_step


@fault
def note_state(fired: Callable, path: str) -> None:
    """Not a fault: notes hashes of the whole state as built, before a checkpoint is loaded into it, and after; and whether
    every rank's random generators are then those of the checkpoint."""
    original = Start.load

    def digest(engine: Engine) -> str:
        state = engine.full_state()
        total = hashlib.sha256()
        for name in sorted(state):
            total.update(name.encode() + state[name].numpy().tobytes())
        return total.hexdigest()

    def load(self, engine):
        if not self.checkpoint:
            return
        fresh = digest(engine)
        original(self, engine)
        loaded, rng, saved = digest(engine), gather_rng(engine.distributed), self.checkpoint.rng()
        same = rng.keys() == saved.keys() and all(rng[name].equal(saved[name]) for name in rng)
        if engine.distributed.is_main:
            fired()
            files.write_json(Path(path), {"fresh": fresh, "loaded": loaded, "rng": same, "step": self.step})

    Start.load = load


@fault
def note_resources(fired: Callable, path: str, every: int) -> None:
    """Not a fault: notes open files, threads and resident memory every so many steps."""

    def action(count: int) -> None:
        if count % every == 0:
            fired()
            status = Path("/proc/self/status").read_text()
            resident = int(status.split("VmRSS:")[1].split()[0])
            record = [count, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), resident]
            with open(path, "a", encoding="utf-8") as handle:
                handle.write(json.dumps(record) + "\n")

    before(Run, "_train_step", action)


@fault
def jump_the_clock(fired: Callable, step: int, seconds: float) -> None:
    """Somebody sets the machine's clock."""
    true_time = time.time

    def action(count: int) -> None:
        if count == step:
            fired()
            time.time = lambda: true_time() + seconds

    before(Run, "_train_step", action)


@fault
def little_space(fired: Callable, call: int, free: int) -> None:
    """The disk has `free` bytes left from the `call`-th question on."""
    original, count = checkpoint.shutil.disk_usage, [0]

    def disk_usage(path):
        count[0] += 1
        usage = original(path)
        if count[0] < call:
            return usage
        fired()
        return usage._replace(free=free)

    checkpoint.shutil.disk_usage = disk_usage


@fault
def slow(fired: Callable, place: str, seconds: float) -> None:
    """Every call of the place takes so much longer."""

    def action(count: int) -> None:
        fired()
        time.sleep(seconds)

    before(*PLACES[place](), action)


@fault
def impatient(fired: Callable) -> None:
    """Not a fault: a busy folder is waited for a second only."""
    run_folder.LOCK_WAIT_S = 1
    fired()


@fault
def unmeasured(fired: Callable) -> None:
    """Nobody notices before the run that the text is too short for it."""
    inputs.check_length = lambda *arguments: fired() or "not measured"


with contextlib.suppress(ImportError):
    # Into the parent, so that the children need not.
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  (which imports the compiler, for a second)
    from accelerate import Accelerator, PartialState  # noqa: F401
    from transformers import AutoTokenizer, GPT2LMHeadModel  # noqa: F401
