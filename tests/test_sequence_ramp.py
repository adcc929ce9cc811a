"""A run whose sequences grow: the same rows cut shorter, under every engine, from the start and from within the ramp."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from launch import PRETRAIN, TINY, environment, launch, losses, metrics, options
from recipe import engine
from recipe.checkpoint import Checkpoint
from recipe.config import Config
from recipe.data.provenance import BatchTracer
from recipe.distributed import Distributed
from recipe.model import build_model, cut_rows
from recipe.optim.schedule import hyperparameters
from recipe.parsing import load_config
from recipe.plan import flops_of_run, flops_per_token, make_plan
from recipe.steps import Step, Steps, StepTimer

STEPS = 8
# Two micro-batches a step on two ranks. Batches grow within a stage of the sequences.
FIELDS = TINY | {
    "micro_batch_size": 2, "batch_tokens": 512, "batch_ramp": "256x4", "sequence_ramp": "16x3,32x3", "max_steps": STEPS,
    "warmup_steps": 2, "save_every": 2, "keep_checkpoints": 9, "precision": "fp32", "optimizer": "muon",
    "spike_action": "skip", "spike_window": 16, "spike_threshold": 100,
}  # fmt: skip
SMALL = Config(
    n_layer=2, n_head=2, n_embd=32, sequence_length=48, n_positions=48, micro_batch_size=2, batch_tokens=96, max_steps=100,
    warmup_steps=0, precision="fp32",
)  # fmt: skip
VOCABULARY = 300


def start(folder: Path, **fields: object) -> Path:
    """The run in one process, to its end."""
    command = [sys.executable, PRETRAIN, *options(**FIELDS | fields, output_dir=folder)]
    subprocess.run(command, env=environment(OMP_NUM_THREADS="1"), check=True, capture_output=True, timeout=120)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, fineweb_folder: Path) -> Path:
    return start(tmp_path_factory.mktemp("ramp") / "run", data=fineweb_folder)


def checkpoint(run: Path, step: int) -> Checkpoint:
    return Checkpoint(run / "checkpoints" / f"step-{step:08d}", step)


# --- rows ---------------------------------------------------------------------------------------------------------


def test_rows_cut_by_hand() -> None:
    rows = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [6, 7, 8, 9, 10, 11, 12]])
    assert cut_rows(rows, 2).tolist() == [[0, 1, 2], [2, 3, 4], [4, 5, 6], [6, 7, 8], [8, 9, 10], [10, 11, 12]]
    assert cut_rows(rows, 3).tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9], [9, 10, 11, 12]]
    assert cut_rows(rows, 6) is rows
    assert cut_rows(rows, 1)[:, 1].tolist() == list(range(1, 13)), "every target once, in order"


def test_pieces_know_nothing_of_each_other() -> None:
    model = build_model(SMALL, VOCABULARY, 0)
    rows = torch.randint(VOCABULARY, (3, 49), generator=torch.Generator().manual_seed(1))
    together = model(cut_rows(rows, 16)).view(3, 48)
    for begin in (0, 16, 32):
        alone = model(rows[:, begin : begin + 17])
        assert torch.allclose(together[:, begin : begin + 16], alone, atol=1e-6)
    whole = model(rows)
    assert torch.allclose(whole[:, :16], together[:, :16], atol=1e-6)
    assert not torch.allclose(whole[:, 16:], together[:, 16:], atol=1e-2)


# --- plan ---------------------------------------------------------------------------------------------------------


def test_the_plan_by_hand() -> None:
    config = Config(**vars(SMALL) | {"sequence_ramp": "8x2,16x3", "batch_tokens": 192, "batch_ramp": "96x1", "max_steps": 10})
    plan = make_plan(config, 1)
    assert [plan.sequence_length_at(step) for step in range(7)] == [8, 8, 16, 16, 16, 48, 48]
    assert "sequence ramp     8 tokens for 2 steps, then 16 tokens for 3 steps" in plan.lines(config, VOCABULARY)
    per_token = [flops_per_token(config, VOCABULARY, length) for length in (8, 16, 48)]
    assert flops_of_run(config, plan, VOCABULARY) == 288 * per_token[0] + 576 * per_token[1] + 960 * per_token[2]
    # Only attention depends on the length.
    assert per_token[2] - per_token[0] == 6 * 2 * 32 * 40 and per_token[2] == flops_per_token(config, VOCABULARY)


def test_a_run_that_ends_within_the_ramp() -> None:
    config = Config(**vars(SMALL) | {"sequence_ramp": "8x2,16x300", "max_steps": 10})
    expected = 2 * 96 * flops_per_token(config, VOCABULARY, 8) + 8 * 96 * flops_per_token(config, VOCABULARY, 16)
    assert flops_of_run(config, make_plan(config, 1), VOCABULARY) == expected


def test_without_a_ramp_nothing_changes() -> None:
    plan = make_plan(SMALL, 1)
    assert plan.sequence_length_at(0) == plan.sequence_length_at(99) == 48
    assert flops_of_run(SMALL, plan, VOCABULARY) == plan.total_tokens * flops_per_token(SMALL, VOCABULARY)
    assert not [line for line in plan.lines(SMALL, VOCABULARY) if "ramp" in line]


@pytest.mark.parametrize(
    "ramp, problem",
    [
        ("24x10", "24 does not divide sequence_length 64; 16, 32 or null for none works"),
        ("16x3,128x10", "128 does not divide sequence_length 64; 64 or null for none works"),
        ("16", "'16' is not a list of LENGTHxSTEPS; write it as 128x500,256x1000"),
        ("0x5", "'0x5' is not a list of LENGTHxSTEPS; write it as 128x500,256x1000"),
    ],
)
def test_a_ramp_that_is_none_is_refused(ramp: str, problem: str) -> None:
    with pytest.raises(ValueError, match=f"^sequence_ramp: {re.escape(problem)}$"):
        load_config(options(sequence_length=64, batch_tokens=512, max_steps=10, sequence_ramp=ramp))


def test_mfu_is_that_of_the_length() -> None:
    config = Config(**vars(SMALL) | {"sequence_ramp": "8x1"})
    peak = 1e9
    steps = Steps(make_plan(config, 1), lambda length: flops_per_token(config, VOCABULARY, length), peak, Distributed())
    for number, length in ((1, 8), (2, 48)):
        step = Step(number, (0, 1), 0.0, 1e-3, None, StepTimer(False, [10.0, 12.0]))
        assert steps.line(step)["mfu"] == pytest.approx(96 / 2 * flops_per_token(config, VOCABULARY, length) / peak)


# --- compiled -----------------------------------------------------------------------------------------------------


def test_a_length_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten lengths, more than the graphs that torch compiles of a function by itself; the last is that of the validation, which
    takes the graph that trains."""
    counter, compile = CompileCounter(), torch.compile
    monkeypatch.setattr(engine.torch, "compile", lambda *args, **options: compile(*args, backend=counter, **options))
    lengths = [n for n in range(1, 49) if 48 % n == 0]
    ramp = ",".join(f"{length}x2" for length in lengths[:-1])
    config = Config(**vars(SMALL) | {"sequence_ramp": ramp, "compile": True})
    plan, distributed = make_plan(config, 1), Distributed()
    ours = engine.make_engine(build_model(config, VOCABULARY, 0), config, plan, distributed, "fp32")
    rows = torch.randint(VOCABULARY, (2, 49), generator=torch.Generator().manual_seed(1))
    ours.losses(rows)
    found = [counter.frame_count]
    for step in range(2 * len(lengths)):
        pieces = cut_rows(rows, plan.sequence_length_at(step))
        ours.train_step([pieces, pieces], hyperparameters(step, config, plan))
        ours.losses(rows)
        found.append(counter.frame_count)
    assert found == [1, *(min(len(lengths), 2 + step // 2) for step in range(2 * len(lengths)))]


# --- runs ---------------------------------------------------------------------------------------------------------


def test_the_rows_are_those_of_a_run_without_a_ramp(run: Path, tmp_path: Path, fineweb_folder: Path) -> None:
    plain = start(tmp_path / "plain", data=fineweb_folder, sequence_ramp="null", max_steps=4)
    assert checkpoint(run, 2).state()["data"] == checkpoint(plain, 2).state()["data"]
    # The first loss is that of the initial model on the pieces; that of whole rows is the other run's.
    tracer = BatchTracer(run)
    rows = torch.tensor(tracer.trace(1)[0].astype("int64"))
    model = build_model(tracer.config, len(tracer.tokenizer), 0)
    assert losses(run)[0] == pytest.approx(model(cut_rows(rows, 16)).mean().item(), abs=1e-5)
    assert losses(plain)[0] == pytest.approx(model(rows).mean().item(), abs=1e-5)
    assert abs(losses(run)[0] - losses(plain)[0]) > 1e-4
    validation = [[r["val_loss"] for r in metrics(folder) if "val_loss" in r][0] for folder in (run, plain)]
    assert validation[0] == validation[1], "the validation takes whole rows"


def test_a_run_goes_on_within_the_ramp_to_the_last_bit(run: Path, tmp_path: Path, fineweb_folder: Path) -> None:
    for step in (2, 4):
        again = start(tmp_path / str(step), data=fineweb_folder, resume=run / "checkpoints" / f"step-{step:08d}")
        assert [r["train_loss"] for r in metrics(again) if "train_loss" in r] == losses(run)[step:]
        ours, theirs = checkpoint(again, STEPS).full_state(), checkpoint(run, STEPS).full_state()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_new_length_is_no_spike(run: Path) -> None:
    """The losses that a step is compared with are those of its own length."""
    for step, known in ((2, 2), (4, 1), (6, 3), (8, 2)):
        assert checkpoint(run, step).state()["spike_losses"] == pytest.approx(losses(run)[step - known : step])


@pytest.mark.parametrize("accelerate_file", ["2cpu-zero1", "2cpu-ddp"])
def test_two_ranks_are_one(run: Path, accelerate_file: str, tmp_path: Path, fineweb_folder: Path) -> None:
    folder = tmp_path / "run"
    launch(accelerate_file, *options(**FIELDS, data=fineweb_folder, output_dir=folder))
    assert losses(folder) == pytest.approx(losses(run), abs=1e-5)
    ours, theirs = ([r["grad_norm"] for r in metrics(path) if "train_loss" in r] for path in (folder, run))
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert json.loads((folder / "status.json").read_text())["tokens"] == 4 * 256 + 4 * 512


def test_activation_checkpointing_changes_nothing(run: Path, tmp_path: Path, fineweb_folder: Path) -> None:
    again = start(tmp_path / "run", data=fineweb_folder, activation_checkpointing=True)
    assert losses(again) == losses(run)
