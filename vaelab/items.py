"""The items of a store: what was captured, read as it is asked for."""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from vaelab.shards import items_file
from vaelab.storage import Folder


class Items(Sequence):
    """The items of a store, read shard by shard when they are asked for."""

    def __init__(self, folder: Folder, counts: list[int], per_shard: int):
        self._length, self._per_shard = sum(counts), per_shard
        self._shard = lru_cache(maxsize=8)(lambda shard: self._read(folder, items_file(shard), counts[shard]))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        return dict(self._shard(place // self._per_shard)[place % self._per_shard])

    @staticmethod
    def _read(folder: Folder, file: str, count: int) -> list[dict[str, Any]]:
        try:
            items = json.loads(folder.read(file))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{folder.name(file)} was changed since it was written: it is not JSON ({error})"
            ) from error
        if len(items) != count:
            raise ValueError(f"{folder.name(file)} was changed since it was written: {len(items)} items, not {count}")
        return items
