"""Find what a local folder holds: pictures by split and class, the metadata beside them, or parquet files.

The conventions are those of Hugging Face's ``imagefolder``, with three differences. Folders are splits only if all of
them have the name of a split, and the names of picture files have no meaning. Links are followed. The folder is listed
anew each time, without a cache. Files and rows that are not loaded are counted.
"""

import csv
import glob
import hashlib
import json
import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL.Image

from vaelab.core.validate import unknown

if TYPE_CHECKING:
    import datasets

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""The names that each split may have, as in the ``datasets`` library."""
SHARD = re.compile(r"(?P<split>.+?)-\d+-of-\d+")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
NOT_DECODED = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")
"""Formats that Pillow recognises and cannot decode by itself."""


@dataclass
class Listing:
    """The files below a folder, as sorted paths relative to it with forward slashes."""

    pictures: list[str] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)
    parquet: list[str] = field(default_factory=list)
    left_out: Counter = field(default_factory=Counter)
    """The number of entries that are not loaded, by kind."""


def list_files(folder: Path) -> Listing:
    """List a folder and all folders in it; links are followed, hidden files and folders are left out.

    Raises:
        OSError: a folder cannot be read.
    """
    found = Listing()
    suffixes = picture_suffixes()
    for here, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        real = os.path.realpath(here)
        for name in list(folders):
            below = os.path.realpath(os.path.join(here, name))
            if name.startswith(".") or name == "__MACOSX":
                found.left_out[f"hidden folder ({name})"] += 1
                folders.remove(name)
            elif (real + os.sep).startswith(below + os.sep):
                found.left_out["link to a folder above it"] += 1
                folders.remove(name)
        for name in files:
            path = Path(here, name)
            inside, suffix = path.relative_to(folder).as_posix(), path.suffix.lower()
            if name.startswith("."):
                found.left_out["hidden file"] += 1
            elif not path.exists():
                found.left_out["link that leads nowhere"] += 1
            elif not _is_text(inside):
                found.left_out["file whose name is no UTF-8"] += 1
            elif name in METADATA:
                found.metadata.append(inside)
            elif suffix == ".parquet":
                found.parquet.append(inside)
            elif suffix in suffixes:
                found.pictures.append(inside)
            else:
                found.left_out[f"file that is no picture ({suffix or 'no suffix'})"] += 1
    for paths in (found.pictures, found.metadata, found.parquet):
        paths.sort()
    if not found.pictures:  # a data set that is stored as metadata.parquet
        found.parquet = sorted([*found.parquet, *(path for path in found.metadata if path.endswith(".parquet"))])
    return found


def picture_suffixes() -> set[str]:
    """Return the suffixes of the files that Pillow can decode, in lower case with their dot."""
    PIL.Image.init()
    formats = PIL.Image.registered_extensions().items()
    return {suffix for suffix, name in formats if name in PIL.Image.OPEN and name not in NOT_DECODED}


def _is_text(path: str) -> bool:
    """Whether a file's name is UTF-8; Python represents other bytes by code points that cannot be encoded."""
    return not any("\udc80" <= character <= "\udcff" for character in path)


def _raise(error: OSError) -> None:
    raise error


def find_split(parameter: str, name: str, available: Iterable[str]) -> str:
    """Find the split among ``available`` that ``name`` refers to: the same name, or another name of the same split.

    Raises:
        ValueError: there is no such split, or several match; the error begins with ``parameter``.
    """
    available = list(available)
    if name in available:
        return name
    alike = [other for other in available if _canonical(other) == _canonical(name)]
    if len(alike) != 1:
        raise unknown(parameter, name, available)
    return alike[0]


def _canonical(name: str) -> str:
    return next((split for split, names in SPLITS.items() if name.lower() in names), name)


def _is_split(name: str) -> bool:
    return _canonical(name) in SPLITS


