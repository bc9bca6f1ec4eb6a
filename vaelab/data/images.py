"""Pictures by one name: an embedded set, a hub id, a local image folder or a parquet file.

Everything goes through the ``datasets`` library. Columns are found by their feature type, so no
column needs a name.
"""

import glob
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from vaelab.core.paths import local
from vaelab.core.validate import at_least, nearest, unknown
from vaelab.data import bundled
from vaelab.data.transforms import BROKEN, collate, decode, preprocess

if TYPE_CHECKING:
    import datasets

PARQUET_CONVERSION = "refs/convert/parquet"
MOVED = {
    "frgfm/imagenette": f"frgfm/imagenette:320px with the revision {PARQUET_CONVERSION} (its script is no longer run)",
    "cifar10": "uoft-cs/cifar10",
    "rcugarte/genfonts_data": "any folder of glyph pictures, or the embedded glyphs",
}


class Images:
    """Preprocessed pictures of one split.

    ``images[i]`` is ``{"pixels": (3, R, R) float32 in [-1, 1], "index": i}``, with ``"label"``
    where the data set has one, or None where picture i cannot be read. What could not be read is
    counted in ``skipped``, once a picture.
    """

    def __init__(self, rows: "datasets.Dataset", image: str, label: str | None, resolution: int, name: str):
        self._rows, self._image, self._label = rows, image, label
        self.resolution, self.name = resolution, name
        self.skipped: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def classes(self) -> list[str]:
        """The class names, or an empty list where the data set has no labels."""
        return list(self._rows.features[self._label].names) if self._label else []

    @property
    def labels(self) -> list[int]:
        """The class numbers of all pictures, of which none is read; -1 where one is withheld."""
        return [-1 if label is None else label for label in self._rows[self._label]] if self._label else []

    def __getitem__(self, index: int) -> dict[str, Any] | None:
        row = self._rows[int(index)]
        try:
            pixels = preprocess(decode(row[self._image]), self.resolution)
        except BROKEN as error:
            self.skipped[int(index)] = str(error)
            return None
        # a test split's labels may be withheld
        label = {"label": -1 if row[self._label] is None else row[self._label]} if self._label else {}
        return {"pixels": pixels, "index": int(index), **label}

    def picture(self, index: int) -> Tensor:
        """One picture (3, R, R), for a figure: number ``index``, or the next that can be read.

        Raises:
            ValueError: there is no such picture, or none from there on can be read.
        """
        if not 0 <= index < len(self):
            raise ValueError(f"picture: {self.name} has pictures 0 to {len(self) - 1}, got {index}")
        item = next((item for item in map(self.__getitem__, range(index, len(self))) if item is not None), None)
        if item is None:
            raise ValueError(f"picture: none of {self.name} from {index} on can be read ({self.skipped[index]})")
        return item["pixels"]

    def batches(self, batch_size: int) -> Iterator[dict[str, Tensor]]:
        """All readable pictures once, in order, in batches of tensors.

        Raises:
            ValueError: no picture can be read.
        """
        at_least("batch_size", batch_size, 1)
        found = False
        for start in range(0, len(self), batch_size):
            batch = collate([self[i] for i in range(start, min(start + batch_size, len(self)))])
            if batch is not None:
                found = True
                yield batch
        if not found:
            raise ValueError(f"dataset: no picture can be read: {self.report()}")

    def stack(self, count: int | None = None) -> Tensor:
        """The first ``count`` readable pictures (all if None) as one tensor (N, 3, R, R)."""
        readable = (item["pixels"] for item in map(self.__getitem__, range(len(self))) if item)
        taken = [pixels for pixels, _ in zip(readable, range(count or len(self)), strict=False)]
        if not taken:
            raise ValueError(f"dataset: no picture of {self.name!r} can be read")
        return torch.stack(taken)

    def shuffled(self, batch_size: int, seed: int) -> Callable[..., Iterator[dict[str, Tensor]]]:
        """Endless shuffled batches for :func:`vaelab.training.loop.train`; epoch e's order is fixed
        by (seed, e) alone, so that a run can be taken up at any batch."""
        at_least("batch_size", batch_size, 1)
        batch_size = min(batch_size, len(self))

        def batches(start: int = 0, rank: int = 0, world: int = 1) -> Iterator[dict[str, Tensor]]:
            per_epoch = max(1, len(self) // (batch_size * world))
            order, ordered = None, -1
            while True:
                epoch, place = divmod(start, per_epoch)
                if epoch != ordered:
                    order, ordered = np.random.default_rng([seed, epoch]).permutation(len(self)), epoch
                begin = (place * world + rank) * batch_size
                batch = collate([self[i] for i in np.take(order, range(begin, begin + batch_size), mode="wrap")])
                if batch is None:
                    raise ValueError(f"dataset: a whole batch of {self.name!r} cannot be read: {self.report()}")
                yield batch
                start += 1

        return batches

    def report(self) -> str:
        """One line on what was skipped."""
        if not self.skipped:
            return f"{self.name}: every picture that was asked for could be read"
        first = next(iter(self.skipped.items()))
        return f"{self.name}: {len(self.skipped)} skipped as unreadable, first row {first[0]} ({first[1]})"


def load_images(
    dataset: str,
    *,
    split: str = "train",
    resolution: int = 256,
    max_images: int | None = None,
    seed: int = 0,
    revision: str | None = None,
) -> Images:
    """Load a picture data set.

    Args:
        dataset: an embedded name (``photos``, ``digits``, ``glyphs``, ``world``), a hub id (``owner/name`` or
            ``owner/name:subset``), a local folder (of pictures, or of parquet files), or a local
            parquet file. ``a+b`` joins several.
        split: a split's name; slices such as ``train[:90%]`` work too. A single parquet file is
            one split, whatever name is asked for.
        resolution: side R of the square pictures, in pixels.
        max_images: how many to take, drawn without replacement by ``seed``; None or 0 takes all.
        seed: fixes which pictures are drawn.
        revision: a branch, tag or commit on the hub.

    Raises:
        ValueError: no such data set or split, no image column, or no picture in it.
    """
    at_least("resolution", resolution, 8)
    at_least("max_images", max_images or 0, 0)
    rows, image, label = _joined([_columns(_rows(part, split, revision), part) for part in _parts(dataset)])
    if len(rows) == 0:
        raise ValueError(f"dataset: {dataset!r} has no picture in its split {split!r}")
    name = f"{dataset}[{split}]" + (f"@{revision}" if revision else "")
    if max_images and max_images < len(rows):
        rows = rows.select(np.sort(np.random.default_rng(seed).permutation(len(rows))[:max_images]))
        name += f", {max_images} drawn by seed {seed}"
    return Images(rows, image, label, resolution, name)


def load_pair(
    dataset: str, split: str, eval_split: str, *, max_images: int, eval_images: int, **options: Any
) -> tuple[Images, Images]:
    """Pictures to train on, and others to measure on; ``options`` as in :func:`load_images`.

    Raises:
        ValueError: both splits are the same pictures, besides what :func:`load_images` raises.
    """
    at_least("eval_images", eval_images or 0, 0)
    if same_pictures(dataset, split, eval_split):
        raise ValueError(
            f"eval_split: {eval_split!r} and split {split!r} are the same pictures of {dataset!r}; "
            "take slices, such as train[:90%] and train[90%:]"
        )
    return (
        load_images(dataset, split=split, max_images=max_images, **options),
        load_images(dataset, split=eval_split, max_images=eval_images, **options),
    )


def short_name(dataset: str) -> str:
    """A data set's name for a label: a hub id without owner and subset, a path's last part."""
    return "+".join(Path(part.split(":")[0]).stem for part in _parts(dataset))


def _parts(dataset: str) -> list[str]:
    """The data sets that ``a+b`` joins; a path that exists may have a plus in it."""
    return [dataset] if local(dataset or "+") else dataset.split("+")


def _rows(dataset: str, split: str, revision: str | None) -> "datasets.Dataset":
    if dataset in bundled.NAMES:
        return bundled.load(dataset, split)
    path = local(dataset)
    if path is not None:
        return _local_rows(path, dataset, split)
    name, _, subset = dataset.partition(":")
    moved = f" Try {MOVED[name]}." if name in MOVED else ""
    if dataset.count("/") != 1 or dataset.startswith((".", "/", "~")):
        known = [*bundled.NAMES, *(name for name in MOVED if "/" in name)]
        raise ValueError(
            f"dataset: {dataset!r} is neither embedded ({', '.join(bundled.NAMES)}), a local folder or "
            "file, nor a hub id (owner/name)." + (moved or f" Did you mean {nearest(dataset, known, 1)[0]!r}?")
        )
    import datasets

    # the hub's parquet conversions keep each subset in a folder of its name
    part = {"data_dir" if revision == PARQUET_CONVERSION else "name": subset} if subset else {}
    try:
        return datasets.load_dataset(name, split=split, revision=revision, **part)
    except (OSError, RuntimeError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"dataset: {dataset!r} could not be loaded from the hub.{moved} ({error})") from error


def _local_rows(path: Path, dataset: str, split: str) -> "datasets.Dataset":
    import datasets

    place = glob.escape(str(path))
    if path.is_file():
        if path.suffix != ".parquet":
            raise ValueError(f"dataset: {dataset!r} is a file but no .parquet; give a folder for pictures")
        with _told(dataset):
            return datasets.load_dataset("parquet", data_files={_base(split): place}, split=split)
    kind = "parquet" if any(path.rglob("*.parquet")) else "imagefolder"
    known = PIL.Image.registered_extensions()
    if kind == "imagefolder" and not any(file.suffix.lower() in known for file in path.rglob("*")):
        raise ValueError(f"dataset: no picture and no parquet file in the folder {dataset!r}")
    with _told(dataset):
        available = datasets.get_dataset_split_names(kind, data_dir=place)
    if _base(split) not in available:
        raise unknown(f"split (of {dataset!r})", split, available)
    with _told(dataset):
        return datasets.load_dataset(kind, data_dir=place, split=split)


@contextmanager
def _told(dataset: str) -> Iterator[None]:
    """What ``datasets`` says of an empty or damaged data set, with the parameter's name."""
    import datasets

    try:
        yield
    except (OSError, RuntimeError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"dataset: {dataset!r} holds no row that can be read ({error.__cause__ or error})") from error


def _base(split: str) -> str:
    return split.split("[")[0]


def same_pictures(dataset: str, split: str, other_split: str) -> bool:
    """Whether two differently named splits are one: of a single parquet file they are."""
    return (
        any(
            (path := local(part)) is not None and path.is_file() and _base(split) != _base(other_split)
            for part in _parts(dataset)
        )
        or split == other_split
    )


def _columns(rows: "datasets.Dataset", dataset: str) -> tuple["datasets.Dataset", str, str | None]:
    """The rows with undecoded pictures, their image column and their label column, if any."""
    import datasets

    sure = {name: _holds_pictures(feature) for name, feature in rows.features.items()}
    image = max(sure, key=sure.get, default=None)
    if not sure.get(image):
        kinds = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in rows.features.items())
        raise ValueError(f"dataset: no image column in {dataset!r}; its columns: {kinds or 'none'}")
    rows = rows.cast_column(image, datasets.Image(decode=False))
    label = next((name for name, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)), None)
    return rows.select_columns([image, *([label] if label else [])]), image, label


def _holds_pictures(feature: Any) -> int:
    """How surely a column of this type holds pictures; 0 for no."""
    import datasets

    if isinstance(feature, datasets.Image):
        return 3
    if isinstance(feature, dict) and {"bytes", "path"} <= feature.keys():
        return 2
    return int(isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary"))


def _joined(parts: list[tuple["datasets.Dataset", str, str | None]]) -> tuple["datasets.Dataset", str, str | None]:
    """Several data sets as one; labels are kept only where there is one data set."""
    import datasets

    if len(parts) == 1:
        return parts[0]
    pictures = [rows.select_columns([image]).rename_column(image, "picture") for rows, image, _ in parts]
    return datasets.concatenate_datasets(pictures), "picture", None
