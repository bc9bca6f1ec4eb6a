"""Runs of notebooks: parameters, results, output folders, the command line and the front page."""

from vaelab.runner.run import Run, read_results, start

__all__ = ["Run", "read_results", "start"]
