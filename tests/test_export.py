"""An export: whole, plain, equal to what was trained, of any checkpoint, and an earlier one stays if a new one fails."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, pipeline

from hub_server import HubServer
from launch import ROOT
from push_helpers import REPO, paths, push_environment
from recipe import checkpoint
from recipe.files import sha256
from recipe.publish.contents import REQUIRED_FILES, export_files
from recipe.publish.export import ExportError, export_checkpoint
from recipe.run_folder import RunFolder

VOCAB = 400


@pytest.fixture
def folder(trained_run: Path, tmp_path: Path) -> RunFolder:
    return RunFolder(shutil.copytree(trained_run, tmp_path / "gpt2-tiny"))


def export(folder: RunFolder, step: int = 20, **config: object) -> Path:
    values = yaml.safe_load(folder.config.read_text()) | config
    folder.config.write_text(yaml.safe_dump(values))
    found = checkpoint.verify(folder.checkpoints / f"step-{step:08d}")
    export_checkpoint(folder, found, folder.export, lambda line: None)
    return folder.export


def masters(folder: RunFolder, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder.checkpoints / f"step-{step:08d}" / "model.safetensors")


@pytest.mark.parametrize("step", [10, 20])
def test_any_checkpoint_becomes_a_whole_export(folder, step):
    target = export(folder, step)
    assert set(REQUIRED_FILES) <= export_files(target).keys()
    assert {p.name for p in target.iterdir()} == export_files(target).keys(), "nothing that is not uploaded"
    config = json.loads((target / "config.json").read_text())
    assert config["architectures"] == ["GPT2LMHeadModel"] and config["vocab_size"] == VOCAB
    assert config["dtype"] == "float32" and config["bos_token_id"] == config["eos_token_id"] == VOCAB - 1
    assert [config[f"{name}_pdrop"] for name in ("attn", "embd", "resid")] == [0, 0, 0]
    assert AutoTokenizer.from_pretrained(target).model_max_length == 128
    assert json.loads((target / "run.json").read_text())["step"] == step
    model = AutoModelForCausalLM.from_pretrained(target)
    assert type(model) is GPT2LMHeadModel and model.lm_head.weight is model.transformer.wte.weight
    for name, weight in masters(folder, step).items():
        assert torch.equal(model.state_dict()[name], weight[:VOCAB] if name == "transformer.wte.weight" else weight)
    text = pipeline("text-generation", model=str(target))("The river", max_new_tokens=4)[0]["generated_text"]
    assert text.startswith("The river")


def test_the_file_has_the_names_and_shapes_of_a_stock_gpt2(folder):
    """What converters to other formats go by; the tied head is stored once."""
    target = export(folder)
    stock = GPT2LMHeadModel(AutoModelForCausalLM.from_pretrained(target).config)
    expected = {name: p.shape for name, p in stock.named_parameters()}
    assert {name: tensor.shape for name, tensor in load_file(target / "model.safetensors").items()} == expected


def test_its_files_are_as_readable_as_each_other(folder):
    assert len({path.stat().st_mode for path in export(folder).iterdir() if path.is_file()}) == 1


def test_bf16_is_the_masters_rounded_and_the_card_says_so(folder):
    target = export(folder, export_dtype="bf16")
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"
    weights = load_file(target / "model.safetensors")
    for name, weight in masters(folder, 20).items():
        expected = (weight[:VOCAB] if name == "transformer.wte.weight" else weight).to(torch.bfloat16)
        assert torch.equal(weights[name], expected)
    assert "rounded to bf16" in (target / "README.md").read_text()


@pytest.mark.parametrize("damage", [1e-2, float("nan")])
def test_an_export_that_computes_something_else_is_not_put_in_place(folder, monkeypatch, damage):
    before = {p.name: sha256(p) for p in folder.export.iterdir()}
    save = GPT2LMHeadModel.save_pretrained

    def save_damaged(model, *arguments, **keywords):
        with torch.no_grad():
            model.transformer.h[0].mlp.c_fc.bias[0] += damage
        save(model, *arguments, **keywords)

    monkeypatch.setattr(GPT2LMHeadModel, "save_pretrained", save_damaged)
    with pytest.raises(ExportError):
        export(folder)
    assert {p.name: sha256(p) for p in folder.export.iterdir()} == before


def test_a_weight_that_no_logit_shows_is_compared_too(folder, monkeypatch):
    """The last position is read by no compared row shorter than it; here a weight below the tolerance of the logits."""
    save = GPT2LMHeadModel.save_pretrained

    def save_damaged(model, *arguments, **keywords):
        with torch.no_grad():
            model.transformer.wpe.weight[0, 0] += 1e-7
        save(model, *arguments, **keywords)

    monkeypatch.setattr(GPT2LMHeadModel, "save_pretrained", save_damaged)
    with pytest.raises(ExportError, match=r"transformer\.wpe\.weight differs"):
        export(folder)


def test_twice_is_the_same_bytes(folder):
    first = {name: sha256(path) for name, path in export_files(export(folder)).items()}
    assert {name: sha256(path) for name, path in export_files(export(folder)).items()} == first


def test_what_is_kept_of_the_configuration_tells_nothing_of_the_machine(folder, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    target = export(folder, data="/home/somebody/text", price_per_hour=3.5)
    values = yaml.safe_load((target / "training_config.yaml").read_text())
    assert values["data"] == "~/text" and values["n_layer"] == 2 and "output_dir" not in values
    for name in ("training_config.yaml", "README.md"):
        assert "/home/somebody" not in (target / name).read_text()


def test_hf_upload_takes_the_folder_as_it_is(folder, tmp_path):
    target = export(folder)
    hf = Path(sys.executable).with_name("hf")
    with HubServer() as server:
        environment = push_environment(server, tmp_path)
        command = [str(hf), "upload", REPO, str(target), "--private"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert paths(server) == export_files(target).keys()
        # push.py knows it for the run's own.
        command = [sys.executable, str(ROOT / "scripts" / "push.py"), str(folder.path), "--repo", REPO]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and "already on" in done.stdout, done.stderr
