"""Intervene on suppressed channels: their GroupNorm scales gamma are raised (nudged), reset to 1, or raised adaptively.

From Shi, Wang and Roshka ("Investigating the Functional Role of Learned Channel Suppression in Diffusion VAEs"),
section 4.4. They leave the adaptive strategy to future work (section 6). The control condition is ours: the same nudge
on as many active channels. Without it, a difference between runs could be due to changing any scales at all.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from vaelab.core.validate import at_least, one_of
from vaelab.hooks import unwrap
from vaelab.vae.channels import Activity, Suppressed, folded_normal_mean

STRATEGIES = ("multiply", "add", "reset", "adaptive")
MOMENTS = ("keep", "reset")
HEADROOM = 1.01
"""``adaptive`` aims at this factor times the threshold, so that rounding leaves no channel just below it."""


@dataclass(frozen=True)
class NudgeConfig:
    """How the scale gamma of a suppressed channel is changed, and how often.

    Strategies act on |gamma| and preserve its sign (0 counts as positive). For positive scales this
    is the paper's formula; a plain sum would push a negative scale towards 0.
    """

    strategy: str = "multiply"
    """``multiply`` sets |gamma| to |gamma| f; ``add`` sets it to |gamma| + a; ``reset`` sets gamma to 1; ``adaptive``
    takes the smallest |gamma| with which m_c is predicted to exceed the threshold. Under ``adaptive`` the control
    condition changes nothing, because its channels are above the threshold."""
    nudge_factor: float = 1.1
    """f, the factor of ``multiply``."""
    nudge_amount: float = 0.01
    """a, the amount that ``add`` adds."""
    gamma_max: float = 2.0
    """Upper bound of |gamma| for ``multiply``, ``add`` and ``adaptive``."""
    gamma_floor: float = 1e-4
    """``multiply`` starts from at least this magnitude: a scale of exactly 0 would stay 0."""
    interval: int = 200
    """Steps between interventions."""
    moments: str = "keep"
    """What happens to AdamW's two moments of a changed scale: ``keep`` leaves them, as in the paper,
    so that the next step still follows the earlier gradients; ``reset`` sets them to 0."""

    def __post_init__(self) -> None:
        one_of("strategy", self.strategy, STRATEGIES)
        one_of("moments", self.moments, MOMENTS)
        at_least("nudge_factor", self.nudge_factor, 1)
        at_least("nudge_amount", self.nudge_amount, 0)
        at_least("gamma_max", self.gamma_max, 0, exclusive=True)
        at_least("gamma_floor", self.gamma_floor, 0)
        at_least("interval", self.interval, 1)


class Intervention(NamedTuple):
    """A change of one channel's scale."""

    layer: str
    channel: int
    before: float
    """The scale gamma before the change."""
    after: float
    """The scale gamma after it."""


