"""Runs of notebooks: parameters, results, and the front page."""

from vaelab.runner.report import Run, start

__all__ = ["Run", "start"]
