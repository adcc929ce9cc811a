"""Muon through the engines, on one process and two, against a reference that does the obvious thing matrix by matrix."""

from __future__ import annotations

import math
import subprocess

import pytest
import torch

from launch import ROOT, accelerate_command, environment
from muon_rank import CONFIG, LONG, SAVED_STEP, STEPS, VOCABULARY, rows_of
from recipe.model import build_model

PARALLEL = ["2cpu-zero1", "2cpu-ddp"]
ALL = ["cpu", *PARALLEL]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory):
    """What the ranks noted, by accelerate file and precision; each is launched once."""
    base = tmp_path_factory.mktemp("muon")

    def get(accelerate_file: str, precision: str) -> dict:
        folder = base / f"{accelerate_file}-{precision}"
        if not folder.is_dir():
            if accelerate_file != "cpu":
                get("cpu", precision)  # whose checkpoint is continued
            folder.mkdir()
            script = str(ROOT / "tests" / "muon_rank.py")
            command = [*accelerate_command(accelerate_file, script=script), str(folder), precision]
            done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)
            assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return torch.load(folder / "results.pt")

    return get


# --- the reference ------------------------------------------------------------------------------------------------


def newton_schulz(matrix: torch.Tensor) -> torch.Tensor:
    """Five iterations of Keller Jordan's quintic in fp32."""
    x = matrix / (matrix.norm() + 1e-7)
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x if wide else x.T


