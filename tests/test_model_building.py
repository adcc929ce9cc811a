"""The model that is built while the text is read: the same one, with its errors where it is asked for."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from recipe import model_building
from recipe.config import Config
from recipe.model import build_model
from recipe.model_building import ModelBuilding
from recipe.tokenizer import Encoder, train_tokenizer

CONFIG = Config(n_layer=2, n_head=2, n_embd=64, n_positions=64)
VOCABULARY = 5000


def test_the_same_weights_and_generator_while_text_is_encoded():
    expected = build_model(CONFIG, VOCABULARY, 0).state_dict()
    generator = torch.get_rng_state()
    torch.manual_seed(1)
    building = ModelBuilding(CONFIG, VOCABULARY, 0)
    texts = [f"The {n}th text of many, with words in it." for n in range(500)]
    encoder = Encoder(train_tokenizer(texts, 300))
    lengths = [len(tokens) for tokens in encoder.encode(texts)]
    model = building.model()
    assert np.sum(lengths) > len(texts)
    assert all(torch.equal(expected[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert model.training and all(p.requires_grad for p in model.parameters())


def test_it_is_built_beside_what_follows(monkeypatch):
    may_end = threading.Event()

    def wait_and_build(*arguments):
        assert may_end.wait(30)
        return build_model(*arguments)

    monkeypatch.setattr(model_building, "build_model", wait_and_build)
    building = ModelBuilding(CONFIG, VOCABULARY, 0)
    may_end.set()
    assert building.model().vocab_size == VOCABULARY


def test_an_error_comes_where_the_model_is_asked_for():
    building = ModelBuilding(replace(CONFIG, n_head=7), VOCABULARY, 0)
    with pytest.raises(ValueError, match="divisible by num_heads"):
        building.model()
