"""Bad input through the real entry: exit code 2, one message with the field and the remedy, and nothing created.

One process imports torch and forks a child a case, which costs the import once.
"""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recipe.config import to_yaml
from recipe.data.corpus import open_corpora
from recipe.parsing import load_config

SCRIPT = Path(__file__).parent.parent / "scripts" / "pretrain.py"
TINY = (
    "--n_layer 1 --n_head 2 --n_embd 16 --sequence_length 32 --micro_batch_size 2 --batch_tokens 64 --max_steps 2 "
    "--warmup_steps 0 --precision fp32 --evaluate_tasks none --sample_every 0 --tokenizer train:300 --data text "
    "--validation_data text --output_dir out"
).split()
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_WAIT_POLICY": "PASSIVE",
}

DRIVER = """
import json, os, re, signal, sys

from recipe.cli import main
from recipe.signals import leave

import recipe.train, accelerate  # what most cases need: once here instead of in each child
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast


def listing():
    found = {}
    for folder, folders, files in os.walk("."):
        for name in folders + files:
            status = os.stat(os.path.join(folder, name))
            found[os.path.relpath(os.path.join(folder, name))] = [status.st_size, status.st_mtime_ns]
    return found


def run(arguments, environment):
    before = listing()
    child = os.fork()
    if not child:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(f"../{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        signal.alarm(60)
        os.environ.update(environment)
        code = 99  # an exception that got out of main
        try:
            code = main(arguments)
        except BaseException:
            import traceback

            traceback.print_exc()
        leave(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    after = listing()
    return {
        "code": code,
        "stdout": open("../stdout").read(),
        "stderr": open("../stderr").read(),
        "changed": sorted(p for p in before.keys() | after.keys() if before.get(p) != after.get(p)),
    }


results = {}
for name, case in json.load(open(sys.argv[1])).items():
    results[name] = run(case["arguments"], case["environment"])
    if case["follow_advice"]:
        advice = re.search(r"--max_epochs \\d+", results[name]["stderr"])
        results[name + ", advice followed"] = run(case["arguments"] + advice[0].split(), {}) if advice else None
json.dump(results, open(sys.argv[2], "w"))
"""


@dataclass
class Case:
    """Arguments beside TINY (a later value replaces TINY's), and what stderr must say."""

    arguments: str
    field: str
    """The message begins with it."""
    says: tuple[str, ...] = ()
    """Parts of the message: what is wrong, and the remedy."""
    environment: dict[str, str] = field(default_factory=dict)
    follow_advice: bool = False


