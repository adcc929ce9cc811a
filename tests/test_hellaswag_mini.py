"""The small offline set in the JSONL format of HellaSwag: its fields, its balance, and lm_eval's reading of it."""

import json
from collections import Counter
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[1] / "recipe" / "evaluation" / "hellaswag_mini.jsonl"
FIELDS = ["ind", "activity_label", "ctx_a", "ctx_b", "ctx", "split", "split_type", "label", "endings", "source_id"]


@pytest.fixture(scope="module")
def items():
    with PATH.open(encoding="ascii") as lines:  # a character outside ASCII fails here
        return [json.loads(line) for line in lines]


def test_fields(items):
    assert len(items) >= 50
    for position, item in enumerate(items):
        assert list(item) == FIELDS
        assert item["ind"] == position
        assert item["source_id"] == f"mini~{position}"
        assert (item["split"], item["split_type"]) == ("val", "indomain")
        assert type(item["label"]) is int and 0 <= item["label"] <= 3
        assert item["ctx"] == f"{item['ctx_a']} {item['ctx_b']}".strip()
        texts = [item["activity_label"], item["ctx_a"], item["ctx_b"], *item["endings"]]
        for text in texts:
            assert text == text.strip() and "  " not in text and "[" not in text
        assert all(texts[:2]) and item["ctx_a"].endswith(".")
        assert len(item["endings"]) == 4
        assert 15 <= len(item["ctx"].split()) <= 45
        for ending in item["endings"]:
            assert ending.endswith(".")
            assert 6 <= len(ending.split()) <= 18
            # Where ctx_b opens the sentence the ending goes on with it; otherwise the ending is a sentence of its own.
            assert ending[0].islower() if item["ctx_b"] else ending[0].isupper()
        # lm_eval writes ctx_b.capitalize(), which would lower a capital inside it.
        assert item["ctx_b"] == item["ctx_b"].lower()


def test_balance(items):
    labels = Counter(item["label"] for item in items)
    assert [labels[label] for label in range(4)] == [len(items) // 4] * 4
    assert sum(bool(item["ctx_b"]) for item in items) * 2 == len(items)


def test_nothing_twice(items):
    endings = [ending.lower() for item in items for ending in item["endings"]]
    assert len(set(endings)) == len(endings)
    contexts = [item["ctx_a"] for item in items]
    assert len(set(contexts)) == len(contexts)


@pytest.mark.parametrize("pick", [max, min], ids=["longest", "shortest"])
def test_length_does_not_give_the_answer_away(items, pick):
    hits = 0
    for item in items:
        lengths = [len(ending) for ending in item["endings"]]
        hits += lengths[item["label"]] == pick(lengths)
    assert 0.15 <= hits / len(items) <= 0.35


def test_lm_eval_reads_it(items):
    pytest.importorskip("lm_eval")
    import datasets
    from lm_eval.tasks.hellaswag.utils import process_docs

    docs = process_docs(datasets.Dataset.from_list(items))
    assert len(docs) == len(items)
    for item, doc in zip(items, docs, strict=True):
        assert doc["choices"] == item["endings"]
        assert doc["gold"] == item["label"]
        start = f"{item['activity_label']}: {item['ctx_a']}"
        opening = item["ctx_b"]
        assert doc["query"] == (f"{start} {opening[0].upper()}{opening[1:]}" if opening else start)
