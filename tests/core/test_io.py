import math
import os
from pathlib import Path

import pytest
from helpers import files_of_at_most

from vaelab.core.io import atomic, locked, naming, read_json, write_json


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
        assert draft.parent == path.parent
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
