"""Load pictures by name: an embedded set (shipped with the package), a hub id, a local folder or a parquet file.

The columns of pictures and of labels are found by their content, or named by the caller. Nothing is left out silently:
an :class:`Images` counts and reports what it does not load.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageColor
import torch
from torch import Tensor

from vaelab.core import hub
from vaelab.core.paths import local
from vaelab.core.validate import at_least, nearest
from vaelab.data import bundled, columns, folders
from vaelab.data.transforms import BROKEN, collate, decode, square, to_rgb
from vaelab.training.batches import Batches, shuffled_batches

if TYPE_CHECKING:
    import datasets

PARQUET_CONVERSION = "refs/convert/parquet"
AS_FOLDER = "download it, and give its folder of pictures with a metadata.csv (columns file_name and label)"
MOVED = {
    "frgfm/imagenette": f"frgfm/imagenette:320px with the revision {PARQUET_CONVERSION}",
    "HuggingFaceM4/FGVC-Aircraft": f"a folder: {AS_FOLDER}",
    "cifar10": "uoft-cs/cifar10",
    "rcugarte/genfonts_data": "any folder of glyph pictures, or the embedded glyphs",
}
"""Replacements for hub ids that ``datasets`` cannot load, or that no longer exist."""


class Part(NamedTuple):
    """Rows of one split of one data set, before pictures are sampled from them."""

    rows: "datasets.Dataset"
    """All rows of the split; pictures are not decoded."""
    image: str
    """The column of pictures."""
    labels: np.ndarray | None
    """Class indices (rows,), -1 if a label is withheld; None if the data set has no classes."""
    classes: list[str]
    label_column: str
    """The column of the labels, or ``""``."""
    label_choices: list[str]
    """Columns that could be labels, if none is chosen."""
    roots: Callable[[int], Sequence[Path]]
    """Returns the folders that may hold the picture of a row, if the row stores a path."""
    identity: str
    """Identifies the split: if two parts have the same identity, equal rows are the same picture."""
    numbers: range
    """The requested rows of the split."""
    notes: list[str]


class Images:
    """Preprocessed pictures of one split.

    ``images[i]`` is ``{"pixels": (3, R, R) float32 in [-1, 1], "index": i}``, with ``"label"``
    if the data set has classes; it is None if picture i cannot be read.

    Attributes:
        resolution: the side R of the pictures, in pixels.
        name: the data set, the split, and how the pictures were sampled.
        notes: what was left out or chosen when the data set was loaded, one sentence each.
        skipped: the reason why a picture could not be read, by the picture's index.
        composited: the indices of the pictures read so far that had transparent pixels.
        first_frames: the indices of the pictures read so far that are the first of several in their file.
        label_choices: the columns among which ``label_column`` must choose one; empty if the labels are clear.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        resolution: int,
        name: str,
        *,
        max_images: int = 0,
        seed: int = 0,
        background: str = "white",
        white_level: float | None = None,
    ):
        self._parts = list(parts)
        where = [np.stack([np.full(len(p.numbers), i), p.numbers], 1) for i, p in enumerate(self._parts)]
        self._where = np.concatenate(where)  # (N, 2): part and row
        if max_images and max_images < len(self._where):
            drawn = np.random.default_rng(seed).permutation(len(self._where))[:max_images]
            self._where = self._where[np.sort(drawn)]
            name += f", {max_images} drawn by seed {seed}"
        self.resolution, self.name = resolution, name
        self._background, self._white_level = background, white_level
        self.skipped: dict[int, str] = {}
        self.composited: set[int] = set()
        self.first_frames: set[int] = set()
        self.notes = [note for part in self._parts for note in part.notes]
        self.classes: list[str] = self._parts[0].classes
        """The names of the classes; empty if the data set has no classes."""
        self.label_choices = [choice for part in self._parts for choice in part.label_choices]
        if any(part.classes != self.classes for part in self._parts):
            self.classes = []
            self.notes.append("no classes: the joined data sets have different ones")
        self._reported = self._counts()

    def __len__(self) -> int:
        return len(self._where)

    @property
    def labels(self) -> list[int]:
        """The class indices of all pictures, found without reading pictures; -1 if a label is withheld."""
        return [int(self._parts[part].labels[row]) for part, row in self._where] if self.classes else []

    @property
    def summary(self) -> str:
        """One phrase on what is loaded, and one on everything that was left out or chosen."""
        names = ", ".join(sorted({part.label_column for part in self._parts} - {""}))
        classes = f" of {len(self.classes)} classes ({names})" if self.classes else ", no classes"
        return "; ".join([f"{self.name}: {len(self):,} pictures{classes}", *self.notes])

    def __getitem__(self, index: int) -> dict[str, Any] | None:
        index = int(index)
        number, row = self._where[index]
        part = self._parts[number]
        try:
            opaque = to_rgb(
                decode(part.rows[int(row)][part.image], part.roots(int(row))),
                background=self._background,
                white_level=self._white_level,
            )
            pixels = square(opaque.image, self.resolution)
        except BROKEN as error:
            if not self.skipped:
                print(f"{self.name}: row {index} cannot be read and is skipped ({error})")
            self.skipped[index] = str(error)
            return None
        if opaque.composited:
            if not self.composited:
                print(f"{self.name}: row {index} has transparent pixels; they are composited on {self._background}")
            self.composited.add(index)
        if opaque.several_frames:
            if not self.first_frames:
                print(f"{self.name}: row {index} has several frames; only the first is read")
            self.first_frames.add(index)
        label = {"label": int(part.labels[row])} if self.classes else {}
        return {"pixels": pixels, "index": index, **label}

    def picture(self, index: int) -> Tensor:
        """Read one picture (3, R, R) for a figure: the picture ``index``, or the next one that can be read.

        Raises:
            ValueError: there is no picture with this index, or neither it nor any later one can be read.
        """
        if not 0 <= index < len(self):
            raise ValueError(f"picture: {self.name} has pictures 0 to {len(self) - 1}, got {index}")
        item = next((item for item in map(self.__getitem__, range(index, len(self))) if item is not None), None)
        if item is None:
            raise ValueError(f"picture: none of {self.name} from {index} on can be read ({self.skipped[index]})")
        return item["pixels"]

    def batches(self, batch_size: int) -> Iterator[dict[str, Tensor]]:
        """Yield all readable pictures once, in order, in batches of tensors.

        Raises:
            ValueError: no picture can be read.
        """
        at_least("batch_size", batch_size, 1)
        readable = False
        for start in range(0, len(self), batch_size):
            batch = collate([self[i] for i in range(start, min(start + batch_size, len(self)))])
            if batch is not None:
                readable = True
                yield batch
        if not readable:
            raise ValueError(f"dataset: no picture can be read: {self.report()}")
        if self._counts() != self._reported:
            self._reported = self._counts()
            print(self.report())

    def _counts(self) -> tuple[int, ...]:
        return len(self.skipped), len(self.composited), len(self.first_frames)

    def stack(self, count: int | None = None) -> Tensor:
        """Stack the first ``count`` readable pictures (None means all) to one tensor (N, 3, R, R)."""
        readable = (item["pixels"] for item in map(self.__getitem__, range(len(self))) if item)
        pixels = [picture for picture, _ in zip(readable, range(count or len(self)), strict=False)]
        if not pixels:
            raise ValueError(f"dataset: no picture of {self.name!r} can be read")
        return torch.stack(pixels)

    def shuffled(self, batch_size: int, seed: int) -> Batches:
        """Make endless shuffled batches for :func:`vaelab.training.loop.train`.

        A data set smaller than one batch gives batches of all its pictures.

        Raises:
            ValueError: not one picture of a batch can be read.
        """
        at_least("batch_size", batch_size, 1)

        def take(numbers: np.ndarray, epoch: int) -> dict[str, Tensor]:
            batch = collate([self[i] for i in numbers])
            if batch is None:
                raise ValueError(f"dataset: a whole batch of {self.name!r} cannot be read: {self.report()}")
            return batch

        return shuffled_batches(len(self), min(batch_size, len(self)), seed, take)

    def report(self) -> str:
        """Report in one line how many of the pictures read so far were skipped, were composited, or are the first of
        several frames."""
        sentences = []
        if self.skipped:
            index, reason = next(iter(self.skipped.items()))
            sentences.append(f"{len(self.skipped)} skipped as unreadable, first row {index} ({reason})")
        if self.composited:
            sentences.append(f"{len(self.composited)} with transparent pixels composited on {self._background}")
        if self.first_frames:
            sentences.append(f"{len(self.first_frames)} with several frames, of which the first is read")
        return f"{self.name}: {'; '.join(sentences) or 'every picture could be read'}"

    @property
    def source(self) -> dict[str, list[list[int]]]:
        """Which rows the pictures were sampled from, for :func:`shared_pictures`: for each split the ranges ``[first,
        end]``, where ``end`` is exclusive."""
        source: dict[str, list[list[int]]] = {}
        for part in self._parts:
            source.setdefault(part.identity, []).append([part.numbers.start, part.numbers.stop])
        return source


