"""Time several functions in turns."""

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
        actions: the functions to time, by name; each is called with the index of the round.
        rounds: how often each action is timed.
        device: the device that the actions use; its queue is emptied before a time is measured.
        warmup: the number of rounds at the start that are not counted.
        seed: determines the order of the actions within the rounds.

    Returns:
        One row per round and one column per action, in seconds.
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
    """Compute how much longer ``name`` takes than ``reference``, in percent of the reference's median time: the median
    over rounds of the paired difference, and its first and third quartiles."""
    difference = 100 * (seconds[name] - seconds[reference]) / seconds[reference].median()
    low, middle, high = np.percentile(difference, [25, 50, 75])
    return float(middle), float(low), float(high)
