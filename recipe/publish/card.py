"""The model card, written from the run's own files; what the run does not know is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from recipe.config import FINEWEB, INSTALLED_DOCS
from recipe.files import read_json_lines, write_text
from recipe.monitor.metrics import format_duration
from recipe.run_folder import RunFolder

DATA_SOURCES = {
    FINEWEB.partition(":")[0]: "[FineWeb](https://huggingface.co/datasets/HuggingFaceFW/fineweb) by Hugging Face, ODC-By 1.0",
    INSTALLED_DOCS: "the documentation and docstrings of the Python packages installed where it was trained, under their own "
    "licences; a model for trying the recipe out, not for use",
}


def write_card(folder: RunFolder) -> Path:
    """Write export/README.md from config.yaml, environment.json, metrics.jsonl and eval/*.json."""
    config = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
    environment = json.loads((folder.path / "environment.json").read_text(encoding="utf-8"))
    config["data"] = environment.get("text", config["data"])  # of prepared tokens, the text that they were made from
    records = read_json_lines(folder.metrics)
    text = ModelCard(f"---\n{_metadata(config).to_yaml()}\n---\n\n{_body(folder, config, environment, records)}")
    path = folder.export / "README.md"
    write_text(path, str(text))
    return path


def _metadata(config: dict[str, Any]) -> ModelCardData:
    hub_dataset = config["data"].partition(":")[0].partition("@")[0] if config["data"].startswith("HuggingFaceFW/") else None
    return ModelCardData(
        language="en",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2", "pretrained-from-scratch"],
        datasets=[hub_dataset] if hub_dataset else None,
    )


def _body(folder: RunFolder, config: dict[str, Any], environment: dict[str, Any], records: list[dict]) -> str:
    training = [r for r in records if "train_loss" in r]
    validation = [r for r in records if "val_loss" in r]
    architecture = json.loads((folder.export / "config.json").read_text(encoding="utf-8"))
    hardware = environment["hardware"]
    device = hardware.get("gpu") or f"CPU ({hardware['cores']} cores)"
    source = next((s for name, s in DATA_SOURCES.items() if config["data"].startswith(name)), f"`{config['data']}`")
    lines = [
        f"# {folder.path.resolve().name}",
        "",
        f"A GPT-2 (`GPT2LMHeadModel`: {architecture['n_layer']} layers, {architecture['n_head']} heads, width "
        f"{architecture['n_embd']}, {architecture['n_positions']} positions, vocabulary {architecture['vocab_size']:,}), "
        "pretrained from scratch. Weights are the fp32 masters of the last step.",
        "",
        "```python",
        "from transformers import pipeline",
        'generator = pipeline("text-generation", "PATH_OR_HUB_ID")',
        'print(generator("The", max_new_tokens=50)[0]["generated_text"])',
        "```",
        "",
        "## Training",
        "",
        f"- Data: {source}.",
    ]
    if training:
        last = training[-1]
        ramp = f" (ramped up by {config['batch_ramp']})" if config.get("batch_ramp") else ""
        muon = f" (Muon {config['muon_learning_rate']:g})" if config["optimizer"] == "muon" else ""
        seconds = sum(r["step_seconds"] for r in training)
        lines += [
            f"- {last['tokens']:,} tokens in {last['step']:,} steps of {config['batch_tokens']:,} tokens{ramp}, "
            f"{format_duration(seconds)} of training steps on {environment['ranks']} x {device}.",
            f"- {config['optimizer']}, learning rate {config['learning_rate']:g}{muon}, {config['schedule']} schedule, "
            f"weight decay {config['weight_decay']:g}, gradient norm clipped at {config['max_grad_norm']:g}, "
            f"{environment['precision']}, sequence length {config['sequence_length']}, seed {config['seed']}.",
        ]
    lines.append(f"- Command: `{' '.join(environment['command'])}`")
    if environment["commit"]:
        lines.append(f"- Commit of the recipe: `{environment['commit']}`")
    shown = ("torch", "transformers", "accelerate", "deepspeed", "datasets")
    versions = ", ".join(f"{n} {environment['versions'][n]}" for n in shown if n in environment["versions"])
    lines += [f"- Versions: {versions}", "", "## Results", ""]
    if validation:
        first, last = validation[0], validation[-1]
        lines.append(
            f"Validation loss {last['val_loss']:.4f} nats per token at step {last['step']:,} ({first['val_loss']:.4f} at step "
            f"{first['step']:,})."
        )
    lines += _evaluations(folder) + _samples(folder)
    lines += [
        "## Limits",
        "",
        "It continues text; it follows no instructions, knows no facts reliably, and repeats the biases of its training text. "
        "It was not filtered or aligned for safety.",
        "",
    ]
    return "\n".join(lines)


def _evaluations(folder: RunFolder) -> list[str]:
    lines = []
    for path in sorted(folder.evaluation.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        for task, numbers in record.get("tasks", {}).items():
            if not lines:
                lines += ["", "| task | items | metric | value |", "|---|---|---|---|"]
            name = f"{task} ({numbers['data']['name']})" if "sha256" in numbers["data"] else task
            lines += [
                f"| {name} | {numbers['n']:,} | {metric} | {value:.4f} ± {numbers[f'{metric}_stderr']:.4f} |"
                for metric, value in numbers.items()
                if f"{metric}_stderr" in numbers
            ]
    if lines:
        lines += ["", "By lm-evaluation-harness; ± is one standard error."]
    return [*lines, ""]


def _samples(folder: RunFolder) -> list[str]:
    paths = sorted(folder.evaluation.glob("samples-step-*.json"))
    if not paths:
        return []
    record = json.loads(paths[-1].read_text(encoding="utf-8"))
    lines = ["## Samples", "", f"At step {record['step']:,}, not picked:", ""]
    for sample in record["samples"]:
        text = f"**{sample['prompt']}**{sample['continuation']}".strip()
        lines += ["> " + text.replace("\n", "\n> "), ""]
    return lines
