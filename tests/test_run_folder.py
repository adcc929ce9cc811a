"""The run folder: whose it is, what it says about the run, and what can be read from it after a crash."""

import dataclasses
import json
import subprocess
import sys
import typing
from types import SimpleNamespace

import pytest
import yaml

from launch import ROOT
from recipe import run_folder
from recipe.config import NOT_PART_OF_THE_RUN, Config, ConfigError, config_fields, to_yaml
from recipe.files import read_json_lines
from recipe.monitor.run_record import GPT2_VOCAB_SHA256
from recipe.parsing import load_config
from recipe.plan import GPT2_VOCAB_SIZE
from recipe.run_folder import RunFolder, describe_environment, describe_tokenizer
from recipe.tokenizer import load_tokenizer, train_tokenizer
from recipe.train import Run


def make_config(**fields) -> Config:
    return dataclasses.replace(load_config(["--max_steps", "1000", "--output_dir", "out"]), **fields)


def other(name: str) -> object:
    """A value of the field that differs from make_config's."""
    hint, now = typing.get_type_hints(Config)[name], getattr(make_config(), name)
    if typing.get_origin(hint) is typing.Literal:
        return next((choice for choice in typing.get_args(hint) if choice != now), "sgd")
    if isinstance(now, bool) or (now is None and bool in getattr(hint, "__args__", ())):
        return not now
    if isinstance(now, str) or (now is None and str in hint.__args__):
        return f"another {name}"
    return (now or 0) + 1


def refusal(folder: RunFolder, config: Config) -> str:
    with pytest.raises(ConfigError) as caught:
        folder.check(config)
    (problem,) = caught.value.problems
    return problem


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path / "some" / "run")


@pytest.fixture
def claimed(folder) -> RunFolder:
    """A folder that holds a run of make_config()."""
    folder.claim(make_config(), {"ranks": 1})
    return folder


# --- check --------------------------------------------------------------------------------------------------------


def test_a_new_folder_holds_no_run_and_is_not_created(folder):
    assert folder.check(make_config()) is False
    assert not folder.path.parent.exists()


def test_an_empty_or_foreign_folder_holds_no_run(folder):
    folder.path.mkdir(parents=True)
    (folder.path / "notes.txt").write_text("mine")
    assert folder.check(make_config()) is False
    assert folder.check(make_config(resume="none")) is False


def test_a_file_is_refused(folder):
    folder.path.parent.mkdir()
    folder.path.write_text("x")
    assert refusal(folder, make_config()) == f"output_dir: {folder.path} is a file; name a folder"


def test_checkpoints_without_a_configuration_are_refused(folder):
    (folder.checkpoints / "step-00000001").mkdir(parents=True)
    assert refusal(folder, make_config()) == (
        f"output_dir: {folder.path} holds checkpoints but no config.yaml; choose another folder"
    )


def test_the_same_configuration_continues(claimed):
    assert claimed.check(make_config()) is True


def test_resume_none_is_refused_on_a_run(claimed):
    problem = refusal(claimed, make_config(resume="none"))
    assert problem.startswith(f"resume: {claimed.path} holds a run already; drop `resume none` to continue it, or ")


@pytest.mark.parametrize("name", sorted(NOT_PART_OF_THE_RUN - {"name"}))
def test_fields_that_may_differ(claimed, name):
    assert claimed.check(make_config(**{name: other(name)})) is True


@pytest.mark.parametrize("name", [n for n in config_fields() if n not in NOT_PART_OF_THE_RUN])
def test_fields_that_may_not_differ_are_named_with_both_values(claimed, name):
    there, now = getattr(make_config(), name), other(name)
    problem = refusal(claimed, make_config(**{name: now}))
    assert problem.startswith(f"output_dir: {claimed.path} holds a run with another configuration: ")
    assert (
        problem.count(" there and ") == 1 and f": {name} is {there} there and {now} now; choose another output_dir" in problem
    )


