"""The model card, written from the run's own files; what the run does not know is left out."""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from recipe.config import FINEWEB, INSTALLED_DOCS
from recipe.evaluation.records import COMPARABLE, metrics_of, read_results, scores_kind, task_label
from recipe.evaluation.references import COMPLETION_TASK, HELLASWAG_ITEMS, LLMC_CURVES, LLMC_SOURCE, references
from recipe.files import read_json_lines, write_text
from recipe.gpus import power_limit
from recipe.monitor.metrics import format_duration
from recipe.monitor.run_record import RunRecord, sample_files
from recipe.publish.contents import LOSS_CURVE, MARKER, TRAINING_CONFIG
from recipe.publish.eval_results import card_results, write_eval_results
from recipe.publish.loss_curve import write_loss_curve
from recipe.publish.redaction import redact
from recipe.run_folder import RunFolder

FINEWEB_REPO = FINEWEB.partition(":")[0]
DATA_SOURCES = {
    FINEWEB_REPO: f"[FineWeb](https://huggingface.co/datasets/{FINEWEB_REPO}) by Hugging Face, released under the Open Data "
    "Commons Attribution License (ODC-By) 1.0; its use is also subject to Common Crawl's terms of use",
    INSTALLED_DOCS: "the documentation and docstrings of the Python packages installed where it was trained, under their own "
    "licences; a model for trying the recipe out, not for use",
}
_CITATIONS = {
    "gpt2": "Radford, Wu, Child, Luan, Amodei, Sutskever: Language Models are Unsupervised Multitask Learners, 2019.",
    "fineweb": "Penedo, Kydlíček, Ben allal, Lozhkov, Mitchell, Raffel, von Werra, Wolf: The FineWeb Datasets: Decanting the "
    "Web for the Finest Text Data at Scale, 2024, arXiv:2406.17557.",
}


def write_card(folder: RunFolder, export: Path | None = None) -> Path:
    """Write README.md, the loss curve and .eval_results of an export (default: RUN/export) from config.yaml,
    environment.json, starts.jsonl, metrics.jsonl and eval/*.json, as of the step that the export's run.json names."""
    export = export or folder.export
    config = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
    run = RunRecord.read(folder.path)
    environment = run.environment
    config["data"] = environment.get("text", config["data"])  # of prepared tokens, the text that they were made from
    step = exported_step(folder, export)
    run.records = records = [record for record in run.records if record["step"] <= step]
    results = [record for record in read_results(folder.evaluation) if record.get("step") == step]
    write_eval_results(results, export, environment["versions"])
    has_curve = write_loss_curve(records, run.is_fineweb, export / LOSS_CURVE)
    title = folder.path.resolve().name
    lines = [
        f"# {title}",
        "",
        *_introduction(export, config, step),
        *_training(config, run, has_curve),
        *_results(records, results, step, config.get("evaluate_data")),
        *_samples(folder, step),
        *_limits(config),
        *_reproduction(environment),
        *_citation(config, title),
    ]
    body = "\n".join(lines).replace(str(Path.home()), "~")
    metadata = _metadata(config, results, title).to_yaml()
    text = str(ModelCard(redact(f"---\n{metadata}\n---\n\n{body}"), ignore_metadata_errors=False))
    write_text(export / "README.md", text)
    return export / "README.md"


def exported_step(folder: RunFolder, export: Path) -> int:
    """The step whose weights an export holds; of one without run.json, the run's last."""
    if (export / MARKER).is_file():
        return json.loads((export / MARKER).read_text(encoding="utf-8"))["step"]
    return max((record["step"] for record in read_json_lines(folder.metrics)), default=0)


def _metadata(config: dict[str, Any], results: list[dict[str, Any]], title: str) -> ModelCardData:
    source = config["data"].partition(":")[0].partition("@")[0]
    evaluations = card_results(results)
    scratch = config.get("init_from") is None
    return ModelCardData(
        language="en" if source in DATA_SOURCES else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gpt2", *(["pretrained-from-scratch"] if scratch else [])],
        datasets=[source] if source == FINEWEB_REPO else None,
        model_name=title if evaluations else None,
        eval_results=evaluations or None,
        ignore_metadata_errors=False,
    )


