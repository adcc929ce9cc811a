"""A checkpoint as a plain GPT2LMHeadModel folder, reloaded and compared before it counts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel
from transformers.utils.logging import disable_progress_bar

from recipe.config import Config
from recipe.model import build_model, gpt2_config

LOGIT_TOLERANCE = 1e-5
"""Largest difference of a logit between the trained weights and the reloaded export, in fp32, relative to the largest
logit where that is above 1: fp32 has 6e-8 a product and the head sums n_embd of them."""


class ExportError(RuntimeError):
    """The export does not compute what the trained model computes; it was not put in place."""


def export_model(masters: dict[str, torch.Tensor], config: Config, tokenizer: Any, rows: np.ndarray, target: Path) -> float:
    """Write `target` (replacing an earlier export) from fp32 masters.

    Args:
        masters: fp32 weights by name, vocabulary padded.
        rows: token ids [rows, sequence + 1] on which the reloaded model is compared with the trained one.
    Returns:
        the largest difference of a logit between the trained and the reloaded model.
    Raises:
        ExportError: if the reloaded logits differ by more than LOGIT_TOLERANCE.
    """
    disable_progress_bar()
    vocab_size = len(tokenizer)
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model = GPT2LMHeadModel(gpt2_config(config, vocab_size, int(tokenizer.eos_token_id)))
    weights = dict(masters)
    weights["transformer.wte.weight"] = masters["transformer.wte.weight"][:vocab_size]
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    model.load_state_dict(weights)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = int(tokenizer.eos_token_id)
    model.save_pretrained(temporary)
    tokenizer.model_max_length = config.n_positions
    tokenizer.save_pretrained(temporary)
    difference = _compare(masters, config, tokenizer, rows, temporary)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    return difference


@torch.no_grad()
def _compare(masters: dict[str, torch.Tensor], config: Config, tokenizer: Any, rows: np.ndarray, folder: Path) -> float:
    trained = build_model(config, len(tokenizer), int(tokenizer.eos_token_id)).gpt2
    trained.load_state_dict(masters | {"lm_head.weight": masters["transformer.wte.weight"]})
    reloaded = AutoModelForCausalLM.from_pretrained(folder)
    if type(reloaded) is not GPT2LMHeadModel or AutoTokenizer.from_pretrained(folder).get_vocab() != tokenizer.get_vocab():
        raise ExportError(f"{folder} does not load as a GPT2LMHeadModel with the run's tokenizer")
    inputs = torch.from_numpy(rows[:2, :-1].astype(np.int64))
    expected = trained.eval()(inputs).logits[..., : len(tokenizer)]
    difference = float((reloaded.eval()(inputs).logits - expected).abs().max())
    allowed = LOGIT_TOLERANCE * max(1.0, float(expected.abs().max()))
    if not difference <= allowed:
        raise ExportError(f"the export's logits differ from the trained model's by {difference:.1e}, above {allowed:.1e}")
    return difference
