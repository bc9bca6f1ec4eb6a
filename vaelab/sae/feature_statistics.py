"""What each feature of a sparse autoencoder does over a store, from one pass over it.

The statistics of a feature are those of Surkov et al. ("Unpacking SDXL Turbo", sections 4 and 5): how often it is
active, its mean positive activation mu (equation 11), its top items by mean spatial activation (equation 9), samples of
its active items by quantile, its activations over timesteps, the features that are active with it, and the words of the
prompts that activate it.

Memory depends on the number of features, not on the number of items: lists have a fixed length, and samples are
uniform. A sample holds the active items whose hash is lowest, so that it does not depend on the order or the batches in
which items are added. A feature that is active in no more items than a sample can hold is sampled whole.

The statistics are saved beside the autoencoder, with the checksums of the autoencoder and of each shard of the store.
If the store has grown, only the new shards are read.
"""

import dataclasses
import hashlib
import itertools
import re
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from vaelab.core.devices import float64_device
from vaelab.core.io import atomic, write_json
from vaelab.core.validate import at_least
from vaelab.sae.model import (
    SAE,
    Codes,
    config_checksum,
    read_config_file,
    require_width,
    weights_checksum,
)
from vaelab.sae.top_activating import NO_ITEM, BestEntries, FeatureAccumulator, FeatureSummary
from vaelab.store.reader import Store

FORMAT, VERSION = "vaelab.sae.feature_statistics", 1
TOP = 20
"""Length of the list of top items."""
SAMPLE = 256
"""Size of the sample of active items; its top 5 % are then 12 items."""
ROW_SAMPLE = 64
"""Size of the sample of positions from which the features that are active together are counted."""
LARGEST_ROW = 32
"""Number of active features that are kept of a position; if more are active, the most active ones."""
WORDS = 128
"""Number of words, the most frequent ones in the prompts."""
WORD_ITEMS = 100_000
"""Number of items in whose prompts the words are counted to find the most frequent ones."""
SAVE_EVERY = 60.0
"""Seconds between two times that an unfinished pass is saved."""