@pytest.mark.parametrize("name", ["data", "validation_data", "tokenizer"])
@pytest.mark.parametrize(
    "there, now, same",
    [
        ("/old/place", "./new/place", True),  # what it holds is compared by its fingerprint
        ("/old/a.parquet", "b.txt", True),
        ("user/name@1", "user/name@1", True),
        ("user/name@1", "user/name@2", False),
        ("/old/place", "user/name", False),
        ("installed-docs", "/old/place", False),
        ("train:300", "train:400", False),
        ("train:300", "/old/place", False),
    ],
)
def test_text_and_tokenizer_may_move_but_not_change(folder, name, there, now, same):
    folder.claim(make_config(**{name: there}), {})
    if same:
        assert folder.check(make_config(**{name: now})) is True
    else:
        assert f"{name} is {there} there and {now} now" in refusal(folder, make_config(**{name: now}))


def test_all_differences_are_named(claimed):
    problem = refusal(claimed, make_config(n_layer=3, seed=7, data="other.txt", save_every=1))
    assert problem.count(" there and ") == 3
    for difference in ("n_layer is 12 there and 3 now", "seed is 0 there and 7 now", "and other.txt now"):
        assert difference in problem
    assert "save_every" not in problem


def test_defaults_resolved_alike_are_the_same_run(claimed):
    given = load_config(
        ["--max_steps", "1000", "--n_positions", "1024", "--sequence_length", "1024", "--learning_rate", "6e-4"]
    )
    assert claimed.check(given) is True


def test_a_field_newer_than_the_run_had_its_default(claimed):
    theirs = yaml.safe_load(claimed.config.read_text())
    del theirs["muon_momentum"]
    claimed.config.write_text(yaml.safe_dump(theirs))
    assert claimed.check(make_config()) is True
    assert "muon_momentum is 0.95 there and 0.9 now" in refusal(claimed, make_config(muon_momentum=0.9))


def test_check_changes_nothing(claimed):
    before = {p: p.read_bytes() for p in claimed.path.rglob("*") if p.is_file()}
    claimed.check(make_config())
    refusal(claimed, make_config(n_layer=3))
    assert before == {p: p.read_bytes() for p in claimed.path.rglob("*") if p.is_file()}


# --- claim, status ------------------------------------------------------------------------------------------------


def test_claim_describes_the_run(claimed):
    made = {".lock", "cache", "checkpoints", "config.yaml", "environment.json", "eval"}
    assert {p.name for p in claimed.path.iterdir()} == made
    assert claimed.config.read_text() == to_yaml(make_config())
    assert json.loads((claimed.path / "environment.json").read_text()) == {"ranks": 1}
    assert not claimed.export.exists() and not claimed.metrics.exists()


def test_the_configuration_in_the_folder_starts_the_same_run(claimed):
    config = load_config([str(claimed.config)])
    assert dataclasses.replace(config, name="run") == make_config()
    assert claimed.check(config) is True


def test_claiming_again_rewrites_the_description_and_keeps_the_rest(claimed):
    (claimed.checkpoints / "step-00000001").mkdir()
    claimed.claim(make_config(log_every=3), {"ranks": 2})
    assert yaml.safe_load(claimed.config.read_text())["log_every"] == 3
    assert json.loads((claimed.path / "environment.json").read_text()) == {"ranks": 2}
    assert (claimed.checkpoints / "step-00000001").is_dir()


def test_status_is_replaced_whole(claimed):
    claimed.status("running", None, 5, 320)
    path = claimed.path / "status.json"
    expected = {"state": "running", "exit_code": None, "step": 5, "tokens": 320, "reason": "", "rank": 0}
    assert json.loads(path.read_text()) == expected
    claimed.status("failed", 1, 7, 448, "RuntimeError: no", 3)
    expected = {"state": "failed", "exit_code": 1, "step": 7, "tokens": 448, "reason": "RuntimeError: no", "rank": 3}
    assert json.loads(path.read_text()) == expected
    assert [p.name for p in claimed.path.glob(".*")] == [".lock"]


# --- environment --------------------------------------------------------------------------------------------------


