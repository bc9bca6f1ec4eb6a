"""What the feature browser shows of one block's autoencoder: a table, a map of the dictionary, cards, and pictures
generated with features turned.

Everything is plain data: a widget and the pages of :mod:`vaelab.browser.feature_pages` draw it. The activations are
those of a store, over all its denoising steps. Pictures are generated again from the store's prompts and seeds. What
takes long (pictures, thumbnails, the map, the twins) is computed once and kept in the browser's folder.
"""

import io
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vaelab import activations
from vaelab.browser.dictionary_map import choose_pictures, draw_tiles, embed_directions, nearest_in, sprite_grid
from vaelab.core.io import atomic, read_json, write_json
from vaelab.core.validate import at_least, one_of, unknown
from vaelab.models.similarity import MINILM, load_sentence_model
from vaelab.models.vocabulary import require_known_words
from vaelab.runner.parameters import portable
from vaelab.runner.run import read_results
from vaelab.sae.feature_scores import ItemPictures, captions_from_words, with_random_directions
from vaelab.sae.feature_statistics import FeatureStatistics, encoded_maps, feature_maps, sae_checksum
from vaelab.sae.model import SAE, config_checksum
from vaelab.sae.steering import Directions, Steerer, Steering
from vaelab.sae.sweep import SAESweep
from vaelab.sae.top_activating import BINS, bin_edges
from vaelab.sae.transcoder import Transcoder, load_trained
from vaelab.viz.encoding import decode_picture, encode_picture, encode_pixels

SHELF = "shelf.json"
"""The file of the features that were kept, in the browser's folder."""
SHELF_FORMAT = "vaelab.browser.shelf"
CACHE = "cache"
"""The folder of what was computed once, in the browser's folder."""
TOGETHER = 64
"""Number of pictures that are generated before they are saved."""
DECILES = 10
CANDIDATES = 20
"""Size of the sample of items from which the example of a decile is chosen."""
LISTED = 50
"""The largest number of features that a search returns."""
BARS = 24
"""The largest number of bars in a histogram."""
REMEMBERED = 8
"""Number of generated pictures whose codes are kept."""
WAYS = ("add", "replace", "clamp")
"""The ways of steering, see :mod:`vaelab.sae.steering`."""
UNKNOWN = {"specificity": np.nan, "f1": np.nan, "control": np.nan, "value": "", "stability": np.nan, "caption": "",
           "caption_score": np.nan}  # fmt: skip
"""Columns of the table that only other runs give, and their value where it is unknown."""


class Twin(NamedTuple):
    """The autoencoder of another seed."""

    seed: int
    sae: SAE


class _Computed(NamedTuple):
    """What is computed once: the map (N, 2), the sheets of thumbnails, and each feature's twin with its cosine."""

    positions: np.ndarray
    sprites: list[bytes]
    twin_feature: np.ndarray
    twin_cosine: np.ndarray


class _Drawn(NamedTuple):
    """A generated picture (3, H, W) and the block's update (h, w, d) at every step."""

    picture: Tensor
    updates: list[Tensor]


