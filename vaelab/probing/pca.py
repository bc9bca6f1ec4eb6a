"""The first principal components of feature maps, as colours.

Kim et al. ("Revelio", section 4.5, Figures 10 to 12) after Tumanyan et al. (2023): the vectors at all positions, of one
picture or of several together, are projected on their first three components, shown as red, green and blue.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vaelab.core.validate import at_least

COLOURS = 3
REGULARISATION = 1e-9
"""Added to the variances of :func:`foreground_auc`, which may be 0."""
CLIPPED = 0.01
"""Share of the positions at either end of a component's range that is shown in the darkest or brightest colour."""


class PrincipalComponents(NamedTuple):
    """The directions of largest variance, in float64."""

    mean: Tensor
    """(d,) the mean of the vectors."""
    directions: Tensor
    """(k, d) directions of unit length; in each, the entry with the largest absolute value is positive."""
    shares: Tensor
    """(k,) the share of the variance along each direction, in decreasing order."""


def principal_components(maps: Tensor, count: int = COLOURS) -> PrincipalComponents:
    """Compute the first principal components of the vectors in maps (N, h, w, d), by scikit-learn in float64.

    Raises:
        ValueError: there are fewer channels than components, or fewer than two vectors.
    """
    from sklearn.decomposition import PCA

    vectors = maps.reshape(-1, maps.shape[-1]).double().numpy()
    at_least("count", count, 1)
    at_least("channels", vectors.shape[1], count)
    at_least("positions", len(vectors), 2)
    with np.errstate(invalid="ignore"):  # the shares of vectors that are all equal
        fitted = PCA(count, svd_solver="covariance_eigh").fit(vectors)
    directions = torch.from_numpy(fitted.components_)
    signs = directions.gather(1, directions.abs().argmax(1, keepdim=True)).sign()
    shares = torch.from_numpy(fitted.explained_variance_ratio_).nan_to_num(0)
    return PrincipalComponents(torch.from_numpy(fitted.mean_), directions * signs, shares)


def project(maps: Tensor, components: PrincipalComponents) -> Tensor:
    """Compute the coordinates (N, h, w, k) of the vectors in maps (N, h, w, d), in float64."""
    return (maps.double() - components.mean) @ components.directions.T


def colours(maps: Tensor, components: PrincipalComponents) -> Tensor:
    """Show maps (N, h, w, d) as pictures (N, 3, h, w) in [-1, 1]; each component has one scale for all pictures.

    Args:
        maps: the maps of one picture or several.
        components: three components; they become red, green and blue.
    """
    values = project(maps, components)
    low, high = (values.reshape(-1, len(components.directions)).quantile(end, 0) for end in (CLIPPED, 1 - CLIPPED))
    scaled = (values - low) / (high - low).clamp_min(torch.finfo(torch.float64).tiny)
    return (2 * scaled.clamp(0, 1) - 1).permute(0, 3, 1, 2).float()


def colours_jointly(maps: Tensor) -> tuple[Tensor, float]:
    """Colour all maps (N, h, w, d) by their joint components: (N, 3, h, w), and the share of variance that is shown.

    A colour means the same in every picture.
    """
    components = principal_components(maps)
    return colours(maps, components), float(components.shares.sum())


def colours_separately(maps: Tensor) -> tuple[Tensor, float]:
    """Colour each map by its own components: (N, 3, h, w), and the mean share of the variance that is shown."""
    each = [colours_jointly(single[None]) for single in maps]
    return torch.cat([picture for picture, _ in each]), sum(share for _, share in each) / len(each)


def foreground_auc(maps: Tensor, masks: Tensor | None) -> float:
    """Measure how well the first three joint components separate the positions of objects from the background.

    The paper judges by eye whether such pictures show what is where (section 4.5); this is a number for it. Quadratic
    discriminant analysis scores every position by the log-ratio of two normal distributions, fitted to the positions
    of objects and to the others with unbiased covariances (scikit-learn's own analysis divides by n - 1 or by n,
    depending on its version). The result is the area under the ROC curve of that score: 0.5 is chance, 1 a perfect
    separation.

    Args:
        maps: (N, h, w, d), the maps of N pictures.
        masks: (N, R, R) bool, true where a picture shows an object; a position of the map counts as an object's if at
            least half of it is covered. None means that the masks are unknown.

    Returns:
        The area; NaN if the masks are unknown, or if objects or background cover too few positions for a covariance.
    """
    from scipy.stats import multivariate_normal
    from sklearn.metrics import roc_auc_score

    if masks is None:
        return float("nan")
    values = project(maps, principal_components(maps)).flatten(0, 2).numpy()
    foreground = (F.adaptive_avg_pool2d(masks[:, None].double(), maps.shape[1:3]).flatten() >= 0.5).numpy()
    count = int(foreground.sum())
    if min(count, len(foreground) - count) <= COLOURS:
        return float("nan")
    things, background = (
        multivariate_normal(part.mean(0), np.cov(part.T) + REGULARISATION * np.eye(COLOURS))
        for part in (values[foreground], values[~foreground])
    )
    return float(roc_auc_score(foreground, things.logpdf(values) - background.logpdf(values)))
