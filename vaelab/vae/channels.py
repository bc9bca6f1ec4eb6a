"""Suppressed channels: statistics of GroupNorm's outputs, and their relation to its scales.

From "Investigating the Functional Role of Learned Channel Suppression in Diffusion VAEs" (Shi, Wang
and Roshka), sections 4.2 and 4.3. A channel is suppressed if its mean absolute activation m_c is
below a threshold theta_act. The paper names GroupNorm's scale gamma as the mechanism:
:func:`scale_relation` tests that.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from vaelab.core.validate import at_least, one_of
from vaelab.hooks import capture, find_layers, unwrap
from vaelab.training.evaluation import evaluation_mode

MEASURES = ("activity", "gamma")


class Moments(NamedTuple):
    """Statistics of the channels of one layer over ``count`` values per channel; each has the shape (C,)."""

    count: int | Tensor
    mean_abs: Tensor
    """m_c, the paper's mean absolute activation (section 4.2)."""
    mean: Tensor
    variance: Tensor

    @property
    def std(self) -> Tensor:
        """Standard deviation of each channel (C,)."""
        return self.variance.sqrt()


Activity = dict[str, Moments]


class Suppressed(NamedTuple):
    """The suppressed channels of one GroupNorm layer."""

    layer: str
    parameter: str
    """Name of the model's parameter that holds the scales gamma, which an intervention changes."""
    indices: tuple[int, ...]
    values: tuple[float, ...]
    """The classified value of each of these channels: m_c, or |gamma|."""


