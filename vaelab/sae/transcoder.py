"""Transcoders: a layer's output as a sum of a few features that are read from its input.

Dunefsky et al. ("Transcoders Find Interpretable LLM Feature Circuits", 2024) train them in place of autoencoders, since
their features compute what the layer computes. With the input x, the output y, and optionally a linear skip term
(Paulo et al., "Transcoders Beat Sparse Autoencoders", 2025)::

    s  = act(encoder (x - pre_bias) + latent_bias)
    y' = s_1 f_1 + ... + s_n f_n + out_bias (+ skip (x - pre_bias))
    loss = |y - y'|^2 / variance of y + aux_weight ... + sparsity       as in vaelab.sae.model

A pair is the vector (x, y) of width 2 d, as the side ``input_output`` of :mod:`vaelab.hooks` gives it, so that pairs
are collected, stored and shuffled like any other vectors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaelab.sae.baselines import Dictionary
from vaelab.sae.kernels import total_variance
from vaelab.sae.model import SAE, Codes, SAEConfig, read_config_file

PAIRS = "input_output"
"""The side of a block on which transcoders are trained."""


@dataclass(frozen=True)
class TranscoderConfig(SAEConfig):
    """The architecture and the loss of a transcoder; ``d`` is the width of input and output each."""

    skip: bool = False
    """Whether there is a linear term from the input to the output."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.skip, bool):
            raise ValueError(f"skip: expected true or false, got {self.skip!r}")
        if self.input_norm != "none":
            raise ValueError(f"input_norm: a transcoder has none, got {self.input_norm!r}")

    @property
    def width(self) -> int:
        """Width of a pair."""
        return 2 * self.d

    def build(self, seed: int = 0) -> "Transcoder":
        """Make the transcoder with its initial weights."""
        return Transcoder(self, seed)


class Transcoder(SAE):
    """A transcoder. Its further parameters are ``out_bias`` (d,) and with a skip term ``skip`` (d, d)."""

    FORMAT = "vaelab.sae.transcoder"
    CONFIG = TranscoderConfig

    config: TranscoderConfig

    def __init__(self, config: TranscoderConfig, seed: int = 0):
        """Initialise as an autoencoder; the skip term begins with 0."""
        super().__init__(config, seed)
        self.out_bias = nn.Parameter(torch.zeros(config.d))
        if config.skip:
            self.skip = nn.Parameter(torch.zeros(config.d, config.d))

    def source(self, x: Tensor) -> Tensor:
        """Return the inputs (..., d) of pairs (..., 2 d); inputs are returned unchanged."""
        return x[..., : self.config.d]

    def target(self, x: Tensor) -> Tensor:
        """Return the outputs (..., d) of pairs (..., 2 d)."""
        return x[..., self.config.d :]

    @property
    def output_bias(self) -> Tensor:
        """The bias (d,) of the reconstruction."""
        return self.out_bias

    @torch.no_grad()
    def set_biases(self, centre: Tensor) -> None:
        """Set the biases such that the output of the pair ``centre`` (2 d,) is reconstructed without active
        features."""
        self.pre_bias.copy_(self.source(centre))
        self.out_bias.copy_(self.target(centre))

    def _reconstructed(self, x: Tensor, centred: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        target = (self.target(x).to(self.encoder) - self.out_bias).contiguous()
        return target, total_variance(target)

    def _skipped(self, x: Tensor) -> Tensor | None:
        return F.linear(x.to(self.encoder) - self.pre_bias, self.skip) if self.config.skip else None

    @torch.no_grad()
    def encode(self, x: Tensor) -> Codes:
        """Compute the active features of inputs (..., d) or pairs (..., 2 d), without an autograd graph.

        With a skip term, ``shift`` is what it adds, (..., d), and ``scale`` is 1.
        """
        x = self.source(x) if x.shape[-1] == self.config.width else x
        codes = super().encode(x)
        if not self.config.skip:
            return codes
        return codes._replace(scale=self.encoder.new_ones(*x.shape[:-1], 1), shift=self._skipped(x))

    @torch.no_grad()
    def rescale(self, factor: float | Tensor) -> None:
        """Convert to a transcoder of pairs that are ``factor`` times as long."""
        super().rescale(factor)
        self.out_bias.mul_(factor)


class OfOutput:
    """A dictionary of the outputs, as a baseline of a transcoder: unlike it, it sees what it must reconstruct."""

    def __init__(self, dictionary: Dictionary):
        """Take a dictionary of vectors (N, d)."""
        self.dictionary = dictionary

    def encode(self, x: Tensor) -> Codes:
        """Compute the codes of the outputs of pairs (N, 2 d)."""
        return self.dictionary.encode(x[..., x.shape[-1] // 2 :].contiguous())

    def decode(self, codes: Codes) -> Tensor:
        """Reconstruct outputs (N, d) from codes."""
        return self.dictionary.decode(codes)

    def features(self) -> Tensor:
        """Return the dictionary's directions (n_features, d)."""
        return self.dictionary.features()


def load_trained(folder: str | Path, *, device: Any = "cpu") -> SAE:
    """Read an autoencoder or a transcoder from a local folder, see :meth:`vaelab.sae.model.SAE.from_pretrained`."""
    config: Mapping[str, Any] = read_config_file(Path(folder, "config.json"))
    kind = Transcoder if config.get("format") == Transcoder.FORMAT else SAE
    return kind.from_pretrained(folder, device=device)