class Reference:
    """One process, fp32: a momentum for each matrix as (out, in), queries, keys and values apart, AdamW for the rest."""

    def __init__(self):
        self.model = build_model(CONFIG, VOCABULARY, 0)
        named = dict(self.model.named_parameters())
        self.blocks = {n: p for n, p in named.items() if ".h." in n and p.dim() == 2}
        tables = [p for n, p in named.items() if p.dim() == 2 and n not in self.blocks]
        vectors = [p for p in named.values() if p.dim() == 1]
        assert (len(self.blocks), len(tables), len(vectors)) == (4 * CONFIG.n_layer, 2, 8 * CONFIG.n_layer + 2)
        self.adamw = torch.optim.AdamW(
            [{"params": tables, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
            betas=(0.9, 0.95), eps=1e-8, foreach=False,
        )  # fmt: skip
        self.momentum: dict[tuple[str, int], torch.Tensor] = {}

    def step(self, step: int) -> tuple[float, float]:
        """The loss, and the norm before clipping."""
        share = (step + 1) / 5 if step < 5 else 1 - (step - 5) / 45
        momentum = 0.85 + 0.1 * min(1, step / 8)
        self.model.zero_grad()
        loss = self.model(rows_of(step)).mean()
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in self.model.parameters()))
        for p in self.model.parameters():
            p.grad *= min(1, 0.5 / norm)
        for group in self.adamw.param_groups:
            group["lr"] = 2e-3 * share
        self.adamw.step()
        with torch.no_grad():
            for name, p in self.blocks.items():
                width = 32 if "c_attn" in name else p.shape[1]
                for part in range(p.shape[1] // width):
                    columns = slice(part * width, (part + 1) * width)
                    weight, gradient = p[:, columns].T, p.grad[:, columns].T  # (out, in)
                    m = self.momentum.setdefault((name, part), torch.zeros_like(gradient))
                    m.mul_(momentum).add_(gradient, alpha=1 - momentum)
                    update = newton_schulz((1 - momentum) * gradient + momentum * m)
                    scale = max(1, weight.shape[0] / weight.shape[1]) ** 0.5
                    weight.mul_(1 - 0.02 * share * 0.1).sub_(0.02 * share * scale * update)
        return loss.item(), norm


@pytest.fixture(scope="module")
def reference() -> dict:
    """Losses and norms of LONG steps, and weights and momentum after STEPS."""
    torch.set_num_threads(1)  # two on a busy machine wait for each other more than they compute
    trained = Reference()
    history, end = [], {}
    for step in range(LONG):
        history.append(trained.step(step))
        if step + 1 == STEPS:
            end = {f"model.{n.removeprefix('gpt2.')}": p.detach().clone() for n, p in trained.model.named_parameters()}
            for name in trained.blocks:
                parts = [m.T for (n, _), m in trained.momentum.items() if n == name]
                end[f"momentum_buffer.{name.removeprefix('gpt2.')}"] = torch.cat(parts, dim=1)
    return {"loss": [loss for loss, _ in history], "norm": [norm for _, norm in history], "end": end}


def largest(a: list[float], b: list[float], count: int) -> float:
    assert min(len(a), len(b)) >= count
    return max(abs(x - y) for x, y in zip(a[:count], b[:count], strict=True))


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


# --- exactness ----------------------------------------------------------------------------------------------------


def test_the_reference_learns_and_is_clipped(reference) -> None:
    assert reference["loss"][0] - reference["loss"][STEPS - 1] > 0.4
    assert reference["loss"][0] - reference["loss"][-1] > 1.0
    assert min(reference["norm"]) > CONFIG.max_grad_norm


@pytest.mark.parametrize("accelerate_file", ALL)
def test_fp32_follows_the_reference(results, reference, accelerate_file: str) -> None:
    found = results(accelerate_file, "fp32")
    assert found["engine"] == ("Zero1Engine" if "zero1" in accelerate_file else "ReplicatedEngine")
    assert largest(found["history"]["loss"], reference["loss"], STEPS) < 1e-5
    assert largest(found["history"]["norm"], reference["norm"], STEPS) < 1e-5  # of gradients, before clipping
    for name, tensor in reference["end"].items():
        assert (found["end"][name] - tensor).abs().max() < 1e-5, name
        moved = (tensor - found["start"].get(name, torch.zeros(()))).abs().max()
        assert moved > (1e-3 if name.startswith("model.") else 1e-4), f"{name} was not trained"


@pytest.mark.parametrize("accelerate_file", ALL)
def test_newton_schulz_in_bf16_follows_the_reference(results, reference, accelerate_file: str) -> None:
    found = results(accelerate_file, "fp32")["history_bf16"]["loss"]
    assert 1e-6 < largest(found, reference["loss"], LONG) < 2e-3


@pytest.mark.slow
@pytest.mark.parametrize("accelerate_file", ALL)
def test_a_bf16_run_follows_the_reference(results, reference, accelerate_file: str) -> None:
    found = results(accelerate_file, "bf16")
    assert largest(found["history"]["loss"], reference["loss"], STEPS) < 2e-3
    assert largest(found["history_bf16"]["loss"], reference["loss"], LONG) < 2e-3


@pytest.mark.parametrize("accelerate_file", ALL)
def test_the_work_is_shared_out(results, accelerate_file: str) -> None:
    work = results(accelerate_file, "fp32")["work"]
    assert sum(work) == 6 * CONFIG.n_layer, "a matrix is orthogonalised twice, or not at all"
    # One and a half of three blocks each: the c_fc in the middle is done by either.
    assert sorted(work) == ([18] if accelerate_file == "cpu" else [8, 10]), work


# --- state --------------------------------------------------------------------------------------------------------


def test_the_state_names_what_each_algorithm_remembers(results) -> None:
    names = results("cpu", "fp32")["saved"].keys()
    assert sum(name.startswith("momentum_buffer.") for name in names) == 4 * CONFIG.n_layer
    assert all(".h." in name and name.endswith(".weight") for name in names if name.startswith("momentum_buffer."))
    for kind in ("exp_avg.", "exp_avg_sq."):
        assert {"transformer.wte.weight", "transformer.wpe.weight"} < {n.removeprefix(kind) for n in names}
        assert f"{kind}transformer.h.0.mlp.c_fc.bias" in names and f"{kind}transformer.h.0.mlp.c_fc.weight" not in names


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("accelerate_file", ALL)
def test_a_resumed_run_is_the_same_bit_for_bit(results, accelerate_file: str, precision: str) -> None:
    found = results(accelerate_file, precision)
    assert_same(found["loaded"], found["saved"])
    assert found["history_again"]["loss"] == found["history"]["loss"][SAVED_STEP:]
    assert_same(found["end_again"], found["end"])
    assert not torch.equal(found["saved"]["model.transformer.wte.weight"], found["end"]["model.transformer.wte.weight"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("accelerate_file", PARALLEL)
def test_a_checkpoint_of_one_process_goes_on_over_two(results, accelerate_file: str, precision: str) -> None:
    one, two = results("cpu", precision), results(accelerate_file, precision)
    assert_same(two["start"], one["start"])
    assert_same(two["loaded_other"], one["saved"])
    limit = 1e-5 if precision == "fp32" else 2e-3
    assert largest(two["history_other"]["loss"], one["history_again"]["loss"], STEPS - SAVED_STEP) < limit


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("accelerate_file", ALL)
def test_a_gradient_that_is_not_finite_on_one_rank_changes_nothing(results, accelerate_file: str, precision: str) -> None:
    found = results(accelerate_file, precision)
    assert found["history_poisoned"]["skipped"] == [1.0]
    assert_same(found["after_poison"], found["before_poison"])
    assert found["history_cured"]["skipped"] == [0.0]
    for name in ("model.transformer.h.1.mlp.c_fc.weight", "momentum_buffer.transformer.h.1.mlp.c_fc.weight", "step"):
        assert found["after_cure"][name].isfinite().all()
        assert not torch.equal(found["after_cure"][name], found["after_poison"][name])