def channel_moments(activation: Tensor) -> Moments:
    """Compute the moments of every channel of one activation.

    Args:
        activation: a GroupNorm layer's output A: (B, C, H, W), (B, C, L) or (B, C).

    Returns:
        float32 moments over batch and positions, on the activation's device; m_c is the mean of |A|.
    """
    if activation.dim() < 2:
        raise ValueError(f"activation: expected (B, C, ...), got {tuple(activation.shape)}")
    values = activation.float()
    over = [dim for dim in range(values.dim()) if dim != 1]
    mean = values.mean(dim=over, keepdim=True)
    # two passes are as stable as torch.var_mean over these dims, and several times faster on a CPU
    variance = (values - mean).square().mean(dim=over)
    return Moments(values.numel() // values.shape[1], values.abs().mean(dim=over), mean.flatten(), variance)


def merge_moments(first: Moments, second: Moments) -> Moments:
    """Combine the moments of two sets of values into the moments of their union (Chan, Golub and LeVeque, 1979)."""
    total = first.count + second.count
    share = second.count / total
    shift = second.mean - first.mean
    return Moments(
        total,
        first.mean_abs + (second.mean_abs - first.mean_abs) * share,
        first.mean + shift * share,
        first.variance * (1 - share) + second.variance * share + shift**2 * share * (1 - share),
    )


def groupnorms(
    model: nn.Module, layers: str | Iterable[str] = "*", parameter: str = "layers"
) -> dict[str, nn.GroupNorm]:
    """Find the GroupNorm layers with a learned scale among ``layers`` (paths or globs), by path.

    Error messages begin with ``parameter``, the notebook parameter that gave ``layers``.

    Raises:
        ValueError: none of the layers is a GroupNorm with a learned scale.
    """
    norms = {
        name: module
        for name, module in find_layers(model, layers, parameter).items()
        if isinstance(module, nn.GroupNorm) and module.affine
    }
    if not norms:
        raise ValueError(f"{parameter}: no GroupNorm with a scale among {layers!r} of {type(unwrap(model)).__name__}")
    return norms


class ActivityTracker:
    """Accumulates the moments of the outputs of a model's GroupNorm layers over forward passes.

    ::

        tracker = ActivityTracker(vae)
        with tracker.track():          # hooks exist in here only
            vae(pictures)
        activity = tracker.read()      # one transfer to the CPU

    Moments are accumulated on the device. In a distributed run ``read`` merges the moments of all processes.
    """

    def __init__(self, model: nn.Module, layers: str | Iterable[str] = "*"):
        self._model = model
        self.layers = list(groupnorms(model, layers))
        self._moments: Activity = {}

    @contextmanager
    def track(self) -> Iterator[None]:
        """Add the activations of forward passes inside the ``with`` block to the moments."""
        with capture(self._model, self.layers, reduce=channel_moments) as captured:
            yield
        for layer, calls in captured.items():
            for moments in calls:
                earlier = self._moments.get(layer)
                self._moments[layer] = merge_moments(earlier, moments) if earlier else moments

    def read(self, *, reset: bool = True) -> Activity:
        """Return the moments tracked so far, on the CPU; with ``reset`` they are discarded afterwards.

        Raises:
            RuntimeError: nothing has been tracked.
        """
        if not self._moments:
            raise RuntimeError("nothing was tracked: run the model inside `track()` first")
        flat = torch.cat([torch.stack(moments[1:]) for moments in self._moments.values()], dim=1).cpu()
        counts = [int(moments.count) for moments in self._moments.values()]
        sizes = [len(moments.mean) for moments in self._moments.values()]
        parts = torch.split(flat, sizes, dim=1)
        activity = {
            layer: Moments(count, *part.unbind(0))
            for layer, count, part in zip(self._moments, counts, parts, strict=True)
        }
        if reset:
            self._moments = {}
        return _merged_over_processes(activity)


def _merged_over_processes(activity: Activity) -> Activity:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return activity
    everyone: list[Activity | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, activity)
    merged = everyone[0]
    for other in everyone[1:]:
        merged = {layer: merge_moments(merged[layer], other[layer]) for layer in merged}
    return merged


@torch.no_grad()
def measure_activity(
    model: nn.Module, forward: Callable[[Tensor], object], batches: Iterable[dict], layers: str | Iterable[str] = "*"
) -> Activity:
    """Measure the moments of the GroupNorm outputs over a data set, in evaluation mode.

    Args:
        model: the model whose layers are measured.
        forward: runs the model; called with each batch's ``pixels``, on the model's device and in its precision.
        batches: dicts with ``pixels`` (B, 3, H, W).
        layers: paths or globs of GroupNorm layers.
    """
    tracker = ActivityTracker(model, layers)
    parameter = next(model.parameters())
    with evaluation_mode(model):
        for batch in batches:
            with tracker.track():
                forward(batch["pixels"].to(parameter.device, parameter.dtype))
    return tracker.read()


def classify(
    model: nn.Module,
    activity: Activity,
    *,
    threshold: float = 1e-3,
    relative: bool = False,
    by: str = "activity",
) -> dict[str, Suppressed]:
    """Find the suppressed channels of every layer in ``activity`` (section 4.3: m_c < theta_act).

    Args:
        model: the model whose GroupNorm layers were measured.
        activity: the moments by layer, from :meth:`ActivityTracker.read` or :func:`measure_activity`.
        threshold: theta_act; a channel whose value equals it is not suppressed.
        relative: multiply the threshold by the layer's median value, since layers differ in scale.
            If more than half of a layer is suppressed, its median is near 0 and almost no channels are found.
        by: the value that is compared with the threshold: ``activity`` (m_c), or ``gamma`` (|gamma|).

    Returns:
        One entry per layer with at least one suppressed channel.

    Raises:
        ValueError: an activation has NaN or infinite values, or ``threshold`` or ``by`` is invalid.
    """
    at_least("threshold", threshold, 0)
    one_of("by", by, MEASURES)
    norms = groupnorms(model, list(activity))
    suppressed = {}
    for layer, moments in activity.items():
        if not moments.mean_abs.isfinite().all():
            raise ValueError(f"activity: the output of {layer} has NaN or infinity; try precision float32 or bfloat16")
        values = moments.mean_abs if by == "activity" else norms[layer].weight.detach().float().abs().cpu()
        bound = threshold * values.quantile(0.5) if relative else threshold
        indices = torch.nonzero(values < bound).flatten().tolist()
        if indices:
            chosen = tuple(float(values[i]) for i in indices)
            suppressed[layer] = Suppressed(layer, f"{layer}.weight", tuple(indices), chosen)
    return suppressed


def count_suppressed(suppressed: dict[str, Suppressed]) -> int:
    """Count the suppressed channels of all layers."""
    return sum(len(layer.indices) for layer in suppressed.values())


def channel_table(model: nn.Module, activity: Activity) -> pd.DataFrame:
    """Make a table with one row per channel: ``layer``, ``channel``, ``mean_abs`` (m_c), ``mean``, ``std``,
    ``gamma``, ``beta`` and ``relative`` (m_c divided by the layer's median m_c)."""
    norms = groupnorms(model, list(activity))
    tables = []
    for layer, moments in activity.items():
        columns = {
            "mean_abs": moments.mean_abs,
            "mean": moments.mean,
            "std": moments.std,
            "gamma": norms[layer].weight.detach().float().cpu(),
            "beta": norms[layer].bias.detach().float().cpu(),
        }
        table = pd.DataFrame({name: values.double().numpy() for name, values in columns.items()})
        table.insert(0, "layer", layer)
        table.insert(1, "channel", np.arange(len(table)))
        table["relative"] = table["mean_abs"] / max(table["mean_abs"].median(), np.finfo(float).tiny)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def suppressed_channel_rows(table: pd.DataFrame, suppressed: dict[str, Suppressed]) -> pd.DataFrame:
    """Select the rows of :func:`channel_table` whose channels :func:`classify` found to be suppressed."""
    chosen = {(layer, channel) for layer, target in suppressed.items() for channel in target.indices}
    return table[[key in chosen for key in zip(table["layer"], table["channel"], strict=True)]].reset_index(drop=True)


def most_suppressed_layer(table: pd.DataFrame, suppressed: dict[str, Suppressed]) -> str:
    """Find the layer with the most suppressed channels; if there are none, the layer of the channel with the smallest
    m_c."""
    if suppressed:
        return max(suppressed, key=lambda layer: len(suppressed[layer].indices))
    return table.loc[table["mean_abs"].idxmin(), "layer"]


def activation_map(activation: Tensor) -> Tensor:
    """Arrange one picture's activation as maps (C, H, W).

    Args:
        activation: (C, H, W), returned unchanged; or (C, L) from an attention block, which becomes
            (C, sqrt L, sqrt L).

    Raises:
        ValueError: the length L is not a square number.
    """
    if activation.dim() == 3:
        return activation
    side = math.isqrt(activation.shape[1])
    if side * side != activation.shape[1]:
        raise ValueError(f"activation: {activation.shape[1]} positions are no square map")
    return activation.unflatten(1, (side, side))


@torch.no_grad()
def near_zero_weights(model: nn.Module, threshold: float = 1e-8, *, relative: bool = False) -> dict[str, float]:
    """Compute the fraction of near-zero weights of each convolution and linear layer (section 4.2, Figure 1).

    Args:
        model: any module.
        threshold: a weight is near zero if its magnitude is below this value.
        relative: multiply ``threshold`` by the layer's mean weight magnitude.
    """
    at_least("near_zero_threshold", threshold, 0)
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)
    weights = {name: m.weight.abs() for name, m in unwrap(model).named_modules() if isinstance(m, kinds)}
    fractions = [
        (weight < (threshold * weight.mean() if relative else threshold)).float().mean() for weight in weights.values()
    ]
    return dict(zip(weights, torch.stack(fractions).tolist(), strict=True)) if weights else {}


