"""Muon without a model: Newton-Schulz, the sharing of matrices whose slices end anywhere, one step against torch's own."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from recipe.optim import cautious, muon
from recipe.optim.cautious import CautiousAdamW
from recipe.optim.muon import MuonAdamW, normalize_neurons
from recipe.optim.orthogonalize import POLAR_EXPRESS, coefficients, orthogonalize
from recipe.optim.sharing import BlockMatrix, Sharing

QUINTIC = coefficients("quintic", 5)


def block(width: int, layer: int) -> list[BlockMatrix]:
    """The matrices of a block in the order of GPT2LMHeadModel."""
    return [
        BlockMatrix(f"h.{layer}.attn.c_attn.weight", width, width, 3),
        BlockMatrix(f"h.{layer}.attn.c_proj.weight", width, width),
        BlockMatrix(f"h.{layer}.mlp.c_fc.weight", width, 4 * width),
        BlockMatrix(f"h.{layer}.mlp.c_proj.weight", 4 * width, width),
    ]


def blocks(width: int, layers: int) -> list[BlockMatrix]:
    return [matrix for layer in range(layers) for matrix in block(width, layer)]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- Newton-Schulz ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 4, 16), (2, 16, 4), (1, 1, 5), (5, 7, 3)])
@pytest.mark.parametrize("name, steps, low, high", [("quintic", 5, 0.6, 1.25), ("polar_express", 10, 0.9999, 1.0001)])
def test_singular_values_come_near_one_and_vectors_stay(shape, name, steps, low, high):
    matrices = randn(*shape)
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    found = orthogonalize(matrices.clone(), coefficients(name, steps))
    assert found.shape == shape
    values = u.mT @ found @ vh.mT
    diagonal = values.diagonal(dim1=-2, dim2=-1)
    assert (values - torch.diag_embed(diagonal)).abs().max() < 2e-4
    assert low < diagonal.min() and diagonal.max() < high


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e4])
def test_the_scale_of_the_gradient_does_not_matter(factor):
    matrices = randn(2, 6, 9)
    expected = orthogonalize(matrices.clone(), QUINTIC)
    assert torch.allclose(orthogonalize(matrices * factor, QUINTIC), expected, atol=1e-3)


def test_a_batch_is_its_matrices():
    matrices = randn(4, 6, 9)
    one_by_one = torch.cat([orthogonalize(matrices[i : i + 1].clone(), QUINTIC) for i in range(4)])
    assert torch.allclose(orthogonalize(matrices.clone(), QUINTIC), one_by_one, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_stays_zero_and_the_precision_stays(dtype):
    found = orthogonalize(torch.zeros(1, 3, 5, dtype=dtype), QUINTIC)
    assert found.dtype == dtype and torch.equal(found, torch.zeros_like(found))


def test_polar_express_brings_small_singular_values_nearer_to_one():
    """On [1e-3, 1] its composition ends within 0.6% of 1 after six iterations; the quintic never does."""

    def worst(name: str, steps: int) -> float:
        x = torch.logspace(-3, 0, 10_001, dtype=torch.float64)
        for a, b, c in coefficients(name, steps):
            x = a * x + b * x**3 + c * x**5
        return float((x - 1).abs().max())

    assert worst("polar_express", 6) < 6e-3 and worst("polar_express", 9) < 1e-9
    assert worst("quintic", 6) > 0.2 and worst("quintic", 9) > 0.2
    assert coefficients("polar_express", 11)[8:] == (POLAR_EXPRESS[-1],) * 3


# --- who does what ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7, 8, 16, 48, 64, 200])
@pytest.mark.parametrize("width, layers", [(768, 12), (1024, 24), (1600, 48), (32, 3)])
def test_every_parameter_has_one_owner_and_the_work_is_even(width, layers, ranks):
    matrices = blocks(width, layers)
    slice_size = -(-sum(m.numel for m in matrices) // (2 * ranks)) * 2
    sharing = Sharing(matrices, slice_size, ranks)
    load, begin = [0] * ranks, 0
    for matrix, pieces, owner in zip(matrices, sharing.pieces, sharing.owners, strict=True):
        assert [p.start for p in pieces] + [matrix.numel] == [0] + [p.stop for p in pieces]
        assert owner in [p.rank for p in pieces], "an owner that holds no part of it"
        for piece in pieces:
            assert piece.size > 0 and piece.offset >= 0 and piece.offset + piece.size <= slice_size
            assert piece.rank * slice_size + piece.offset == begin + piece.start
        load[owner] += matrix.cost
        begin += matrix.numel
    owned = [index for rank in range(ranks) for index, _ in sharing.whole(rank)] + sharing.split
    assert sorted(owned) == list(range(len(matrices)))
    assert len(sharing.split) < ranks
    assert sum(load) == sum(m.cost for m in matrices)
    # An even share, and one parameter more; a matrix itself cannot be shared.
    assert max(load) <= sum(load) / ranks + max(m.cost for m in matrices)


@pytest.mark.parametrize("ranks, most", [(1, 1.0), (2, 1.0), (4, 1.0), (8, 1.07)])
def test_the_work_of_the_124m_model(ranks, most):
    matrices = blocks(768, 12)
    sharing = Sharing(matrices, sum(m.numel for m in matrices) // ranks, ranks)
    load = [sum(m.cost for m, owner in zip(matrices, sharing.owners, strict=True) if owner == rank) for rank in range(ranks)]
    assert max(load) / (sum(load) / ranks) < most + 1e-9
    assert len(sharing.split) == (4 if ranks == 8 else 0)


def test_slices_that_are_too_small_are_refused():
    with pytest.raises(ValueError, match="do not hold"):
        Sharing(blocks(4, 1), 10, 2)


# --- ranks as threads ---------------------------------------------------------------------------------------------


class Ranks:
    """Runs a function as each of several ranks, in threads that exchange tensors."""

    def __init__(self, count: int):
        self.count, self.bytes = count, 0
        self._barrier = threading.Barrier(count, timeout=30)
        self._sent: dict[int, list[torch.Tensor]] = {}

    def exchange(self, rank: int) -> Callable:
        def exchange(sent: list[torch.Tensor], sizes: list[int]) -> list[torch.Tensor]:
            assert len(sent) == len(sizes) == self.count
            assert sent[rank].numel() == sizes[rank] == 0, "a rank sends to itself"
            self._sent[rank] = [tensor.clone() for tensor in sent]
            self._barrier.wait()
            received = [self._sent[other][rank] for other in range(self.count)]
            self._barrier.wait()
            assert [tensor.numel() for tensor in received] == sizes
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in sent)
            return received

        return exchange

    def run(self, function: Callable[[int], object]) -> list:
        results: list = [None] * self.count

        def call(rank: int) -> None:
            try:
                results[rank] = function(rank)
            except BaseException as error:
                results[rank] = error
                self._barrier.abort()

        threads = [threading.Thread(target=call, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results


def train(matrices: list[BlockMatrix], ranks: int, steps: int = 3, padding: int = 0, dtype=torch.float32, **more):
    """Weights and momentum, flat, after some steps on random gradients, and the ranks that computed them."""
    size = sum(m.numel for m in matrices)
    slice_size = -(-size // ranks) + padding
    start = torch.cat([randn(size), torch.zeros(ranks * slice_size - size)])
    gradients = [torch.cat([randn(size, seed=step + 1), torch.zeros(ranks * slice_size - size)]) for step in range(steps)]
    world = Ranks(ranks)
    world.second_moments, world.sizes = [None] * ranks, [0] * ranks

    def rank_run(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        own = slice(rank * slice_size, (rank + 1) * slice_size)
        weights = start[own].clone().requires_grad_()
        group = {"params": [weights], "algorithm": "muon", "matrices": matrices, "momentum": 0.9, "weight_decay": 0.1} | more
        optimizer = MuonAdamW([group], QUINTIC, dtype, rank, ranks, world.exchange(rank), lr=0.05, fused=True)
        for gradient in gradients:
            weights.grad = gradient[own].clone()
            optimizer.step()
        if group["algorithm"] == "normuon":
            world.second_moments[rank] = optimizer.second_moments(optimizer.param_groups[0])
            world.sizes[rank] = len(optimizer.state[weights]["second_momentum_buffer"])
        return weights.detach(), optimizer.state[weights]["momentum_buffer"]

    slices = world.run(rank_run)
    weights, momentum = (torch.cat(parts) for parts in zip(*slices, strict=True))
    return weights[:size], momentum[:size], weights[size:], world


@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 7, 8, 11])
@pytest.mark.parametrize("width, layers, padding", [(4, 1, 1), (5, 2, 3), (6, 3, 1), (3, 2, 40)])
def test_any_number_of_slices_gives_the_weights_of_one(width, layers, padding, ranks):
    matrices = blocks(width, layers)
    weights, momentum, _, _ = train(matrices, 1)
    shared_weights, shared_momentum, rest, world = train(matrices, ranks, padding=padding)
    assert torch.equal(shared_momentum, momentum)
    assert (shared_weights - weights).abs().max() < 1e-5
    assert (weights - randn(len(weights))).abs().max() > 0.05
    assert not rest.any(), "padding is trained"
    assert world.bytes > 0, "no matrix lies across a boundary: the exchange was not tried"


def test_bf16_is_exchanged_in_bf16():
    matrices = blocks(6, 1)
    weights, _, _, exact = train(matrices, 4)
    rounded, _, _, world = train(matrices, 4, dtype=torch.bfloat16)
    assert world.bytes * 2 == exact.bytes
    assert 0 < (weights - rounded).abs().max() < 0.02


def test_matrices_are_orthogonalised_once_and_in_batches(monkeypatch):
    calls: dict[int, list[torch.Size]] = {}

    def spy(matrices, table):
        calls.setdefault(threading.get_ident(), []).append(matrices.shape)
        return orthogonalize(matrices, table)

    monkeypatch.setattr(muon, "orthogonalize", spy)
    matrices = blocks(8, 4)
    train(matrices, 1, steps=1)
    assert sorted(next(iter(calls.values()))) == [(8, 8, 32), (16, 8, 8)]
    calls.clear()
    train(matrices, 5, steps=1)  # every boundary cuts a matrix, and so no thread ends before another begins
    assert len(calls) == 5, "a rank with nothing to do"
    assert sum(shape[0] for shapes in calls.values() for shape in shapes) == 24
    assert max(sum(shape[0] for shape in shapes) for shapes in calls.values()) <= 8
    calls.clear()
    monkeypatch.setattr(muon, "BATCH_ELEMENTS", 600)
    train(matrices, 1, steps=1)
    assert sorted(next(iter(calls.values()))) == [(2, 8, 32)] * 4 + [(7, 8, 8)] + [(9, 8, 8)]


# --- torch's Muon -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_step_is_that_of_torch_on_the_transposed_matrices(dtype):
    matrices = blocks(48, 1)
    flat, gradient = randn(sum(m.numel for m in matrices)), randn(sum(m.numel for m in matrices), seed=1)
    parts, gradients, offset = [], [], 0
    for matrix in matrices:
        for values, into in ((flat, parts), (gradient, gradients)):
            into += [part.T.contiguous() for part in matrix.split(values[offset : offset + matrix.numel].clone())]
        offset += matrix.numel
    theirs = [torch.nn.Parameter(part.clone()) for part in parts]
    for parameter, part in zip(theirs, gradients, strict=True):
        parameter.grad = part.clone()
    torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="original").step()

    weights = flat.clone().requires_grad_()
    group = {"params": [weights], "algorithm": "muon", "matrices": matrices, "momentum": 0.95, "weight_decay": 0.1}
    optimizer = MuonAdamW([group], QUINTIC, dtype, 0, 1, lr=0.02, fused=True)
    weights.grad = gradient.clone()
    optimizer.step()
    ours, offset = [], 0
    for matrix in matrices:
        ours += [part.T for part in matrix.split(weights.detach()[offset : offset + matrix.numel])]
        offset += matrix.numel
    assert len(ours) == len(theirs) == 6
    for before, mine, other in zip(parts, ours, theirs, strict=True):
        a, b = (mine - before).flatten(), (other.detach() - before).flatten()
        assert torch.cosine_similarity(a, b, dim=0) > 0.995
        assert float(a.norm() / b.norm()) == pytest.approx(1, abs=0.01)


# --- AdamW's groups -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("found_inf", [None, 0.0, 1.0])
def test_the_other_groups_are_torchs_adamw(found_inf):
    keywords = {"lr": 1e-2, "betas": (0.8, 0.9), "eps": 1e-6, "fused": True}
    matrices = [BlockMatrix("h.0.c", 4, 6)]
    pairs = []
    for kind in ("ours", "theirs"):
        a, b, c = (randn(n, seed=n).requires_grad_() for n in (5, 7, 24))
        groups = [{"params": [a], "weight_decay": 0.1}, {"params": [b], "weight_decay": 0.0}]
        if kind == "ours":
            muon_group = {"params": [c], "matrices": matrices, "momentum": 0.9, "weight_decay": 0.1, "algorithm": "muon"}
            groups = [g | {"algorithm": "adamw"} for g in groups] + [muon_group]
            optimizer = MuonAdamW(groups, QUINTIC, torch.float32, 0, 1, **keywords)
        else:
            optimizer = torch.optim.AdamW(groups, **keywords)
        for step in range(4):
            for tensor in (a, b, c):
                tensor.grad = randn(len(tensor), seed=100 * step + len(tensor))
            if found_inf is not None:
                optimizer.found_inf = torch.tensor(found_inf if step == 2 else 0.0)
            optimizer.step()
        pairs.append((a.detach(), b.detach(), optimizer.state[a]["exp_avg"], optimizer.state[b]["step"]))
        assert torch.equal(c.detach(), randn(24, seed=24)) == (kind == "theirs")
        assert optimizer.param_groups[0]["lr"] == 1e-2 and len(optimizer.param_groups) == (3 if kind == "ours" else 2)
    assert all(torch.equal(x, y) for x, y in zip(*pairs, strict=True))


# --- NorMuon ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("neuron_dim", [-1, -2])
def test_neurons_are_brought_to_one_length_and_the_matrix_keeps_its_own(dtype, neuron_dim: int):
    matrices = (randn(3, 6, 9) * torch.linspace(0.1, 2, 9)).to(dtype)
    neurons = matrices.shape[neuron_dim]
    moments = [torch.zeros(neurons) for _ in range(3)]
    found = matrices.float() * normalize_neurons(matrices, moments, neuron_dim, 0.05)
    assert torch.allclose(found.norm(dim=(1, 2)), matrices.float().norm(dim=(1, 2)), rtol=1e-5)
    lengths = found.norm(dim=-3 - neuron_dim)  # the first step's moments are its own squares
    assert torch.allclose(lengths, lengths[:, :1].expand_as(lengths), rtol=1e-5)
    squares = matrices.float().square().mean(dim=-3 - neuron_dim)
    assert torch.allclose(torch.stack(moments), 0.05 * squares, rtol=1e-5)
    again = matrices.flip(-1) if neuron_dim == -1 else matrices.flip(-2)
    normalize_neurons(again, moments, neuron_dim, 0.05)
    assert torch.allclose(torch.stack(moments), 0.95 * 0.05 * squares + 0.05 * squares.flip(-1), rtol=1e-5)


def test_a_matrix_of_zeros_stays_zero_and_a_neuron_without_gradient_harms_nothing():
    matrices = randn(2, 4, 6)
    matrices[0] = 0
    matrices[1, :, 2] = 0
    factors = normalize_neurons(matrices, [torch.zeros(6), torch.zeros(6)], -1, 0.05)
    found = matrices * factors
    assert found.isfinite().all() and not found[0].any() and not found[1, :, 2].any()
    assert torch.allclose(found[1].norm(), matrices[1].norm())


@pytest.mark.parametrize("ranks", [2, 3, 5, 8, 30])
@pytest.mark.parametrize("more", [{}, {"weight_decay": 0.0, "cautious_decay": 0.1}])
def test_normuon_on_any_number_of_ranks(ranks: int, more: dict):
    matrices, more = blocks(5, 2), {"algorithm": "normuon", **more}
    weights, momentum, _, alone = train(matrices, 1, **more)
    plain, *_ = train(matrices, 1)
    shared_weights, shared_momentum, rest, world = train(matrices, ranks, padding=3, **more)
    assert torch.equal(shared_momentum, momentum) and not rest.any() and world.bytes > 0
    assert (shared_weights - weights).abs().max() < 1e-5
    assert (plain - weights).abs().max() > 0.02
    # Each value lies on one rank, and the sum over the ranks is the state of one.
    assert len(world.second_moments) == ranks
    assert torch.allclose(sum(world.second_moments), alone.second_moments[0], rtol=1e-4, atol=1e-9)
    assert (torch.stack(world.second_moments) != 0).sum(0).max() == 1
    assert sum(world.sizes) == len(alone.second_moments[0]) == sum(m.neurons for m in matrices)
    rounded, *_ = train(matrices, ranks, dtype=torch.bfloat16, **more)
    assert 0 < (rounded - weights).abs().max() < 0.05


# --- cautious weight decay ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [7, 10**6])
def test_adamw_decays_cautiously_where_update_and_weight_agree(monkeypatch, chunk: int):
    monkeypatch.setattr(cautious, "CHUNK_ELEMENTS", chunk)
    keywords = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-6, "fused": True}
    ours, theirs = randn(40).requires_grad_(), randn(40).requires_grad_()
    group = {"params": [ours], "weight_decay": 0.0, "cautious_decay": 0.5}
    optimizer, plain = CautiousAdamW([group], **keywords), torch.optim.AdamW([theirs], weight_decay=0.0, **keywords)
    agreed = 0
    for step in range(5):
        gradient, before = randn(40, seed=step + 1), theirs.detach().clone()
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        plain.step()
        with torch.no_grad():
            agree = (before - theirs) * before >= 0
            theirs -= 0.1 * 0.5 * before * agree
        agreed += int(agree.sum())
        assert torch.allclose(ours, theirs, atol=1e-6), step
    assert 40 < agreed < 160
    optimizer.found_inf = torch.tensor(1.0)
    ours.grad, before = torch.full((40,), float("nan")), ours.detach().clone()
    optimizer.step()
    assert torch.equal(ours, before)


@pytest.mark.parametrize("ranks", [1, 3])
def test_muon_decays_cautiously_where_update_and_weight_agree(ranks: int):
    matrices = blocks(6, 2)
    start = randn(sum(m.numel for m in matrices))
    free, *_ = train(matrices, ranks, steps=1, weight_decay=0.0)
    found, *_ = train(matrices, ranks, steps=1, padding=2, weight_decay=0.0, cautious_decay=0.1)
    agree = (start - free) * start >= 0
    assert 0.4 < agree.float().mean() < 0.6
    assert torch.allclose(found, free - 0.05 * 0.1 * start * agree, atol=2e-6)


def test_muon_may_decay_in_parts_and_cautiously_on_any_number_of_ranks(monkeypatch):
    matrices = blocks(5, 2)
    whole, momentum, *_ = train(matrices, 1, cautious_decay=0.1)
    monkeypatch.setattr(cautious, "CHUNK_ELEMENTS", 100)
    weights, shared_momentum, rest, _ = train(matrices, 4, padding=3, cautious_decay=0.1)
    assert torch.equal(momentum, shared_momentum) and not rest.any()
    assert (weights - whole).abs().max() < 1e-5


@pytest.mark.parametrize("more", [{}, {"cautious_decay": 0.1}, {"algorithm": "normuon"}])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_where_found_inf_is_one_nothing_changes(bad, more):
    matrices = blocks(4, 1)
    weights = randn(192).requires_grad_()
    group = {"params": [weights], "algorithm": "muon", "matrices": matrices, "momentum": 0.9, "weight_decay": 0.1, **more}
    optimizer = MuonAdamW([group], QUINTIC, torch.float32, 0, 1, lr=0.05, fused=True)
    seen = []
    for step, found_inf in enumerate([0.0, 1.0, 0.0]):
        weights.grad = randn(192, seed=step)
        if found_inf:
            weights.grad[17] = bad
        optimizer.found_inf = torch.tensor(found_inf)
        optimizer.step()
        seen.append((weights.detach().clone(), optimizer.state[weights]["momentum_buffer"].clone()))
    for first, skipped, then in zip(*seen, strict=True):
        assert torch.equal(first, skipped)
        assert then.isfinite().all() and not torch.equal(skipped, then)
