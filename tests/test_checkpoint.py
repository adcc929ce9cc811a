"""Checkpoints: what is saved comes back exactly, what is damaged never counts, and no crash costs an older one."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from recipe import checkpoint, files
from recipe.checkpoint import Checkpoint, CheckpointError, find_newest, remove, rotate, save, verify
from recipe.files import write_json, write_text

FILES = ["MANIFEST.json", "model.safetensors", "optimizer.safetensors", "state.json"]
WEIGHTS = {"transformer.wte.weight": (6, 4), "transformer.h.0.attn.c_attn.bias": (12,), "transformer.ln_f.weight": (4,)}


def full_state(step: int) -> dict[str, torch.Tensor]:
    """Masters, moments and step as an engine gives them; another for each step."""
    generator = torch.Generator().manual_seed(step)
    state = {
        f"{kind}.{name}": torch.randn(shape, generator=generator)
        for kind in ("model", "exp_avg", "exp_avg_sq")
        for name, shape in WEIGHTS.items()
    }
    return state | {"step": torch.tensor([float(step)])}


def state(step: int) -> dict:
    return {"tokens": step * 64, "data": {"rows": 2 * step, "cursors": [[0, 1, 2, 3]]}, "best_val_loss": 2.5}


def saved(folder: Path, *steps: int) -> list[Checkpoint]:
    return [save(folder, full_state(step), state(step), step) for step in steps]


def assert_same(found: Checkpoint, step: int) -> None:
    """The checkpoint is that of `step`, bit for bit."""
    assert found.step == step
    assert found.state() == {"step": step, **state(step)}
    ours, theirs = full_state(step), found.full_state()
    assert ours.keys() == theirs.keys()
    assert found.shapes() == {name: tensor.shape for name, tensor in ours.items()}
    for name, tensor in ours.items():
        assert theirs[name].dtype == torch.float32 and torch.equal(theirs[name], tensor), name


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# --- round trip ---------------------------------------------------------------------------------------------------


def test_round_trip_is_exact(tmp_path):
    (made,) = saved(tmp_path / "checkpoints", 500)
    assert made.path == tmp_path / "checkpoints" / "step-00000500"
    assert names(made.path) == FILES and names(made.path.parent) == ["step-00000500"]
    assert_same(verify(made.path), 500)
    found, skipped = find_newest(made.path.parent)
    assert found == made and skipped == []


def test_special_numbers_survive(tmp_path):
    values = torch.tensor([0.0, -0.0, 1e-45, 3.4028234e38, -1e-38, 1 / 3])
    special = full_state(1) | {"model.transformer.ln_f.bias": values, "exp_avg.transformer.ln_f.bias": values}
    theirs = save(tmp_path, special, state(1), 1).full_state()
    for kind in ("model", "exp_avg"):
        assert theirs[f"{kind}.transformer.ln_f.bias"].numpy().tobytes() == values.numpy().tobytes()


def test_masters_have_the_names_of_gpt2(tmp_path):
    (made,) = saved(tmp_path, 3)
    assert made.masters().keys() == WEIGHTS.keys()


def test_the_manifest_describes_the_other_files(tmp_path):
    (made,) = saved(tmp_path, 3)
    manifest = json.loads((made.path / "MANIFEST.json").read_text())
    assert (manifest["step"], manifest["tokens"]) == (3, 192)
    assert sorted(manifest["files"]) == FILES[1:]
    for name, expected in manifest["files"].items():
        assert expected == {"size": (made.path / name).stat().st_size, "sha256": files.sha256(made.path / name)}


def test_the_same_state_gives_the_same_bytes(tmp_path):
    (one,), (two,) = saved(tmp_path / "a", 3), saved(tmp_path / "b", 3)
    assert [(one.path / n).read_bytes() for n in FILES] == [(two.path / n).read_bytes() for n in FILES]


def test_no_folder_and_an_empty_folder_hold_nothing(tmp_path):
    assert find_newest(tmp_path / "missing") == (None, [])
    assert find_newest(tmp_path) == (None, [])
    rotate(tmp_path / "missing", 2)


def test_the_newest_is_found(tmp_path):
    saved(tmp_path, 90, 1000, 100, 5)
    assert_same(find_newest(tmp_path)[0], 1000)


def test_steps_of_nine_digits_are_newer_than_those_of_eight(tmp_path):
    saved(tmp_path, 99_999_999, 100_000_000)
    assert_same(find_newest(tmp_path)[0], 100_000_000)
    rotate(tmp_path, 1)
    assert names(tmp_path) == ["step-100000000"]


# --- damage -------------------------------------------------------------------------------------------------------


def delete(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if path.name != "MANIFEST.json" else 0] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize("damage", [delete, truncate, flip_a_bit, empty, append])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_the_older_checkpoint_taken(tmp_path, name, damage):
    older, newer = saved(tmp_path, 1, 2)
    damage(newer.path / name)
    with pytest.raises(CheckpointError) as caught:
        verify(newer.path)
    assert name in str(caught.value) and str(newer.path) in str(caught.value)
    found, skipped = find_newest(tmp_path)
    assert skipped == [str(caught.value)]
    assert_same(found, 1)
    assert found == older


@pytest.mark.parametrize(
    "name, damage, reason",
    [
        ("model.safetensors", delete, "is missing"),
        ("model.safetensors", flip_a_bit, "is damaged"),
        ("model.safetensors", empty, "has 0 bytes instead of"),
        ("MANIFEST.json", delete, "so it was never finished"),
        ("MANIFEST.json", truncate, "cannot be read"),
    ],
)
def test_the_reason_is_told(tmp_path, name, damage, reason):
    (made,) = saved(tmp_path, 1)
    damage(made.path / name)
    with pytest.raises(CheckpointError, match=reason):
        verify(made.path)


def test_a_flipped_bit_anywhere_in_a_data_file_is_found(tmp_path):
    (made,) = saved(tmp_path, 1)
    for name in FILES[1:]:
        content = (made.path / name).read_bytes()
        for position in range(0, len(content), 7):
            damaged = bytearray(content)
            damaged[position] ^= 1 << position % 8
            (made.path / name).write_bytes(damaged)
            with pytest.raises(CheckpointError):
                verify(made.path)
        (made.path / name).write_bytes(content)
    verify(made.path)


def test_a_flipped_bit_in_the_manifest_never_gives_another_step(tmp_path):
    (made,) = saved(tmp_path, 123)
    content = (made.path / "MANIFEST.json").read_bytes()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1
        (made.path / "MANIFEST.json").write_bytes(damaged)
        try:
            assert verify(made.path).step == 123, damaged
        except CheckpointError as error:
            assert str(made.path) in str(error)


@pytest.mark.parametrize("content", ["[]", "3", "null", "{}", '{"files": {}}', '{"step": 1}', '{"step": 1, "files": [1]}'])
def test_a_manifest_that_is_none(tmp_path, content):
    (made,) = saved(tmp_path, 1)
    (made.path / "MANIFEST.json").write_text(content)
    with pytest.raises(CheckpointError, match="MANIFEST.json"):
        verify(made.path)


def test_a_manifest_without_files_vouches_for_nothing(tmp_path):
    (made,) = saved(tmp_path, 1)
    (made.path / "MANIFEST.json").write_text('{"step": 1, "files": {}}')
    with pytest.raises(CheckpointError):
        verify(made.path)


@pytest.mark.parametrize("name", ["missing", "plain-file", "plain-file/below", "folder"])
def test_a_path_that_is_no_checkpoint(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "plain-file").write_text("x")
    with pytest.raises(CheckpointError, match=name):
        verify(tmp_path / name)


def test_all_damaged_gives_none_and_every_reason(tmp_path):
    for made in saved(tmp_path, 1, 2, 3):
        delete(made.path / "state.json")
    found, skipped = find_newest(tmp_path)
    assert found is None
    assert [f"step-0000000{n}" in reason for n, reason in zip((3, 2, 1), skipped, strict=True)] == [True] * 3


# --- what is not saved --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_and_leave_nothing(tmp_path, number):
    saved(tmp_path, 1)
    broken = full_state(2)
    broken["model.transformer.ln_f.weight"][3] = number
    with pytest.raises(CheckpointError, match=r"step 2: model\.transformer\.ln_f\.weight is not finite"):
        save(tmp_path, broken, state(2), 2)
    assert names(tmp_path) == ["step-00000001"]


def test_refused_weights_make_no_folder(tmp_path):
    broken = full_state(2)
    broken["model.transformer.ln_f.weight"][3] = float("nan")
    with pytest.raises(CheckpointError):
        save(tmp_path / "checkpoints", broken, state(2), 2)
    assert not (tmp_path / "checkpoints").exists()


# --- rotation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep, left", [(1, [4]), (2, [3, 4]), (3, [2, 3, 4]), (4, [1, 2, 3, 4]), (9, [1, 2, 3, 4])])
def test_the_newest_are_kept(tmp_path, keep, left):
    saved(tmp_path, 3, 1, 4, 2)
    rotate(tmp_path, keep)
    assert names(tmp_path) == [f"step-{n:08d}" for n in left]
    assert_same(find_newest(tmp_path)[0], 4)


STRANGE = ["best", "step-abc", "step-123", "step-00000001.bak", "xstep-00000001", "notes.txt", "step-00000000"]


def test_strange_folders_and_files_stay(tmp_path):
    saved(tmp_path, 1, 2, 3)
    for name in STRANGE[:-2]:
        shutil.copytree(tmp_path / "step-00000001", tmp_path / name)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "step-00000000").write_text("a file of that name")
    rotate(tmp_path, 1)
    assert names(tmp_path) == sorted([*STRANGE, "step-00000003"])
    assert_same(find_newest(tmp_path)[0], 3)
    remove(tmp_path / "step-00000003")
    assert find_newest(tmp_path) == (None, [])


def test_steps_to_branch_off_are_kept(tmp_path):
    saved(tmp_path, 1, 2, 3, 4, 5)
    rotate(tmp_path, 1, keep_steps=(2, 3, 9))
    assert names(tmp_path) == [f"step-{n:08d}" for n in (2, 3, 5)]


def test_a_folder_without_a_manifest_is_no_checkpoint_to_rotate(tmp_path):
    made = saved(tmp_path, 1, 2, 3)
    delete(made[2].path / "MANIFEST.json")
    rotate(tmp_path, 1)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


def test_remove(tmp_path):
    made = saved(tmp_path, 1, 2)
    remove(made[1].path)
    assert names(tmp_path) == ["step-00000001"]
    remove(made[0].path)
    assert names(tmp_path) == []


def test_half_removed_never_counts(tmp_path, monkeypatch):
    made = saved(tmp_path, 1, 2)
    monkeypatch.setattr(shutil, "rmtree", lambda *arguments, **keywords: None)  # killed before the files go
    remove(made[1].path)
    found, skipped = find_newest(tmp_path)
    assert_same(found, 1)
    assert "never finished" in skipped[0]


# --- saving over, leftovers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [None, delete, truncate])
def test_saving_over_an_existing_step(tmp_path, damage):
    saved(tmp_path, 1)
    save(tmp_path, full_state(77), state(77), 2)  # another content
    if damage:
        damage(tmp_path / "step-00000002" / "MANIFEST.json")
    (tmp_path / "step-00000002" / "extra").write_text("x")
    saved(tmp_path, 2)
    assert_same(find_newest(tmp_path)[0], 2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"] and names(tmp_path / "step-00000002") == FILES


def test_leftovers_of_an_interrupted_save_are_ignored_and_overwritten(tmp_path):
    saved(tmp_path, 1, 2)
    leftover = tmp_path / ".step-00000003.tmp"
    shutil.copytree(tmp_path / "step-00000002", leftover)  # complete but for the last rename
    (leftover / "extra").write_text("x")
    found, skipped = find_newest(tmp_path)
    assert (found.step, skipped) == (2, [])
    rotate(tmp_path, 2)
    assert leftover.is_dir()
    saved(tmp_path, 3)
    assert names(tmp_path) == ["step-00000001", "step-00000002", "step-00000003"]
    assert names(tmp_path / "step-00000003") == FILES
    assert_same(find_newest(tmp_path)[0], 3)


# --- crashes ------------------------------------------------------------------------------------------------------


class Crash(OSError):
    """The disk is full, or the power is gone."""


class CrashAt:
    """Lets the operations of a save through until the `at`-th, which does half of its work or none and raises."""

    def __init__(self, monkeypatch, at: int):
        self.count, self.at = 0, at
        for owner, name in [
            (os, "replace"),
            (os, "fsync"),
            (checkpoint, "save_file"),
            (checkpoint, "write_json"),
            (checkpoint, "sha256"),
            (shutil, "rmtree"),
            (Path, "unlink"),
            (Path, "mkdir"),
        ]:
            monkeypatch.setattr(owner, name, self.wrap(getattr(owner, name), name))

    def wrap(self, function, name):
        def wrapped(*arguments, **keywords):
            self.count += 1
            if self.count == self.at:
                if name in ("save_file", "write_json"):
                    Path(arguments[name == "save_file"]).write_bytes(b"{")
                raise Crash(name)
            return function(*arguments, **keywords)

        return wrapped


def crash_a_save(tmp_path, at: int, content: int = 2) -> bool:
    """Save step 2 and crash at the `at`-th operation; whether it came to that."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        operations = CrashAt(monkeypatch, at)
        try:
            save(tmp_path, full_state(content), state(content), 2)
        except Crash:
            return True
        assert operations.count < at
        return False