@dataclass
class PictureFolder:
    """The pictures of a folder by split, with what its folders and its metadata say about them."""

    splits: dict[str, list[str]]
    """Paths relative to the folder, by split."""
    classes: list[str]
    """Names of the folders that the pictures of all splits are sorted into; empty if they are not sorted."""
    labels: dict[str, int]
    """The class index of each picture that is sorted into a class, by path."""
    metadata: dict[str, list[dict[str, Any]]]
    """The rows of metadata files about each picture, by path; empty if there are no metadata files."""
    notes: list[str]


def picture_folder(folder: Path, listing: Listing) -> PictureFolder:
    """Find the splits, classes and metadata of a folder of pictures.

    Raises:
        ValueError: folders of several splits lie beside other pictures, a metadata file cannot be read or names no
            picture, or a folder has several metadata files.
    """
    notes = []
    metadata, governed = {}, set()
    # a metadata file applies to its folder and to all folders below it that have none of their own
    for path in sorted(listing.metadata, key=lambda path: path.count("/"), reverse=True):
        beside = posixpath.dirname(path)
        alike = [other for other in listing.metadata if posixpath.dirname(other) == beside]
        if len(alike) > 1:
            raise ValueError(f"dataset: {str(folder)!r} has {' and '.join(alike)}; expected one of them")
        below = {p for p in listing.pictures if not beside or p.startswith(beside + "/")} - governed
        governed |= below
        rows, missing = _metadata_rows(folder, path), 0
        for row in rows:
            picture = posixpath.normpath(posixpath.join(beside, row.pop("file_name")))
            if picture in below:
                metadata.setdefault(picture, []).append(row)
            else:
                missing += 1
        if missing:
            notes.append(
                f"left out: {missing} of {len(rows)} rows of {path}, of no picture or one with nearer metadata"
            )
    if unnamed := len(governed - metadata.keys()):
        notes.append(f"left out: {unnamed} pictures that the metadata does not name")
    if repeated := sum(len(rows) for rows in metadata.values()) - len(metadata):
        notes.append(f"the metadata has {repeated} more rows than pictures; each row counts as a picture")
    pictures = [path for path in listing.pictures if path in metadata or path not in governed]
    if not pictures:
        raise ValueError(
            f"dataset: the metadata of {str(folder)!r} ({', '.join(listing.metadata)}) names no picture there"
        )

    base = _only_folder(pictures)
    tops = {path[len(base) :].split("/")[0] if "/" in path[len(base) :] else "" for path in pictures}
    kinds = {_canonical(top) for top in tops if _is_split(top)}
    others = sorted(top or "pictures outside all folders" for top in tops if not _is_split(top))
    if len(kinds) > 1 and others:
        raise ValueError(
            f"dataset: {str(folder)!r} has folders of the splits {', '.join(sorted(kinds))}, and besides "
            f"{', '.join(others)}; expected splits alone, or classes alone"
        )
    if kinds and not others:
        parts = {path: path[len(base) :].split("/", 1) for path in pictures}
        splits = {top: [path for path in pictures if parts[path][0] == top] for top in sorted(tops)}
        inner = {path: parts[path][1] for path in pictures}
    else:
        splits, inner = {"train": pictures}, {path: path[len(base) :] for path in pictures}
    labels, classes = _folder_classes(splits, inner, notes)
    return PictureFolder(splits, classes, labels, metadata if listing.metadata else {}, notes)


def _only_folder(pictures: Sequence[str]) -> str:
    """Return the path of the innermost folder that holds all pictures, ending with a slash (empty for the top); it
    stops above a folder with the name of a split."""
    base = ""
    while True:
        inside = {path[len(base) :].split("/")[0] for path in pictures if "/" in path[len(base) :]}
        loose = any("/" not in path[len(base) :] for path in pictures)
        if loose or len(inside) != 1 or _is_split(only := next(iter(inside))):
            return base
        base += only + "/"