def shared_pictures(source: dict[str, list[list[int]]], other: dict[str, list[list[int]]]) -> int:
    """Count the pictures that two sources have in common; each is an :attr:`Images.source`, or was saved as one."""
    return sum(
        max(0, min(end, other_end) - max(first, other_first))
        for identity in source.keys() & other.keys()
        for first, end in source[identity]
        for other_first, other_end in other[identity]
    )


def load_images(
    dataset: str,
    *,
    split: str = "train",
    resolution: int = 256,
    max_images: int | None = None,
    seed: int = 0,
    revision: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    background: str = "white",
    white_level: float | None = None,
) -> Images:
    """Load a picture data set, and print what was loaded, chosen and left out.

    Args:
        dataset: an embedded name (``photos``, ``digits``, ``glyphs``, ``world``), a hub id (``owner/name`` or
            ``owner/name:subset``), a local folder (of pictures, or of parquet files), or a local
            parquet file. ``a+b`` joins several.
        split: a split's name; slices such as ``train[:90%]`` and sums such as ``train+test`` work
            too. A single parquet file is one split: the name is ignored.
        resolution: side R of the square pictures, in pixels.
        max_images: the number of pictures, sampled without replacement by ``seed``; None or 0 takes all.
        seed: determines which pictures are sampled.
        revision: a branch, tag or commit on the hub.
        image_column: the column of pictures; None or ``""`` takes the only column of pictures, or ``image``.
        label_column: the column of labels: class labels, text or whole numbers. None or ``""`` takes
            ``label``, or the only column of class labels; if there are several, the data set has no
            classes until one is chosen.
        background: the colour behind transparent pixels, see :func:`vaelab.data.transforms.to_rgb`.
        white_level: the value that is white in deep greyscale pictures, see :func:`vaelab.data.transforms.to_rgb`.

    Raises:
        ValueError: there is no such data set, split or column; there is no column of pictures, or several; the split
            has no picture; or a revision was given for data that are not on the hub.
    """
    at_least("resolution", resolution, 8)
    at_least("max_images", max_images or 0, 0)
    if white_level is not None:
        at_least("white_level", white_level, 0, exclusive=True)
    _require_colour(background)
    if revision and all(part in bundled.NAMES or local(part) is not None for part in _parts(dataset)):
        raise ValueError(
            f"revision: {revision!r} was given for {dataset!r}, which is not on the hub and has no revisions"
        )
    chosen_columns = (image_column or "", label_column or "")
    parts = [
        _load_part(part, piece, revision, *chosen_columns) for part in _parts(dataset) for piece in split.split("+")
    ]
    if not sum(len(part.numbers) for part in parts):
        raise ValueError(f"dataset: {dataset!r} has no picture in its split {split!r}")
    name = f"{dataset}[{split}]" + (f"@{revision}" if revision else "")
    # stores and checkpoints compare this name when they are resumed: it holds all that determines pictures and labels
    chosen = {"image_column": image_column, "label_column": label_column, "white_level": white_level}
    chosen["background"] = background if background != "white" else None
    name += "".join(f", {parameter} {value}" for parameter, value in chosen.items() if value)
    drawn = {"max_images": max_images or 0, "seed": seed}
    images = Images(parts, resolution, name, **drawn, background=background, white_level=white_level)
    print(images.summary)
    return images