def test_a_crash_at_any_operation_leaves_the_older_checkpoint(tmp_path):
    at, newer = 0, 0
    while True:
        at += 1
        folder = tmp_path / str(at)
        saved(folder, 1)
        if not crash_a_save(folder, at):
            break
        found, skipped = find_newest(folder)
        newer += found.step == 2
        assert_same(found, found.step)
        assert skipped == [] and verify(folder / "step-00000001").step == 1
        saved(folder, 2)  # the next start gets through
        assert_same(find_newest(folder)[0], 2)
        assert names(folder) == ["step-00000001", "step-00000002"]
    assert at > 12
    assert newer == 1  # only the sync of the folder comes after the rename


def test_a_crash_while_a_step_is_saved_over_leaves_the_older_checkpoint(tmp_path):
    at = 0
    while True:
        at += 1
        folder = tmp_path / str(at)
        saved(folder, 1)
        save(folder, full_state(77), state(77), 2)
        if not crash_a_save(folder, at):
            break
        assert verify(folder / "step-00000001").step == 1
        found, _ = find_newest(folder)
        if found.step == 2:  # as before or as after, never a mixture
            content = 77 if found.state()["tokens"] == 77 * 64 else 2
            assert all(torch.equal(t, full_state(content)[n]) for n, t in found.full_state().items())
        else:
            assert_same(found, 1)
        saved(folder, 2)
        assert_same(find_newest(folder)[0], 2)
    assert at > 15