class FeatureData:
    """The features of one block's autoencoder, with all that a browser shows of them."""

    table: pd.DataFrame
    """One row per feature: ``feature``; ``frequency`` and ``density``, the shares of the store's items and positions in
    which it is active; ``mu``, its mean positive activation; ``words`` of the prompts that activate it; and where runs
    give them ``specificity``, ``f1`` (the best truth score), ``value`` (the factor value it is for), ``control`` (the
    F1 of the best random direction for that value), ``stability`` (the cosine with its twin), ``caption`` and
    ``caption_score``. Unknown numbers are NaN, unknown texts empty."""
    positions: np.ndarray
    """(N, 2) float32 in [0, 1]: a map of the dictionary, neighbours have similar directions."""
    sprites: list[bytes]
    """WebP sheets of thumbnails: one of a feature's top pictures, faded where the feature is not active. Tile i, row by
    row through all sheets, is feature i; it is transparent if the feature was never active, or none of its top pictures
    was among those generated."""
    sprite_grid: tuple[int, int, int]
    """Columns and rows of a sheet, and the side of a tile in pixels."""
    folder: Path
    """Where the shelf and the computed parts are kept."""

    def __init__(
        self, pipeline: Any, block: str, sae: SAE, statistics: FeatureStatistics, pictures: ItemPictures,
        folder: str | Path, *, truth: pd.DataFrame | None = None, scores: pd.DataFrame | None = None,
        captions: pd.DataFrame | None = None, twin: Twin | None = None, sentence_model: str = MINILM,
        thumbnails: int = 64, examples: int = 4, seed: int = 0, device: str = "auto",
    ):  # fmt: skip
        """Take a block's autoencoder and what is known of its features.

        Args:
            pipeline: the model that the activations come from.
            block: the block's short name.
            sae: the autoencoder.
            statistics: its statistics over the store.
            pictures: the pictures of the store's items.
            folder: the folder for the shelf and for what is computed once.
            truth: a table of :func:`vaelab.sae.truth.features_against_truth`.
            scores: the table of :func:`read_scores`.
            captions: the table of :func:`read_captions`.
            twin: the autoencoder of another seed.
            sentence_model: the model that finds captions by their meaning.
            thumbnails: the largest number of pictures that are generated for the thumbnails.
            examples: top pictures on a card; one of every decile stands beside them.
            seed: determines samples, the map and the random directions of the control.
            device: the device of the sentence model.

        Raises:
            ValueError: the autoencoder is a transcoder, a number is out of range, or a table names a feature that the
                autoencoder does not have.
        """
        if isinstance(sae, Transcoder):
            raise ValueError(f"saes: that of {block} is a transcoder; the browser shows features of a block's update")
        at_least("thumbnails", thumbnails, 1)
        at_least("examples", examples, 1)
        own = None if scores is None else scores[scores["who"] == "sae"]
        for name, table in {"scores": own, "captions": captions}.items():
            if table is not None and table["feature"].max() >= sae.config.n_features:  # NaN of an empty table is not
                raise ValueError(
                    f"{name}: has feature {table['feature'].max()}; the autoencoder of {block} has features 0 to "
                    f"{sae.config.n_features - 1}, so they belong to another one"
                )
        self.block, self.sae, self.statistics, self.folder = block, sae, statistics, Path(folder)
        self.sampling = pictures.sampling
        self._pipeline, self._pictures, self._seed, self._device = pipeline, pictures, seed, device
        self._examples, self._sentence_model = examples, sentence_model
        self._scores, self._captions = scores, captions
        self._summary, self._mean = statistics.summary(), statistics.mean_activation()
        self._sheets: dict[int, np.ndarray] = {}
        self._drawn: OrderedDict[tuple[str, int], _Drawn] = OrderedDict()
        self._norms = sae.decoder.detach().norm(dim=1).clamp_min(1e-12)
        self.sprite_grid = sprite_grid(sae.config.n_features)
        computed = self._compute_once(twin, thumbnails)
        self.positions, self.sprites = computed.positions, computed.sprites
        self._twin = None if twin is None else (twin.seed, computed.twin_feature, computed.twin_cosine)
        self.table = self._tabulate(truth)

    def __len__(self) -> int:
        return self.sae.config.n_features

    @cached_property
    def passes(self) -> int:
        """Number of the denoiser's passes in which a picture is generated."""
        return activations.count_passes(self._pipeline, self.sampling)

    def card(self, feature: int) -> dict[str, Any]:
        """Describe a feature.

        Returns:
            ``feature``, the columns of :attr:`table`, and

            - ``examples``: dicts with ``group`` (``top``, or ``decile 1`` to ``decile 10``, from the weakest to the
              strongest items in which the feature is active), ``item``, ``prompt``, ``seed``, ``timestep``,
              ``activation`` (the mean over the item's positions), ``picture`` (bytes of a PNG or WebP), ``map`` (h, w),
              and ``vmin`` and ``vmax``, the least positive and the largest activation of all examples;
            - ``histogram``: ``edges`` and ``counts`` of the positive activations;
            - ``timesteps``: ``timestep``, ``mean`` and ``density``, lists from the most noise to the least;
            - ``co_active``: pairs of a feature and the share of positions at which it is active too;
            - ``nearest``: pairs of a feature and its cosine;
            - ``twin``: ``seed``, ``feature`` and ``cosine``, or None;
            - ``scores``: dicts with ``score``, ``feature`` and one entry for each control;
            - ``reasoning``: of the annotator.

        Raises:
            ValueError: the autoencoder has no such feature.
        """
        self._require(feature)
        curve = self.statistics.timestep_curve(feature)
        together = self.statistics.co_active(feature)
        return {
            **self.table.iloc[feature].to_dict(), "feature": int(feature),
            "examples": self._example_pictures(feature),
            "histogram": histogram(self._summary.histogram[feature]),
            "timesteps": {name: curve[name].tolist() for name in ("timestep", "mean", "density")},
            "co_active": list(zip(together["feature"].tolist(), together["share"].tolist(), strict=True)),
            "nearest": self._nearest(feature), "twin": self._twin_of(feature),
            "scores": self._scores_of(feature), "reasoning": self._reasoning(feature),
        }  # fmt: skip

    def thumbnail(self, feature: int) -> np.ndarray | None:
        """Cut a feature's thumbnail (side, side, 4) uint8 out of the sheets; None if it has none."""
        columns, rows, side = self.sprite_grid
        number, place = divmod(self._require(feature), columns * rows)
        if number not in self._sheets:
            self._sheets[number] = np.asarray(Image.open(io.BytesIO(self.sprites[number])).convert("RGBA"))
        y, x = divmod(place, columns)
        tile = self._sheets[number][y * side : (y + 1) * side, x * side : (x + 1) * side]
        return tile if tile[..., 3].any() else None

    def generate(
        self, prompt: str, seed: int, steerings: Sequence[Mapping[str, Any]] = (),
        step_range: tuple[int, int] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Generate the picture of a prompt, with features turned.

        Args:
            prompt: the prompt.
            seed: the seed of its noise.
            steerings: dicts with ``feature``; ``strength`` in k mu; and optionally ``way`` (one of :data:`WAYS`, by
                default ``add``), ``mask`` (H, W) from 0 to 1, and ``control``: whether a random direction with the
                length of the feature's is written instead. The control holds for all or none of them.
            step_range: the first and the last denoising step at which they are turned, counted from 0; None means all.

        Returns:
            ``picture``, the bytes of a PNG or WebP; and ``maps``, by feature its activations (h, w) in the unchanged
            picture, averaged over the steps.

        Raises:
            ValueError: the prompt has words that the text model does not know, a feature does not exist or was never
                active, or a number is out of range.
        """
        require_known_words(self._pipeline, prompt)
        requests = [self._steering(one, step_range) for one in steerings]
        controls = {bool(one.get("control")) for one in steerings}
        if len(controls) > 1:
            raise ValueError("control: holds for all turned features or for none, got both")
        if not requests:
            return {"picture": encode_picture(self._draw(prompt, seed).picture), "maps": {}}
        steerer = self._control if controls == {True} else self._steerer
        picture = steerer.generate([prompt], [requests], self.sampling, [seed])[0]
        features = list(dict.fromkeys(one.feature for one in requests))
        maps = encoded_maps(self.sae, torch.stack(self._draw(prompt, seed).updates), features).mean(0)
        return {
            "picture": encode_picture(picture),
            "maps": {feature: one.tolist() for feature, one in zip(features, maps, strict=True)},
        }

    def active_at(self, prompt: str, seed: int, mask: Any = None) -> list[tuple[int, float]]:
        """List the features that are active in a part of the picture of a prompt, the strongest first.

        Args:
            prompt: the prompt.
            seed: the seed.
            mask: (H, W) from 0 to 1, resized to the block's positions; None means the whole picture.

        Returns:
            At most :data:`LISTED` pairs of a feature and its mean activation there, over all steps. Features that were
            never active in the store are left out.

        Raises:
            ValueError: the mask holds no position, or the prompt has words that the text model does not know.
        """
        require_known_words(self._pipeline, prompt)
        weights = None if mask is None else _mask(mask)
        updates = torch.stack(self._draw(prompt, seed).updates)  # (steps, h, w, d)
        if weights is None:
            weights = torch.ones(updates.shape[1:3])
        weights = F.adaptive_avg_pool2d(weights[None, None], updates.shape[1:3]).flatten()
        if not weights.sum() > 0:
            raise ValueError("mask: is 0 at every position; paint or choose a part of the picture")
        codes = self.sae.encode(updates.flatten(1, 2).to(self.sae.device))
        values = (codes.values.cpu() * weights[:, None]).flatten()
        total = torch.zeros(len(self)).index_add_(0, codes.indices.cpu().flatten(), values)
        total[self._mean == 0] = 0
        order = torch.sort(total, descending=True, stable=True).indices[:LISTED]
        amounts = total[order] / (weights.sum() * len(updates))
        return [(f, a) for f, a in zip(order.tolist(), amounts.tolist(), strict=True) if a > 0]

    def search_meaning(self, text: str) -> list[int]:
        """List the features whose captions (or, without one, words) are nearest in meaning to a text, at most
        :data:`LISTED`, the nearest first.

        Raises:
            ValueError: the text is empty, or no feature has a caption or words.
        """
        if not text.strip():
            raise ValueError("text: expected some words, got none")
        features, vectors = self._meanings
        if not features:
            raise ValueError("captions: no feature has a caption or words; run 36_annotate_features first")
        similar = vectors @ self._sentences.embed_sentences([text])[0]
        order = torch.sort(similar, descending=True, stable=True).indices[:LISTED]
        return [features[place] for place in order.tolist()]

    def load_shelf(self) -> dict[int, str]:
        """Read the features that were kept, with their notes, in their order; empty if none was kept yet.

        Raises:
            ValueError: the file is damaged.
        """
        rows = self._shelves().get(self._checksum, {"features": []})["features"]
        return {row["feature"]: row["note"] for row in rows if 0 <= row["feature"] < len(self)}

    def save_shelf(self, shelf: Mapping[int, str]) -> None:
        """Write the features that are kept, with their notes, to ``shelf.json`` in the folder. What was kept of other
        autoencoders stays there.

        Raises:
            ValueError: the autoencoder has no such feature, or the file is damaged.
        """
        for feature in shelf:
            self._require(feature)
        rows = [{"feature": int(feature), "note": str(note)} for feature, note in shelf.items()]
        shelves = {**self._shelves(), self._checksum: {"block": self.block, "features": rows}}
        write_json(self.folder / SHELF, {"format": SHELF_FORMAT, "version": 1, "shelves": shelves})

    def _shelves(self) -> dict[str, Any]:
        """Read what was kept, by the checksum of the autoencoder."""
        path = self.folder / SHELF
        if not path.exists():
            return {}
        try:
            stored = read_json(path)
            if (stored["format"], stored["version"]) != (SHELF_FORMAT, 1):
                raise ValueError("another format")
            return {
                name: {
                    "block": str(own["block"]),
                    "features": [{"feature": int(row["feature"]), "note": str(row["note"])} for row in own["features"]],
                }
                for name, own in stored["shelves"].items()
            }
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise ValueError(f"shelf: {path.name} is damaged; move it away to begin anew") from error

    def feature_page(self, feature: int) -> str:
        """Make a feature's card as one HTML page, which needs neither a server nor a network."""
        from vaelab.browser.feature_pages import feature_page

        return feature_page(self, feature)

    def shelf_page(self, features: Mapping[int, str] | Sequence[int] = ()) -> str:
        """Make one HTML page of several features.

        Args:
            features: their numbers, or their notes by number; empty takes the shelf.
        """
        from vaelab.browser.feature_pages import shelf_page

        chosen = features or self.load_shelf()
        return shelf_page(self, chosen if isinstance(chosen, Mapping) else dict.fromkeys(chosen, ""))

    # What is computed once

    @cached_property
    def _checksum(self) -> str:
        return sae_checksum(self.sae)

    def _compute_once(self, twin: Twin | None, thumbnails: int) -> _Computed:
        store = self._pictures.store
        key = config_checksum({
            "sae": self._checksum, "twin": sae_checksum(twin.sae) if twin else "", "store": store.identity,
            "shards": store.shard_checksums(self.block), "items": self.statistics.item_count,
            "thumbnails": thumbnails, "seed": self._seed,
        })[:12]  # fmt: skip
        path = self.folder / CACHE / f"map-{key}.npz"
        if path.is_file():
            with np.load(path, allow_pickle=False) as found:
                sheets = [found[name].tobytes() for name in sorted(found.files) if name.startswith("sheet")]
                return _Computed(found["positions"], sheets, found["twin_feature"], found["twin_cosine"])
        directions = self.sae.features().cpu()
        none = (np.zeros(0, np.int64), np.zeros(0, np.float32))
        computed = _Computed(
            embed_directions(directions, self._seed), self._draw_sheets(thumbnails),
            *(nearest_in(directions, twin.sae.features().cpu()) if twin else none),
        )  # fmt: skip
        sheets = {f"sheet{i:05d}": np.frombuffer(data, np.uint8) for i, data in enumerate(computed.sprites)}
        arrays = {name: getattr(computed, name) for name in ("positions", "twin_feature", "twin_cosine")}
        with atomic(path) as draft, open(draft, "wb") as file:
            np.savez(file, **arrays, **sheets)
        return computed

    def _draw_sheets(self, thumbnails: int) -> list[bytes]:
        """Generate the pictures of the thumbnails, and draw the sheets."""
        columns, rows, side = self.sprite_grid
        tops: dict[int, dict[Path, int]] = {}
        for feature in np.flatnonzero(self._mean.numpy() > 0).tolist():
            own = tops.setdefault(feature, {})
            for item in self.statistics.top_items(feature)[0]:
                own.setdefault(self._picture_file(item), item)
        chosen = choose_pictures({feature: list(own) for feature, own in tops.items()}, thumbnails)
        of_item: dict[int, list[int]] = {}
        for feature, own in tops.items():
            best = next((item for file, item in own.items() if file in chosen), None)
            if best is not None:
                of_item.setdefault(best, []).append(feature)
        count = -(-len(self) // (columns * rows))
        sheets = np.zeros((count, rows, columns, side, side, 4), np.uint8)
        tiles = sheets.reshape(-1, side, side, 4)
        for begin in range(0, len(of_item), TOGETHER):  # so that they are generated in batches
            self._picture_bytes(list(of_item)[begin : begin + TOGETHER])
        for item, features in of_item.items():
            picture = decode_picture(self._picture_bytes([item])[0])[None]
            maps = feature_maps(self.sae, self._pictures.store, self.block, [item], features)[0]
            tiles[features] = draw_tiles(picture, maps, side)
        return [
            encode_pixels(sheet.transpose(0, 2, 1, 3, 4).reshape(rows * side, columns * side, 4), "WEBP", quality=82)
            for sheet in sheets
        ]

    def _picture_file(self, item: int) -> Path:
        """Return the file in which the picture of an item is kept; items of the same prompt and seed share it."""
        store = self._pictures.store
        record = store.items[item]
        name = config_checksum({"prompt": record["prompt"], "seed": record["seed"]})[:20]
        return self.folder / CACHE / f"pictures-{store.identity[:12]}" / name

    def _picture_bytes(self, items: Sequence[int]) -> list[bytes]:
        """Return the encoded pictures of items; those that are missing are generated."""
        files = {item: self._picture_file(item) for item in items}
        missing = {file: item for item, file in files.items() if not file.is_file()}
        if missing:
            for file, picture in zip(missing, self._pictures.pictures(list(missing.values())), strict=True):
                with atomic(file) as draft:
                    draft.write_bytes(encode_picture(picture))
        return [files[item].read_bytes() for item in items]

    def _tabulate(self, truth: pd.DataFrame | None) -> pd.DataFrame:
        summary, n = self._summary, len(self)
        table = pd.DataFrame({
            "feature": np.arange(n),
            "frequency": (summary.active_items.double() / max(summary.item_count, 1)).numpy(),
            "density": (summary.active_rows.double() / max(summary.row_count, 1)).numpy(),
            "mu": self._mean.numpy(), "words": captions_from_words(self.statistics),
            **{name: [value] * n for name, value in UNKNOWN.items()},
        }).set_index("feature", drop=False)  # fmt: skip
        if truth is not None:
            table.update(truth.set_index("feature")[["f1", "value", "control"]])
        if self._scores is not None:
            own = self._scores[self._scores["who"] == "sae"]
            table.update(own.set_index("feature")[["specificity"]])
        if self._captions is not None:
            found = self._captions.rename(columns={"score": "caption_score"}).set_index("feature")
            table.update(found[["caption", "caption_score"]])
        if self._twin is not None:
            table["stability"] = self._twin[2].astype(float)
        return table.reset_index(drop=True)

    # The parts of a card

    def _example_pictures(self, feature: int) -> list[dict[str, Any]]:
        groups = {"top": self._top(feature)}
        groups |= {f"decile {i + 1}": self._of_decile(feature, i) for i in reversed(range(DECILES))}
        found = [
            {"group": group, "item": item, "activation": mean}
            for group, own in groups.items() for item, mean in zip(*own, strict=True)
        ]  # fmt: skip
        if not found:
            return []
        items = [one["item"] for one in found]
        maps = feature_maps(self.sae, self._pictures.store, self.block, items, [feature])[:, 0]
        pictures = self._picture_bytes(items)
        positive = maps[maps > 0]
        low, high = (float(positive.min()), float(positive.max())) if len(positive) else (0.0, 0.0)
        for one, picture, own in zip(found, pictures, maps, strict=True):
            record = self._pictures.store.items[one["item"]]
            one |= {name: record.get(name) for name in ("prompt", "seed", "timestep")}
            one |= {"picture": picture, "map": own.tolist(), "vmin": low, "vmax": high}
        return found

    def _top(self, feature: int) -> tuple[list[int], list[float]]:
        """List the items in which a feature is most active; of items with the same picture only the first."""
        items, means = self.statistics.top_items(feature)
        first = {self._picture_file(item): place for place, item in reversed(list(enumerate(items)))}
        places = sorted(first.values())[: self._examples]
        return [items[i] for i in places], [means[i] for i in places]

    def _of_decile(self, feature: int, number: int) -> tuple[list[int], list[float]]:
        """Choose an item of a decile of the feature's active items: the first of a sample whose picture was generated
        before, otherwise the first, so that a card seldom waits for pictures."""
        items, means = self.statistics.sample_items(
            feature, number / DECILES, (number + 1) / DECILES, CANDIDATES, self._seed
        )
        order = sorted(range(len(items)), key=lambda i: not self._picture_file(items[i]).is_file())[:1]
        return [items[i] for i in order], [means[i] for i in order]

    def _nearest(self, feature: int, count: int = 10) -> list[tuple[int, float]]:
        decoder = self.sae.decoder.detach()
        cosines = (decoder @ decoder[feature] / (self._norms * self._norms[feature])).cpu()
        cosines[feature] = -torch.inf
        best = cosines.topk(min(count, len(self) - 1))
        return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))

    def _twin_of(self, feature: int) -> dict[str, Any] | None:
        if self._twin is None:
            return None
        seed, other, cosine = self._twin
        return {"seed": seed, "feature": int(other[feature]), "cosine": float(cosine[feature])}

    def _scores_of(self, feature: int) -> list[dict[str, Any]]:
        row = self.table.iloc[feature]
        found = []
        if row["value"]:
            name = f"F1 for {row['value']}"
            found.append({"score": name, "feature": float(row["f1"]), "random directions": float(row["control"])})
        if self._scores is not None:
            numbers = self._scores.set_index("who").select_dtypes("number").drop(columns="pictures", errors="ignore")
            own = numbers[numbers["feature"] == feature].drop(columns="feature")
            means = numbers.drop(columns="feature").groupby("who").mean()
            for score in own.columns if "sae" in own.index else ():
                controls = {who: means.loc[who, score] for who in means.index if who != "sae"}
                if "random directions" in own.index:  # of this very feature
                    controls["random directions"] = own.loc["random directions", score]
                known = {who: float(value) for who, value in controls.items() if np.isfinite(value)}
                if np.isfinite(own.loc["sae", score]):
                    found.append({"score": score, "feature": float(own.loc["sae", score]), **known})
        return found

    def _reasoning(self, feature: int) -> str:
        if self._captions is None:
            return ""
        found = self._captions.loc[self._captions["feature"] == feature, "reasoning"]
        return "" if found.empty else str(found.iloc[0])

    # Generation

    @cached_property
    def _steerer(self) -> Steerer:
        return Steerer(self._pipeline, {self.block: Directions.of(self.sae, self.statistics)})

    @cached_property
    def _control(self) -> Steerer:
        random = with_random_directions(self.sae, self._seed)
        return Steerer(self._pipeline, {self.block: Directions.of(random, self.statistics)})

    def _draw(self, prompt: str, seed: int) -> _Drawn:
        """Generate the unchanged picture of a prompt and capture the block's update; the last few are kept."""
        key = (prompt, seed)
        if key not in self._drawn:
            found = activations.from_prompts(self._pipeline, [prompt], [seed], self.block, self.sampling, pictures=True)
            updates = [one[0].float().cpu() for one in found.maps[self.block]]
            self._drawn[key] = _Drawn(found.pictures[0].cpu(), updates)
            while len(self._drawn) > REMEMBERED:
                self._drawn.popitem(last=False)
        self._drawn.move_to_end(key)
        return self._drawn[key]

    def _steering(self, one: Mapping[str, Any], step_range: tuple[int, int] | None) -> Steering:
        for name in one:
            one_of("steerings", name, ("feature", "strength", "way", "mask", "control"))
        one_of("way", one.get("way", "add"), WAYS)
        steps: tuple[int, ...] = ()
        if step_range is not None:
            first, last = step_range
            if not 0 <= first <= last < self.passes:
                raise ValueError(
                    f"step_range: expected two rising numbers from 0 to {self.passes - 1}, got {first} and {last}"
                )
            steps = tuple(range(first, last + 1))
        return Steering(
            self.block, self._require(one["feature"]), float(one["strength"]), one.get("way", "add"), "k_mean",
            mask=None if one.get("mask") is None else _mask(one["mask"]), steps=steps,
        )  # fmt: skip

    def _require(self, feature: int) -> int:
        if isinstance(feature, bool) or not isinstance(feature, int | np.integer) or not 0 <= feature < len(self):
            raise ValueError(f"feature: {self.block} has features 0 to {len(self) - 1}, got {feature!r}")
        return int(feature)

    # Search

    @cached_property
    def _sentences(self) -> Any:
        return load_sentence_model(self._sentence_model, device=self._device)

    @cached_property
    def _meanings(self) -> tuple[list[int], Tensor]:
        """The features that have a caption or words, and the vectors (M, d) of these."""
        texts = self.table["caption"].where(self.table["caption"] != "", self.table["words"])
        named = texts[texts != ""]
        if named.empty:
            return [], torch.zeros(0, 0)
        different = list(dict.fromkeys(named))
        parts = [self._sentences.embed_sentences(different[i : i + 64]) for i in range(0, len(different), 64)]
        place = {text: i for i, text in enumerate(different)}
        return named.index.tolist(), torch.cat(parts)[[place[text] for text in named]]


