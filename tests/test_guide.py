"""docs/guide.md: every command runs, on a tiny scale; German text with its own tokenizer ends in a model that writes."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from conftest import make_documents
from hub_server import HubServer, client_environment
from launch import ROOT, TINY, environment, losses
from recipe.config import config_fields

GUIDE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", GUIDE, flags=re.S)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.strip()]
FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"

STEPS = 16
SMALL = TINY | {"max_steps": STEPS, "n_positions": 128, "warmup_steps": 4, "evaluate_data": "mini", "evaluate_limit": 4}
del SMALL["tokenizer"]
INSTEAD = {"--tokenizer": "train:600", "--warmup_steps": "4", "--max_epochs": "40"}
"""What a training command of the guide gives, on the small scale; the other fields of SMALL are appended."""


def german(count: int) -> list[str]:
    """Sentences with genders, umlauts and a verb that follows from its noun."""
    rng = random.Random(5)
    nouns = [
        ("Der alte Mann", "liest"), ("Die kleine Tür", "knarrt"), ("Das schöne Mädchen", "singt"), ("Der müde Bär", "schläft"),
        ("Die große Brücke", "steht"), ("Das grüne Schloß", "glänzt"),
    ]  # fmt: skip
    places = ["über dem Fluß", "hinter den Bäumen", "im Schatten der Mühle", "an der weißen Küste", "vor dem Häuschen"]
    times = ["jeden Abend", "früh am Morgen", "während des Winters", "übermorgen", "zwölf Tage lang"]

    def sentence() -> str:
        noun, verb = rng.choice(nouns)
        return f"{noun} {verb} {rng.choice(times)} {rng.choice(places)}."

    return [" ".join(sentence() for _ in range(rng.randint(10, 40))) for _ in range(count)]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, fineweb_folder: Path):
    """A Hub with the text that the guide names, at the revision that it names."""
    from recipe.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("hub")
    train_tokenizer(make_documents(60), 400).save_pretrained(folder / "gpt2")
    files = {f"sample/10BT/{path.name}": path.read_bytes() for path in sorted(fineweb_folder.iterdir())}
    files["README.md"] = (
        b"---\nconfigs:\n- config_name: sample-10BT\n  data_files:\n  - split: train\n    path: sample/10BT/*\n---\n"
    )
    with HubServer() as server:
        revision = server.add_repo("dataset", FINEWEB_EDU, files)
        server.add_repo("model", "openai-community/gpt2", {p.name: p.read_bytes() for p in (folder / "gpt2").iterdir()})
        yield server, revision, folder


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the checkout, with the reader's text, where the commands run one after another."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "configs").mkdir()
    for path in (ROOT / "configs").iterdir():
        (folder / "configs" / path.name).symlink_to(path)
    for name in ("recipe", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv").symlink_to(Path(sys.executable).parent.parent)
    for name, documents in (("my_text", make_documents(80)), ("texte", german(80))):
        (folder / name).mkdir()
        for number, text in enumerate(documents):
            (folder / name / f"{number}.txt").write_text(text, encoding="utf-8")
    mine = re.search(r"Save this as `(\S+)`:\n\n```yaml\n(.*?)```", GUIDE, flags=re.S)
    (folder / mine[1]).write_text(mine[2])
    return folder


def small(command: str) -> str:
    """A command of the guide as one of seconds, on this machine."""
    words = shlex.split(command)
    if "--dry_run" in words:
        # The tiny run has the folder, and the text must last for the run.
        shorter = "--data my_text --tokenizer train:400 --sequence_length 64 --batch_tokens 8192 --max_steps 2 --warmup_steps 1"
        return f"{command} {shorter} --validation_tokens 1024 --max_epochs 40 --output_dir runs/dry"
    if words[0] == "hf":
        return f"{command} --help"
    if words[1] == "scripts/generate.py":
        return f"{command} --max_new_tokens 30 --seed 1"
    trains = "scripts/pretrain.py" in words or "scripts/supervise.sh" in words
    if not trains and words[1] != "scripts/prepare_data.py":
        return command
    text, fields = [], dict(SMALL)
    while words:
        word = words.pop(0)
        name = word.removeprefix("--")
        if word.startswith("configs/accelerate/"):
            word = "configs/accelerate/cpu.yaml"
        if not word.startswith("--") or name not in config_fields() | {"output_dir": None}:
            text.append(word)
        elif name == "max_tokens":
            words.pop(0)  # SMALL says how long
        else:
            value = words.pop(0)
            fields.pop(name, None)
            text += [word, INSTEAD.get(word, value)]
    fields.setdefault("max_epochs", 40)
    if any(word.endswith("-fast.yaml") for word in text):
        fields["sequence_ramp"] = "32x4"  # within SMALL's rows
    if "--max_epochs" in text:
        del fields["max_epochs"]
    if not trains:
        fields = {name: SMALL[name] for name in ("sequence_length", "validation_tokens", "batch_tokens", "micro_batch_size")}
    if command.startswith("bash") or "350m" in command or "mine.yaml" in command:
        fields["data"] = "my_text"
    return shlex.join([*text, *(word for name, value in fields.items() for word in (f"--{name}", str(value)))])


def run(command: str, folder: Path, hub) -> subprocess.CompletedProcess:
    server, revision, cache = hub
    command = re.sub(r"@[0-9a-f]{40}", f"@{revision}", command)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    variables = client_environment(server, cache) | {"PATH": path, "PYTHON": sys.executable, "HF_HUB_OFFLINE": "0"}
    variables = environment(**variables)
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=variables, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


ELSEWHERE = {
    "git clone https://github.com/USER/gpt2-recipe && cd gpt2-recipe": "test_the_clone_is_a_checkout",
    "bash scripts/install.sh .venv gpu": "test.sh runs it with the extra test",
}


def test_the_clone_is_a_checkout(tmp_path: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a repository")
    (command,) = (c for c in COMMANDS if c.startswith("git clone"))
    local = command.replace("https://github.com/USER/gpt2-recipe", f"-q file://{ROOT} gpt2-recipe")
    shown = subprocess.run(["bash", "-c", f"{local} && ls"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert {"recipe", "configs", "scripts", "setup.py"} <= set(shown.stdout.split()), shown.stderr


def test_a_model_takes_five_commands() -> None:
    paste = GUIDE.partition("**Paste**")[2]
    assert len(re.search(r"```bash\n(.*?)```", paste, flags=re.S)[1].splitlines()) == 5
    assert set(ELSEWHERE) <= set(COMMANDS)


def test_every_path_in_the_guide_exists() -> None:
    for path in set(re.findall(r"\b(?:configs|scripts|docs|tests)/[\w./-]+\w", GUIDE)) - {"configs/mine.yaml"}:
        assert (ROOT / path).exists(), path
    for name in re.findall(r"`--(\w+)|`(\w+_\w+)`", GUIDE):
        name = name[0] or name[1]
        assert name in config_fields() or name in ("val_bits_per_byte", "num_processes", "NCCL_SOCKET_IFNAME"), name


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_command_runs_in_the_order_of_the_guide(checkout: Path, hub) -> None:
    ran = []
    for command in COMMANDS:
        if command in ELSEWHERE:
            continue
        done = run(small(command), checkout, hub)
        ran.append(command)
        if "scripts/pretrain.py" in command and "--dry_run" in command:
            assert "tokens in all" in done.stdout
        elif "scripts/pretrain.py" in command or "supervise.sh" in command:
            (folder,) = re.findall(r"^finished: (\S+)", done.stdout, flags=re.M)
            found = losses(checkout / folder)
            assert len(found) == STEPS and found[-1] < found[0] - 0.2, command
            assert (checkout / folder / "export" / "model.safetensors").is_file()
    trained = {path.name for path in (checkout / "runs").iterdir()}
    assert trained == {"gpt2-124m", "gpt2-350m-fast", "mine", "edu", "prepared", "deutsch"}
    # The text of the Hub is the guide's.
    assert FINEWEB_EDU in yaml.safe_load((checkout / "runs" / "edu" / "config.yaml").read_text())["data"]
    assert len(ran) == len(COMMANDS) - len(ELSEWHERE)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_another_language_with_its_own_tokenizer_ends_in_a_model_that_writes(checkout: Path, hub) -> None:
    train, write = (c for c in COMMANDS if "runs/deutsch" in c)
    assert "--data texte --tokenizer train:32768 --evaluate_tasks none" in train
    train = small(train).replace("runs/deutsch", "runs/sprache").replace(f"--max_steps {STEPS}", "--max_steps 150")
    train = train.replace("--learning_rate 0.001", "--learning_rate 0.01")
    run(train, checkout, hub)
    folder = checkout / "runs" / "sprache"
    found = losses(folder)
    assert found[-1] < 0.4 * found[0], "the text has a structure that is learnt in seconds"
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

    model, tokenizer = (kind.from_pretrained(folder / "export") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert type(model) is GPT2LMHeadModel and model.config.vocab_size == len(tokenizer) <= 600
    assert tokenizer.decode(tokenizer("Die große Brücke steht früh.").input_ids) == "Die große Brücke steht früh."
    assert len(tokenizer("übermorgen").input_ids) < len("übermorgen".encode())
    # Greedy, the model writes the language's words and nothing else.
    inputs = tokenizer("Der alte Mann", return_tensors="pt")
    text = tokenizer.decode(model.generate(**inputs, max_new_tokens=40, do_sample=False, pad_token_id=0)[0])
    words = {word for document in german(80) for word in re.findall(r"\w+", document)}
    written = re.findall(r"\w+", text)[3:-1]  # the last may be cut off
    assert len(written) >= 5 and sum(word in words for word in written) >= 0.8 * len(written), text
    shown = run(small(write).replace("runs/deutsch", "runs/sprache"), checkout, hub).stdout
    assert "Der alte Mann" in shown and len(shown.split()) > 6
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
