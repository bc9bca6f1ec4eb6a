"""The first principal components of feature maps, as colours.

As Kim et al. ("Revelio", section 4.5, Figures 10 to 12) after Tumanyan et al. (2023): the vectors of all
positions, of one picture or of several together, are projected on their first three components, which
are shown as red, green and blue.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from torch import Tensor

from vaelab.core.validate import at_least

COLOURS = 3
SMALLEST = 1e-9
"""Added to variances that may be 0."""
TAILS = 0.01
"""Share of the positions at either end that is shown as dark or as bright as a colour can be."""


class Components(NamedTuple):
    """The directions of largest variance."""

    mean: Tensor
    """(d,) float64."""
    directions: Tensor
    """(k, d) float64, of unit length, each with its largest number positive."""
    shares: Tensor
    """(k,) of the variance, falling."""


def components(maps: Tensor, count: int = COLOURS) -> Components:
    """The first principal components of the vectors of maps (N, h, w, d), in float64.

    Raises:
        ValueError: fewer channels than components, or a single vector.
    """
    vectors = maps.reshape(-1, maps.shape[-1]).double()
    at_least("count", count, 1)
    at_least("channels", vectors.shape[1], count)
    at_least("positions", len(vectors), 2)
    mean = vectors.mean(0)
    centred = vectors - mean
    variances, directions = torch.linalg.eigh(centred.T @ centred / len(vectors))
    order = variances.argsort(descending=True)[:count]
    chosen = directions[:, order].T
    signs = chosen.gather(1, chosen.abs().argmax(1, keepdim=True)).sign()
    whole = variances.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return Components(mean, chosen * signs, variances[order].clamp_min(0) / whole)


def colours(maps: Tensor, found: Components) -> Tensor:
    """Maps (N, h, w, d) as pictures (N, 3, h, w) in [-1, 1], all on one scale a component.

    Args:
        maps: of one picture or several.
        found: three components.
    """
    seen = (maps.double() - found.mean) @ found.directions.T
    low, high = (seen.reshape(-1, len(found.directions)).quantile(end, 0) for end in (TAILS, 1 - TAILS))
    scaled = (seen - low) / (high - low).clamp_min(torch.finfo(torch.float64).tiny)
    return (2 * scaled.clamp(0, 1) - 1).permute(0, 3, 1, 2).float()


def jointly(maps: Tensor) -> tuple[Tensor, float]:
    """Colours (N, 3, h, w) by the components of all maps (N, h, w, d) together, in which a colour means the
    same in every picture, and the share of the variance that they show."""
    found = components(maps)
    return colours(maps, found), float(found.shares.sum())


def telling(maps: Tensor, things: Tensor | None) -> float:
    """How well the first three components of all maps together tell the positions of things from the ground.

    The paper says of such pictures that they show what is where, or that they do not (section 4.5); this is a
    number for it, the area under the curve of the log-ratio of two normal distributions, fitted to the
    components at the positions of things and at the others: 0.5 is chance, 1 that all are told apart.

    Args:
        maps: (N, h, w, d).
        things: (N, R, R) bool, where each picture has a thing; a position is one where half of it is covered.
            None where that is not known.

    Returns:
        The area; not a number where things are not known, or have fewer positions than a distribution takes.
    """
    if things is None:
        return float("nan")
    found = components(maps)
    seen = ((maps.double() - found.mean) @ found.directions.T).flatten(0, 2)
    marked = F.adaptive_avg_pool2d(things[:, None].double(), maps.shape[1:3]).flatten() >= 0.5
    count = int(marked.sum())
    if min(count, len(marked) - count) <= COLOURS:
        return float("nan")
    thing, ground = (
        torch.distributions.MultivariateNormal(part.mean(0), part.T.cov() + SMALLEST * torch.eye(COLOURS).double())
        for part in (seen[marked], seen[~marked])
    )
    ranks = rankdata(thing.log_prob(seen) - ground.log_prob(seen))
    return float((ranks[marked.numpy()].sum() - count * (count + 1) / 2) / (count * (len(marked) - count)))


def each_by_itself(maps: Tensor) -> tuple[Tensor, float]:
    """Colours (N, 3, h, w) by the components of each map (h, w, d), and the mean share that they show."""
    shown = [jointly(one[None]) for one in maps]
    return torch.cat([picture for picture, _ in shown]), sum(share for _, share in shown) / len(shown)