def _introduction(export: Path, config: dict[str, Any], step: int) -> list[str]:
    architecture = json.loads((export / "config.json").read_text(encoding="utf-8"))
    if config.get("export_dtype", "fp32") == "fp32":
        weights = f"The weights are the fp32 masters of step {step:,}"
    else:
        weights = f"The weights are the fp32 masters of step {step:,}, rounded to bf16"
    origin = f"trained on from `{config['init_from']}`" if config.get("init_from") else "pretrained from scratch"
    return [
        f"A GPT-2 (`GPT2LMHeadModel`: {architecture['n_layer']} layers, {architecture['n_head']} heads, width "
        f"{architecture['n_embd']}, {architecture['n_positions']} positions, vocabulary {architecture['vocab_size']:,}), "
        f"{origin}. {weights}; input and output embedding are one matrix.",
        "",
        "```python",
        "from transformers import pipeline",
        'generator = pipeline("text-generation", "PATH_OR_HUB_ID")',
        'print(generator("The", max_new_tokens=50)[0]["generated_text"])',
        "```",
        "",
    ]


def _training(config: dict[str, Any], run: RunRecord, has_curve: bool) -> list[str]:
    environment = run.environment
    source = next((s for name, s in DATA_SOURCES.items() if config["data"].startswith(name)), None)
    lines = ["## Training", "", f"- Data: {source} (`{config['data']}`)." if source else f"- Data: `{config['data']}`."]
    if run.training:
        last = run.training[-1]
        ramp = f" (ramped up by {config['batch_ramp']})" if config.get("batch_ramp") else ""
        name = "NorMuon" if config.get("muon_variant") == "normuon" else "Muon"  # older runs have no variant
        muon = f" ({name} {config['muon_learning_rate']:g})" if config["optimizer"] == "muon" else ""
        shorter = f" (ramped up by {config['sequence_ramp']})" if config.get("sequence_ramp") else ""
        seconds = sum(r["step_seconds"] for r in run.training)
        branch = (
            f"branched off another run at step {run.begun_at:,}; time, money and energy are those of its own "
            f"{run.own_tokens:,} tokens in {last['step'] - run.begun_at:,} steps: "
        )
        lines += [
            f"- {last['tokens']:,} tokens in {last['step']:,} steps of {config['batch_tokens']:,} tokens{ramp}, "
            f"{branch if run.begun_at else ''}{format_duration(seconds)} of training steps on {run.machine}.",
            *_cost(run, seconds),
            f"- {config['optimizer']}, learning rate {config['learning_rate']:g}{muon}, {config['schedule']} schedule, "
            f"weight decay {config['weight_decay']:g}, gradient norm clipped at {config['max_grad_norm']:g}, "
            f"{environment['precision']}, sequence length {config['sequence_length']}{shorter}, seed {config['seed']}.",
        ]
    lines.append(f"- Command: `{shlex.join(environment['command'])}`")
    if environment["commit"]:
        lines.append(f"- Commit of the recipe: `{environment['commit']}`")
    shown = ("torch", "transformers", "accelerate", "deepspeed", "datasets")
    versions = ", ".join(f"{n} {environment['versions'][n]}" for n in shown if n in environment["versions"])
    lines += [f"- Versions: Python {environment['python']}, {versions}", ""]
    return [*lines, f"![Training and validation loss]({LOSS_CURVE})", ""] if has_curve else lines


def _cost(run: RunRecord, seconds: float) -> list[str]:
    """Money and energy of the training steps; of a run on several machines neither, since how long each took is not known."""
    lines = []
    price, dollars = run.config.price_per_hour, run.dollars(seconds)
    if dollars:
        lines.append(f"- {dollars:,.2f} dollars for the training steps, at {price:g} dollars an hour.")
    (ranks, gpu), *others = run.machines
    watts = power_limit(gpu)
    if watts and not others:
        energy = watts * ranks * seconds / 3600 / 1000
        lines.append(f"- Energy, an estimate: {energy:,.2f} kWh, the GPUs at their limit of {watts} W, without the rest.")
    return lines


def _results(records: list[dict[str, Any]], results: list[dict[str, Any]], step: int, evaluate_data: str | None) -> list[str]:
    validation = [r for r in records if r.get("val_loss") is not None]
    lines = []
    if validation:
        first, last = validation[0], validation[-1]
        bits = f", {last['val_bits_per_byte']:.4f} bits a byte" if last.get("val_bits_per_byte") is not None else ""
        before = f" ({first['val_loss']:.4f} at step {first['step']:,})" if first is not last else ""
        lines += [f"Validation loss {last['val_loss']:.4f} nats per token{bits} at step {last['step']:,}{before}.", ""]
    lines += _harness_table(results) + _completion_table(records, step, evaluate_data)
    return ["## Results", "", *lines] if lines else []


