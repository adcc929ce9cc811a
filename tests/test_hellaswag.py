"""HellaSwag in the loop and its scoring: against hand-made numbers, lm-evaluation-harness, and any number of ranks."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from launch import ROOT, TINY, launch, losses, metrics, options
from recipe.config import Config, ConfigError
from recipe.distributed import Distributed
from recipe.evaluation.hellaswag import HellaSwag
from recipe.evaluation.in_loop import InLoopHellaSwag
from recipe.evaluation.items import MINI, read_items
from recipe.evaluation.metrics import LanguageModelLoss, MultipleChoiceAccuracy, compute
from recipe.evaluation.scoring import Request, causal_losses, evaluating, score, training_losses
from recipe.evaluation.suite import evaluate
from recipe.model import build_model
from recipe.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def items() -> list[dict]:
    return read_items("mini")


@pytest.fixture(scope="module")
def tokenizer(items):
    return train_tokenizer([f"{item['ctx']} {ending}" for item in items for ending in item["endings"]], 600)


@pytest.fixture(scope="module")
def distributed() -> Distributed:
    return Distributed()


@pytest.fixture(scope="module")
def model(tokenizer) -> GPT2LMHeadModel:
    """Random weights large enough for confident predictions."""
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 256, "initializer_range": 0.3}
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **shape)).eval()


def by_hand(model: GPT2LMHeadModel, context: list[int], ending: list[int]) -> float:
    """The log-likelihood of an ending, in fp64, alone in its batch."""
    with torch.no_grad():
        log_probabilities = model.double()(torch.tensor([context + ending])).logits[0].log_softmax(-1)
    model.float()
    return sum(float(log_probabilities[len(context) + n - 1, token]) for n, token in enumerate(ending))


def test_log_likelihoods_of_20_items_by_hand(items, tokenizer, model, distributed) -> None:
    with evaluating(model):
        found = HellaSwag(items[:20], tokenizer).score(causal_losses(model), 256, 2048, distributed)
    for n, item in enumerate(items[:20]):
        for k, ending in enumerate(item["endings"]):
            opening = item["ctx_b"][:1].upper() + item["ctx_b"][1:]
            query = f"{item['activity_label']}: {item['ctx_a']} {opening}".strip()
            start = tokenizer.encode(query)
            expected = by_hand(model, start, tokenizer.encode(f"{query} {ending}")[len(start) :])
            assert found["lm-eval"].log_likelihoods[n, k] == pytest.approx(expected, abs=1e-4)
            assert found["lm-eval"].lengths[n, k] == len(ending)
            own = tokenizer.encode(f" {ending}")
            expected = by_hand(model, tokenizer.encode(item["ctx"]), own)
            assert found["completion"].log_likelihoods[n, k] == pytest.approx(expected, abs=1e-4)
            assert found["completion"].lengths[n, k] == len(own)


def test_oracle_and_anti_oracle(items, tokenizer, distributed) -> None:
    """A model that knows which endings are right, through the whole path: requests, batches, metric."""
    for right, expected in ((0.0, 1.0), (9.0, 0.0)):
        for style in ("lm-eval", "completion"):
            asked = HellaSwag(items, tokenizer, (style,))
            known = {}
            requests, _ = asked._asked[style]
            for n, request in enumerate(requests):
                known[tuple(request.tokens[:-1])] = right if n % 4 == items[n // 4]["label"] else 9.0 - right

            def model(ids, rows, columns, targets, known=known):
                # A row is padded with zeros, so the request is the longest beginning of it that is known.
                tokens = [tuple(row) for row in ids.tolist()]
                values = [next(known[t[:n]] for n in range(len(t), 0, -1) if t[:n] in known) for t in tokens]
                return torch.tensor(values)[rows]

            numbers = asked.score(model, 256, 2048, distributed)[style].metrics()
            assert (numbers["acc"], numbers["acc_norm"], numbers["n"]) == (expected, expected, 64)


def test_random_scores_lie_at_chance(items) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(4, size=10_042)
    numbers = compute(
        MultipleChoiceAccuracy, predictions=rng.normal(size=(10_042, 4)), lengths=np.ones((10_042, 4)), references=labels
    )
    for name in ("acc", "acc_norm"):
        assert abs(numbers[name] - 0.25) < 2 * numbers[f"{name}_stderr"]
    assert numbers["acc_stderr"] == pytest.approx(math.sqrt(0.25 * 0.75 / 10_042), rel=0.02)


def test_equal_probability_per_token_scores_what_the_counts_give(items, tokenizer, model, distributed) -> None:
    uniform = GPT2LMHeadModel(model.config).eval()
    with torch.no_grad():
        for parameter in uniform.parameters():
            parameter.zero_()
    with evaluating(uniform):
        found = HellaSwag(items, tokenizer).score(causal_losses(uniform), 256, 2048, distributed)
    fewest, cheapest = [], []
    for item in items:
        opening = item["ctx_b"][:1].upper() + item["ctx_b"][1:]
        query = f"{item['activity_label']}: {item['ctx_a']} {opening}".strip()
        tokens = [len(tokenizer.encode(f"{query} {e}")) - len(tokenizer.encode(query)) for e in item["endings"]]
        fewest.append(tokens.index(min(tokens)) == item["label"])
        rates = [count / len(e) for count, e in zip(tokens, item["endings"], strict=True)]
        cheapest.append(rates.index(min(rates)) == item["label"])
    numbers = found["lm-eval"].metrics()
    assert numbers["acc"] == np.mean(fewest) and numbers["acc_norm"] == np.mean(cheapest)
    # A mean over tokens is the same for all endings.
    means = found["completion"].log_likelihoods / found["completion"].lengths
    assert means == pytest.approx(-math.log(len(tokenizer)), abs=1e-5)


HELLASWAG = ROOT.parent / "shared" / "data" / "hellaswag"


@pytest.mark.parametrize("copy", ["mini", "500"])
def test_in_loop_and_harness_agree_to_the_item(copy: str, tokenizer, tmp_path: Path, distributed) -> None:
    if copy == "500" and not HELLASWAG.is_dir():
        pytest.skip("needs a copy of HellaSwag")
    data, limit = ("mini", None) if copy == "mini" else (str(next(HELLASWAG.glob("*.jsonl"))), 500)
    items = read_items(data, limit)

    config = Config(n_layer=2, n_head=2, n_embd=32, sequence_length=256, n_positions=256, micro_batch_size=8)
    trained = build_model(config, len(tokenizer), tokenizer.eos_token_id)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.mul_(10)  # away from chance
        trained.gpt2.transformer.wte.weight[len(tokenizer) :] = 0
    in_loop = InLoopHellaSwag(items, tokenizer, config)
    with evaluating(trained):
        scores = in_loop._set.score(training_losses(trained), 256, 2048, distributed)["lm-eval"]
    export = GPT2LMHeadModel(GPT2Config(**{**trained.gpt2.config.to_dict(), "vocab_size": len(tokenizer)}))
    weights = trained.gpt2.state_dict()
    cut = {name: tensor[: len(tokenizer)] for name, tensor in weights.items() if tensor.shape[0] == 640}
    export.load_state_dict(weights | cut)
    export.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    results = evaluate(str(tmp_path / "model"), ["hellaswag"], distributed, data, tmp_path / "tasks", limit)
    harness = results["items"]["hellaswag"]
    assert [item["doc_id"] for item in harness] == list(range(limit or 64))
    theirs = np.array([item["log_likelihoods"] for item in harness])
    assert theirs == pytest.approx(scores.log_likelihoods, abs=1e-3)
    assert np.array_equal(theirs.argmax(1), scores.log_likelihoods.argmax(1))
    numbers = in_loop.evaluate(trained, distributed)
    assert numbers["hellaswag_acc"] == results["tasks"]["hellaswag"]["acc"]
    assert numbers["hellaswag_acc_norm"] == results["tasks"]["hellaswag"]["acc_norm"]


def test_longer_inputs_are_cut_from_the_left_and_counted(model, distributed) -> None:
    rng = random.Random(0)
    tokens = [rng.randrange(500) for _ in range(300)]
    with evaluating(model):
        (whole, cut), truncated = score(
            [Request(tokens[300 - 257 :], 250), Request(tokens, 293)], causal_losses(model), 256, 512, distributed
        )
    assert truncated == 1 and whole == pytest.approx(cut, abs=1e-4)


def test_modes_and_generators_stay(items, tokenizer, distributed) -> None:
    config = Config(n_layer=1, n_head=1, n_embd=16, n_positions=256, sequence_length=64, micro_batch_size=8)
    model = build_model(config, len(tokenizer), tokenizer.eos_token_id).train()
    model.gpt2.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    InLoopHellaSwag(items[:8], tokenizer, config).evaluate(model, distributed)
    assert [module.training for module in model.modules()] == modes
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states


def test_language_model_loss() -> None:
    numbers = compute(LanguageModelLoss, predictions=[8.0, 2.0], references=[3, 2], text_bytes=[10, 10])
    assert numbers["loss"] == 2.0 and numbers["perplexity"] == pytest.approx(math.exp(2))
    assert numbers["bits_per_byte"] == pytest.approx(10 / math.log(2) / 20)


# --- where items come from --------------------------------------------------------------------------------------------


def test_jsonl_parquet_and_folders_hold_the_same_items(items, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(items), tmp_path / "a.parquet")
    (tmp_path / "parts").mkdir()
    lines = MINI.read_text().splitlines(keepends=True)
    (tmp_path / "parts" / "0.jsonl").write_text("".join(lines[:40]))
    (tmp_path / "parts" / "1.jsonl").write_text("".join(lines[40:]))
    assert read_items(str(tmp_path / "a.parquet")) == read_items(str(tmp_path / "parts")) == items
    assert read_items(str(tmp_path / "parts"), 41) == items[:41]


@pytest.mark.parametrize(
    "content, said",
    [
        ("", "no items"),
        ("nonsense", "cannot be read"),
        ('{"ctx": "A"}', "has no activity_label"),
        (json.dumps(dict.fromkeys(["activity_label", "ctx_a", "ctx_b", "ctx"], "x") | {"endings": ["a"], "label": 0}), "label"),
    ],
)
def test_other_files_are_refused(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=said):
        read_items(str(tmp_path / "x.jsonl"))


def test_without_the_hub_the_error_says_what_to_do(monkeypatch) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: (_ for _ in ()).throw(ConnectionError("no route")))
    with pytest.raises(ConfigError, match="no route; give a copy with --evaluate_data"):
        read_items(None)


# --- in a run -----------------------------------------------------------------------------------------------------------

RUN = TINY | {"n_positions": 256, "precision": "fp32", "max_steps": 6, "warmup_steps": 2, "eval_every": 3}
LOOP = {"hellaswag_every": 3, "evaluate_data": "mini", "hellaswag_items": 40}
FIELDS = ("hellaswag_acc", "hellaswag_acc_norm", "hellaswag_completion_acc_norm", "hellaswag_n")


def evaluations(run: Path) -> list[tuple]:
    return [(r["step"], *(r[name] for name in FIELDS)) for r in metrics(run) if "hellaswag_acc" in r]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, fineweb_folder) -> Path:
    folder = tmp_path_factory.mktemp("loop") / "one"
    launch("cpu", *options(**(RUN | LOOP | {"data": fineweb_folder, "output_dir": folder})))
    return folder


def test_the_loop_evaluates_and_trains_on_undisturbed(one_process: Path, tmp_path: Path, fineweb_folder: Path) -> None:
    launch("cpu", *options(**(RUN | {"data": fineweb_folder, "output_dir": tmp_path / "off"})))
    assert losses(one_process) == losses(tmp_path / "off")
    assert [(e[0], e[-1]) for e in evaluations(one_process)] == [(3, 40), (6, 40)]
    validation = [r for r in metrics(one_process) if "val_loss" in r]
    assert validation == [r for r in metrics(tmp_path / "off") if "val_loss" in r]
    for record in validation:
        assert 0 < record["val_bits_per_byte"] < record["val_loss"] / math.log(2)  # a token is at least a byte


@pytest.mark.slow
def test_two_ranks_and_compiled_give_the_same_to_the_item(one_process: Path, tmp_path: Path, fineweb_folder: Path) -> None:
    for name, machine, more in (("two", "2cpu-ddp", {}), ("compiled", "cpu", {"compile": True})):
        folder = tmp_path / name
        launch(machine, *options(**(RUN | LOOP | more | {"data": fineweb_folder, "output_dir": folder})))
        assert evaluations(folder) == evaluations(one_process)
