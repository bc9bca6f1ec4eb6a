"""Widgets for JupyterLab: what a notebook draws once, with controls."""

from vaelab.browser.feature_browser import FeatureBrowser
from vaelab.browser.tour import BlockSwitch, ChannelViewer

__all__ = ["BlockSwitch", "ChannelViewer", "FeatureBrowser"]
