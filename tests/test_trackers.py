"""Trackers get what metrics.jsonl has, and none of their failures reaches the training."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from accelerate import PartialState
from accelerate.tracking import GeneralTracker, on_main_process

from launch import ROOT, TINY, environment, metrics, options
from recipe.config import Config, ConfigError
from recipe.monitor import trackers
from recipe.monitor.trackers import Reporter, make_tracker, tracker_problems
from recipe.plan import load_run


class FileTracker(GeneralTracker):
    """A tracker of Accelerate's kind that writes what it gets into a file; `fail` and `block` are what the network may do."""

    name = "file"
    requires_logging_directory = True

    def __init__(self, run_name: str, logging_dir: Path, fail: bool = False, block: threading.Event | None = None):
        super().__init__()
        self.path, self.fail, self.block = Path(logging_dir) / f"{run_name}.jsonl", fail, block

    @property
    def tracker(self):
        return self.path

    def _write(self, record: dict) -> None:
        if self.block:
            self.block.wait()
        if self.fail:
            raise ConnectionError("the network is gone")
        with open(self.path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(record) + "\n")

    @on_main_process
    def store_init_configuration(self, values: dict) -> None:
        self._write({"settings": values})

    @on_main_process
    def log(self, values: dict, step: int | None = None, **kwargs) -> None:
        self._write({"step": step, **values})

    @on_main_process
    def finish(self) -> None:
        self._write({"finished": True})


@pytest.fixture(autouse=True)
def state() -> None:
    PartialState(cpu=True)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


RECORDS = [{"step": n, "train_loss": 1.0 / n, "path": "a word", "mfu": None} for n in range(1, 6)]


def test_a_tracker_gets_the_numbers_in_their_order(tmp_path: Path) -> None:
    reporter = Reporter(FileTracker("run", tmp_path), {"seed": 0, "max_hours": None}, print)
    reporter.log(RECORDS[:2])
    reporter.log(RECORDS[2:])
    reporter.finish(10)
    told = read(tmp_path / "run.jsonl")
    assert told[0] == {"settings": {"seed": 0}} and told[-1] == {"finished": True}
    assert told[1:-1] == [{"step": n, "train_loss": 1.0 / n} for n in range(1, 6)]


def test_a_tracker_that_fails_is_a_warning_once(tmp_path: Path) -> None:
    said: list[str] = []
    tracker = FileTracker("run", tmp_path)
    reporter = Reporter(tracker, {}, said.append)
    reporter.log(RECORDS[:1])
    while not (tmp_path / "run.jsonl").exists() or len(read(tmp_path / "run.jsonl")) < 2:
        time.sleep(0.01)
    tracker.fail = True
    reporter.log(RECORDS[1:3])
    while not said:
        time.sleep(0.01)
    time.sleep(0.1)
    tracker.fail = False  # the network comes back
    reporter.log(RECORDS[3:])
    reporter.finish(10)
    assert [record["step"] for record in read(tmp_path / "run.jsonl") if "step" in record] == [1, 4, 5]
    assert len(said) == 1 and "the tracker file failed: ConnectionError: the network is gone" in said[0]


def test_a_tracker_that_cannot_start_is_a_warning(tmp_path: Path) -> None:
    said: list[str] = []
    reporter = Reporter(FileTracker("run", tmp_path, fail=True), {}, said.append)
    reporter.log(RECORDS)
    reporter.finish(10)
    assert len(said) == 1 and not list(tmp_path.iterdir())


def test_a_tracker_that_stands_still_holds_up_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "QUEUE", 50)
    said: list[str] = []
    block = threading.Event()
    reporter = Reporter(FileTracker("run", tmp_path, block=block), {}, said.append)
    began = time.perf_counter()
    for _ in range(100):
        reporter.log(RECORDS)
    assert time.perf_counter() - began < 0.5
    reporter.finish(0.2)
    assert time.perf_counter() - began < 1.5
    assert len(said) == 1 and "does not keep up" in said[0]
    block.set()


def test_a_package_that_is_missing_is_refused_before_anything_starts(tmp_path: Path) -> None:
    missing = [name for name, packages in trackers.PACKAGES.items() if not any(map(importlib.util.find_spec, packages))]
    if not missing:
        pytest.skip("all trackers are installed")
    for name in missing:
        with pytest.raises(ConfigError) as caught:
            load_run(["--max_steps", "9", "--data", "installed-docs", "--warmup_steps", "0", "--report_to", name], 1)
        (problem,) = caught.value.problems
        assert problem.startswith(f"report_to: the package {name} is not installed; pip install {name}")


def test_wandb_without_an_account_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trackers.PACKAGES, "wandb", ("json",))  # as if it were installed
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (problem,) = tracker_problems(Config(report_to="wandb"))
    assert "WANDB_MODE=offline" in problem
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password 0123\n")
    assert tracker_problems(Config(report_to="wandb")) == []


DRIVER = """
import sys
from pathlib import Path

sys.path[:0] = [{root!r}, {tests!r}]
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from recipe.monitor import trackers
from test_trackers import FileTracker

class Failing(FileTracker):
    def log(self, values, step=None, **kwargs):
        self.fail = {fail} and step > 5
        super().log(values, step, **kwargs)

trackers.PACKAGES["tensorboard"] = ("json",)
LOGGER_TYPE_TO_CLASS["tensorboard"] = Failing
from recipe.cli import main
from recipe.signals import leave

leave(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("fail", [False, True])
def test_a_run_reports_what_its_metrics_say(fail: bool, tmp_path: Path, fineweb_folder: Path) -> None:
    """With a tracker of ours in the place of TensorBoard's, whose package need not be there."""
    fields = TINY | {"data": fineweb_folder, "max_steps": 12, "warmup_steps": 0, "log_every": 3, "eval_every": 6}
    arguments = options(**fields, output_dir=tmp_path / "run", report_to="tensorboard")
    driver = DRIVER.format(root=str(ROOT), tests=str(Path(__file__).parent), fail=fail)
    done = subprocess.run(
        [sys.executable, "-c", driver, *arguments], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    written = metrics(tmp_path / "run")
    told = [record for record in read(tmp_path / "run" / "tensorboard.jsonl") if "step" in record]
    expected = [
        {k: v for k, v in record.items() if isinstance(v, int | float)} for record in written if not fail or record["step"] <= 5
    ]
    assert len([record for record in written if "train_loss" in record]) == 12
    assert told == expected
    assert done.stdout.count("warning: the tracker file failed: ConnectionError") == fail


@pytest.mark.skipif(not importlib.util.find_spec("tensorboard"), reason="needs the package tensorboard")
def test_tensorboard_reads_the_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reporter = Reporter(make_tracker("tensorboard", tmp_path), {"seed": 0}, print)
    reporter.log(RECORDS)
    reporter.finish(30)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train_loss")] == [
        (n, pytest.approx(1.0 / n)) for n in range(1, 6)
    ]