@pytest.mark.parametrize("name", ["save_file", "write_json", "sha256", "sync"])
def test_a_full_disk_raises_and_commits_nothing(tmp_path, monkeypatch, name):
    saved(tmp_path, 1)

    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, name, full)
    with pytest.raises(OSError, match="No space left"):
        saved(tmp_path, 2)
    assert [n for n in names(tmp_path) if not n.startswith(".")] == ["step-00000001"]


def test_files_are_synced_before_they_are_vouched_for(tmp_path, monkeypatch):
    events = []
    for owner, name in [(checkpoint, "sync"), (checkpoint, "write_json"), (os, "replace"), (checkpoint, "sync_folder")]:
        original = getattr(owner, name)

        def spy(*arguments, name=name, original=original):
            events.append((name, Path(arguments[-1] if name == "replace" else arguments[0]).name))
            return original(*arguments)

        monkeypatch.setattr(owner, name, spy)
    saved(tmp_path / "checkpoints", 1)
    manifest = events.index(("write_json", "MANIFEST.json"))
    assert all(events.index(("sync", name)) < manifest for name in FILES[1:])
    assert events[-2:] == [("replace", "step-00000001"), ("sync_folder", "checkpoints")]


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", ["fsync", "replace"])
def test_a_text_file_is_old_or_new(tmp_path, monkeypatch, operation):
    write_text(tmp_path / "a.txt", "old")

    def crash(*arguments):
        raise Crash

    monkeypatch.setattr(os, operation, crash)
    with pytest.raises(Crash):
        write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old"
    monkeypatch.undo()
    write_text(tmp_path / "a.txt", "newer")
    assert (tmp_path / "a.txt").read_text() == "newer" and names(tmp_path) == ["a.txt"]


def test_json_is_readable_and_keeps_its_letters(tmp_path):
    write_json(tmp_path / "a.json", {"text": "naïve 文", "list": [1, None]})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == (
        '{\n  "text": "naïve 文",\n  "list": [\n    1,\n    null\n  ]\n}\n'
    )
