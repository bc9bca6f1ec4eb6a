"""Prompts by name."""

import datasets
import pytest

from vaelab import world
from vaelab.data import prompts


def test_the_world_gives_its_scenes_and_their_prompts():
    some = prompts.load_prompts("world", split="unseen", count=5)
    assert some.of_the_world and some.rows == list(range(5))
    assert some.scenes == [world.sample(seed, "unseen") for seed in range(5)]
    assert some.texts == [scene.prompt for scene in some.scenes]
    assert all(len(scene.named) == 2 and all(len(t.named) == 4 for t in scene.things) for scene in some.spelled_out)


def test_a_text_file_a_prompt_a_line_without_empty_ones(tmp_path):
    file = tmp_path / "some.txt"
    file.write_text("a dog\n\n  a cat \n\na bird\n")
    some = prompts.load_prompts(str(file), count=2)
    assert some.texts == ["a dog", "a cat"] and some.rows == [0, 2]
    with pytest.raises(ValueError, match="no scenes"):
        some.scenes  # noqa: B018


@pytest.mark.parametrize(("column", "expected"), [("", ["x", "y"]), ("other", ["1", "2"])])
def test_a_parquet_file_by_its_likeliest_column_or_the_one_asked_for(tmp_path, column, expected):
    rows = datasets.Dataset.from_dict({"number": [1, 2], "other": ["1", "2"], "caption": ["x", "y"]})
    rows.to_parquet(str(tmp_path / "rows.parquet"))
    for place in (tmp_path / "rows.parquet", tmp_path):
        assert prompts.load_prompts(str(place), column=column).texts == expected


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ("wolrd", {}, "Did you mean 'world'"),
        ("world", {}, "^max_images .of the world"),
        ("world", {"count": 2, "split": "tset"}, "test"),
        ("{folder}/numbers.parquet", {}, "no column of text"),
        ("{folder}/numbers.parquet", {"column": "nummer"}, "number"),
        ("{folder}/empty.txt", {}, "no prompt"),
        ("{folder}/empty.txt", {"count": -1}, "^max_images: must be at least 0"),
        ("{folder}/notes.md", {}, "holds no prompts"),
        ("{folder}/bytes.txt", {}, "^dataset: .*bytes.txt' could not be read as text"),
        ("{folder}/cut.parquet", {}, "^dataset: .*cut.parquet' holds no row that can be read"),
        ("{folder}/two.parquet", {}, "^column: .*two.parquet' has several columns of text; give one of a, b"),
        ("{folder}/numbers.parquet", {"column": "number"}, "^column: 'number' of .* holds no text"),
        ("world", {"count": 2, "revision": "v2"}, "^revision: 'v2' was given for 'world', which is not on the hub"),
        ("{folder}/two.parquet", {"revision": "v2"}, "^revision: 'v2' was given for .*two.parquet', which is not on"),
        ("world", {"count": 2, "column": "prompt"}, "^column: 'prompt' was given for 'world', which has no columns"),
        ("{folder}/empty.txt", {"column": "prompt"}, "^column: 'prompt' was given for .*empty.txt', which has no"),
        ("{folder}/splits", {"split": "validation"}, "^split .*the nearest of 2: .*train"),
    ],
)
def test_what_is_refused(tmp_path, dataset, options, message):
    datasets.Dataset.from_dict({"number": [1, 2]}).to_parquet(str(tmp_path / "numbers.parquet"))
    two = datasets.Dataset.from_dict({"a": ["x"], "b": ["y"]})
    (tmp_path / "splits").mkdir()
    for name in ("two", "splits/train-0000", "splits/test-0000"):
        two.to_parquet(str(tmp_path / f"{name}.parquet"))
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "notes.md").write_text("a dog")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x80")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "numbers.parquet").read_bytes()[:200])
    with pytest.raises(ValueError, match=message):
        prompts.load_prompts(dataset.format(folder=tmp_path), **options)


def test_a_folder_of_parquet_files_gives_the_split_that_is_asked_for(tmp_path, capsys):
    for split in ("train", "test"):
        rows = datasets.Dataset.from_dict({"prompt": ["", f"of {split}"]})
        rows.to_parquet(str(tmp_path / f"{split}-00000-of-00001.parquet"))
        some = prompts.load_prompts(str(tmp_path), split=split)
        assert some.texts == [f"of {split}"] and some.rows == [1]
        assert "1 prompts (column 'prompt'); left out: 1 empty ones" in capsys.readouterr().out


def test_a_line_ends_only_where_the_file_says(tmp_path):
    (tmp_path / "some.txt").write_bytes("\ufeffa dog\u2028on a mat\r\na caf\u00e9\n".encode())
    assert prompts.load_prompts(str(tmp_path / "some.txt")).texts == ["a dog\u2028on a mat", "a caf\u00e9"]


def test_prompts_by_hand():
    assert prompts.from_list([]) is None
    assert prompts.from_list(["a", "b"]).texts == ["a", "b"]
