"""Charts and picture grids: tables and tensors in, figures out."""

from vaelab.viz.charts import SILENT, bars, curves, distributions, forest, losses
from vaelab.viz.grids import captioned, displayable, masked, matrix, picture_grid, strength

__all__ = [
    "SILENT",
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
