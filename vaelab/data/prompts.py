"""Load prompts by name: the synthetic scene world (:mod:`vaelab.world`), a hub id, a local text file or parquet
files."""

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vaelab import world
from vaelab.core import hub
from vaelab.core.paths import local
from vaelab.core.validate import at_least, nearest, one_of
from vaelab.data import folders
from vaelab.world.scenes import Scene

if TYPE_CHECKING:
    import datasets

LIKELY = ("prompt", "caption", "text", "TEXT")
"""Likely names of a column of prompts, the likeliest first."""
MOVED = {"laion/laion-coco": "guangyil/laion-coco-aesthetic", "laion-coco": "guangyil/laion-coco-aesthetic"}
"""Replacements for ids that no longer exist on the hub."""


class Prompts(NamedTuple):
    """Prompts, and where they come from."""

    texts: list[str]
    rows: list[int]
    """The row of each prompt in its data set; for the world, the scene's seed."""
    name: str
    split: str

    @property
    def of_the_world(self) -> bool:
        """Whether the prompts describe scenes of the synthetic world, so that the described scene is known."""
        return self.name == "world"

    @property
    def scenes(self) -> list[Scene]:
        """The scenes that the prompts describe.

        Raises:
            ValueError: the prompts are not from the world.
        """
        if not self.of_the_world:
            raise ValueError(f"dataset: {self.name!r} has no scenes; only the world's prompts have")
        return [world.sample(row, self.split) for row in self.rows]

    @property
    def spelled_out(self) -> list[Scene]:
        """The same scenes with every factor (attribute such as colour) named in the prompt."""
        return [scene.spelled_out() for scene in self.scenes]


def from_list(texts: list[str]) -> Prompts | None:
    """Make prompts from a list of texts written by hand; None if the list is empty."""
    return Prompts(texts, list(range(len(texts))), "given", "given") if texts else None


def load_prompts(
    dataset: str, *, split: str = "train", count: int = 0, column: str = "", revision: str | None = None
) -> Prompts:
    """Load the first ``count`` prompts of a data set, without empty ones; print how many, and from which column.

    Args:
        dataset: ``world``, a hub id (``owner/name``, streamed), a local text file with one prompt per
            line, a local parquet file, or a folder of parquet files.
        split: a split's name. A single file is one split: the name is ignored.
        count: the number of prompts; 0 takes all.
        column: the column of prompts. Empty takes the column with the likeliest name (prompt, caption, text), or the
            only column of text.
        revision: a branch, tag or commit on the hub.

    Raises:
        ValueError: there is no such data set, split or column; there are several columns of text and none has a likely
            name; there is no prompt; all prompts of the world, which has no end, were asked for; a revision was
            given for data that are not on the hub; or a column was given for a text file.
    """
    at_least("max_images", count, 0)
    path = local(dataset)
    if revision and (dataset == "world" or path is not None):
        raise ValueError(
            f"revision: {revision!r} was given for {dataset!r}, which is not on the hub and has no revisions"
        )
    if column and (dataset == "world" or (path is not None and path.suffix == ".txt")):
        raise ValueError(f"column: {column!r} was given for {dataset!r}, which has no columns")
    if dataset == "world":
        one_of("split", split, world.SPLITS)
        at_least("max_images (of the world, which has no end)", count, 1)
        return Prompts([world.sample(seed, split).prompt for seed in range(count)], list(range(count)), "world", split)
    if path and path.suffix == ".txt":
        lines, source = _lines(path, dataset), "lines"
    else:
        rows = _hub_rows(dataset, split, revision) if path is None else _parquet_rows(path, dataset, split)
        source = f"column {(chosen := _column(rows, dataset, column))!r}"
        lines = (row[chosen] for row in rows.select_columns([chosen]))
    numbered = enumerate(text and text.strip() for text in lines)
    filled = list(islice(((row, text) for row, text in numbered if text), count or None))
    if not filled:
        raise ValueError(f"dataset: no prompt in {dataset!r}")
    rows, texts = zip(*filled, strict=True)
    empty = rows[-1] + 1 - len(rows)
    left_out = f"; left out: {empty} empty ones" if empty else ""
    print(f"{dataset}[{split}]: {len(texts):,} prompts ({source}){left_out}")
    return Prompts(list(texts), list(rows), dataset, split)


def _lines(path: Path, dataset: str) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"dataset: {dataset!r} could not be read as text ({error})") from error


def _parquet_rows(path: Path, dataset: str, split: str) -> "datasets.Dataset":
    """Read the rows of one split of a local parquet file or a folder of such files."""
    if path.is_file():
        files = [path] if path.suffix == ".parquet" else []
    else:
        splits, _ = folders.parquet_splits(folders.list_files(path))
        split = folders.find_split(f"split (of {dataset!r})", split, splits)
        files = [path / name for name in splits[split]]
    if not files:
        raise ValueError(f"dataset: {dataset!r} holds no prompts; expected .txt, .parquet or a folder of the latter")
    return folders.read_parquet(files, dataset)


def _hub_rows(dataset: str, split: str, revision: str | None) -> "datasets.IterableDataset":
    import datasets

    if dataset.count("/") != 1 or dataset.startswith((".", "/", "~")):
        known = ["world", *MOVED.values()]
        raise ValueError(
            f"dataset: {dataset!r} is neither the world, a local file, nor a hub id (owner/name). "
            f"Did you mean {nearest(dataset, known, 1)[0]!r}?"
        )
    moved = f"; it is now {MOVED[dataset]!r}" if dataset in MOVED else ""
    with hub.access_repository(dataset, revision=revision, dataset=True, parameter="dataset", hint=moved):
        try:
            return datasets.load_dataset(dataset, split=split, revision=revision, streaming=True)
        except (OSError, RuntimeError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise ValueError(f"dataset: {dataset!r} could not be read from the hub{moved} ({error})") from error


def _column(rows: "datasets.Dataset | datasets.IterableDataset", dataset: str, column: str) -> str:
    features = rows.features or dict.fromkeys(next(iter(rows)))
    texts = [name for name, kind in features.items() if kind is None or getattr(kind, "dtype", "").endswith("string")]
    if column:
        one_of(f"column (of {dataset!r})", column, features)
        if column not in texts:
            raise ValueError(f"column: {column!r} of {dataset!r} holds no text")
        return column
    if not texts:
        raise ValueError(f"dataset: no column of text in {dataset!r}; its columns: {', '.join(features)}")
    likely = [name for name in LIKELY if name in texts]
    if not likely and len(texts) > 1:
        raise ValueError(f"column: {dataset!r} has several columns of text; give one of {', '.join(texts)}")
    return (likely or texts)[0]
