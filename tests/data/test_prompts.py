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
        ("{folder}/cut.parquet", {}, "^dataset: .*cut.parquet' could not be loaded"),
    ],
)
def test_what_is_refused(tmp_path, dataset, options, message):
    datasets.Dataset.from_dict({"number": [1, 2]}).to_parquet(str(tmp_path / "numbers.parquet"))
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "notes.md").write_text("a dog")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x80")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "numbers.parquet").read_bytes()[:200])
    with pytest.raises(ValueError, match=message):
        prompts.load_prompts(dataset.format(folder=tmp_path), **options)


def test_prompts_by_hand():
    assert prompts.given([]) is None
    assert prompts.given(["a", "b"]).texts == ["a", "b"]