# What finished runs know


def load_autoencoders(
    trained: SAESweep, block: str, k: int, n_features: int, device: Any = "cpu"
) -> tuple[SAE, Twin | None]:
    """Load a block's autoencoder of the first seed, and that of the second seed if there is one.

    Raises:
        ValueError: the run has no autoencoder for the block, or none of that size.
    """
    if block not in trained.blocks:
        raise unknown("block (of the autoencoders)", block, trained.blocks)
    trained.validate([], (k, n_features))
    seeds = [seed for (*key, seed) in trained.names if key == [block, k, n_features]]
    saes = [load_trained(trained.folder / trained.names[block, k, n_features, s], device=device) for s in seeds[:2]]
    return saes[0], Twin(seeds[1], saes[1]) if len(seeds) > 1 else None


def read_captions(folder: str, block: str, autoencoders: Mapping[str, Any]) -> pd.DataFrame:
    """Read the captions of a block's features from a finished run of notebook 36.

    Args:
        folder: the run's output folder.
        block: the block's short name.
        autoencoders: the parameters ``saes``, ``k`` and ``n_features`` that the run must have had.

    Returns:
        ``feature``, ``caption``, ``reasoning`` and ``score``.

    Raises:
        ValueError: the folder holds no such run, or the run is of other autoencoders or has no captions of the block.
    """
    table = _own_table("captions", folder, "36_annotate_features", "captions", block, autoencoders)
    table = table.loc[table["caption"] != "", ["feature", "caption", "reasoning", "score"]]  # not those that failed
    return table.drop_duplicates("feature").astype({"score": float})


