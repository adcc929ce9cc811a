"""Output whose reader is gone keeps nothing from happening."""

from __future__ import annotations

import errno
import os
import sys

import pytest

from recipe.output import lasting_output
from recipe.signals import leave


def test_a_pipe_without_a_reader_takes_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with lasting_output():
            print("heard", flush=True)
            assert os.read(reader, 100) == b"heard\n"
            os.close(reader)
            for _ in range(3):
                print("x" * 100_000, flush=True)
            assert sys.stdout.fileno() == writer and not sys.stdout.isatty()
            os.write(writer, b"by native code")
        assert sys.stdout is stream


def test_what_a_full_disk_does_not_take_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        taken: list[str] = []
        full = True

        def write(self, text: str) -> int:
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.taken.append(text)
            return len(text)

        def flush(self) -> None: ...

    monkeypatch.setattr(sys, "stderr", Full())
    with lasting_output():
        print("lost", file=sys.stderr)
        Full.full = False
        print("there is room again", file=sys.stderr)
    assert "".join(Full.taken) == "there is room again\n"


def test_a_process_leaves_with_its_code_whoever_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def flush(self) -> None:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    ended: list[int] = []
    monkeypatch.setattr(sys, "stdout", Gone())
    monkeypatch.setattr(os, "_exit", ended.append)
    leave(75)
    assert ended == [75]
