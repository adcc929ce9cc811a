"""A checkpoint as a plain GPT2LMHeadModel folder, reloaded and compared before it counts."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, pipeline
from transformers.utils.logging import disable_progress_bar

from recipe.checkpoint import Checkpoint
from recipe.config import Config
from recipe.files import write_json, write_text
from recipe.model import build_model, gpt2_config
from recipe.parsing import load_config
from recipe.publish.card import write_card
from recipe.publish.contents import MARKER, TRAINING_CONFIG, ContentsError, HubRecord
from recipe.publish.redaction import redact
from recipe.run_folder import RunFolder
from recipe.tokenizer import load_tokenizer

LOGIT_TOLERANCE = 1e-5
"""Largest difference of a logit between the trained weights and the reloaded export, in fp32, relative to the largest
logit where that is above 1: fp32 has 6e-8 a product and the head sums n_embd of them."""
COMPARED_ROWS, COMPARED_TOKENS = 2, 256
"""Of random tokens, on which the logits are compared."""
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class ExportError(ContentsError):
    """The export does not compute what the trained model computes; an earlier export is as it was."""


def export_checkpoint(folder: RunFolder, checkpoint: Checkpoint, target: Path, say: Callable[[str], None]) -> None:
    """Export any checkpoint of a run, with its card, to `target`, replacing an earlier export.

    Raises:
        ExportError: as `export_model`.
        ConfigError: if the run's config.yaml or tokenizer cannot be read.
    """
    config = load_config([str(folder.config)])
    tokenizer = load_tokenizer(str(folder.cache / "tokenizer"))
    temporary = target.with_name(f".{target.name}.tmp")
    difference = export_model(checkpoint.masters(), config, tokenizer, temporary)
    marker = {"run_id": HubRecord(folder).run_id, "name": folder.path.resolve().name, "step": checkpoint.step}
    write_json(temporary / MARKER, marker | {"tokens": checkpoint.state()["tokens"]})
    write_text(temporary / TRAINING_CONFIG, _shareable(folder.config))
    write_card(folder, temporary)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)
    say(f"exported {target} from step {checkpoint.step}; reloaded logits differ by at most {difference:.1e}")


def export_model(masters: dict[str, torch.Tensor], config: Config, tokenizer: Any, target: Path) -> float:
    """Write model and tokenizer to the folder `target`, which is made anew, from fp32 masters.

    Args:
        masters: fp32 weights by name, vocabulary padded.
    Returns:
        the largest difference of a logit between the trained and the reloaded model, both of weights in `export_dtype` and
        computed in fp32.
    Raises:
        ExportError: if the reloaded logits differ by more than LOGIT_TOLERANCE, a weight differs, or the text-generation
            pipeline does not run on it.
    """
    disable_progress_bar()
    vocab_size, dtype = len(tokenizer), _DTYPES[config.export_dtype]
    shutil.rmtree(target, ignore_errors=True)
    masters = {name: tensor.to(dtype).float() for name, tensor in masters.items()}
    model = GPT2LMHeadModel(gpt2_config(config, vocab_size, int(tokenizer.eos_token_id)))
    weights = dict(masters)
    weights["transformer.wte.weight"] = masters["transformer.wte.weight"][:vocab_size]
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    model.load_state_dict(weights)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = int(tokenizer.eos_token_id)
    model.to(dtype).save_pretrained(target, max_shard_size="1TB")
    # safetensors makes a file that its owner alone may read, whatever the umask.
    (target / "model.safetensors").chmod(stat.S_IMODE((target / "config.json").stat().st_mode))
    tokenizer.model_max_length = config.n_positions
    tokenizer.save_pretrained(target)
    return _compare(masters, config, tokenizer, target)


@torch.no_grad()
def _compare(masters: dict[str, torch.Tensor], config: Config, tokenizer: Any, folder: Path) -> float:
    vocab_size = len(tokenizer)
    trained = build_model(config, vocab_size, int(tokenizer.eos_token_id)).gpt2
    trained.load_state_dict(masters | {"lm_head.weight": masters["transformer.wte.weight"]})
    reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if type(reloaded) is not GPT2LMHeadModel or AutoTokenizer.from_pretrained(folder).get_vocab() != tokenizer.get_vocab():
        raise ExportError(f"{folder} does not load as a GPT2LMHeadModel with the run's tokenizer")
    shape = COMPARED_ROWS, min(COMPARED_TOKENS, config.n_positions)
    inputs = torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(0))
    expected = trained.eval()(inputs).logits[..., :vocab_size]
    difference = float((reloaded.eval()(inputs).logits - expected).abs().max())
    allowed = LOGIT_TOLERANCE * max(1.0, float(expected.abs().max()))
    if not difference <= allowed:
        raise ExportError(f"the export's logits differ from the trained model's by {difference:.1e}, above {allowed:.1e}")
    for name, weight in reloaded.named_parameters():
        if not torch.equal(weight, masters[name][:vocab_size] if name == "transformer.wte.weight" else masters[name]):
            raise ExportError(f"the export's {name} differs from the trained model's")
    del reloaded
    generator = pipeline("text-generation", model=str(folder), device="cpu")
    if not generator("The", max_new_tokens=2, do_sample=False)[0]["generated_text"].startswith("The"):
        raise ExportError(f"the text-generation pipeline does not continue a text on {folder}")
    return difference


def _shareable(config: Path) -> str:
    """config.yaml without where this machine keeps things: its own run folder, and the home folder in paths."""
    values = yaml.safe_load(config.read_text(encoding="utf-8"))
    for name in ("output_dir", "resume", "push_to_hub"):
        values.pop(name, None)
    text = yaml.safe_dump({k: v for k, v in values.items() if v is not None}, sort_keys=False, width=10_000)
    return redact(text.replace(str(Path.home()), "~"))
