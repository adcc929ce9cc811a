"""HellaSwag in both styles: scores that are known beforehand, and log-likelihoods made by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from conftest import make_documents
from launch import ROOT
from recipe.config import Config
from recipe.distributed import Distributed
from recipe.evaluation.hellaswag import STYLES, HellaSwag
from recipe.evaluation.metrics import LanguageModelLoss, compute
from recipe.evaluation.scoring import Request, causal_losses, evaluating, score, training_losses
from recipe.model import build_model
from recipe.tokenizer import train_tokenizer

POSITIONS = 320


@pytest.fixture(scope="module")
def items() -> list[dict]:
    lines = (ROOT / "recipe" / "evaluation" / "hellaswag_mini.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(make_documents(50), 400)


@pytest.fixture(scope="module")
def model(tokenizer):
    model = build_model(Config(n_layer=2, n_head=2, n_embd=32, n_positions=POSITIONS), len(tokenizer), 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)  # far from uniform
        model.gpt2.transformer.wte.weight[len(tokenizer) :] = 0
    return model


@pytest.fixture(scope="module")
def alone() -> Distributed:
    return Distributed()


def fixed(value) -> callable:
    """A model whose loss of a target is a function of its id."""
    return lambda ids, rows, columns, targets: value(targets)


@pytest.mark.parametrize(("sign", "accuracy"), [(1.0, 1.0), (-1.0, 0.0)])
def test_an_oracle_is_always_right_and_its_opposite_never(items, tokenizer, alone, sign: float, accuracy: float) -> None:
    for scores in HellaSwag(items, tokenizer).score(fixed(lambda t: t.float()), POSITIONS, 4096, alone).values():
        scores.log_likelihoods[:] = -1e3
        scores.log_likelihoods[np.arange(len(items)), scores.labels] += sign * 999
        result = scores.metrics()
        assert (result["n"], result["acc"], result["acc_norm"]) == (len(items), accuracy, accuracy)


def test_equal_probabilities_score_what_the_lengths_give(items, tokenizer, alone) -> None:
    scores = HellaSwag(items, tokenizer).score(fixed(lambda t: torch.ones(len(t))), POSITIONS, 4096, alone)
    tokens = -scores["lm-eval"].log_likelihoods  # a nat a token
    characters = np.array([[len(ending) for ending in item["endings"]] for item in items])
    labels = np.array([item["label"] for item in items], dtype=int)
    assert scores["lm-eval"].metrics()["acc"] == np.mean(tokens.argmin(1) == labels)
    assert scores["lm-eval"].metrics()["acc_norm"] == np.mean((tokens / characters).argmin(1) == labels)
    # A nat for each token of every ending: all are equally good, and the first is taken.
    assert scores["completion"].metrics()["acc_norm"] == np.mean(labels == 0)


@pytest.mark.parametrize("style", STYLES)
def test_log_likelihoods_are_those_made_by_hand(items, tokenizer, model, alone, style: str) -> None:
    hellaswag = HellaSwag(items[:20], tokenizer)
    with evaluating(model):
        scores = hellaswag.score(training_losses(model), POSITIONS, 2048, alone)[style]
        for n, request in enumerate(hellaswag._asked[style][0]):
            logits = model.gpt2(torch.tensor([request.tokens])).logits[0, :, : model.vocab_size].double()
            by_token = logits.log_softmax(-1)
            hand = sum(float(by_token[i - 1, request.tokens[i]]) for i in range(request.start, len(request.tokens)))
            assert scores.log_likelihoods[n // 4, n % 4] == pytest.approx(hand, abs=1e-4)
    assert scores.truncated == 0 and np.ptp(scores.log_likelihoods) > 1


def test_any_model_scores_as_the_model_in_training(items, tokenizer, model, alone) -> None:
    hellaswag = HellaSwag(items[:8], tokenizer)
    padded = model.gpt2.lm_head.weight.shape[0]
    assert padded > model.vocab_size
    mode = [module.training for module in model.modules()]
    with evaluating(model):
        ours = hellaswag.score(training_losses(model), POSITIONS, 2048, alone)
        model.gpt2.resize_token_embeddings(model.vocab_size)
        theirs = hellaswag.score(causal_losses(model.gpt2), POSITIONS, 300, alone)
        model.gpt2.resize_token_embeddings(padded)
    for style in STYLES:
        np.testing.assert_allclose(ours[style].log_likelihoods, theirs[style].log_likelihoods, atol=1e-4)
    assert [module.training for module in model.modules()] == mode


def test_what_is_too_long_is_cut_from_the_left_and_counted(model, alone) -> None:
    tokens = list(np.random.default_rng(0).integers(0, model.vocab_size, POSITIONS + 11))
    with evaluating(model):
        (cut, whole), truncated = score(
            [Request(tokens, POSITIONS), Request(tokens[10:], POSITIONS - 10)], training_losses(model), POSITIONS, 1024, alone
        )
    assert truncated == 1 and cut == pytest.approx(whole, abs=1e-5)


def test_loss_perplexity_and_bits_per_byte() -> None:
    result = compute(LanguageModelLoss, predictions=[6.0, 2.0], references=[3, 1], text_bytes=[10, 6])
    assert result["loss"] == pytest.approx(2.0) and result["perplexity"] == pytest.approx(np.exp(2.0))
    assert result["bits_per_byte"] == pytest.approx(8 / np.log(2) / 16)
