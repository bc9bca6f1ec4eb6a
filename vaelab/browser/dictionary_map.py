"""The map of a dictionary: a place for every feature, the nearest features of another dictionary, and thumbnails."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

TSNE_MOST = 5120
"""The largest number of features that t-SNE embeds; more are embedded by PCA."""
TILE, SMALL_TILE, MANY = 32, 16, 20_480
"""Sides of a thumbnail, in pixels; the smaller one is for more features than the last number."""
SHEET = 2048
"""The largest side of a sheet of thumbnails, in pixels."""
FADED = 0.4
"""Brightness of a thumbnail where the feature is not active."""


def embed_directions(directions: Tensor, seed: int = 0) -> np.ndarray:
    """Embed directions (N, d) of unit length in two dimensions: (N, 2) float32 in [0, 1].

    Up to :data:`TSNE_MOST` directions are embedded by t-SNE (van der Maaten and Hinton, 2008) with cosine distances,
    more of them by PCA; both are scikit-learn's.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    vectors, n = directions.float().numpy(), len(directions)
    if 8 <= n <= TSNE_MOST:
        perplexity = min(30.0, (n - 1) / 3)
        found = TSNE(2, perplexity=perplexity, metric="cosine", max_iter=500, random_state=seed).fit_transform(vectors)
    elif n > 1:
        found = PCA(2, svd_solver="covariance_eigh", random_state=seed).fit_transform(vectors)
    else:
        found = np.zeros((n, 2))
    low, high = found.min(0), found.max(0)
    return ((found - low) / np.maximum(high - low, 1e-12)).astype(np.float32)


def nearest_in(directions: Tensor, others: Tensor, rows: int = 1024) -> tuple[np.ndarray, np.ndarray]:
    """Find for each direction (N, d) the nearest of others (M, d): its number (N,), and the cosine (N,); all directions
    have unit length."""
    best = [(part @ others.T).max(1) for part in directions.split(rows)]
    return torch.cat([one.indices for one in best]).numpy(), torch.cat([one.values for one in best]).numpy()


def sprite_grid(n: int) -> tuple[int, int, int]:
    """Choose columns, rows and the side of a tile of the sheets of thumbnails of n features."""
    side = TILE if n <= MANY else SMALL_TILE
    columns = min(int(np.ceil(np.sqrt(n))), SHEET // side)
    return columns, min(-(-n // columns), SHEET // side), side


def choose_pictures(tops: Mapping[int, Sequence[Any]], most: int) -> set[Any]:
    """Choose at most ``most`` pictures such that features find one among their top pictures.

    If the features' first pictures are too many, the picture that most features still lack is chosen again and again.

    Args:
        tops: each feature's top pictures, the best first.
        most: the largest number.
    """
    first = {own[0] for own in tops.values() if own}
    if len(first) <= most:
        return first
    chosen: set[Any] = set()
    open_ = dict(tops)
    while open_ and len(chosen) < most:
        ((picture, _),) = Counter(picture for own in open_.values() for picture in own).most_common(1)
        chosen.add(picture)
        open_ = {feature: own for feature, own in open_.items() if picture not in own}
    return chosen


def draw_tiles(picture: Tensor, maps: Tensor, side: int) -> np.ndarray:
    """Draw thumbnails of one picture (1, 3, H, W) in [-1, 1] for features with maps (F, h, w): (F, side, side, 4)
    uint8. Where a feature is not active, the picture is faded."""
    small = F.interpolate(picture.float(), (side, side), mode="bilinear", antialias=True, align_corners=False)
    spread = F.interpolate(maps[:, None].float(), (side, side), mode="bilinear", align_corners=False)
    weight = FADED + (1 - FADED) * (spread / spread.amax((2, 3), keepdim=True).clamp_min(1e-12)).clamp(0, 1).sqrt()
    shown = ((small.clamp(-1, 1) + 1) * 127.5 * weight).round().byte()
    return torch.cat([shown, torch.full_like(shown[:, :1], 255)], 1).permute(0, 2, 3, 1).numpy()
