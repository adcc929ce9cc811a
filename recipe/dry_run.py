"""`--dry_run`: the resolved configuration, what the run amounts to, and whether it could start, without starting it.

The text is opened and a micro-batch of it tokenised; the model is built without memory; machine, disk and Hub are looked at.
What the Hub serves is `not checked: offline` without a network. Nothing stays behind.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from recipe.config import INSTALLED_DOCS, Config, ConfigError, compiles, to_yaml
from recipe.data.corpus import Corpus, open_corpora
from recipe.data.sources import hub_id, is_local
from recipe.data.token_index import TOKENIZER, is_prepared
from recipe.estimate import GIB, Machine, estimate, memory_by_part
from recipe.gpus import GPUS, cpu
from recipe.micro_batch import under_zero1
from recipe.plan import GPT2_VOCAB_SIZE, Plan, count_parameters
from recipe.run_folder import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ROWS_SHOWN, CHARACTERS_SHOWN = 3, 300
"""Of the first micro-batch."""
TRAIN_ON = 4 << 20
"""Bytes of text that `train:VOCAB_SIZE` is tried on."""


def dry_run(config: Config, plan: Plan, folder: RunFolder) -> None:
    """Print it all.

    Raises:
        ConfigError: with all that would stop the run on any machine, after everything else is printed.
    """
    print(to_yaml(config), flush=True)
    problems: list[str] = []
    with tempfile.TemporaryDirectory(prefix="dry-run-") as temporary:
        try:
            vocab_size = _look_at_text(config, plan, folder, Path(temporary), problems)
        except ConfigError as error:
            problems += error.problems
            vocab_size = None
    print("\n".join(plan.lines(config, vocab_size)))
    _look_at_model(config, vocab_size or GPT2_VOCAB_SIZE)
    _look_at_machine(config, plan, vocab_size or GPT2_VOCAB_SIZE)
    _look_at_disk(config, plan, folder, vocab_size or GPT2_VOCAB_SIZE, problems)
    _look_at_destination(config, folder, problems)
    if problems:
        raise ConfigError(*problems)


def say(name: str, text: str) -> None:
    """A line of the report."""
    print(f"{name:17} {text}", flush=True)


# --- text and tokenizer ---------------------------------------------------------------------------------------------


def _look_at_text(config: Config, plan: Plan, folder: RunFolder, temporary: Path, problems: list[str]) -> int | None:
    """The size of the vocabulary, as far as it is known."""
    there = True
    for name, value in (("data", config.data), ("validation_data", config.validation_data)):
        if value is not None:
            here = value == INSTALLED_DOCS or is_local(value)
            found = "found" if here else _ask_hub("dataset", *hub_id(value), name, problems)
            there &= found == "found"
            say(name, f"{found}: {value}")
    saved = folder.cache / "tokenizer"
    wanted = config.tokenizer
    if is_prepared(config.data) and wanted == Config.tokenizer:
        wanted = str(Path(config.data) / TOKENIZER)  # nothing else was asked for, and the tokens bring their own
    local = saved.is_dir() or wanted.startswith("train:") or is_local(wanted)
    found = "found" if local else _ask_hub("model", wanted, None, "tokenizer", problems)
    say("tokenizer", f"{found}: {wanted}{f', kept in {saved}' if saved.is_dir() else ''}")
    if not there or found != "found":
        return _load(config, folder, None)[0] if found == "found" else None
    if config.data == INSTALLED_DOCS and not any(folder.cache.glob("installed-docs-*")):
        say("data", "reading the documentation of the installed packages (the run does it once more)")
    # A run keeps the documentation that it began with.
    cache = folder.cache if any(folder.cache.glob("installed-docs-*")) else temporary
    training, validation = open_corpora(config.data, config.validation_data, config.text_column, cache)
    size, tokenizer = _load(config, folder, (training, validation is None))
    _show_batch(config, plan, training, validation, tokenizer)
    return size


def _load(
    config: Config, folder: RunFolder, text: tuple[Corpus, bool] | None
) -> tuple[int | None, PreTrainedTokenizerFast | None]:
    """The vocabulary's size and the tokenizer; `text` is what to train it on and whether a part of that is held out."""
    from recipe.data.prepared import PreparedCorpus, load_prepared_tokenizer
    from recipe.tokenizer import load_tokenizer, obtain_tokenizer

    saved = folder.cache / "tokenizer"
    if text and isinstance(text[0], PreparedCorpus):
        if text[0].repo:
            return text[0].index["vocab_size"], None  # all its tokens would be downloaded
        tokenizer = load_prepared_tokenizer(text[0], config.tokenizer)
    elif saved.is_dir():
        tokenizer = load_tokenizer(str(saved))
    elif not config.tokenizer.startswith("train:"):
        tokenizer = load_tokenizer(config.tokenizer)
    elif text:
        tokenizer = obtain_tokenizer(config.tokenizer, *text, train_on=TRAIN_ON)
        if text[0].text_bytes > TRAIN_ON:
            say("tokenizer", f"trained here on the first {TRAIN_ON >> 20} MiB, by the run on more: its tokens will be others")
    else:
        return int(config.tokenizer.removeprefix("train:")), None
    return len(tokenizer), tokenizer


