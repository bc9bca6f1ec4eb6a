"""Timing several functions in turns."""

import time
from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
import torch

from vaelab.core import devices
from vaelab.core.validate import at_least


def interleaved(
    actions: Mapping[str, Callable[[int], object]], rounds: int, *, device: torch.device, warmup: int = 2, seed: int = 0
) -> pd.DataFrame:
    """Time several actions in turns.

    Args:
        actions: called with the round's number.
        rounds: how often each is timed.
        device: whose queue must be empty before a clock is read.
        warmup: rounds that do not count.
        seed: fixes the order within the rounds.

    Returns:
        A row a round, a column an action, in seconds.
    """
    at_least("rounds", rounds, 1)
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(warmup + rounds):
        row = {}
        for name in rng.permutation(list(actions)):
            devices.synchronize(device)
            began = time.perf_counter()
            actions[str(name)](number)
            devices.synchronize(device)
            row[str(name)] = time.perf_counter() - began
        rows.append(row)
    return pd.DataFrame(rows[warmup:])[list(actions)]


def paired_percent(seconds: pd.DataFrame, name: str, reference: str) -> tuple[float, float, float]:
    """How much longer ``name`` takes than ``reference``, in percent: the median over rounds of
    the paired difference over the reference's median, and its first and third quartile."""
    difference = 100 * (seconds[name] - seconds[reference]) / seconds[reference].median()
    low, middle, high = np.percentile(difference, [25, 50, 75])
    return float(middle), float(low), float(high)