def load_pair(
    dataset: str, split: str, eval_split: str, *, max_images: int, eval_images: int, **options: Any
) -> tuple[Images, Images]:
    """Load pictures to train on, and other pictures to evaluate on; ``options`` are those of :func:`load_images`.

    Raises:
        ValueError: the splits have pictures in common; also the errors of :func:`load_images`.
    """
    at_least("eval_images", eval_images or 0, 0)
    learning = load_images(dataset, split=split, max_images=max_images, **options)
    held_out = load_images(dataset, split=eval_split, max_images=eval_images, **options)
    if shared := shared_pictures(learning.source, held_out.source):
        raise ValueError(
            f"eval_split: {eval_split!r} and split {split!r} of {dataset!r} have {shared} pictures in common; "
            "expected slices that do not overlap, such as train[:90%] and train[90%:]"
        )
    return learning, held_out


def short_name(dataset: str) -> str:
    """Shorten a data set's name for a label: a hub id without owner and subset, a path's last part."""
    return "+".join(Path(part.split(":")[0]).stem for part in _parts(dataset))


def _parts(dataset: str) -> list[str]:
    """Split ``a+b`` into the names of the joined data sets; the path of an existing file or folder may contain a
    plus."""
    return [dataset] if local(dataset) is not None else dataset.split("+")