def _show_batch(
    config: Config, plan: Plan, training: Corpus, validation: Corpus | None, tokenizer: PreTrainedTokenizerFast | None
) -> None:
    """How long the text lasts, and the first rows of the run."""
    from recipe.data.prepared import encoder_for
    from recipe.data.stream import RowStream
    from recipe.data.validation import check_length, hold_out, read_validation_rows
    from recipe.tokenizer import Encoder

    if tokenizer is None:
        say("first batch", "not shown: the tokens are on the Hub, and the run downloads them all")
        return
    vocab_encoder = Encoder(tokenizer)
    encoder, length = encoder_for(training, vocab_encoder, "data"), config.sequence_length
    if validation is not None:
        other = encoder_for(validation, vocab_encoder, "validation_data")
        rows = read_validation_rows(validation, other, length, config.validation_tokens)
    else:
        rows, training = hold_out(training, encoder, length, config.validation_tokens)
    say("text", check_length(training, encoder, length, plan.total_tokens, config.max_epochs, config.packing))
    say("validation", f"{len(rows) * length:,} tokens{' held out of it' if validation is None else ''}")
    stream = RowStream(training, encoder, length, config.seed, config.max_epochs, packing=config.packing)
    batch = stream.next_batch(config.micro_batch_size)
    stream.close()
    say("first batch", f"{len(batch)} rows of {batch.shape[1]} tokens, tokenised by {encoder.engine}; their beginnings:")
    for row in islice(batch, ROWS_SHOWN):
        text = tokenizer.decode(row[: 2 * CHARACTERS_SHOWN].tolist())[:CHARACTERS_SHOWN]
        say("", repr(text) + " ...")


def _ask_hub(repo_type: str, repo: str, revision: str | None, name: str, problems: list[str]) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    from recipe.remedies import explain

    try:
        HfApi().repo_info(repo, repo_type=repo_type, revision=revision, timeout=10)
    except HfHubHTTPError as error:
        known = explain(error) or f"{str(error).splitlines()[0]}; check the spelling, or `hf auth login` if it is private"
        problems.append(f"{name}: {repo}: {known}")
        return "NOT FOUND"
    except Exception:  # the transport raises a dozen types; all mean that nothing answered
        return "not checked: offline"
    return "found"


# --- model, machine, disk -------------------------------------------------------------------------------------------