def _harness_table(results: list[dict[str, Any]]) -> list[str]:
    rows, mini, comparable = [], False, False
    for record in results:
        for task, numbers in record["tasks"].items():
            if task == COMPLETION_TASK:
                continue
            name, kind = task_label(task, numbers["data"]), numbers["data"]["kind"]
            mini |= kind == "mini"
            comparable |= task == "hellaswag" and kind in COMPARABLE
            rows += [
                f"| this model | {name} | {numbers['n']:,} | {metric} | {value} |" for metric, value in metrics_of(numbers)
            ]
    if not rows:
        return []
    if comparable:
        rows += [
            f"| [{other.model}]({other.source}) | hellaswag | {HELLASWAG_ITEMS:,} | {metric} | {_with_error(value)} |"
            for other in references("lm-eval")
            for metric, value in (("acc", other.acc), ("acc_norm", other.acc_norm))
            if value is not None
        ]
    lines = ["| model | task | items | metric | value |", "|---|---|---|---|---|", *rows, ""]
    lines += ["By lm-evaluation-harness, zero-shot; ± is one standard error.", ""]
    if mini:
        lines += ["The 64 items of `hellaswag_mini.jsonl` show that the evaluation runs; they are no benchmark.", ""]
    return lines


def _completion_table(records: list[dict[str, Any]], step: int, evaluate_data: str | None) -> list[str]:
    """HellaSwag in llm.c's style, which is never put beside lm-evaluation-harness'."""
    scored = [r for r in records if r.get("hellaswag_completion_acc_norm") is not None and r["step"] == step]
    found = [r for r in scored if scores_kind(r, evaluate_data) in COMPARABLE]
    if not found:
        return []
    rows = [("this model", found[-1]["hellaswag_completion_acc_norm"])]
    rows += [(f"[{r.model}]({r.source})", r.acc_norm) for r in references("completion") if r.acc_norm is not None]
    rows += [
        (f"[llm.c's 124M on {machine}]({LLMC_SOURCE})", curve[-1].hellaswag_completion_acc_norm)
        for machine, curve in LLMC_CURVES.items()
        if curve[-1].hellaswag_completion_acc_norm is not None
    ]
    return [
        "| model | HellaSwag in llm.c's completion style, acc_norm |",
        "|---|---|",
        *(f"| {name} | {_with_error(value)} |" for name, value in rows),
        "",
        "The two styles differ on the same weights: compare within a table alone.",
        "",
    ]


def _with_error(share: float) -> str:
    """A share of HellaSwag's items with its standard error, as lm-evaluation-harness computes it."""
    return f"{share:.4f} ± {math.sqrt(share * (1 - share) / (HELLASWAG_ITEMS - 1)):.4f}"


def _samples(folder: RunFolder, step: int) -> list[str]:
    paths = sample_files(folder.path, step)
    if not paths:
        return []
    record = json.loads(paths[-1].read_text(encoding="utf-8"))
    lines = ["## Samples", "", f"At step {record['step']:,}, temperature 1, the likeliest 50 tokens, not picked:", ""]
    for sample in record["samples"]:
        text = f"{sample['prompt']}{sample['continuation']}".rstrip()
        # A fence longer than any in the text: nothing in it can be taken for markup.
        fence = "`" * max(3, 1 + max((len(ticks) for ticks in re.findall("`+", text)), default=0))
        lines += [f"{fence}text", text, fence, ""]
    return lines


def _limits(config: dict[str, Any]) -> list[str]:
    web = "FineWeb is filtered for quality, not for harm or bias; what the web says about people, it says too. "
    return [
        "## Limits and biases",
        "",
        "It continues text; it follows no instructions, knows no facts reliably, and repeats the biases of its training text. "
        f"{web if config['data'].startswith(FINEWEB_REPO) else ''}"
        "It was not filtered or aligned for safety. It reads at most as many tokens as it has positions.",
        "",
    ]


def _reproduction(environment: dict[str, Any]) -> list[str]:
    commit = (environment["commit"] or "").removesuffix("-dirty")
    at = f" at commit `{commit}`" if commit else ""
    changed = ", which had changes that were not committed" if (environment["commit"] or "").endswith("-dirty") else ""
    return [
        "## How to reproduce",
        "",
        f"With the recipe{at}{changed}, the versions above and `{TRAINING_CONFIG}` from this repository:",
        "",
        "```bash",
        f"accelerate launch --num_processes {environment['ranks']} scripts/pretrain.py {TRAINING_CONFIG}",
        "```",
        "",
        "The same machine and number of processes give the same weights; others give the same rows, and losses that differ by "
        "rounding.",
        "",
    ]


def _citation(config: dict[str, Any], title: str) -> list[str]:
    works = [_CITATIONS["gpt2"], *([_CITATIONS["fineweb"]] if config["data"].startswith(FINEWEB_REPO) else [])]
    return ["## Citation", "", f"Name this model as `{title}`, and cite what it rests on:", "", *(f"- {w}" for w in works), ""]
