"""Charts and picture grids: tables and tensors in, figures out."""

from vaelab.viz.charts import SUPPRESSED_COLOUR, bars, curves, distributions, forest, losses
from vaelab.viz.grids import captioned, displayable, masked, matrix, picture_grid, strength

__all__ = [
    "SUPPRESSED_COLOUR",
    "bars",
    "captioned",
    "curves",
    "displayable",
    "distributions",
    "forest",
    "losses",
    "masked",
    "matrix",
    "picture_grid",
    "strength",
]
