"""The formulas of the autoencoders, dense and in float64: what the quick passes are compared with."""

import torch


def largest(values, k):
    """1 for the k largest of each row, else 0."""
    return torch.zeros_like(values).scatter_(1, values.topk(k, 1).indices, 1.0)


def code(pre, threshold, config):
    """The activations (N, n), and the share of each entry in L0, with their gradients."""
    if config.variant == "k_sae":
        return pre * largest(pre, config.k), None
    if config.variant in ("topk", "matryoshka"):
        return pre.relu() * largest(pre, config.k), None
    if config.variant == "batchtopk":
        least = pre.flatten().topk(config.k * len(pre)).values.min()
        return pre.relu() * (pre >= least), None
    if config.variant == "relu_l1":
        return pre.relu(), None
    passed, fixed = (pre > threshold).double(), threshold.detach()
    window = ((pre - fixed).abs() < config.bandwidth / 2).detach() / config.bandwidth
    moved = threshold - fixed  # is 0, and carries the estimated gradient
    return pre * passed - moved * fixed * window, passed - moved * window


def losses(sae, x):
    """The loss with its parts, and the parameters that it can be differentiated by, as in equations 2, 3, 16, 17."""
    config = sae.config
    weights = {name: value.detach().double().requires_grad_() for name, value in sae.named_parameters()}
    x, dead = x.double(), sae.inactive_for >= config.dead_after
    variance = (x - x.mean(0)).square().sum()
    pre = (x - weights["pre_bias"]) @ weights["encoder"].T + weights["latent_bias"]
    threshold = weights["log_threshold"].exp() if config.variant == "jumprelu" else None
    s, counted = code(pre, threshold, config)
    unexplained = 0
    for size in config.prefixes:
        first = s * (torch.arange(config.n_features) < size)
        left = x - first @ weights["decoder"] - weights["pre_bias"]
        unexplained = unexplained + left.square().sum() / variance / len(config.prefixes)
    loss, auxiliary = unexplained, torch.zeros(())
    if dead.any():
        left, of_dead = left.detach(), pre[:, dead]
        of_dead = of_dead * largest(of_dead.detach(), min(config.k_aux, of_dead.shape[1]))
        of_dead = of_dead if config.variant == "k_sae" else of_dead.relu()
        target = (left - left.mean(0)).square().sum()
        auxiliary = (left - of_dead @ weights["decoder"][dead]).square().sum() / target
        loss = loss + config.aux_weight * auxiliary
    if config.variant == "relu_l1":
        loss = loss + config.sparsity_weight * s.sum(1).mean() / (variance / len(x)).sqrt()
    if config.variant == "jumprelu":
        loss = loss + config.sparsity_weight * (counted.sum(1).mean() / config.k - 1).square()
    return loss, auxiliary, s.detach(), weights
