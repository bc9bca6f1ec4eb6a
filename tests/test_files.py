import math

import pytest

from vaelab.files import atomic, read_json, write_json


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