@torch.no_grad()
def nudge_scales(
    model: nn.Module,
    targets: dict[str, Suppressed],
    config: NudgeConfig,
    *,
    activity: Activity | None = None,
    threshold: float | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> list[Intervention]:
    """Change the scales of ``targets``, and nothing else, as ``config`` says.

    Args:
        model: the model whose parameters are changed in place.
        targets: the channels, from :func:`vaelab.vae.channels.classify` or :func:`random_active_channels`.
        config: the strategy and its settings.
        activity: the moments by which the targets were classified; required by ``adaptive``.
        threshold: theta_act, above which ``adaptive`` raises m_c; required by ``adaptive``.
        optimizer: the optimizer whose moments are set to 0 with ``moments="reset"``; None means that no moments are
            changed.

    Returns:
        One record per channel, with its scale before and after the change.

    Raises:
        ValueError: the model does not have a target's parameter, or the strategy is ``adaptive`` and ``activity`` or
            ``threshold`` is missing.
    """
    if config.strategy == "adaptive" and (activity is None or threshold is None):
        raise ValueError("strategy: adaptive needs the activity and the threshold it was classified by")
    parameters = dict(unwrap(model).named_parameters())
    log = []
    for layer, target in targets.items():
        if target.parameter not in parameters:
            raise ValueError(f"targets: the model has no parameter {target.parameter!r}")
        scale = parameters[target.parameter]
        where = torch.tensor(target.indices, device=scale.device)
        before = scale[where].cpu().double()
        if config.strategy == "adaptive":
            beta = parameters[f"{layer}.bias"][where].cpu().double().numpy()
            after = _adaptive(before, beta, activity[layer], target.indices, threshold, config)
        else:
            after = _nudged(before, config)
        scale[where] = after.to(scale)
        if optimizer is not None and config.moments == "reset":
            _reset_moments(optimizer, scale, where)
        stored = scale[where].tolist()
        log += [Intervention(layer, *row) for row in zip(target.indices, before.tolist(), stored, strict=True)]
    return log


def random_active_channels(
    activity: Activity, suppressed: dict[str, Suppressed], rng: np.random.Generator
) -> dict[str, Suppressed]:
    """Sample the targets of the control condition: in each layer as many active channels as are suppressed.

    If a layer has fewer active channels than suppressed ones, the rest is sampled from the other active channels of all
    layers, as far as there are any.

    Args:
        activity: the moments of all channels, by layer.
        suppressed: the suppressed channels, from :func:`vaelab.vae.channels.classify`.
        rng: the random generator that samples the channels.
    """
    active = {
        layer: np.setdiff1d(np.arange(len(moments.mean_abs)), suppressed[layer].indices if layer in suppressed else ())
        for layer, moments in activity.items()
    }
    chosen = {layer: rng.permutation(active[layer])[: len(target.indices)] for layer, target in suppressed.items()}
    missing = sum(len(target.indices) for target in suppressed.values()) - sum(map(len, chosen.values()))
    remaining = [(layer, c) for layer in active for c in np.setdiff1d(active[layer], chosen.get(layer, ()))]
    for index in rng.permutation(len(remaining))[:missing]:
        layer, channel = remaining[index]
        chosen[layer] = np.append(chosen.get(layer, np.array([], dtype=int)), channel)
    return {
        layer: Suppressed(
            layer,
            f"{layer}.weight",
            tuple(sorted(map(int, indices))),
            tuple(activity[layer].mean_abs[sorted(indices)].tolist()),
        )
        for layer, indices in chosen.items()
        if len(indices)
    }


def _nudged(scale: Tensor, config: NudgeConfig) -> Tensor:
    if config.strategy == "reset":
        return torch.ones_like(scale)
    size = scale.abs()
    size = (
        size.clamp(min=config.gamma_floor) * config.nudge_factor
        if config.strategy == "multiply"
        else size + config.nudge_amount
    )
    return _signed(scale, size.clamp(max=config.gamma_max))


def _signed(scale: Tensor, size: Tensor) -> Tensor:
    return torch.where(scale < 0, -size, size)


def _adaptive(
    scale: Tensor, beta: np.ndarray, moments: object, indices: tuple[int, ...], threshold: float, config: NudgeConfig
) -> Tensor:
    """Find, by bisection, the smallest |gamma|, never below the present one, that brings m_c just above the threshold.

    m_c is predicted as s E|gamma z + beta|. The normalized channel z is assumed to be normal, with its measured mean
    and standard deviation; the factor s makes the prediction at the present gamma equal to the measured m_c. If gamma
    is 0 or the channel is constant, z cannot be measured: it is assumed to be standard normal, and s to be 1.
    """
    gamma = scale.numpy()
    chosen = list(indices)
    mean, std = moments.mean[chosen].double().numpy(), moments.std[chosen].double().numpy()
    measured, active = moments.mean_abs[chosen].double().numpy(), (moments.mean_abs[chosen] >= threshold).numpy()
    # a constant channel's deviation is float32's rounding of its mean, or 0
    measurable = (np.abs(gamma) > 1e-8) & (std > 1e-6 * np.abs(mean)) & (std > 0)
    safe = np.where(measurable, gamma, 1.0)
    z_mean, z_std = np.where(measurable, (mean - beta) / safe, 0.0), np.where(measurable, std / np.abs(safe), 1.0)
    sign = np.where(gamma < 0, -1.0, 1.0)

    def predicted(size: np.ndarray) -> np.ndarray:
        return folded_normal_mean(sign * size * z_mean + beta, size * z_std)

    factor = np.where(measurable, measured / np.maximum(predicted(np.abs(gamma)), np.finfo(float).tiny), 1.0)
    low = np.abs(gamma)
    high = np.maximum(low, config.gamma_max)
    for _ in range(60):
        middle = (low + high) / 2
        enough = factor * predicted(middle) >= HEADROOM * threshold
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return _signed(scale, torch.from_numpy(np.where(active, np.abs(gamma), high)))


def _reset_moments(optimizer: torch.optim.Optimizer, scale: nn.Parameter, where: Tensor) -> None:
    for key in ("exp_avg", "exp_avg_sq"):
        if key in optimizer.state[scale]:
            optimizer.state[scale][key][where] = 0
