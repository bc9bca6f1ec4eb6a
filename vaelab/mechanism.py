"""Whether GroupNorm's scale is what silences a channel: its m_c against gamma and beta.

A claim of Shi, Wang and Roshka, section 4.3. A normalised channel times gamma plus beta is normal, as
far as the channel was, so that its mean absolute activation can be foretold.
"""

import numpy as np
import pandas as pd


def folded_normal_mean(mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """E|y| of a normal y: what m_c would be of a channel with this mean and standard deviation."""
    from scipy.special import erf

    ratio = mean / np.maximum(std, np.abs(mean) / 40 + np.finfo(float).tiny)  # beyond 40, E|y| is |mean|
    return std * np.sqrt(2 / np.pi) * np.exp(-(ratio**2) / 2) + mean * erf(ratio / np.sqrt(2))


def scale_relation(table: pd.DataFrame, threshold: float) -> dict[str, float]:
    """How m_c, gamma and beta relate: a test of the claim that GroupNorm's scale is the mechanism.

    Args:
        table: from :func:`vaelab.channels.channel_table`.
        threshold: theta_act, for both m_c and |gamma|.

    Returns:
        ``spearman.gamma`` and ``spearman.beta``, rank correlations of m_c with |gamma| and |beta|;
        ``predicted.r2``, the share of m_c's variance that E|gamma z + beta| with a standard normal
        z accounts for; and the counts ``low.activity``, ``low.gamma`` and ``low.both``. A correlation
        that is not defined, as that with the shifts of an untrained model, all 0, is left out.
    """
    gamma, beta = table["gamma"].abs(), table["beta"]
    predicted = folded_normal_mean(beta.to_numpy(), gamma.to_numpy())
    residual = ((table["mean_abs"] - predicted) ** 2).sum()
    total = ((table["mean_abs"] - table["mean_abs"].mean()) ** 2).sum()
    low, low_gamma = table["mean_abs"] < threshold, gamma < threshold
    relation = {
        "spearman.gamma": _spearman(table["mean_abs"], gamma),
        "spearman.beta": _spearman(table["mean_abs"], beta.abs()),
        "predicted.r2": float(1 - residual / total) if total > 0 else float("nan"),
        "low.activity": int(low.sum()),
        "low.gamma": int(low_gamma.sum()),
        "low.both": int((low & low_gamma).sum()),
    }
    return {name: value for name, value in relation.items() if np.isfinite(value)}


def _spearman(first: pd.Series, second: pd.Series) -> float:
    return float(first.rank().corr(second.rank()))
