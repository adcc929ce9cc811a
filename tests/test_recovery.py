"""What counts as a bad step, and what follows from it; the generators in a checkpoint; which checkpoints stay."""

from __future__ import annotations

import random
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from recipe import checkpoint
from recipe.checkpoint import Checkpoint
from recipe.config import Config
from recipe.distributed import Distributed
from recipe.recovery import MAX_ROLLBACKS, Recovery, Rollback, TrainingError
from recipe.rng import gather_rng, restore_rng
from recipe.saving import Saver
from recipe.spikes import MOST_IN_A_ROW, SkippedRows, SpikeFinder
from recipe.steps import Step
from recipe.watchdog import has_ended


def step(number: int, loss: float = 3.0, skipped: bool = False, limit: float = float("inf")) -> Step:
    rows = (16 * number - 16, 16 * number - 1)
    return Step(number, rows, 0.0, 1e-3, None, None, loss=loss, grad_norm=1.0, skipped=skipped, limit=limit)


NAN = float("nan")


def test_three_steps_in_a_row_that_are_not_finite_stop_the_run() -> None:
    recovery = Recovery(Config(on_nonfinite="stop"))
    taken = [step(1), step(2, NAN, True), step(3, NAN, True)]
    assert recovery.examine(taken, None) == (taken, None)
    good, bad = step(4), [step(n, NAN, True) for n in (5, 6, 7)]
    assert recovery.examine([good], None) == ([good], None)  # it ends the row
    steps, rollback = recovery.examine([*bad, step(8)], None)
    assert steps == bad and rollback.last_good_step == 4
    assert [one["rows"] for one in rollback.bad] == [[64, 79], [80, 95], [96, 111]]
    assert all(one["loss"] is None for one in rollback.bad)
    with pytest.raises(TrainingError, match="3 steps in a row up to step 7.*lower learning_rate"):
        recovery.rolls_back(rollback)


def test_spikes_are_recorded_or_rolled_back(tmp_path: Path) -> None:
    record = SkippedRows(tmp_path / "skipped_rows.jsonl")
    spike = step(9, 8.0, True, limit=5.0)
    steps, rollback = Recovery(Config(spike_action="skip")).examine([step(8), spike, step(10)], record)
    assert len(steps) == 3 and rollback is None
    assert record.left_out() == []  # its update is left out, its rows are not taken from the text
    assert '"rows": [128, 143]' in (tmp_path / "skipped_rows.jsonl").read_text()
    _, rollback = Recovery(Config(spike_action="rollback")).examine([step(8), spike], None)
    assert rollback.allowed and rollback.last_good_step == 8 and rollback.bad[0]["limit"] == 5.0
    record.add([one | {"action": "rollback"} for one in rollback.bad])
    assert record.left_out() == [(128, 143)]


def test_rollbacks_without_progress_come_to_an_end() -> None:
    recovery, rollback = Recovery(Config()), Rollback("a reason", [{"step": 40, "rows": [0, 15]}])
    for _ in range(MAX_ROLLBACKS):
        recovery.rolls_back(rollback)
    recovery.saved(40)  # not behind it
    with pytest.raises(TrainingError, match="3 rollbacks did not get beyond it"):
        recovery.rolls_back(rollback)
    recovery.saved(41)
    recovery.rolls_back(rollback)


def test_the_limit_of_a_spike_by_hand() -> None:
    finder = SpikeFinder(8, 2.0, torch.device("cpu"))
    accepted = torch.zeros(())
    for loss in (4.0, 3.0):
        assert finder.limit() == float("inf")
        finder.accept(torch.tensor(loss), accepted)
    finder.accept(torch.tensor(100.0), torch.ones(()))  # left out: it never moves the history
    finder.accept(torch.tensor(NAN), accepted)
    assert finder.state() == [4.0, 3.0]
    assert float(finder.limit()) == pytest.approx(np.mean([4, 3]) + 2 * np.std([4, 3], ddof=1))
    for n in range(10):
        finder.accept(torch.tensor(float(n)), accepted)
    assert finder.state() == [float(n) for n in range(2, 10)]
    again = SpikeFinder(8, 2.0, torch.device("cpu"), finder.state())
    assert float(again.limit()) == float(finder.limit())


def test_another_level_of_the_loss_is_no_spike_for_ever() -> None:
    """As after an update that has spoiled the weights: every step would be left out, and nothing mend them."""
    finder, accepted = SpikeFinder(8, 2.0, torch.device("cpu"), [3.0, 3.1] * 4), torch.zeros(())
    for count in range(1, MOST_IN_A_ROW):
        finder.accept(torch.tensor(9.0), torch.ones(()), finder.limit())
        assert finder.in_a_row() == count and float(finder.limit()) < 4
    again = SpikeFinder(8, 2.0, torch.device("cpu"), finder.state(), finder.in_a_row())
    for one in (finder, again):
        one.accept(torch.tensor(9.0), torch.ones(()), one.limit())
        assert one.state() == [] and one.in_a_row() == 0 and one.limit() == float("inf")
        one.accept(torch.tensor(9.0), accepted, one.limit())
        assert one.state() == [9.0]
    # One that is accepted in between ends the row.
    finder = SpikeFinder(8, 2.0, torch.device("cpu"), [3.0, 3.1] * 4)
    for loss in [*[9.0] * (MOST_IN_A_ROW - 1), 3.0, 9.0]:
        finder.accept(torch.tensor(loss), accepted, finder.limit())
    assert finder.in_a_row() == 1 and len(finder.state()) == 8


def test_a_save_is_not_charged_with_the_one_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two slow ones behind each other would look to the watchdog like one that hangs."""
    began: list[float] = []

    def write(folder: Path, *_: object) -> Checkpoint:
        began.append(watchdog.writing_since)
        time.sleep(0.5)
        return Checkpoint(tmp_path, 0)

    monkeypatch.setattr(checkpoint, "save", write)
    monkeypatch.setattr(checkpoint, "rotate", lambda *_: [])
    watchdog = SimpleNamespace(writing_since=None)
    engine = SimpleNamespace(full_state=lambda buffers: buffers, precision="fp32")
    saver = Saver(tmp_path, Config(), Distributed(), watchdog)
    for number in (1, 2):
        saver.save(number, engine, {}, {})
        if number == 2:
            assert time.monotonic() - watchdog.writing_since < 0.4
    saver.wait()
    first, second = saver.results()
    assert second["save_stall_seconds"] > 0.3 and max(first["save_seconds"], second["save_seconds"]) < 0.9
    assert saver.longest < 0.9 and len(began) == 2


def test_generators_continue_where_they_were() -> None:
    distributed = Distributed()
    state = gather_rng(distributed)
    drawn = torch.rand(3), np.random.rand(3), random.random()
    assert restore_rng(state, distributed)
    again = torch.rand(3), np.random.rand(3), random.random()
    assert torch.equal(drawn[0], again[0]) and np.array_equal(drawn[1], again[1]) and drawn[2] == again[2]
    other = {name.replace("rank0", "rank1"): part for name, part in state.items()}
    assert not restore_rng(other, distributed)  # this rank is not in it


def test_a_killed_process_has_ended_before_its_parent_knows() -> None:
    process = subprocess.Popen(["sleep", "60"])
    assert not has_ended(process.pid)
    process.kill()
    deadline = time.monotonic() + 10
    while not has_ended(process.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert has_ended(process.pid)
    process.wait()
    assert has_ended(process.pid)
