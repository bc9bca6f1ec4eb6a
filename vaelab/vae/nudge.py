"""What is done to suppressed channels: the paper's nudge, the reset, an adaptive one, a control.

From Shi, Wang and Roshka, section 4.4. The adaptive strategy is their future work (section 6); the
control, the same nudge on as many active channels, is ours: without it a difference between runs
may come from touching the scales at all.
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
"""``adaptive`` aims this much above the threshold, so that rounding leaves no channel just below."""


@dataclass(frozen=True)
class NudgeConfig:
    """What is done to the scale gamma of a suppressed channel, and how often.

    Strategies act on |gamma| and keep its sign (0 counts as positive), which for the paper's
    positive scales is its formula; a plain sum would push a negative scale towards silence.
    """

    strategy: str = "multiply"
    """``multiply``: |gamma| f; ``add``: |gamma| + a; ``reset``: gamma = 1; ``adaptive``: as far as
    the threshold asks for and no further (so the control, whose channels are above it, is left as
    it is)."""
    nudge_factor: float = 1.1
    """f of ``multiply``."""
    nudge_amount: float = 0.01
    """a of ``add``."""
    gamma_max: float = 2.0
    """gamma_max, which caps ``multiply``, ``add`` and ``adaptive``."""
    gamma_floor: float = 1e-4
    """``multiply`` starts from at least this magnitude: a scale of exactly 0 would stay 0."""
    interval: int = 200
    """Steps between interventions."""
    moments: str = "keep"
    """What becomes of AdamW's two moments of a touched entry: ``keep`` leaves them, as the paper's
    method does, so that the next step still goes where the old gradients pointed; ``reset`` zeroes."""

    def __post_init__(self) -> None:
        one_of("strategy", self.strategy, STRATEGIES)
        one_of("moments", self.moments, MOMENTS)
        at_least("nudge_factor", self.nudge_factor, 1)
        at_least("nudge_amount", self.nudge_amount, 0)
        at_least("gamma_max", self.gamma_max, 0, exclusive=True)
        at_least("gamma_floor", self.gamma_floor, 0)
        at_least("interval", self.interval, 1)


class Intervention(NamedTuple):
    """What was done to one channel's scale."""

    layer: str
    channel: int
    before: float
    after: float


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
    """Apply ``config`` to the scales of ``targets`` and to nothing else.

    Args:
        model: whose parameters are changed in place.
        targets: from :func:`vaelab.vae.channels.classify` or :func:`random_active`.
        config: what to do.
        activity: the moments the targets were classified by; ``adaptive`` needs them.
        threshold: theta_act that ``adaptive`` raises m_c to.
        optimizer: whose moments of the touched entries ``moments`` speaks of.

    Returns:
        One record a channel, with its scale before and after.

    Raises:
        ValueError: a target that names no parameter, or ``adaptive`` without what it needs.
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
    """The control's targets: as many channels that are *not* suppressed, at random, in each layer.

    Where a layer has fewer active channels than suppressed ones, what is missing is drawn from the
    active channels of all other layers (or of as many as there are).
    """
    active = {
        layer: np.setdiff1d(np.arange(len(moments.mean_abs)), suppressed[layer].indices if layer in suppressed else ())
        for layer, moments in activity.items()
    }
    chosen = {layer: rng.permutation(active[layer])[: len(target.indices)] for layer, target in suppressed.items()}
    missing = sum(len(target.indices) for target in suppressed.values()) - sum(map(len, chosen.values()))
    left = [(layer, c) for layer in active for c in np.setdiff1d(active[layer], chosen.get(layer, ()))]
    for place in rng.permutation(len(left))[:missing]:
        layer, channel = left[place]
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
    """The smallest |gamma|, never below the present one, that brings m_c just above the threshold.

    m_c is predicted as s E|gamma z + beta|, where z is the normalised channel: normal, with the
    mean and deviation it was measured to have, and s makes the prediction at the present gamma what
    was measured (z is standard and s = 1 where nothing could be measured: gamma is 0, or the
    channel constant). Solved by bisection.
    """
    gamma = scale.numpy()
    chosen = list(indices)
    mean, std = moments.mean[chosen].double().numpy(), moments.std[chosen].double().numpy()
    measured, active = moments.mean_abs[chosen].double().numpy(), (moments.mean_abs[chosen] >= threshold).numpy()
    # a constant channel's deviation is float32's rounding of its mean, or 0
    seen = (np.abs(gamma) > 1e-8) & (std > 1e-6 * np.abs(mean)) & (std > 0)
    safe = np.where(seen, gamma, 1.0)
    z_mean, z_std = np.where(seen, (mean - beta) / safe, 0.0), np.where(seen, std / np.abs(safe), 1.0)
    sign = np.where(gamma < 0, -1.0, 1.0)

    def predicted(size: np.ndarray) -> np.ndarray:
        return folded_normal_mean(sign * size * z_mean + beta, size * z_std)

    share = np.where(seen, measured / np.maximum(predicted(np.abs(gamma)), np.finfo(float).tiny), 1.0)
    low = np.abs(gamma)
    high = np.maximum(low, config.gamma_max)
    for _ in range(60):
        middle = (low + high) / 2
        enough = share * predicted(middle) >= HEADROOM * threshold
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return _signed(scale, torch.from_numpy(np.where(active, np.abs(gamma), high)))


def _reset_moments(optimizer: torch.optim.Optimizer, scale: nn.Parameter, where: Tensor) -> None:
    for key in ("exp_avg", "exp_avg_sq"):
        if key in optimizer.state[scale]:
            optimizer.state[scale][key][where] = 0