def _require_colour(background: str) -> None:
    try:
        PIL.ImageColor.getrgb(background)
    except ValueError as error:
        raise ValueError(
            f"background: {background!r} is no colour that Pillow knows, such as white or #808080"
        ) from error


class _Split(NamedTuple):
    """All rows of a split, before its columns are known."""

    rows: "datasets.Dataset"
    identity: str
    roots: Callable[[int], Sequence[Path]]
    every_value: Callable[[str], Iterable[Any]]
    """The values of a column in all splits of the data set."""
    notes: list[str]


def _load_part(dataset: str, split: str, revision: str | None, image_column: str, label_column: str) -> Part:
    base = split.split("[")[0]
    whole = _load_split(dataset, base, revision)
    image = columns.find_images(whole.rows, dataset, image_column)
    labels, classes, column, choices = columns.find_labels(whole.rows, whole.every_value, dataset, image, label_column)
    notes = list(whole.notes)
    if choices:
        notes.append(f"no classes chosen; label_column may be {', '.join(choices)}")
    import datasets

    rows = whole.rows.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    numbers = _slice(split, base, len(rows))
    return Part(rows, image, labels, classes, column, choices, whole.roots, whole.identity, numbers, notes)


def _slice(split: str, base: str, total: int) -> range:
    """Return the rows that the slice ``split`` takes of a split of ``total`` rows."""
    import datasets

    try:
        (part,) = datasets.ReadInstruction.from_spec("train" + split[len(base) :]).to_absolute({"train": total})
    except (AssertionError, ValueError) as error:
        raise ValueError(f"split: {split!r} is no slice of {total} pictures, such as train[:90%] ({error})") from error
    return range(part.from_ or 0, total if part.to is None else part.to)


def _load_split(dataset: str, split: str, revision: str | None) -> _Split:
    if dataset in bundled.NAMES:
        return _Split(bundled.load_split(dataset, split), f"{dataset}[{split}]", lambda row: (), lambda column: (), [])
    path = local(dataset)
    if path is None:
        return _hub_split(dataset, split, revision)
    if path.is_file():
        if path.suffix != ".parquet":
            raise ValueError(f"dataset: {dataset!r} is a file but no .parquet; give a folder for pictures")
        return _parquet_split(path.parent, [path], [path], dataset, _local_identity(path), [])
    listing = folders.list_files(path)
    if not listing.pictures and not listing.parquet:
        raise ValueError(f"dataset: no picture and no parquet file in the folder {dataset!r}")
    notes = [f"left out: {count} x {kind}" for kind, count in sorted(listing.left_out.items())]
    if set(listing.parquet) - set(listing.metadata):
        splits, more = folders.parquet_splits(listing)
        split = folders.find_split(f"split (of {dataset!r})", split, splits)
        if listing.pictures:
            more.append(f"left out: {len(listing.pictures)} picture files but for those that a parquet row names")
        files = [path / name for name in splits[split]]
        every_file = [path / name for names in splits.values() for name in names]
        return _parquet_split(path, files, every_file, dataset, _local_identity(path, split), notes + more)
    return _folder_split(path, listing, dataset, split, notes)


def _parquet_split(
    folder: Path, files: list[Path], every_file: list[Path], dataset: str, identity: str, notes: list[str]
) -> _Split:
    import pyarrow.parquet as pq

    rows = folders.read_parquet(files, dataset)
    ends = np.cumsum([pq.read_metadata(file).num_rows for file in files])

    def roots(row: int) -> tuple[Path, Path]:
        return files[int(np.searchsorted(ends, row, side="right"))].parent, folder

    def every_value(column: str) -> Iterator[Any]:
        for file in every_file:
            if column in pq.read_schema(file).names:
                yield from pq.ParquetFile(file).read(columns=[column])[column].unique().to_pylist()

    return _Split(rows, identity, roots, every_value, notes)