def read_scores(folder: str, block: str, autoencoders: Mapping[str, Any]) -> pd.DataFrame:
    """Read the scores of a block's features and of their controls from a finished run of notebook 34.

    Args and errors as for :func:`read_captions`.

    Returns:
        ``who``, ``feature`` and the scores of :mod:`vaelab.sae.feature_scores`.
    """
    return _own_table("scores", folder, "34_feature_gallery", "features", block, autoencoders)


def _own_table(
    parameter: str, folder: str, notebook: str, name: str, block: str, autoencoders: Mapping[str, Any]
) -> pd.DataFrame:
    results = read_results(folder, notebook, parameter)
    for key, value in autoencoders.items():
        if (there := results["params"].get(key)) != portable(value):
            raise ValueError(
                f"{parameter}: {folder!r} is about other autoencoders: its {key} is {there!r}, here it is {value!r}"
            )
    rows = results["tables"].get(name, [])
    own = [row for row in rows if row["block"] == block]
    if not own:
        there = ", ".join(dict.fromkeys(row["block"] for row in rows)) or "none"
        raise ValueError(f"{parameter}: {folder!r} has no feature of block {block}; its blocks: {there}")
    return pd.DataFrame(own)


def write_page(path: Path, page: str) -> str:
    """Write an HTML page; returns its path relative to the project."""
    with atomic(path) as draft:
        draft.write_text(page, encoding="utf-8")
    return portable(str(path))


