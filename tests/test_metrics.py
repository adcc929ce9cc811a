"""metrics.jsonl across restarts and bad numbers; the progress line."""

import json
import math

import numpy as np
import pytest

from recipe.files import read_json_lines
from recipe.monitor.metrics import MetricsLog, format_duration, progress_line


def log(path, records, resume_step=None):
    metrics = MetricsLog(path, resume_step)
    metrics.write(records)
    metrics.close()


def steps(path) -> list[int]:
    return [record["step"] for record in read_json_lines(path)]


def test_records_are_appended_one_a_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log(path, [{"step": 1, "train_loss": 2.5}, {"step": 2, "train_loss": 2.25}])
    log(path, [{"step": 3}])
    assert path.read_text() == '{"step": 1, "train_loss": 2.5}\n{"step": 2, "train_loss": 2.25}\n{"step": 3}\n'
    assert steps(path) == [1, 2, 3]


def test_lines_can_be_read_before_the_log_is_closed(tmp_path):
    metrics = MetricsLog(tmp_path / "metrics.jsonl")
    metrics.write([{"step": 1}])
    assert steps(tmp_path / "metrics.jsonl") == [1]
    metrics.close()


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, np.float64("nan")])
def test_numbers_that_json_cannot_hold_become_null(tmp_path, number):
    path = tmp_path / "metrics.jsonl"
    log(path, [{"step": 1, "train_loss": number, "lr": 0.5}])
    assert path.read_text() == '{"step": 1, "train_loss": null, "lr": 0.5}\n'


@pytest.mark.parametrize("resume, kept", [(-1, []), (0, [0]), (2, [0, 1, 2, 2]), (3, [0, 1, 2, 2, 3]), (9, [0, 1, 2, 2, 3])])
def test_a_continued_run_drops_what_the_lost_part_wrote(tmp_path, resume, kept):
    path = tmp_path / "metrics.jsonl"
    log(path, [{"step": 0, "val_loss": 9.0}, {"step": 1}, {"step": 2}, {"step": 2, "val_loss": 8.0}, {"step": 3}])
    log(path, [], resume)
    assert steps(path) == kept
    log(path, [{"step": 4}])
    assert steps(path) == [*kept, 4]


def test_without_a_resume_nothing_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log(path, [{"step": 5}])
    log(path, [{"step": 2}])
    assert steps(path) == [5, 2]


def test_resuming_without_a_file_starts_one(tmp_path):
    log(tmp_path / "metrics.jsonl", [{"step": 1}], resume_step=0)
    assert steps(tmp_path / "metrics.jsonl") == [1]


@pytest.mark.parametrize("cut", range(1, len('{"step": 2, "lr": 0.5}')))
def test_a_cut_off_last_line_is_dropped_wherever_it_was_cut(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "lr": 0.5}\n' + '{"step": 2, "lr": 0.5}'[:cut])
    assert steps(path) == [1]
    log(path, [{"step": 2}], resume_step=5)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_truncation_leaves_no_temporary_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log(path, [{"step": 1}])
    log(path, [], 0)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_lines_that_stay_are_kept_byte_for_byte(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step":1,   "lr": 1e-3, "note": "é"}\n{"step": 2}\n', encoding="utf-8")
    log(path, [], 1)
    assert path.read_text(encoding="utf-8") == '{"step":1,   "lr": 1e-3, "note": "é"}\n'


RECORD = {
    "step": 40,
    "train_loss": 3.14159,
    "lr": 6e-4,
    "grad_norm": 0.987,
    "tokens_per_second": 123456.7,
    "data_wait_fraction": 0.0123,
    "mfu": None,
    "skipped": 0,
}


def test_progress_line():
    assert progress_line(RECORD, 1000, 3725) == (
        "step   40/1000 | loss 3.1416 | lr 6.00e-04 | norm 0.99 | 123,457 tok/s | data wait 1.2% | 1h02m left"
    )


def test_progress_line_with_mfu_and_a_skipped_step():
    assert progress_line({**RECORD, "mfu": 0.4567, "skipped": 1, "train_loss": math.nan}, 40, 0) == (
        "step 40/40 | loss nan | lr 6.00e-04 | norm 0.99 | 123,457 tok/s | mfu 45.7% | data wait 1.2% | 1 skipped | 0s left"
    )


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0s"),
        (0.4, "0s"),
        (5, "5s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (65, "1m05s"),
        (3599, "59m59s"),
        (3599.9, "1h00m"),
        (3660, "1h01m"),
        (3719, "1h01m"),
        (90_000, "25h00m"),
    ],
)
def test_format_duration(seconds, text):
    assert format_duration(seconds) == text
