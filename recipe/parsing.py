"""Reading a configuration: a YAML file with those it builds on, then `--field value`, then checks.

Nothing here imports torch. Every problem that can be seen without the network or the data is collected by `load_config`
and raised at once as a `ConfigError`, each naming the field and the remedy.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import types
import typing
from pathlib import Path

import yaml

from recipe.config import (
    HUB_REPO,
    HUB_TOKEN,
    Config,
    ConfigError,
    config_fields,
    field_docs,
    parse_ramp,
    parse_ranges,
    parse_steps,
)


def load_config(arguments: list[str]) -> Config:
    """Read `[CONFIG.yaml] [--field value ...]`.

    Args:
        arguments: command-line words without the program's name.
    Raises:
        ConfigError: with all problems found: unknown fields (with the nearest known name), wrong types, values out of
            range, fields that contradict each other.
    """
    config, problems = parse_config(arguments)
    if problems:
        raise ConfigError(*problems)
    return config


def parse_config(arguments: list[str]) -> tuple[Config, list[str]]:
    """As `load_config`, but give the problems beside the configuration as far as it could be read."""
    problems: list[str] = []
    config_file, overrides = _split_arguments(arguments, problems)
    levels = _read_files(config_file, problems) if config_file else []
    length_unknown = None in [values for _, values in levels]  # what the file would have said is not missing as well
    if len(_lengths(overrides)) == 2:
        problems.append("--max_steps and --max_tokens: both given; keep one")
    levels = [(file, values or {}) for file, values in levels] + [("command line", overrides)]
    for number, (_, values) in enumerate(levels):
        if any(_lengths(later) for _, later in levels[number + 1 :]):
            values.pop("max_steps", None)
            values.pop("max_tokens", None)
    config = Config(name=Path(config_file).stem if config_file else "run")
    hints = typing.get_type_hints(Config)
    known = config_fields()
    for source, name, value in [(source, *item) for source, values in levels for item in values.items()]:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"; did you mean {nearest[0]}?" if nearest else "; --help lists the fields"
            problems.append(f"{name}: unknown field ({source}){hint}")
            continue
        if HUB_TOKEN.search(str(value)):
            problems.append(
                f"{name}: the value ({source}) holds an access token, which would end up in logs and files; revoke it, "
                "and put a new one into HF_TOKEN or `hf auth login`"
            )
            continue
        if name in PATH_FIELDS and isinstance(value, str):
            value = os.path.expanduser(value)  # no shell does it behind `--field=`, nor in YAML
        try:
            setattr(config, name, _convert(value, hints[name]))
        except (ValueError, OverflowError):
            problems.append(f"{name}: {value!r} ({source}) is not {_describe(hints[name])}")
            length_unknown |= name in ("max_steps", "max_tokens")
    if config.max_steps is None and config.max_tokens is None and not length_unknown:
        problems.append("max_steps: neither max_steps nor max_tokens is set; give one")
    if config.output_dir is None:
        config.output_dir = str(Path("runs") / config.name)
    if config.n_positions is None:
        config.n_positions = max(1, config.sequence_length)
    return config, problems + _range_problems(config)


def _lengths(source: dict) -> list[str]:
    """The lengths of the run that `source` gives; null, as in a run's config.yaml, gives none."""
    return [name for name in ("max_steps", "max_tokens") if source.get(name) not in (None, "null")]


def _split_arguments(arguments: list[str], problems: list[str]) -> tuple[str | None, dict[str, str]]:
    config_file, overrides, words = None, {}, list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            if config_file is not None:
                problems.append(f"{word}: a second config file or a stray word; options are written --field value")
            config_file = config_file or word
            continue
        name, equals, value = word[2:].partition("=")
        if name in overrides:
            problems.append(f"{name}: given twice on the command line")
        if equals:
            overrides[name] = value
        elif name == "dry_run" and not (words and words[0].lower() in ("true", "false")):
            overrides[name] = "true"
        elif not words or words[0].startswith("--"):
            problems.append(f"{name}: no value given on the command line; write --{name} VALUE")
        else:
            overrides[name] = words.pop(0)
    return config_file, overrides