CASES = {
    # The first: its advice, followed, leaves the finished run in `run` that later cases meet.
    "text shorter than the run": Case(
        "--data short --output_dir run",
        "max_epochs",
        ("the run takes 128 tokens", "short holds ", " epochs", "max_epochs is 1", "set --max_epochs "),
        follow_advice=True,
    ),
    # 128 tokens in all: without the first, 127 targets, and the run takes 128.
    "text shorter than the run by a token": Case(
        "--data brim --tokenizer train:257 --output_dir run-brim",
        "max_epochs",
        ("brim holds 128", "set --max_epochs 2"),
        follow_advice=True,
    ),
    # 928 tokens for a run of 896, in 8 shards of 116: each gives 3 rows of 32 and leaves 20 tokens over.
    "text shorter than the run by what the shards leave over": Case(
        "--data brims --tokenizer train:257 --output_dir run-brims --max_steps 14",
        "max_epochs",
        ("brims holds 928", "set --max_epochs 2"),
        follow_advice=True,
    ),
    # --- the configuration
    "unknown field": Case("--n_layers 3", "n_layers", ("unknown field", "did you mean n_layer?")),
    "unknown field in YAML": Case("typo.yaml", "lerning_rate", ("unknown field (typo.yaml)", "did you mean learning_rate?")),
    "wrong type": Case("--n_layer 1.5", "n_layer", ("'1.5'", "is not a whole number")),
    "indivisible batch": Case(
        "--batch_tokens 100", "batch_tokens", ("100 is not a multiple of", "batch_tokens 64 or 128 works")
    ),
    "indivisible batch over two ranks": Case(
        "--batch_tokens 192",
        "batch_tokens",
        ("2 ranks = 128; ", "128 or 256, or micro_batch_size 1, or 1 or 3 ranks works"),
        {"WORLD_SIZE": "2"},
    ),
    "heads that do not divide the width": Case("--n_head 3", "n_head", ("3 heads do not divide n_embd 16", "; ")),
    "sequence longer than the positions": Case(
        "--n_positions 16", "sequence_length", ("32 is longer than n_positions 16", "raise n_positions")
    ),
    "warm-up beyond the run": Case(
        "--warmup_steps 5", "warmup_steps", ("5 steps of warm-up do not fit a run of 2 steps", "; ")
    ),
    "no length": Case("--max_steps null", "max_steps", ("neither max_steps nor max_tokens is set", "give one")),
    "rows that are none": Case("--skip_rows 5-3", "skip_rows", ("'5-3' is not a list of ranges", "write it as 1200-1263,5000")),
    "bad vocabulary size": Case("--tokenizer train:100", "tokenizer", ("train:100", "from 257 to 65536")),
    "bad vocabulary word": Case("--tokenizer train:many", "tokenizer", ("train:many", "from 257 to 65536")),
    "missing config file": Case("missing.yaml", "missing.yaml", ("no such config file", "configs/")),
    "broken YAML": Case("broken.yaml", "broken.yaml", ("not valid YAML", "line 2")),
    # --- paths
    "missing data": Case("--data ./missing", "data", ("./missing does not exist", "give a folder, file or glob, or a Hub")),
    "missing glob": Case("--data text/*.parquet", "data", ("text/*.parquet does not exist", "give a folder, file or glob")),
    "folder without text": Case("--data notext", "data", ("notext holds no .parquet, .jsonl", ".txt files")),
    "missing validation data": Case("--validation_data gone.jsonl", "validation_data", ("gone.jsonl does not exist", "give ")),
    "missing evaluation data": Case(
        "--evaluate_data gone.jsonl --evaluate_tasks hellaswag", "evaluate_data", ("gone.jsonl", "HellaSwag-format .jsonl")
    ),
    "output_dir is a file": Case("--output_dir typo.yaml", "output_dir", ("typo.yaml is a file", "name a folder")),
    # --- what is in the data
    "empty .jsonl": Case("--data empty", "data", ("empty holds no text",)),
    "blank lines only": Case("--data blank", "data", ("blank holds no text",)),
    "empty .txt": Case("--data empty.txt", "data", ("empty.txt holds no text",)),
    "unreadable parquet among good ones": Case(
        "--data mixed", "data", ("cannot read mixed/b.parquet", "replace or remove the file")
    ),
    "wrong column of parquet": Case(
        "--data columns.parquet", "data", ("columns.parquet has no column text", "set text_column to one of body, url")
    ),
    "wrong key of .jsonl": Case("--data keys.jsonl", "data", ("keys.jsonl has no key text", "set text_column to one of body")),
    "broken JSON": Case("--data broken.jsonl", "data", ("cannot read broken.jsonl", "replace or remove the file")),
    "numbers in .jsonl": Case("--data numbers.jsonl", "data", ("numbers.jsonl", "text_column")),
    "numbers in parquet": Case("--data numbers.parquet", "data", ("numbers.parquet", "text_column")),
    "too small to hold out": Case(
        "--data short --validation_data null --tokenizer run/cache/tokenizer",
        "validation_data",
        ("short", "give validation_data"),
    ),
    "validation shorter than a row": Case(
        "--validation_data tiny.txt", "validation_data", ("less than a row of 32", "lower sequence_length")
    ),
    "Hub data offline": Case(
        "--data some/dataset", "data", ("Hub cannot be reached for some/dataset", "use local text", "--data installed-docs")
    ),
    # --- the tokenizer
    "missing tokenizer folder": Case(
        "--tokenizer ./missing", "tokenizer", ("cannot load", "./missing", "name a Hub id, a folder with vocab.json")
    ),
    "folder without a tokenizer": Case("--tokenizer notext", "tokenizer", ("cannot load folder notext", "train:VOCAB_SIZE")),
    # --- an existing run
    "run of another model": Case(
        "--data short --output_dir run --n_layer 2",
        "output_dir",
        ("run holds a run with another configuration", "n_layer is 1 there and 2 now; ", "choose another output_dir"),
    ),
    "run of another rate and seed": Case(
        "--data short --output_dir run --learning_rate 1e-3 --seed 5",
        "output_dir",
        ("learning_rate is 0.0006 there and 0.001 now", "seed is 0 there and 5 now"),
    ),
    "run of another text": Case("--output_dir run", "data", ("the checkpoint's data differs in", "restore ", "output_dir")),
    "run of another validation text": Case(
        "--data short --max_epochs 9 --validation_data text/3.txt --output_dir run",
        "validation_data",
        ("differs from what the run began with", "restore it"),
    ),
    "resume none on a run": Case(
        "--data short --output_dir run --resume none",
        "resume",
        ("run holds a run already", "drop `resume none` to continue it"),
    ),
    "resume from another optimizer's checkpoint": Case(
        "--data short --max_epochs 9 --resume run/checkpoints/step-00000002 --optimizer muon --output_dir branch",
        "optimizer",
        ("run/checkpoints/step-00000002 holds the state of adamw, not of muon", "set optimizer adamw"),
    ),
    "resume from nothing": Case("--resume ./nothing", "resume", ("nothing", "does not exist")),
    "resume from a folder": Case("--resume text", "resume", ("text: no MANIFEST.json", "never finished")),
    "resume from a file": Case("--resume short/a.txt", "resume", ("short/a.txt",)),
    "resume from a damaged checkpoint": Case(
        "--resume damaged", "resume", ("damaged: model.safetensors is missing",)
    ),
    "resume from another text": Case(
        "--resume run/checkpoints/step-00000002", "data", ("the checkpoint's data differs in", "restore ", "output_dir")
    ),
    "resume from another model": Case(
        "--data short --max_epochs 9 --n_layer 2 --resume run/checkpoints/step-00000002",
        "resume",
        ("run/checkpoints/step-00000002",),
    ),
    "resume with other heads": Case(
        "--data short --max_epochs 9 --n_head 4 --resume run/checkpoints/step-00000002 --output_dir heads",
        "n_head",
        ("run/checkpoints/step-00000002 holds a model of 2 heads, not of 4", "set n_head 2"),
    ),
    # --- --dry_run refuses the same
    "dry run of a bad batch": Case("--dry_run --batch_tokens 100", "batch_tokens", ("100 is not a multiple of",)),
    "dry run without its tokenizer": Case("--dry_run --tokenizer ./missing", "tokenizer", ("cannot load", "./missing")),
}  # fmt: skip

