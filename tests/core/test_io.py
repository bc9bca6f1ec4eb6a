import math
import os
import time
from pathlib import Path

import pytest
import torch
from helpers import CHILDREN, files_of_at_most
from safetensors.torch import save_file

from vaelab.core import io
from vaelab.core.io import atomic, locked, naming, read_json, remove_dead_drafts, write_json


def test_exception_leaves_the_old_file_and_no_draft(tmp_path):
    path = tmp_path / "value.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="half"), atomic(path) as draft:
        draft.write_text("ne")
        raise RuntimeError("half way")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "value.txt"
    path.write_text("old")
    with atomic(path) as draft:
        draft.write_text("new")
        assert path.read_text() == "old"
        assert draft.parent.parent == path.parent and draft.name == path.name
        place = draft.stat().st_ino
    assert path.read_text() == "new"
    assert path.stat().st_ino == place  # renamed, not copied
    assert list(tmp_path.iterdir()) == [path]


def test_missing_folders_are_made(tmp_path):
    write_json(tmp_path / "a" / "b" / "value.json", [1])
    assert read_json(tmp_path / "a" / "b" / "value.json") == [1]


def test_json_numbers_come_back_exactly(tmp_path):
    value = {"third": 1 / 3, "tiny": 5e-324, "list": [True, None, "ä"]}
    write_json(tmp_path / "value.json", value)
    assert read_json(tmp_path / "value.json") == value


def test_nan_is_refused_and_the_old_json_stays(tmp_path):
    write_json(tmp_path / "value.json", 1)
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "value.json", math.nan)
    assert read_json(tmp_path / "value.json") == 1


def test_one_holds_a_lock_at_a_time(tmp_path):
    held = locked(tmp_path / "lock")
    assert locked(tmp_path / "lock") is None
    held.close()
    locked(tmp_path / "lock").close()


def test_a_full_disk_is_an_error_that_names_the_file_and_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "value.json"
    write_json(path, [1])
    with files_of_at_most(100), pytest.raises(OSError, match=r"File too large: '.*value.json'"):
        write_json(path, [1] * 1000)

    def refuse(descriptor):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match=r"Input/output error: '.*value.json'"):
        write_json(path, [2])
    assert read_json(path) == [1] and list(tmp_path.iterdir()) == [path]


def test_an_error_that_names_its_file_is_left_alone(tmp_path):
    with pytest.raises(FileNotFoundError, match="/not/there"), naming(tmp_path):
        Path("/not/there").read_bytes()
    with pytest.raises(OSError, match=r"^of another kind$"), naming(tmp_path):
        raise OSError("of another kind")


def hold_a_draft(path, written, how):
    """In a process of its own: write a draft, say so, and be killed or wait before it becomes the file."""
    with atomic(path) as draft:
        if how == "safetensors":
            save_file({"x": torch.zeros(3)}, draft)
        else:
            draft.write_text("half")
        written.set()
        if how == "dies":
            os._exit(9)
        time.sleep(60)


def drafts(folder):
    return [file for place in folder.glob(".draft-*") for file in place.iterdir()]


@pytest.mark.parametrize("how", ["text", "safetensors"])
def test_a_draft_stays_while_its_process_lives_and_goes_when_it_has_been_killed(tmp_path, how):
    written = CHILDREN.Event()
    process = CHILDREN.Process(target=hold_a_draft, args=(tmp_path / "value.txt", written, how))
    process.start()
    assert written.wait(60)
    remove_dead_drafts(tmp_path)
    assert [file.name for file in drafts(tmp_path)] == ["value.txt"]
    process.kill()
    process.join()
    remove_dead_drafts(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_next_process_that_writes_to_a_folder_removes_dead_drafts(tmp_path, monkeypatch):
    written = CHILDREN.Event()
    process = CHILDREN.Process(target=hold_a_draft, args=(tmp_path / "value.txt", written, "dies"))
    process.start()
    process.join()
    assert len(drafts(tmp_path)) == 1
    monkeypatch.setattr(io, "_cleaned", set())  # what a new process begins with
    with atomic(tmp_path / "other.txt") as draft:
        draft.write_text("other")
        with atomic(tmp_path / "third.txt") as third:
            third.write_text("third")
        assert drafts(tmp_path) == [draft]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.txt", "third.txt"]


def test_only_folders_of_drafts_are_removed(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    (tmp_path / ".draft-link").symlink_to(tmp_path / "mine")
    (tmp_path / ".draft-of-a-letter").write_text("mine")
    remove_dead_drafts(tmp_path)
    assert (tmp_path / ".draft-link" / "file").exists() and (tmp_path / ".draft-of-a-letter").exists()


def test_a_draft_that_cannot_be_asked_for_stays(tmp_path, monkeypatch):
    def no_locks(descriptor):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(io, "_flock", no_locks)
    with atomic(tmp_path / "value.txt") as draft:
        draft.write_text("new")
        remove_dead_drafts(tmp_path)
        assert draft.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["value.txt"]
