"""The weights of any GPT-2 checkpoint as the start of a run: `init_from`."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GPT2LMHeadModel, PretrainedConfig
from transformers.utils.logging import get_verbosity, set_verbosity, set_verbosity_error

from recipe.config import Config, ConfigError, first_line
from recipe.distributed import Distributed
from recipe.model import PretrainingModel
from recipe.plan import padded_vocab_size

_SHAPE = ("n_layer", "n_head", "n_embd", "n_positions")
_FIXED = {
    "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True, "n_inner": None,
    "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False,
}  # fmt: skip
"""What a run's GPT-2 computes; another value would be another function of the same weights."""


def load_initial_weights(model: PretrainingModel, config: Config, vocab_size: int, distributed: Distributed) -> None:
    """Put the weights that `init_from` names into a model, its vocabulary padded with zeros. Collective.

    Args:
        vocab_size: of the tokenizer.
    Raises:
        ConfigError: if they cannot be had, or are of another shape than the configuration says.
    """
    name, revision = _split(config.init_from)
    distributed.on_main(_check, name, revision, config, vocab_size)
    distributed.on_each_node(lambda: _load(name, revision))  # downloads
    weights = _load(name, revision, downloaded=True)
    padded = torch.zeros_like(model.gpt2.transformer.wte.weight)
    padded[:vocab_size] = weights["transformer.wte.weight"][:vocab_size]
    weights["transformer.wte.weight"] = weights["lm_head.weight"] = padded
    model.gpt2.load_state_dict(weights)


def _split(init_from: str) -> tuple[str, str | None]:
    """A folder, or a repository and its revision."""
    if Path(init_from).exists():
        return init_from, None
    name, _, revision = init_from.partition("@")
    return name, revision or None


def _check(name: str, revision: str | None, config: Config, vocab_size: int) -> None:
    try:
        theirs, _ = PretrainedConfig.get_config_dict(name, revision=revision)
    except Exception as error:  # the client and JSON raise a dozen types here; all mean the same
        where = "folder" if Path(name).exists() else "folder or Hub id"
        raise ConfigError(f"init_from: cannot load {where} {config.init_from}: {first_line(error)}") from error
    if theirs.get("model_type") != "gpt2":
        raise ConfigError(f"init_from: {config.init_from} holds a model of type {theirs.get('model_type')}, not a gpt2")
    defaults = {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024, "vocab_size": 50257}
    theirs = defaults | {name: value for name, value in theirs.items() if value is not None}
    differing = [f"{f} {theirs[f]} (here {getattr(config, f)})" for f in _SHAPE if theirs[f] != getattr(config, f)]
    if differing:
        raise ConfigError(f"init_from: {config.init_from} has {', '.join(differing)}; give the same values")
    if not vocab_size <= theirs["vocab_size"] <= padded_vocab_size(vocab_size):
        raise ConfigError(
            f"init_from: {config.init_from} has a vocabulary of {theirs['vocab_size']} and the tokenizer one of {vocab_size}; "
            f"give its own with --tokenizer {name}"
        )
    other = [f"{f} {theirs[f]}" for f, value in _FIXED.items() if f in theirs and theirs[f] != value]
    if other:
        raise ConfigError(f"init_from: {config.init_from} is no plain GPT-2: {', '.join(other)}")


def _load(name: str, revision: str | None, downloaded: bool = False) -> dict[str, torch.Tensor]:
    """The fp32 weights by name.

    Raises:
        ConfigError: if they cannot be loaded or some are missing.
    """
    verbosity = get_verbosity()
    set_verbosity_error()
    try:
        model, info = GPT2LMHeadModel.from_pretrained(
            name, revision=revision, dtype=torch.float32, output_loading_info=True, local_files_only=downloaded
        )
    except Exception as error:
        raise ConfigError(f"init_from: cannot load {name}: {first_line(error)}") from error
    finally:
        set_verbosity(verbosity)
    missing = sorted(set(info["missing_keys"]) - {"lm_head.weight"})
    if missing:
        raise ConfigError(f"init_from: {name} has no {missing[0]}{f' and {len(missing) - 1} more' if missing[1:] else ''}")
    return dict(model.state_dict())