def test_the_environment_is_described(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scripts/pretrain.py", "configs/quickstart.yaml"])
    environment = describe_environment(2, "Zero1Engine", "bf16")
    assert json.loads(json.dumps(environment)) == environment
    assert environment["command"] == ["python", "scripts/pretrain.py", "configs/quickstart.yaml"]
    assert (environment["ranks"], environment["engine"], environment["precision"]) == (2, "Zero1Engine", "bf16")
    assert environment["python"] == ".".join(map(str, sys.version_info[:3]))
    assert environment["hardware"]["cores"] >= 1 and environment["hardware"]["cpu"]
    import torch

    assert environment["versions"]["torch"] == torch.__version__
    assert set(environment["versions"]) <= set(run_folder.PACKAGES)


def test_a_tokenizer_is_known_by_its_tokens(trained_run):
    texts = ["the river runs to the sea"] * 9, ["a stone lies under the old tree"] * 9
    one, other = (train_tokenizer(t, 270) for t in texts)
    assert len(one) == len(other) and describe_tokenizer(one) != describe_tokenizer(other)
    environment = json.loads((trained_run / "environment.json").read_text())
    found = describe_tokenizer(load_tokenizer(str(trained_run / "cache" / "tokenizer")))
    assert {name: environment[name] for name in found} == found and found["vocab_size"] == 400


def test_the_tokens_of_gpt2_are_known():
    published = ROOT.parent / "shared" / "data" / "tokenizer"
    if not (published / "vocab.json").is_file():
        pytest.skip("needs a copy of GPT-2's tokenizer")
    known = {"vocab_size": GPT2_VOCAB_SIZE, "vocab_sha256": GPT2_VOCAB_SHA256}
    assert describe_tokenizer(load_tokenizer(str(published))) == known


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with one tagged commit, from which recipe/run_folder.py seems to run; gives a `git` function."""
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "run_folder.py").write_text("")
    monkeypatch.setattr(run_folder, "__file__", str(tmp_path / "recipe" / "run_folder.py"))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")

    def git(*words: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one")
    git("tag", "-am", "v1", "v1")
    return git


def test_the_commit_is_recorded(checkout):
    assert describe_environment(1, "E", "fp32")["commit"] == checkout("rev-parse", "HEAD")


def test_a_changed_file_makes_the_commit_dirty(checkout, tmp_path):
    (tmp_path / "recipe" / "run_folder.py").write_text("changed")
    assert describe_environment(1, "E", "fp32")["commit"] == checkout("rev-parse", "HEAD") + "-dirty"


def test_outside_a_checkout_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "__file__", str(tmp_path / "recipe" / "run_folder.py"))
    assert describe_environment(1, "E", "fp32")["commit"] is None


def test_without_git_there_is_no_commit(checkout, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert describe_environment(1, "E", "fp32")["commit"] is None


# --- read_json_lines -------------------------------------------------------------------------------------------------


def test_metrics_without_a_file(tmp_path):
    assert read_json_lines(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("last", ["", '{"step": 2, "tr', "{", '{"step": 2}', '{"step": 2}\n'])
def test_metrics_leave_out_a_line_cut_off(tmp_path, last):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "train_loss": null}\n' + last)
    assert read_json_lines(path) == [{"step": 1, "train_loss": None}] + (
        [{"step": 2}] if last.startswith('{"step": 2}') else []
    )


def test_a_run_that_waits_for_the_folder_does_not_hold_it(tmp_path, monkeypatch):
    """Else its end would be told as that of the run that trains."""
    first, second = RunFolder(tmp_path), RunFolder(tmp_path)
    first.lock()
    held: list[bool] = []

    def wait(handle, seconds) -> bool:
        held.append(second.locked)
        return False

    monkeypatch.setattr(run_folder, "_lock", wait)
    with pytest.raises(ConfigError, match="is being trained in by process"):
        second.lock()
    assert held == [False] and first.locked and not second.locked


def test_a_full_disk_does_not_keep_the_watchdog_from_ending_the_run(tmp_path):
    def full(*_) -> None:
        raise OSError(28, "No space left on device")

    folder = RunFolder(tmp_path)
    folder.config.write_text("")
    folder.status = full
    plan = SimpleNamespace(tokens_after=lambda step: step)
    Run._fail(SimpleNamespace(folder=folder, distributed=SimpleNamespace(rank=0), step=1, plan=plan), "stuck", 0)
