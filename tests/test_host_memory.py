"""Tensors side by side in blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from launch import ROOT
from recipe import host_memory
from recipe.host_memory import HostMemory
from recipe.model import gpt2_config
from recipe.parsing import load_config


def test_tensors_are_apart_and_the_same_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "BLOCK", 1000)
    memory = HostMemory(pinned=False)
    shapes = {"a": (700,), "b": (30, 40), "c": (5, 7, 11), "d": (3,), "e": (200,)}
    tensors = {name: memory.tensor(name, torch.Size(shape)) for name, shape in shapes.items()}
    for number, tensor in enumerate(tensors.values()):
        tensor.fill_(number)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes
    assert all((tensor == number).all() for number, tensor in enumerate(tensors.values()))
    # b is larger than a block; d has found room behind a.
    storages = {name: tensor.untyped_storage().data_ptr() for name, tensor in tensors.items()}
    assert len(set(storages.values())) == 3 and storages["a"] == storages["d"] and storages["c"] == storages["e"]
    again = memory.tensor("c", torch.Size(shapes["c"]))
    assert again.data_ptr() == tensors["c"].data_ptr()
    save_file(tensors, tmp_path / "file")
    found = load_file(tmp_path / "file")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("size", ["124m", "1558m"])
def test_little_is_left_over(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = gpt2_config(load_config([str(ROOT / "configs" / f"gpt2-{size}.yaml")]), 50_304, 50_256)
    width = config.n_embd
    layer = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width), *[(width,)] * 9]
    shapes = [(50_304, width), (1024, width), *layer * config.n_layer] * 3  # masters and both moments
    blocks: list[int] = []
    empty = torch.empty

    def note(count: int, **options) -> torch.Tensor:
        assert options.pop("pin_memory")
        blocks.append(count)
        return empty(count, device="meta", **options)

    monkeypatch.setattr(torch, "empty", note)
    memory = HostMemory(pinned=True)
    for number, shape in enumerate(shapes):
        memory.tensor(str(number), torch.Size(shape))
    rounded = sum(1 << (count - 1).bit_length() for count in blocks)
    assert rounded < 1.08 * sum(torch.Size(shape).numel() for shape in shapes)