def folded_normal_mean(mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Compute E|y| of a normal variable y with this mean and standard deviation: the m_c of a channel with normally
    distributed values."""
    from scipy.stats import foldnorm

    # from 40 standard deviations on E|y| is |mean|; scipy takes no standard deviation of 0
    std = np.maximum(std, np.abs(mean) / 40 + np.finfo(float).tiny)
    return foldnorm.mean(np.abs(mean) / std, scale=std)


def scale_relation(table: pd.DataFrame, threshold: float) -> dict[str, float]:
    """Measure how m_c depends on gamma and beta, to test the paper's claim that the scale gamma is the mechanism.

    GroupNorm's output is gamma z + beta with the normalized channel z. If z is Gaussian, then gamma z + beta is
    Gaussian too, and its m_c = E|gamma z + beta| is the mean of a folded normal distribution.

    Args:
        table: the table of :func:`channel_table`.
        threshold: theta_act, for both m_c and |gamma|.

    Returns:
        ``spearman.gamma`` and ``spearman.beta``, rank correlations of m_c with |gamma| and |beta|;
        ``predicted.r2``, the R^2 of predicting m_c by E|gamma z + beta| with a standard normal z; and the
        numbers of channels below the threshold: ``low.activity`` (by m_c), ``low.gamma`` (by |gamma|) and
        ``low.both``. A correlation is left out if one of its two columns is constant (for instance the shifts of
        an untrained model, which are all 0), and ``predicted.r2`` if m_c is constant.
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


def describe_census(relation: Mapping[str, float], channels: int, threshold: float) -> str:
    """Describe in one sentence how many channels are suppressed, and how many of them by their scale.

    Args:
        relation: the measures of :func:`scale_relation`.
        channels: the number of channels of all layers.
        threshold: theta_act.
    """
    low, both = relation["low.activity"], relation["low.both"]
    if not low:
        return f"None of {channels} channels is suppressed: no m_c is below {threshold:g}."
    sentence = (
        f"{low} of {channels} channels ({low / channels:.0%}) are suppressed, with an m_c below {threshold:g}; "
        f"of these, {both} ({both / low:.0%}) also have a scale |gamma| below it"
    )
    if {"spearman.gamma", "spearman.beta"} <= relation.keys():
        sentence += (
            f". Over all channels m_c has a rank correlation of {relation['spearman.gamma']:.2f} with |gamma| and, "
            f"as a control, of {relation['spearman.beta']:.2f} with the shift |beta|"
        )
    return sentence + "."


def _spearman(first: pd.Series, second: pd.Series) -> float:
    constant = first.nunique() < 2 or second.nunique() < 2
    return float("nan") if constant else float(first.corr(second, method="spearman"))