def _look_at_model(config: Config, vocab_size: int) -> None:
    import torch

    from recipe.model import build_model

    with torch.device("meta"):
        gpt2 = build_model(config, vocab_size, 0).gpt2
    built = sum(p.numel() for p in gpt2.parameters())
    padding = (gpt2.config.vocab_size - vocab_size) * config.n_embd
    assert built - padding == count_parameters(config, vocab_size), "the plan counts other parameters than the model has"
    say("model", f"{type(gpt2).__name__}, {built - padding:,} parameters, and {padding:,} that pad the vocabulary")


def _look_at_machine(config: Config, plan: Plan, vocab_size: int) -> None:
    """What it has; that it could not run this is no problem here, for the run may be meant for another."""
    import torch

    from recipe.distributed import resolve_precision
    from recipe.preflight import idle_gpu, machine_problems

    for problem in machine_problems(config):
        say("machine", f"NOT READY: {problem}")
    if idle := idle_gpu():
        say("machine", f"its NVIDIA GPU lies idle: {idle}")
    cuda = torch.cuda.is_available()
    precision = resolve_precision(config.precision, cuda)
    zero1 = under_zero1()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if cuda:
        name, available = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    else:
        name = f"CPU, {os.cpu_count()} cores"
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // here
    plain = not compiles(config, cuda)
    memory = memory_by_part(config, plan.num_processes if zero1 else 1, vocab_size, precision, plain)
    needed = sum(memory.values())
    fits = "fits" if needed <= available else "DOES NOT FIT: lower micro_batch_size"
    say("machine", f"{name}, {precision}")
    say("memory a rank", f"about {needed / GIB:.2f} GiB of {available / GIB:.1f} GiB: {fits}")
    machine = known_machine(name, available, plan.num_processes) if cuda else None
    if not cuda:
        machine = Machine(name, cpu(os.cpu_count() or 1, available * here // GIB), 1, "CPU")
    if machine is None:
        say("time", "unknown: nobody has measured or estimated this GPU")
        return
    run = estimate(replace(config, micro_batch_size=1), machine, config.price_per_hour, vocab_size)
    money = "" if run.dollars is None else f", {run.dollars:,.2f} dollars"
    say("time", f"about {run.hours:,.2f} hours{money} at {run.tokens_per_second:,.0f} tokens/s ({run.basis})")


def known_machine(device: str, memory: int, gpus: int) -> Machine | None:
    """The entry of GPUS for a device by torch's name of it and its memory in bytes."""
    found = [name for name, gpu in GPUS.items() if not gpu.cores and re.search(rf"\b{gpu.name}\b", device)]
    if not found:
        return None
    nearest = min(found, key=lambda name: abs(GPUS[name].memory * GIB - memory))
    return Machine(f"{gpus}x{nearest}", GPUS[nearest], gpus, nearest)


def _look_at_disk(config: Config, plan: Plan, folder: RunFolder, vocab_size: int, problems: list[str]) -> None:
    from recipe.saving import check_disk

    existing = next(path for path in (folder.path.absolute(), *folder.path.absolute().parents) if path.exists())
    try:
        check_disk(folder.checkpoints, config, plan, vocab_size)
        state = "the checkpoints and the export fit"
        if not os.access(existing, os.W_OK):
            state = "not writable"
            problems.append(f"output_dir: {existing} cannot be written; name another folder, or change its permissions")
    except ConfigError as error:
        state = "too small"
        problems += error.problems
    say("disk", f"{shutil.disk_usage(existing).free / GIB:.1f} GiB free at {existing}: {state}")


def _look_at_destination(config: Config, folder: RunFolder, problems: list[str]) -> None:
    """Whether the token may push to push_to_hub, and whose the repository is."""
    if config.push_to_hub is None:
        return
    from recipe.publish.hub import HubError
    from recipe.publish.push import Destination

    try:
        state = Destination.of(config).look(folder)
    except HubError as error:
        if not error.passing:
            problems.append(f"push_to_hub: {error}")
        state = f"not checked: {error}" if error.passing else "REFUSED"
    say("push_to_hub", f"{config.push_to_hub}: {state}")