def _folder_split(folder: Path, listing: folders.Listing, dataset: str, split: str, notes: list[str]) -> _Split:
    import datasets

    found = folders.picture_folder(folder, listing)
    split = folders.find_split(f"split (of {dataset!r})", split, found.splits)
    rows = [(path, row) for path in found.splits[split] for row in found.metadata.get(path, [{}])]
    stored = [{"bytes": None, "path": str(folder / path)} for path, _ in rows]
    tables = {"image": datasets.Dataset.from_dict({"image": stored}, features=_undecoded("image"))}
    described = {column for rows in found.metadata.values() for row in rows for column in row} - {"image"}
    for column in sorted(described):
        values = [row.get(column) for _, row in rows]
        kinds = {type(value) for value in values} - {type(None)}
        if kinds and kinds <= {str, int, float, bool}:
            same = values if len(kinds) == 1 else [None if value is None else str(value) for value in values]
            tables[column] = datasets.Dataset.from_dict({column: same})
    notes = [*notes, *found.notes]
    if "label" not in tables and any(path in found.labels for path, _ in rows):
        label = datasets.ClassLabel(names=found.classes)
        numbers = [found.labels.get(path, -1) for path, _ in rows]
        tables["label"] = datasets.Dataset.from_dict({"label": numbers}, features=datasets.Features(label=label))
        notes += ["classes are the names of the folders"] if listing.metadata else []
    whole = datasets.concatenate_datasets(list(tables.values()), axis=1)
    anywhere = (Path(folder.resolve().anchor),)  # the files were listed here, and a link may lead anywhere

    def every_value(column: str) -> list[Any]:
        return [row.get(column) for rows in found.metadata.values() for row in rows]

    return _Split(whole, _local_identity(folder, split), lambda row: anywhere, every_value, notes)


def _local_identity(path: Path, split: str = "") -> str:
    """Make a text that identifies a split of a file or folder, without naming this machine's folders."""
    return f"{path.name}[{split}] {hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}"


def _undecoded(column: str) -> "datasets.Features":
    import datasets

    return datasets.Features({column: datasets.Image(decode=False)})


def _announce_download(name: str, revision: str | None, part: dict[str, str]) -> None:
    """Announce the download of a data set on the hub, unless the ``datasets`` library has prepared it already."""
    import datasets

    builder = datasets.load_dataset_builder(name, revision=revision, **part)
    if not Path(builder.cache_dir).is_dir():
        urls = [url for split in (builder.config.data_files or {}).values() for url in split]
        # hf://datasets/owner/name@commit/path
        files = [url.partition("@")[2].partition("/")[2] for url in urls if url.startswith("hf://")]
        hub.announce_download(name, files, revision=revision, dataset=True, parameter="dataset", prepared=True)


def _hub_split(dataset: str, split: str, revision: str | None) -> _Split:
    name, _, subset = dataset.partition(":")
    moved = f"; use {MOVED[name]}" if name in MOVED else ""
    if dataset.count("/") != 1 or dataset.startswith((".", "/", "~")):
        known = [*bundled.NAMES, "frgfm/imagenette:320px", "uoft-cs/cifar10"]
        raise ValueError(
            f"dataset: {dataset!r} is neither embedded ({', '.join(bundled.NAMES)}), a local folder or "
            "file, nor a hub id (owner/name)" + (moved or f"; did you mean {nearest(dataset, known, 1)[0]!r}?")
        )
    import datasets
    import huggingface_hub

    # the hub's parquet conversions keep each subset in a folder of its name
    part = {"data_dir" if revision == PARQUET_CONVERSION else "name": subset} if subset else {}
    with hub.access_repository(name, revision=revision, dataset=True, parameter="dataset", hint=moved) as described:
        try:
            if described:
                _announce_download(name, revision, part)
            rows = datasets.load_dataset(name, split=split, revision=revision, **part)
        except (OSError, RuntimeError, ValueError, datasets.exceptions.DatasetsError) as error:
            if "scripts are no longer supported" in str(error):
                script = "; it needs a loading script, which the datasets library no longer runs"
                moved = script + (moved or f"; try the revision {PARQUET_CONVERSION}, or {AS_FOLDER}")
            raise ValueError(f"dataset: {dataset!r} could not be read from the hub{moved} ({error})") from error
    caches = [datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH]
    roots = tuple(Path(cache) for cache in [*caches, huggingface_hub.constants.HF_HUB_CACHE])

    def every_value(column: str) -> Iterator[Any]:
        # the library prepares all splits of a data set for one, so that this downloads nothing
        for rows in datasets.load_dataset(name, revision=revision, **part).values():
            yield from rows.unique(column) if column in rows.column_names else ()

    return _Split(rows, f"{dataset}[{split}]@{revision or ''}", lambda row: roots, every_value, [])