OTHERS = {
    "dry run": Case("--dry_run", ""),
    "dry run of a run": Case("--data short --max_epochs 9 --output_dir run --dry_run", ""),
    "rank 1": Case("--n_layers 3", "", environment={"RANK": "1", "WORLD_SIZE": "2"}),
    "three problems": Case("--n_layers 3 --batch_tokens 100 --data ./missing", ""),
}


def arguments_of(case: Case) -> list[str]:
    """TINY's arguments with the case's in place of those of the same name."""
    words = case.arguments.split()
    own = {word for word in words if word.startswith("--")}
    kept = [w for pair in zip(TINY[::2], TINY[1::2], strict=True) if pair[0] not in own for w in pair]
    return [*kept, *words]


def make_inputs(folder: Path) -> None:
    """Good and bad data, configurations and a damaged checkpoint."""
    for name in ("text", "short", "brim", "brims", "empty", "blank", "mixed", "notext", "damaged"):
        (folder / name).mkdir(parents=True)
    for n in range(4):
        lines = [f"Line {i} of file {n} tells of river number {i * n} and of the stone in it.\n" for i in range(60)]
        (folder / "text" / f"{n}.txt").write_text("".join(lines))
    (folder / "short" / "a.txt").write_text("A short text, which is read more than once.\n" * 4)
    (folder / "brim" / "a.txt").write_text("x" * 127)  # a byte is a token of train:257, and end-of-text is one more
    for n in range(8):
        (folder / "brims" / f"{n}.txt").write_text("x" * 115)
    (folder / "tiny.txt").write_text("tiny")
    (folder / "empty" / "a.jsonl").touch()
    (folder / "empty.txt").touch()
    (folder / "blank" / "a.jsonl").write_text("\n\n\n")
    (folder / "notext" / "readme.md").write_text("# Not for training")
    for name in "abc":
        pq.write_table(pa.table({"text": ["A document.", "Another one."] * 20}), folder / "mixed" / f"{name}.parquet")
    (folder / "mixed" / "b.parquet").write_bytes((folder / "mixed" / "a.parquet").read_bytes()[:-100])
    pq.write_table(pa.table({"body": ["A document."], "url": ["u"]}), folder / "columns.parquet")
    (folder / "keys.jsonl").write_text('{"body": "A document."}\n')
    (folder / "broken.jsonl").write_text('{"text": "A document."}\n{"text": \n')
    (folder / "numbers.jsonl").write_text('{"text": 12}\n')
    pq.write_table(pa.table({"text": [1, 2, 3] * 100}), folder / "numbers.parquet", row_group_size=100)
    (folder / "typo.yaml").write_text("lerning_rate: 1e-3\n")
    (folder / "broken.yaml").write_text("n_layer: [\n")
    files = {name: {"size": 1, "sha256": ""} for name in ("model.safetensors", "optimizer.safetensors", "state.json")}
    (folder / "damaged" / "MANIFEST.json").write_text(json.dumps({"step": 1, "tokens": 64, "files": files}))


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict]:
    """What each case did: exit code, stdout, stderr and the paths that it changed."""
    folder = tmp_path_factory.mktemp("bad_input")
    make_inputs(folder / "work")
    cases = {
        name: {"arguments": arguments_of(case), "environment": case.environment, "follow_advice": case.follow_advice}
        for name, case in (CASES | OTHERS).items()
    }
    (folder / "cases.json").write_text(json.dumps(cases))
    subprocess.run(
        [sys.executable, "-c", DRIVER, folder / "cases.json", folder / "results.json"],
        cwd=folder / "work",
        env=os.environ | OFFLINE | {"HF_HOME": str(folder / "hf"), "PYTHONPATH": str(SCRIPT.parent.parent)},
        check=True,
        timeout=240,
    )
    return json.loads((folder / "results.json").read_text())