# Parts of a card


def histogram(bins: Tensor) -> dict[str, list[float]]:
    """Take the positive half of a feature's histogram (:data:`BINS`,), joined to at most :data:`BARS` bars.

    Returns:
        ``edges``, one more than ``counts``; both empty if no activation is positive.
    """
    counts = bins[BINS // 2 :].numpy()
    filled = np.flatnonzero(counts)
    if not len(filled):
        return {"edges": [], "counts": []}
    begin, end = filled[0], filled[-1] + 1
    joined = -(-(end - begin) // BARS)
    starts = np.arange(begin, end, joined)
    ends = np.append(starts[1:], end)
    return {
        "edges": bin_edges()[np.append(starts, end)].tolist(),
        "counts": [int(counts[a:b].sum()) for a, b in zip(starts, ends, strict=True)],
    }


def _mask(mask: Any) -> Tensor:
    try:
        found = torch.as_tensor(np.asarray(mask, np.float32))
    except (ValueError, TypeError) as error:
        raise ValueError("mask: expected rows of equal length with numbers from 0 to 1") from error
    if found.ndim != 2 or not found.numel() or not ((found >= 0) & (found <= 1)).all():
        raise ValueError(f"mask: expected (H, W) with numbers from 0 to 1, got the shape {tuple(found.shape)}")
    return found