class _StrictLoader(yaml.SafeLoader):
    """YAML that refuses a key written twice, which PyYAML resolves silently to the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _read_files(path: str, problems: list[str]) -> list[tuple[str, dict | None]]:
    """The values of the file and of those that it builds on by `base: FILE`, relative to itself, the base first."""
    levels: list[tuple[str, dict | None]] = []
    seen: list[Path] = []
    while path is not None:
        if Path(path).resolve() in seen:
            chain = " -> ".join([*(file for file, _ in reversed(levels)), path])
            problems.append(f"base: {chain} is a circle; drop one of its bases")
            break
        seen.append(Path(path).resolve())
        values = _read_yaml(path, problems)
        base = values.pop("base", None) if values else None
        if values and len(_lengths(values)) == 2:
            problems.append(f"max_steps and max_tokens: {path} gives both; keep one")
        if base is not None and not isinstance(base, str):
            problems.append(f"base: {base!r} ({path}) is not the path of a YAML file, relative to this one")
            base = None
        levels.insert(0, (str(path), values))
        path = None if base is None else str(Path(path).parent / base)
    return levels


def _read_yaml(path: str, problems: list[str]) -> dict | None:
    """The values of the file, None if it cannot be read."""
    if not Path(path).is_file():
        problems.append(f"{path}: no such config file; the presets are in configs/")
        return None
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problems.append(f"{path}: not valid YAML: {' '.join(str(error).split())}")
        return None
    if values is None:
        return {}
    if not isinstance(values, dict):
        problems.append(f"{path}: expected `field: value` lines, found {type(values).__name__}")
        return None
    return {str(name): value for name, value in values.items()}


PATH_FIELDS = frozenset("data validation_data tokenizer output_dir resume init_from evaluate_data".split())
"""Fields that may name a file or folder of this machine."""
_INTEGER = re.compile(r"[+-]?\d+(_\d+)*")
_NUMBER = re.compile(r"[+-]?(\d[\d_]*\.?\d*|\.\d+)([eE][+-]?\d+)?")


def _convert(value: object, hint: object) -> object:
    """`value` as the type `hint`; words from the command line and YAML values pass the same checks."""
    optional = isinstance(hint, types.UnionType) and type(None) in hint.__args__
    if optional:
        if value is None or value == "null":
            return None
        hint = next(arm for arm in hint.__args__ if arm is not type(None))
    if typing.get_origin(hint) is typing.Literal:
        if value in typing.get_args(hint):
            return value
    elif hint is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, str) and _INTEGER.fullmatch(value):
            return int(value)
    elif hint is float:
        # PyYAML reads 6e-4, which has no dot, as a string.
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if (is_number or (isinstance(value, str) and _NUMBER.fullmatch(value))) and math.isfinite(float(value)):
            return float(value)
    elif hint is str and isinstance(value, str) and value:
        return value
    raise ValueError(value)


def _describe(hint: object) -> str:
    if isinstance(hint, types.UnionType):
        return _describe(hint.__args__[0]) + " or null"
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(typing.get_args(hint))
    return {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}[hint]


_AT_LEAST = {
    "validation_tokens": 1, "sequence_length": 1, "max_epochs": 1, "data_workers": 0, "n_layer": 1, "n_head": 1,
    "n_embd": 1, "n_positions": 1, "learning_rate": 0, "warmup_steps": 0, "decay_steps": 0, "final_learning_rate": 0,
    "weight_decay": 0, "beta1": 0, "beta2": 0, "epsilon": 0, "max_grad_norm": 0, "muon_learning_rate": 0, "muon_momentum": 0,
    "embedding_learning_rate": 0, "z_loss": 0,
    "muon_momentum_warmup_steps": 0, "muon_weight_decay": 0, "muon_ns_steps": 1, "batch_tokens": 1, "micro_batch_size": 1,
    "max_steps": 1, "max_tokens": 1, "seed": 0, "save_every": 0, "keep_checkpoints": 1, "log_every": 1, "eval_every": 0,
    "hellaswag_every": 0, "hellaswag_items": 1, "sample_every": 0, "evaluate_limit": 1, "keep_every": 0, "watchdog_seconds": 0,
    "spike_threshold": 1, "spike_window": 8, "price_per_hour": 0, "push_every": 0, "push_patience": 0,
}  # fmt: skip
_BELOW = {"beta1": 1, "beta2": 1, "muon_momentum": 1, "seed": 2**64}


def _range_problems(config: Config) -> list[str]:
    problems = []
    for name, least in _AT_LEAST.items():
        value = getattr(config, name)
        if value is not None and not value >= least:
            problems.append(f"{name}: {value} is below {least}")
    for name, limit in _BELOW.items():
        if getattr(config, name) >= limit:
            problems.append(f"{name}: {getattr(config, name)} must be below {limit}")
    if config.max_hours is not None and config.max_hours <= 0:
        problems.append(f"max_hours: {config.max_hours} leaves no time to train; give hours, or drop it")
    if config.n_head > 0 and config.n_embd % config.n_head:
        lower = config.n_embd - config.n_embd % config.n_head
        choices = " or ".join(str(n) for n in (lower, lower + config.n_head) if n > 0)
        problems.append(f"n_head: {config.n_head} heads do not divide n_embd {config.n_embd}; n_embd {choices} works")
    if 0 < config.n_positions < config.sequence_length:
        problems.append(
            f"sequence_length: {config.sequence_length} is longer than n_positions {config.n_positions}; raise n_positions"
        )
    try:
        parse_ranges(config.skip_rows)
    except ValueError:
        problems.append(f"skip_rows: {config.skip_rows!r} is not a list of ranges; write it as 1200-1263,5000")
    try:
        parse_steps(config.save_at)
    except ValueError:
        problems.append(f"save_at: {config.save_at!r} is not a list of steps; write it as 229,458")
    try:
        parse_ramp(config.batch_ramp)
    except ValueError:
        problems.append(f"batch_ramp: {config.batch_ramp!r} is not a list of TOKENSxSTEPS; write it as 131072x1000,262144x500")
    if config.zero_init_projections and config.init_from is not None:
        problems.append("zero_init_projections: the weights of init_from are not random ones; drop one of the two")
    problems += _sequence_ramp_problems(config)
    problems += _hub_problems(config)
    if config.tokenizer.startswith("train:"):
        try:
            valid = 257 <= _convert(config.tokenizer.removeprefix("train:"), int) <= 65_536
        except ValueError:
            valid = False
        if not valid:
            problems.append(f"tokenizer: {config.tokenizer}: VOCAB_SIZE must be a whole number from 257 to 65536")
    return problems


def _sequence_ramp_problems(config: Config) -> list[str]:
    try:
        ramp = parse_ramp(config.sequence_ramp)
    except ValueError:
        return [f"sequence_ramp: {config.sequence_ramp!r} is not a list of LENGTHxSTEPS; write it as 128x500,256x1000"]
    whole, problems = config.sequence_length, []
    for length in dict.fromkeys(length for length, _ in ramp):
        if whole > 0 and whole % length:
            below = max(n for n in range(1, min(length, whole) + 1) if whole % n == 0)
            above = min((n for n in range(length, whole + 1) if whole % n == 0), default=below)
            fit = ", ".join(str(n) for n in dict.fromkeys((below, above)))
            problems.append(f"sequence_ramp: {length} does not divide sequence_length {whole}; {fit} or null for none works")
    return problems


def _hub_problems(config: Config) -> list[str]:
    problems = []
    if config.push_to_hub is not None and not HUB_REPO.fullmatch(config.push_to_hub):
        problems.append(f"push_to_hub: {config.push_to_hub!r} does not say where to; write it as USER/NAME")
    if config.push_to_hub is not None and not config.keep_model:
        problems.append("keep_model: false leaves nothing to push to push_to_hub; drop one of the two")
    if config.push_every and config.push_to_hub is None:
        problems.append("push_every: there is nowhere to push to; give push_to_hub USER/NAME")
    if config.push_every and (not config.save_every or config.push_every % config.save_every):
        problems.append(f"push_every: {config.push_every} is not a multiple of save_every {config.save_every}")
    if config.resume.startswith("hub:"):
        repo, _, revision = config.resume.removeprefix("hub:").partition("@")
        if not HUB_REPO.fullmatch(repo) or not revision:
            problems.append(f"resume: {config.resume!r} is not hub:USER/NAME@REVISION; hub:me/gpt2-124m@step-5000 is")
    return problems


def help_text(program: str) -> str:
    """Usage and every field with its type, default and docstring."""
    hints, docs = typing.get_type_hints(Config), field_docs()
    lines = [
        f"usage: {program} [CONFIG.yaml] [--field value ...] [--dry_run]",
        "",
        "A CONFIG.yaml may begin with `base: OTHER.yaml`, relative to itself, whose values hold where it gives none.",
        "",
    ]
    for name, f in config_fields().items():
        lines.append(f"  --{name}  {_describe(hints[name])} (default: {f.default})")
        lines.append(f"      {docs[name]}")
    return "\n".join(lines)