class FeatureStatistics:
    """Statistics of the n features of an autoencoder; made by :func:`collect_statistics`."""

    def __init__(
        self, n_features: int, row_width: int, *, top: int = TOP, sample: int = SAMPLE, rows: int = ROW_SAMPLE,
        words: Sequence[str] = (), device: Any = "cpu",
    ):  # fmt: skip
        """Begin without any item.

        Args:
            n_features: n.
            row_width: the number of active features that are kept of a sampled position.
            top: the length of the list of top items.
            sample: the size of the sample of active items.
            rows: the size of the sample of positions.
            words: the words for which activations are counted.
            device: the device of the statistics.
        """
        for name, value in {"top": top, "sample": sample, "rows": rows, "row_width": row_width}.items():
            at_least(name, value, 1)
        self.n_features, self.words, self.device = n_features, list(words), torch.device(device)
        self.timesteps: list[float] = []
        """The timesteps of the items so far, in the order in which they were found."""
        self._sizes = {"row_width": row_width, "top": top, "sample": sample, "rows": rows}
        self._word_index = {word: i for i, word in enumerate(self.words)}
        whole, short = (torch.zeros((), dtype=kind, device=self.device) for kind in (torch.int64, torch.int32))
        real, wide = torch.zeros((), device=self.device), float64_device(self.device)
        self._peaks = FeatureAccumulator(n_features, top, device)
        self._top = BestEntries(n_features, top, torch.float32, {"item": whole + NO_ITEM})
        self._sample = BestEntries(n_features, sample, torch.int32, {"item": short + NO_ITEM, "mean": real})
        nothing = torch.full((row_width,), NO_ITEM, dtype=torch.int32, device=self.device)
        self._rows = BestEntries(n_features, rows, torch.int32, {"active": nothing})
        self._positive_rows = torch.zeros(n_features, dtype=torch.int64, device=self.device)
        self._positive_total = torch.zeros(n_features, dtype=torch.float64, device=wide)
        self._positions_at = torch.zeros(0, dtype=torch.int64)
        self._rows_at = torch.zeros(0, n_features, dtype=torch.int64, device=self.device)
        self._total_at = torch.zeros(0, n_features, dtype=torch.float64, device=wide)
        self._items_with = torch.zeros(len(self.words), dtype=torch.int64)
        self._active_with = torch.zeros(len(self.words), n_features, dtype=torch.int32, device=self.device)
        self._total_with = torch.zeros(len(self.words), n_features, dtype=torch.float64, device=wide)

    @property
    def item_count(self) -> int:
        """The number of items."""
        return self._peaks.item_count

    def add(self, codes: Codes, items: Sequence[int], records: Sequence[Mapping[str, Any]]) -> None:
        """Add the codes of B items.

        Args:
            codes: ``values`` and ``indices`` (B, P, K).
            items: the indices of the B items in the store, in rising order; each item is added once.
            records: what the store says about each item; its ``prompt`` and ``timestep`` are used if it has them.
        """
        places = codes.values.shape[1]
        active = self._peaks.add(codes, items)
        numbers = torch.tensor(list(items), dtype=torch.int64, device=self.device)
        mean = active.total / places  # equation 9
        positive = mean > 0
        self._top.add(active.feature[positive], mean[positive], item=numbers[active.item[positive]])
        self._sample.add(
            active.feature[positive], -hashes(numbers[active.item[positive]]),
            item=numbers[active.item[positive]].int(), mean=mean[positive],
        )  # fmt: skip
        self._add_rows(codes, numbers)
        self._add_timesteps([record.get("timestep") for record in records], active, places)
        self._add_words([record.get("prompt") for record in records], active, mean)

    def _add_rows(self, codes: Codes, numbers: Tensor) -> None:
        """Add the positions with a positive activation to the sample of positions, and to the sums behind mu."""
        width = self._sizes["row_width"]
        places = codes.values.shape[1]
        keys = -hashes((numbers[:, None] * places + torch.arange(places, device=self.device)).flatten())
        values, indices = codes.values.flatten(0, 1), codes.indices.flatten(0, 1)
        row, column = (values > 0).nonzero(as_tuple=True)
        feature, value = indices[row, column], values[row, column]
        self._positive_rows += torch.bincount(feature, minlength=self.n_features)
        place = feature.to(self._positive_total.device)
        self._positive_total.index_add_(0, place, value.to(place.device).double())
        enters = keys[row] > self._rows.keys[feature, -1]
        row, feature = row[enters], feature[enters]
        kept = values[row].topk(min(width, values.shape[1]))
        together = indices[row].gather(1, kept.indices).masked_fill(kept.values <= 0, NO_ITEM).int()
        together = torch.nn.functional.pad(together, (0, width - together.shape[1]), value=NO_ITEM)
        self._rows.add(feature, keys[row], active=together)

    def _add_timesteps(self, timesteps: Sequence[Any], active: Any, places: int) -> None:
        if not all(isinstance(one, int | float) for one in timesteps):
            return
        for timestep in dict.fromkeys(timesteps):
            if timestep not in self.timesteps:
                self._open_timestep(timestep)
        which = torch.tensor([self.timesteps.index(one) for one in timesteps], dtype=torch.int64)
        self._positions_at.index_add_(0, which, torch.full_like(which, places))
        cell = which.to(self.device)[active.item] * self.n_features + active.feature
        self._rows_at.view(-1).index_add_(0, cell, active.count)
        wide = self._total_at.device
        self._total_at.view(-1).index_add_(0, cell.to(wide), active.total.to(wide).double())

    def _open_timestep(self, timestep: float) -> None:
        self.timesteps.append(timestep)
        for name in ("_positions_at", "_rows_at", "_total_at"):
            old = getattr(self, name)
            setattr(self, name, torch.cat([old, old.new_zeros(1, *old.shape[1:])]))

    def _add_words(self, prompts: Sequence[Any], active: Any, mean: Tensor) -> None:
        if not self.words:
            return
        found = [self._words_of(prompt) for prompt in prompts]
        flat = torch.tensor(list(itertools.chain.from_iterable(found)), dtype=torch.int64)
        self._items_with += torch.bincount(flat, minlength=len(self.words))
        counts, flat = torch.tensor([len(words) for words in found], device=self.device), flat.to(self.device)
        begins = counts.cumsum(0) - counts
        # one entry for each pair of an active feature and a word of its item's prompt
        repeats = counts[active.item]
        entry = torch.arange(len(repeats), device=self.device).repeat_interleave(repeats)
        within = torch.arange(len(entry), device=self.device) - (repeats.cumsum(0) - repeats)[entry]
        word = flat[begins[active.item[entry]] + within]
        cell = word * self.n_features + active.feature[entry]
        one = torch.ones((), dtype=torch.int32, device=self.device).expand(len(cell))
        self._active_with.view(-1).index_add_(0, cell, one)
        wide = self._total_with.device
        self._total_with.view(-1).index_add_(0, cell.to(wide), mean[entry].to(wide).double())

    def _words_of(self, prompt: Any) -> list[int]:
        known = {self._word_index.get(word) for word in split_words(prompt)} if isinstance(prompt, str) else set()
        return sorted(known - {None})

    def summary(self) -> FeatureSummary:
        """Return the statistics of single positions: density, quantiles, and top items by largest activation."""
        return self._peaks.summary()

    def require_feature(self, feature: int, block: str = "the autoencoder") -> None:
        """Raise ValueError unless the autoencoder has this feature and the feature was active in the store."""
        if not 0 <= feature < self.n_features:
            raise ValueError(f"feature: {block} has features 0 to {self.n_features - 1}, got {feature}")
        if not self._positive_rows[feature]:
            raise ValueError(f"feature: {feature} of {block} was never active in the activations")

    def mean_activation(self) -> Tensor:
        """Compute mu (n,) float64, the mean of each feature's positive activations (equation 11); 0 for features that
        were never active."""
        return self._positive_total.cpu() / self._positive_rows.cpu().clamp_min(1)

    def largest_activation(self) -> Tensor:
        """Return the largest activation (n,) float32 of each feature; 0 for features that were never active."""
        return self._peaks.summary().values[:, 0]

    def top_items(self, feature: int, count: int = TOP) -> tuple[list[int], list[float]]:
        """Return the items with the largest mean spatial activation, in decreasing order, and these means."""
        items, means = (part[feature, :count].tolist() for part in (self._top.columns["item"], self._top.keys))
        return [i for i in items if i != NO_ITEM], [m for i, m in zip(items, means, strict=True) if i != NO_ITEM]

    def sample_items(
        self, feature: int, low: float, high: float, count: int, seed: int = 0
    ) -> tuple[list[int], list[float]]:
        """Sample active items whose mean spatial activation is between two quantiles of the feature's active items.

        Args:
            feature: the feature.
            low: the lower quantile, from 0 to 1.
            high: the upper quantile; 0.95 and 1 give the top 5 %, 0.3 and 0.4 the fourth decile.
            count: the largest number of items.
            seed: determines which items are chosen if more are there.

        Returns:
            The items, in decreasing order of their means, and the means. There are at least one, if the feature was
            ever active.

        Raises:
            ValueError: the quantiles are not rising or outside [0, 1].
        """
        if not 0 <= low < high <= 1:
            raise ValueError(f"quantiles: expected 0 <= low < high <= 1, got {low} and {high}")
        items, means = (self._sample.columns[name][feature].cpu() for name in ("item", "mean"))
        items, means = items[items != NO_ITEM], means[items != NO_ITEM]
        order = torch.sort(means, stable=True).indices
        first = min(int(np.floor(low * len(order))), max(len(order) - 1, 0))
        chosen = order[first : max(int(np.ceil(high * len(order))), first + 1)]
        if len(chosen) > count:
            generator = torch.Generator().manual_seed(seed)
            chosen = chosen[torch.randperm(len(chosen), generator=generator)[:count].sort().values]
        chosen = chosen.flip(0)
        return items[chosen].tolist(), means[chosen].tolist()

    def timestep_curve(self, feature: int) -> pd.DataFrame:
        """Tabulate a feature over timesteps, from the most noise to the least: ``timestep``, ``density`` (the share of
        positions at which it is active) and ``mean`` (of its activations there)."""
        rows, total = self._rows_at[:, feature].cpu().double(), self._total_at[:, feature].cpu()
        table = pd.DataFrame({
            "timestep": self.timesteps, "density": (rows / self._positions_at.clamp_min(1)).tolist(),
            "mean": (total / rows.clamp_min(1)).tolist(),
        })  # fmt: skip
        return table.sort_values("timestep", ascending=False, ignore_index=True)

    def co_active(self, feature: int, count: int = 10) -> pd.DataFrame:
        """Tabulate the features that are most often active at the same position: ``feature`` and ``share``, the share
        of the feature's positions at which the other one is active too."""
        rows = self._rows.columns["active"][feature].cpu()
        rows = rows[self._rows.keys[feature].cpu() != self._rows.lowest]
        others = rows[(rows != NO_ITEM) & (rows != feature)].long()
        counts = torch.bincount(others, minlength=self.n_features)
        order = torch.sort(counts, descending=True, stable=True).indices[:count]
        order = order[counts[order] > 0]
        return pd.DataFrame({"feature": order.tolist(), "share": (counts[order] / max(len(rows), 1)).tolist()})

    def by_word(self, feature: int, count: int = 10) -> pd.DataFrame:
        """Tabulate the words whose prompts activate a feature most.

        Returns:
            ``word``; ``items``, the number of items whose prompt has the word; ``active``, the share of them in which
            the feature is active; ``mean``, their mean spatial activation; and ``ratio``, that mean divided by the mean
            of all items. The largest ratio comes first.
        """
        with_word = self._items_with.double().clamp_min(1)
        table = pd.DataFrame({
            "word": self.words, "items": self._items_with.tolist(),
            "active": (self._active_with[:, feature].cpu() / with_word).tolist(),
            "mean": (self._total_with[:, feature].cpu() / with_word).tolist(),
            "ratio": self.word_ratios([feature])[1].flatten().tolist(),
        })  # fmt: skip
        table = table[table["items"] > 0]
        return table.sort_values("ratio", ascending=False, kind="stable", ignore_index=True)[:count]

    def word_ratios(self, features: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Compute the ratios of :meth:`by_word` of F features; None takes all.

        Returns:
            (W,) the number of items whose prompt has each of the W :attr:`words`; and (W, F) the ratios, 0 for features
            that were never active.
        """
        chosen = slice(None) if features is None else list(features)
        mean = self._total_with[:, chosen].cpu() / self._items_with.double().clamp_min(1)[:, None]
        everywhere = self._peaks.totals()[chosen] / max(self._peaks.row_count, 1)
        return self._items_with, torch.where(everywhere != 0, mean / everywhere, 0)

    def table(self) -> pd.DataFrame:
        """Make the table of :meth:`vaelab.sae.top_activating.FeatureSummary.table`, with mu as ``mean_positive``."""
        return self.summary().table().assign(mean_positive=self.mean_activation().tolist())

    def most_active(self, count: int) -> list[int]:
        """List the features with the largest mean spatial activation in any item, in decreasing order."""
        largest = self._top.keys[:, 0].cpu()
        order = torch.sort(largest, descending=True, stable=True).indices[:count]
        return order[largest[order] > 0].tolist()

    def state(self) -> dict[str, Tensor]:
        """Return all tensors, by name."""
        parts = {"peaks": self._peaks, "top": self._top, "sample": self._sample, "rows": self._rows}
        nested = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state().items()}
        own = ("positive_rows", "positive_total", "positions_at", "rows_at", "total_at", "items_with", "active_with",
               "total_with")  # fmt: skip
        return {**nested, **{name: getattr(self, f"_{name}") for name in own}}

    def save(self, path: Path, source: Mapping[str, Any]) -> None:
        """Write ``path`` (safetensors), and the JSON file beside it with everything else and the checksum.

        Args:
            path: the file of the tensors.
            source: what the statistics are of, see :func:`collect_statistics`.
        """
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.state().items()}
        with atomic(path) as draft:
            save_file(tensors, draft, metadata={"format": FORMAT})
        counts = {"items": self._peaks.item_count, "positions": self._peaks.row_count}
        write_json(path.with_suffix(".json"), {
            "format": FORMAT, "version": VERSION, "tensors_sha256": weights_checksum(tensors), **source, **counts,
            "n_features": self.n_features, "sizes": self._sizes, "words": self.words, "timesteps": self.timesteps,
        })  # fmt: skip

    @classmethod
    def load(cls, path: Path, device: Any = "cpu") -> tuple["FeatureStatistics", dict[str, Any]]:
        """Read what :meth:`save` wrote, and its JSON.

        Raises:
            ValueError: a file is missing, damaged, of another version, or the two do not belong together.
        """
        stored = read_config_file(path.with_suffix(".json"))
        if (stored.get("format"), stored.get("version")) != (FORMAT, VERSION):
            raise ValueError(f"{path.with_suffix('.json')}: not feature statistics of this version")
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: missing or damaged ({error})") from error
        if weights_checksum(tensors) != stored["tensors_sha256"]:
            raise ValueError(f"{path}: does not belong to its JSON file; their checksums differ")
        statistics = cls(stored["n_features"], words=stored["words"], device=device, **stored["sizes"])
        for timestep in stored["timesteps"]:
            statistics._open_timestep(timestep)
        for name, value in statistics.state().items():
            value.copy_(tensors[name])
        statistics._peaks.item_count, statistics._peaks.row_count = stored["items"], stored["positions"]
        return statistics, stored


def collect_statistics(
    sae: SAE, activations: Store, block: str, folder: str | Path | None = None, *, guided_only: bool = True,
    step: int | None = None, batch_items: int = 64, progress: bool = False,
) -> FeatureStatistics:  # fmt: skip
    """Compute the statistics of all features over a block of a store, or read them if they are saved.

    Args:
        sae: the autoencoder; the computation runs on its device.
        activations: the store.
        block: the block whose vectors or maps are encoded.
        folder: the folder to save the statistics in, usually the autoencoder's own. A pass that was interrupted is
            continued, and a store that has grown is read from its first new shard. None saves nothing.
        guided_only: with classifier-free guidance, whether to leave out the items of the half without the prompt.
        step: the denoising step whose items are used, counted from 0; None means all.
        batch_items: the number of items per batch.
        progress: whether to show a progress bar.

    Raises:
        ValueError: the block is unknown, or its vectors do not have the width that the autoencoder is for.
    """
    at_least("batch_items", batch_items, 1)
    shards = activations.shard_checksums(block)
    require_width(torch.empty(0, activations.layout[block].width), sae.config.d)
    source = {
        "sae_sha256": sae_checksum(sae), "store": activations.identity, "block": block, "guided_only": guided_only,
        "step": step,
    }  # fmt: skip
    path = None if folder is None else Path(folder, f"statistics-{_digest(source)}.safetensors")
    statistics, done = _saved(path, source, shards, sae.device)
    if statistics is None:
        config = sae.config
        width = config.k if config.variant in ("topk", "k_sae", "matryoshka") else LARGEST_ROW
        statistics = FeatureStatistics(
            config.n_features, min(width, LARGEST_ROW, config.n_features), device=sae.device,
            words=frequent_words(activations, guided_only),
        )  # fmt: skip
    number, saved = sum(items for items, _ in shards[:done]), time.monotonic()
    with tqdm(
        total=len(activations.items), initial=number, unit="item", desc=f"statistics of {block}", file=sys.stdout,
        mininterval=2, ncols=100, disable=not progress,
    ) as bar:  # fmt: skip
        for place, (items, _) in enumerate(shards[done:], done + 1):
            for begin in range(number, number + items, batch_items):
                _add_items(statistics, sae, activations, block, range(begin, min(begin + batch_items, number + items)),
                           guided_only, step)  # fmt: skip
                bar.update(min(batch_items, number + items - begin))
            number += items
            if path and (place == len(shards) or time.monotonic() - saved > SAVE_EVERY):
                statistics.save(path, {**source, "shards": [checksum for _, checksum in shards[:place]]})
                saved = time.monotonic()
    return statistics


def _add_items(
    statistics: FeatureStatistics, sae: SAE, activations: Store, block: str, numbers: range, guided_only: bool,
    step: int | None,
) -> None:  # fmt: skip
    records = {number: activations.items[number] for number in numbers}
    kept = [
        number for number, record in records.items()
        if (not guided_only or record.get("guided", True)) and step in (None, record.get("step"))
    ]  # fmt: skip
    if kept:
        maps = activations.maps(block, kept).to(sae.device).float()
        codes = sae.encode(maps.reshape(len(kept), -1, maps.shape[-1]))
        statistics.add(codes, kept, [records[number] for number in kept])


def _saved(
    path: Path | None, source: Mapping[str, Any], shards: Sequence[tuple[int, str]], device: Any
) -> tuple[FeatureStatistics | None, int]:
    """Read saved statistics of the first shards of a store, and the number of these shards."""
    if path is None or not path.with_suffix(".json").is_file():
        return None, 0
    try:
        statistics, stored = FeatureStatistics.load(path, device)
    except ValueError as error:  # for instance the process was killed between the two files
        print(f"computed again: {error}")
        return None, 0
    now = [checksum for _, checksum in shards]
    if {name: stored.get(name) for name in source} != source or stored["shards"] != now[: len(stored["shards"])]:
        return None, 0
    return statistics, len(stored["shards"])


def feature_maps(sae: SAE, activations: Store, block: str, items: Sequence[int], features: Sequence[int]) -> Tensor:
    """Compute the maps (N, F, h, w) of F features S^rho (equation 7) in N items of a store; on the CPU.

    Raises:
        ValueError: the store has no such block or item, or the autoencoder has no such feature.
    """
    _require_features(sae, features)
    return encoded_maps(sae, activations.maps(block, items), features)


def _require_features(sae: SAE, features: Sequence[int]) -> None:
    for feature in features:
        if not 0 <= feature < sae.config.n_features:
            raise ValueError(f"feature: the autoencoder has features 0 to {sae.config.n_features - 1}, got {feature}")


def mean_activations(
    sae: SAE, activations: Store, block: str, items: Sequence[int], features: Sequence[int], batch_items: int = 64
) -> Tensor:
    """Compute the mean spatial activations (N, F) of F features in N items of a store (equation 9); on the CPU.

    Raises:
        ValueError: as :func:`feature_maps`.
    """
    _require_features(sae, features)
    parts = []
    for begin in range(0, len(items), batch_items):
        maps = activations.maps(block, items[begin : begin + batch_items]).to(sae.device).float()
        codes = sae.encode(maps.flatten(1, 2))
        total = torch.zeros(len(maps), sae.config.n_features, device=sae.device)
        total.scatter_add_(1, codes.indices.flatten(1), codes.values.flatten(1))
        parts.append((total / codes.values.shape[1])[:, list(features)].cpu())
    return torch.cat(parts)


def encoded_maps(sae: SAE, maps: Tensor, features: Sequence[int]) -> Tensor:
    """Compute the maps (N, F, h, w) of F features in maps (N, h, w, d) of a block; on the CPU."""
    codes = sae.encode(maps.to(sae.device).float())
    found = [(codes.values * (codes.indices == feature)).sum(-1) for feature in features]
    return torch.stack(found, 1).cpu()


def sae_checksum(sae: SAE) -> str:
    """Compute the SHA-256 of an autoencoder's configuration and weights."""
    tensors = {name: value.detach().cpu() for name, value in sae.state_dict().items() if name != "inactive_for"}
    both = config_checksum(dataclasses.asdict(sae.config)) + weights_checksum(tensors)
    return hashlib.sha256(both.encode()).hexdigest()


def frequent_words(activations: Store, guided_only: bool = True, count: int = WORDS) -> list[str]:
    """List the words that occur in the prompts of most items, of the first :data:`WORD_ITEMS`."""
    found: Counter = Counter()
    for number in range(min(len(activations.items), WORD_ITEMS)):
        record = activations.items[number]
        if isinstance(record.get("prompt"), str) and (not guided_only or record.get("guided", True)):
            found.update(split_words(record["prompt"]))
    return sorted(word for word, _ in found.most_common(count))


def split_words(prompt: str) -> set[str]:
    """Return the different words of a prompt, in lower case."""
    return set(re.findall(r"[^\W_]+", prompt.lower()))


def hashes(numbers: Tensor) -> Tensor:
    """Compute a hash (N,) int32, at least 0, of whole numbers (N,): the finalizer of SplitMix64 (Steele et al., 2014).
    It only serves to sample."""
    mixed = numbers * -7046029254386353131
    mixed = (mixed ^ (mixed >> 30)) * -4658895280553007687
    mixed = (mixed ^ (mixed >> 27)) * -7723592293110705685
    return ((mixed ^ (mixed >> 31)) & 0x7FFFFFFF).int()


def _digest(source: Mapping[str, Any]) -> str:
    return config_checksum(source)[:12]
