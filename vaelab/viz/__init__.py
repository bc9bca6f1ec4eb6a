"""Charts and picture grids: tables and tensors in, figures out."""

from vaelab.viz.charts import SUPPRESSED_COLOUR, bars, curves, distributions, forest, losses, summary_bars
from vaelab.viz.grids import captioned, displayable, masked, matrix, picture_grid, strength, summary_pictures

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
    "summary_bars",
    "summary_pictures",
]
