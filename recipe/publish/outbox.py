"""What a training run still has to push: kept on disk, sent by a process of its own, which no dead network and no crash of
either side can make lose it.

    RUN/outbox/step-00000500/ticket.json        where to
                             checkpoint/        hard links to the checkpoint's files, or copies: they outlive its rotation
              final/ticket.json                 RUN/export is to be pushed
    RUN/push.log                                what became of it

The process: python -m recipe.publish.outbox RUN [--patience SECONDS]
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from recipe.config import Config, ConfigError, first_line
from recipe.files import link_or_copy, write_json
from recipe.publish.contents import STATE_FILES
from recipe.publish.hub import HubError
from recipe.publish.push import Destination, push_checkpoint, push_export
from recipe.publish.redaction import redact
from recipe.run_folder import RunFolder

if TYPE_CHECKING:
    from recipe.checkpoint import Checkpoint

FINAL = "final"
MOST_CHECKPOINTS = 4
"""Waiting ones; of more, the older ones are given up: each holds the disk space of a checkpoint."""
FIRST_PAUSE, LONGEST_PAUSE = 2.0, 60.0
"""Seconds between attempts."""
_LAUNCHERS = re.compile(r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_.*|TORCHELASTIC_.*|ACCELERATE_.*|PET_.*")
_NAME = re.compile(r"step-\d{8,}|" + FINAL)


class Outbox:
    """The waiting entries of a run."""

    def __init__(self, folder: RunFolder):
        self.folder, self.path = folder, folder.path / "outbox"

    def entries(self) -> list[Path]:
        """The finished model first, then the checkpoints by step."""
        found = [p for p in self.path.glob("*") if _NAME.fullmatch(p.name) and (p / "ticket.json").is_file()]
        return sorted(found, key=lambda path: (path.name != FINAL, len(path.name), path.name))

    def add_checkpoint(self, found: Checkpoint, destination: Destination) -> list[str]:
        """Keep a checkpoint for pushing; the names of older ones that are given up for it.

        Raises:
            OSError: if its files can be neither linked nor copied.
        """
        names = STATE_FILES if destination.with_state else ("MANIFEST.json", "model.safetensors", "state.json")

        def fill(entry: Path) -> None:
            (entry / "checkpoint").mkdir()
            for name in (name for name in names if (found.path / name).exists()):
                link_or_copy(found.path / name, entry / "checkpoint" / name)

        self._add(f"step-{found.step:08d}", found.step, destination, fill)
        # The first is perhaps being pushed.
        waiting = [path for path in self.entries() if path.name != FINAL]
        given_up = waiting[1 : 1 + max(0, len(waiting) - MOST_CHECKPOINTS)]
        for path in given_up:
            shutil.rmtree(path)
        return [path.name for path in given_up]

    def add_final(self, step: int, destination: Destination) -> None:
        """Note that RUN/export is to be pushed."""
        self._add(FINAL, step, destination, lambda entry: None)

    def _add(self, name: str, step: int, destination: Destination, fill: Callable[[Path], None]) -> None:
        target, temporary = self.path / name, self.path / f".{name}.tmp"
        for path in (temporary, target):
            shutil.rmtree(path, ignore_errors=True)
        temporary.mkdir(parents=True)
        fill(temporary)
        write_json(temporary / "ticket.json", {"step": step, "destination": asdict(destination)})
        os.replace(temporary, target)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Be the only process that pushes; wait until another one is done."""
        self.path.mkdir(exist_ok=True)
        with open(self.path / ".lock", "w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield


def _sleep(seconds: float) -> bool:
    time.sleep(seconds)
    return True


def deliver_all(
    folder: RunFolder, patience: float, say: Callable[[str], None], is_awaited: Callable[[float], bool] = _sleep
) -> bool:
    """Push what waits, and take it out of the outbox.

    Args:
        patience: seconds without success, while somebody waits for us, after which to give up.
        is_awaited: waits that many seconds; whether somebody waits for us. As long as nobody does (the training goes on), we
            never give up.
    Returns:
        whether nothing is left.
    """
    outbox = Outbox(folder)
    failing_since, pause, was_awaited = None, FIRST_PAUSE, False
    with outbox.lock():
        while entries := outbox.entries():
            entry, asked = entries[0], 0.0
            try:
                _deliver(folder, entry, say)
                failing_since, pause = None, FIRST_PAUSE
                continue
            except HubError as error:
                say(f"{entry.name} not pushed: {error}")
                may_pass, asked = error.passing, error.retry_after
            except OSError as error:  # the disk is full, or the entry was given up for a newer one
                if not entry.exists():
                    continue
                say(f"{entry.name} not pushed: {first_line(error)}")
                may_pass = True
            except Exception as error:
                shutil.rmtree(entry, ignore_errors=True)
                say(f"{entry.name} is given up: {first_line(error)}. scripts/push.py can push what the run still has")
                continue
            awaited = is_awaited(0)
            if failing_since is None or (awaited and not was_awaited):
                failing_since, pause = time.monotonic(), FIRST_PAUSE
            was_awaited, wait = awaited, max(pause, asked)
            if awaited and (not may_pass or time.monotonic() + wait - failing_since > patience):
                return False
            is_awaited(wait)
            pause = min(2 * pause, LONGEST_PAUSE)
    return True


def _deliver(folder: RunFolder, entry: Path, say: Callable[[str], None]) -> None:
    ticket = json.loads((entry / "ticket.json").read_text(encoding="utf-8"))
    destination = Destination(**ticket["destination"])
    if entry.name == FINAL:
        push_export(folder, destination, say)
    else:
        from recipe.checkpoint import Checkpoint  # torch: not for the finished model, which is exported already

        push_checkpoint(folder, Checkpoint(entry / "checkpoint", ticket["step"]), destination, say)
    shutil.rmtree(entry)


class BackgroundPush:
    """Rank 0's side during the training: puts checkpoints into the outbox, and keeps the process that empties it going.

    None of it raises: what fails is said.
    """

    def __init__(self, folder: RunFolder, config: Config, say: Callable[[str], None]):
        self._folder, self._config, self._say = folder, config, say
        self._destination = Destination.of(config)
        self._outbox = Outbox(folder)
        self._process: subprocess.Popen | None = None
        if self._outbox.entries():
            self._quietly(self._start)

    def saved(self, found: Checkpoint) -> None:
        """A checkpoint was committed: push it if it is due."""
        if self._config.push_every and found.step % self._config.push_every == 0:
            self._quietly(self._add, found)

    def finish(self, step: int) -> None:
        """Push the finished model and wait until it is there, or push_patience is over without success."""
        self._quietly(self._finish, step)

    def _add(self, found: Checkpoint) -> None:
        size = sum(path.stat().st_size for path in found.path.iterdir())
        if shutil.disk_usage(self._folder.path).free < 2 * size:
            self._say(f"push: step {found.step} is left out, the disk is nearly full")
            return
        for name in self._outbox.add_checkpoint(found, self._destination):
            self._say(f"push: {name} is given up, for newer ones wait; see {self._folder.path / 'push.log'}")
        self._start()

    def _start(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        root = str(Path(__file__).resolve().parents[2])
        environment = {name: value for name, value in os.environ.items() if not _LAUNCHERS.fullmatch(name)}
        environment |= {"PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
        environment.setdefault("HF_HUB_DISABLE_XET", "1")
        command = [sys.executable, "-m", "recipe.publish.outbox", str(self._folder.path.resolve())]
        with open(self._folder.path / "push.log", "ab") as log:
            # It lives as long as there is something to push. Its stdin is the end of the training for it, however that comes.
            self._process = subprocess.Popen(
                [*command, "--patience", str(self._config.push_patience)],
                env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def _finish(self, step: int) -> None:
        self._outbox.add_final(step, self._destination)
        self._say(f"pushing to {self._destination.repo}; see {self._folder.path / 'push.log'}")
        for _ in range(2):  # it may have looked for the last time before the entry came
            self._start()
            self._process.stdin.close()
            if self._process.wait() != 0 or not self._outbox.entries():
                break
        if left := self._outbox.entries():
            self._say(f"not pushed: {', '.join(path.name for path in left)}: {_last_line(self._folder.path / 'push.log')}")
            self._say(f"later: python scripts/push.py {self._folder.path} --pending, or the same command again")
        else:
            self._say(f"pushed to {self._destination.repo}")

    def _quietly(self, action: Callable, *arguments: object) -> None:
        try:
            action(*arguments)
        except Exception as error:
            self._say(f"push: {redact(first_line(error))}; the training is not affected")


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return lines[-1] if lines else "no reason given"


def check_destination(config: Config, folder: RunFolder, say: Callable[[str], None]) -> None:
    """At the start of a run: who am I, may I write, is the repository there, whose is it. It is made if not.

    Raises:
        ConfigError: if a run that is new may not push there. One that goes on is told, and trains.
    """
    try:
        Destination.of(config).open(folder)
    except HubError as error:
        if not error.passing and not folder.config.is_file():
            raise ConfigError(f"push_to_hub: {error}") from error
        say(f"push_to_hub: {error}; the training goes on, and pushing is tried again later")


def main(arguments: list[str]) -> int:
    """The process of the outbox: 0 if all is pushed, 1 if not."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("run", type=Path)
    parser.add_argument("--patience", type=float, default=120)
    options = parser.parse_args(arguments)
    # Only what the training leaves of the processors, where the system can be told so.
    with contextlib.suppress(OSError, AttributeError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    with contextlib.suppress(OSError):
        os.nice(19)

    def ended(seconds: float) -> bool:
        return bool(select.select([sys.stdin], [], [], seconds)[0])

    def is_awaited(seconds: float) -> bool:
        if not ended(0):
            return ended(seconds)
        time.sleep(seconds)
        return True

    def say(line: str) -> None:
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {redact(line)}", flush=True)

    return 0 if deliver_all(RunFolder(options.run), options.patience, say, is_awaited) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