def message(result: dict) -> str:
    """The one problem on stderr, which must hold nothing else."""
    assert result["stderr"].startswith("1 problem with the configuration or the input:\n"), result["stderr"]
    lines = result["stderr"].splitlines()
    assert len(lines) == 2 and lines[1].startswith("  "), result["stderr"]
    return lines[1].strip()


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused(results, name):
    case, result = CASES[name], results[name]
    assert result["code"] == 2, result["stderr"]
    text = message(result)
    assert text.startswith(f"{case.field}: ")
    for part in case.says:
        assert part in text
    # Nothing is created; only the lock of a run that exists already is taken.
    assert [path for path in result["changed"] if path != "run/.lock"] == []


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.follow_advice])
def test_the_advised_epochs_work(results, name):
    result = results[f"{name}, advice followed"]
    assert result and result["code"] == 0, result
    assert "finished: run" in result["stdout"]
    assert any(path.endswith("export/model.safetensors") for path in result["changed"])


def test_only_rank_0_speaks(results):
    assert (results["rank 1"]["code"], results["rank 1"]["stdout"], results["rank 1"]["stderr"]) == (2, "", "")


def test_several_problems_are_one_message(results):
    lines = results["three problems"]["stderr"].splitlines()
    assert lines[0] == "3 problems with the configuration or the input:"
    assert [re.match(r"  (\w+): ", line)[1] for line in lines[1:]] == ["n_layers", "batch_tokens", "data"]


def test_repeated_documents_are_text(tmp_path):
    # Parquet stores a repeated value once: 4000 documents in a few hundred bytes.
    pq.write_table(pa.table({"text": ["A document.", "Another one."] * 2000}), tmp_path / "a.parquet")
    corpus, _ = open_corpora(str(tmp_path), None, "text", tmp_path)
    assert sum(len(list(corpus.read(unit))) for unit in corpus.units) == 4000


# --- through the script -------------------------------------------------------------------------------------------


def start(arguments: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess:
    environ = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_ENDPOINT")} | environment
    command = [sys.executable, SCRIPT, *arguments]
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=60)


def test_the_script_gives_the_exit_code(tmp_path):
    began = time.perf_counter()
    result = start(["--max_stepz", "2"], tmp_path, **OFFLINE)
    assert time.perf_counter() - began < 2  # a typo does not wait for torch
    assert result.returncode == 2
    assert "max_stepz: unknown field (command line); did you mean max_steps?" in result.stderr
    assert result.stdout == "" and list(tmp_path.iterdir()) == []


def test_dry_run_prints_the_numbers_and_creates_nothing(results):
    result = results["dry run"]
    assert (result["code"], result["stderr"], result["changed"]) == (0, "", [])
    lines = [" ".join(line.split()) for line in result["stdout"].splitlines()]
    for line in [
        f"parameters {300 * 16 + 32 * 16 + 12 * 256 + 13 * 16 + 32:,}",
        "ranks 1",
        "tokens a step 64 (2 rows x 32 tokens x 1 ranks x 1 accumulation)",
        "steps 2 (0 of them warm-up)",
        "tokens in all 128",
        "data found: text",
        "tokenizer found: train:300",
    ]:
        assert line in lines
    assert to_yaml(replace(load_config(TINY), activation_checkpointing=False)) in result["stdout"]


def test_dry_run_of_a_run_leaves_it_alone(results):
    result = results["dry run of a run"]
    assert (result["code"], result["changed"]) == (0, [])


@pytest.mark.parametrize(
    "environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}], ids=lambda e: next(iter(e))
)
def test_dry_run_without_a_network(tmp_path, environment):
    began = time.perf_counter()
    arguments = ["--max_steps", "1000", "--validation_data", "user/name@abc", "--dry_run"]
    result = start(arguments, tmp_path, HF_HOME=str(tmp_path / "hf"), **environment)
    assert time.perf_counter() - began < 15
    assert result.returncode == 0, result.stderr
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "parameters 124,439,808 (assuming GPT-2's vocabulary of 50,257)" in lines
    assert "tokens in all 524,288,000" in lines
    for name, value in [
        ("data", "HuggingFaceFW/fineweb:sample-10BT@9bb295ddab0e05d785b879661af7260fed5140fc"),
        ("validation_data", "user/name@abc"),
        ("tokenizer", "openai-community/gpt2"),
    ]:
        assert f"{name} not checked: offline: {value}" in lines
    assert not (tmp_path / "runs").exists()