def _folder_classes(
    splits: dict[str, list[str]], inner: dict[str, str], notes: list[str]
) -> tuple[dict[str, int], list[str]]:
    """Find the class of each picture in those splits whose pictures all lie at the same depth of folders."""
    sorted_into = {}
    for split, paths in splits.items():
        depths = {inner[path].count("/") for path in paths}
        if len(depths) > 1:
            notes.append(f"no classes from folders in {split!r}: its pictures lie at different depths")
        elif depths != {0}:
            sorted_into |= {path: posixpath.dirname(inner[path]) for path in paths}
    folders = sorted(set(sorted_into.values()))
    if len(folders) < 2:
        return {}, []
    # the last folder is the class, unless that would join classes of two parents
    last = [posixpath.basename(folder) for folder in folders]
    name = dict(zip(folders, last if len(set(last)) == len(last) else folders, strict=True))
    classes = sorted(name.values())
    return {path: classes.index(name[folder]) for path, folder in sorted_into.items()}, classes


def _metadata_rows(folder: Path, path: str) -> list[dict[str, Any]]:
    """Read the rows of a metadata file, each with a text ``file_name``; values of a CSV file stay text."""
    file = folder / path
    try:
        if file.suffix == ".csv":
            with file.open(newline="", encoding="utf-8-sig") as stream:
                rows = [{key: value or None for key, value in row.items() if key} for row in csv.DictReader(stream)]
        elif file.suffix == ".jsonl":
            lines = file.read_text(encoding="utf-8-sig").split("\n")
            rows = [json.loads(line) for line in lines if line.strip()]
        else:
            import pyarrow.parquet as pq

            rows = pq.ParquetFile(file).read().to_pylist()
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"dataset: {str(file)!r} cannot be read ({error})") from error
    for row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"dataset: {str(file)!r} holds {row!r}; expected an object with file_name in each line")
        name = next((key for key in row if key == "file_name" or key.endswith("_file_name")), None)
        if name is None or not isinstance(row[name], str):
            raise ValueError(
                f"dataset: {str(file)!r} has a row without file_name; expected the name of a picture beside it"
            )
        row["file_name"] = row.pop(name)
    return rows


def parquet_splits(listing: Listing) -> tuple[dict[str, list[str]], list[str]]:
    """Sort the parquet files of a folder into splits, by their names or their folders' names; return them with notes.

    If no file has the name of a split, all files form the split ``train``. If some files have one, the others are left
    out.
    """
    splits: dict[str, list[str]] = {}
    for path in listing.parquet:
        splits.setdefault(_split_of(path), []).append(path)
    unnamed = splits.pop("", [])
    if not splits:
        return {"train": unnamed}, []
    notes = [f"left out: {len(unnamed)} parquet files of no split ({', '.join(unnamed[:3])})"] if unnamed else []
    return splits, notes


def _split_of(path: str) -> str:
    stem = Path(path).stem
    if shard := SHARD.fullmatch(stem):
        return shard["split"]
    first = re.split(r"[-_.]", stem)[0]
    folder = Path(path).parent.name
    return next((_canonical(name.lower()) for name in (first, folder) if _is_split(name)), "")


def read_parquet(files: Sequence[Path], name: str) -> "datasets.Dataset":
    """Read parquet files one after the other, memory-mapped from the cache of ``datasets``.

    The library's cache identifies a file only by its name and time of change. Here the file's identity is added to the
    cache key, so that another file of the same name and time is read anew.

    Raises:
        ValueError: a file is damaged, or a path contains ``::``, with which the library chains protocols.
    """
    import datasets

    if chained := next((str(file) for file in files if "::" in str(file)), None):
        raise ValueError(f"dataset: {chained!r} has '::' in its path, which cannot be read; expected another name")
    stats = [(str(file.resolve()), file.stat()) for file in files]
    identity = [(path, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for path, stat in stats]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    escaped = [glob.escape(str(file)) for file in files]
    with readable(name):
        return datasets.load_dataset("parquet", name=key, data_files={"train": escaped}, split="train")


@contextmanager
def readable(dataset: str) -> Iterator[None]:
    """Turn the errors of ``datasets`` for an empty or damaged data set into one ValueError with the data set's
    name."""
    import datasets

    try:
        yield
    except (OSError, RuntimeError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"dataset: {dataset!r} holds no row that can be read ({error.__cause__ or error})") from error
