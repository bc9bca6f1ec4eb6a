"""Prompts by one name: the world, a hub id, a local text or parquet file."""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vaelab import world
from vaelab.core.paths import local
from vaelab.core.validate import at_least, nearest, one_of
from vaelab.world.scenes import Scene

if TYPE_CHECKING:
    import datasets

LIKELY = ("prompt", "caption", "text", "TEXT")
MOVED = {"laion/laion-coco": "guangyil/laion-coco-aesthetic", "laion-coco": "guangyil/laion-coco-aesthetic"}


class Prompts(NamedTuple):
    """Some prompts, and where they come from."""

    texts: list[str]
    rows: list[int]
    """Of each its number in the data set; of the world the scene's seed."""
    name: str
    split: str

    @property
    def of_the_world(self) -> bool:
        """Whether they describe scenes of the world, whose truth is known."""
        return self.name == "world"

    @property
    def scenes(self) -> list[Scene]:
        """The scenes that the prompts describe.

        Raises:
            ValueError: prompts that are not of the world.
        """
        if not self.of_the_world:
            raise ValueError(f"dataset: {self.name!r} has no scenes; only the world's prompts have")
        return [world.sample(row, self.split) for row in self.rows]

    @property
    def spelled_out(self) -> list[Scene]:
        """The same scenes with every factor named."""
        return [scene.spelled_out() for scene in self.scenes]


def given(texts: list[str]) -> Prompts | None:
    """Prompts written by hand; None for none."""
    return Prompts(texts, list(range(len(texts))), "given", "given") if texts else None


def load_prompts(
    dataset: str, *, split: str = "train", count: int = 0, column: str = "", revision: str | None = None
) -> Prompts:
    """The first ``count`` prompts of a data set; empty ones are left out.

    Args:
        dataset: ``world``, a hub id (``owner/name``, streamed), a local parquet file, or a local
            text file with a prompt a line.
        split: a split's name; of a local file there is one only.
        count: how many; 0 takes all there are.
        column: of the prompts; empty for the likeliest by name, or the only one of text.
        revision: a branch, tag or commit on the hub.

    Raises:
        ValueError: no such data set, split or column, no prompt in it, or all of the world, which
            has no end.
    """
    at_least("max_images", count, 0)
    if dataset == "world":
        one_of("split", split, world.SPLITS)
        at_least("max_images (of the world, which has no end)", count, 1)
        return Prompts([world.sample(seed, split).prompt for seed in range(count)], list(range(count)), "world", split)
    path = local(dataset)
    lines = _lines(path, dataset) if path and path.suffix == ".txt" else _texts(dataset, split, column, revision)
    kept = list(islice(((row, text.strip()) for row, text in enumerate(lines) if text and text.strip()), count or None))
    if not kept:
        raise ValueError(f"dataset: no prompt in {dataset!r}")
    rows, texts = zip(*kept, strict=True)
    return Prompts(list(texts), list(rows), dataset, split)


def _lines(path: Path, dataset: str) -> list[str]:
    try:
        return path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"dataset: {dataset!r} could not be read as text ({error})") from error


def _texts(dataset: str, split: str, column: str, revision: str | None) -> Iterable[str]:
    import datasets

    path = local(dataset)
    files = None if path is None else _parquet(path, dataset)
    if files is None:
        _refuse_no_hub_id(dataset)
    try:
        if files is not None:
            rows = datasets.load_dataset("parquet", data_files=files, split="train")
        else:
            rows = datasets.load_dataset(dataset, split=split, revision=revision, streaming=True)
    except (OSError, RuntimeError, ValueError, datasets.exceptions.DatasetsError) as error:
        moved = f" It is now {MOVED[dataset]!r}." if dataset in MOVED else ""
        raise ValueError(f"dataset: {dataset!r} could not be loaded.{moved} ({error})") from error
    chosen = _column(rows, dataset, column)
    return (row[chosen] for row in rows.select_columns([chosen]))


def _parquet(path: Path, dataset: str) -> list[str]:
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    if not files or any(file.suffix != ".parquet" for file in files):
        raise ValueError(f"dataset: {dataset!r} holds no prompts; expected .txt, .parquet or a folder of the latter")
    return [str(file) for file in files]


def _refuse_no_hub_id(dataset: str) -> None:
    if dataset.count("/") != 1 or dataset.startswith((".", "/", "~")):
        known = ["world", *MOVED.values()]
        raise ValueError(
            f"dataset: {dataset!r} is neither the world, a local file, nor a hub id (owner/name). "
            f"Did you mean {nearest(dataset, known, 1)[0]!r}?"
        )


def _column(rows: "datasets.Dataset | datasets.IterableDataset", dataset: str, column: str) -> str:
    features = rows.features or dict.fromkeys(next(iter(rows)))
    if column:
        one_of(f"column (of {dataset!r})", column, features)
        return column
    texts = [name for name, kind in features.items() if kind is None or getattr(kind, "dtype", "").endswith("string")]
    likely = [name for name in LIKELY if name in texts] or texts
    if not likely:
        raise ValueError(f"dataset: no column of text in {dataset!r}; its columns: {', '.join(features)}")
    return likely[0]
