"""Sparse autoencoders: vectors as sums of a few features of a learned dictionary.

With the features f_1 ... f_n (rows of ``decoder``, of unit length), for a vector x of width d::

    s  = act(encoder (x - pre_bias) + latent_bias)      few of the n entries are not 0
    x' = s_1 f_1 + ... + s_n f_n + pre_bias
    loss = |x - x'|^2 / variance + aux_weight |(x - x') - x'_dead|^2 / its variance + sparsity

From Surkov et al. ("Unpacking SDXL Turbo", equations 2, 3, 16 and 17 with appendix A), who follow
Gao et al. (2024), and Kim et al. ("Revelio", equations 3 and 4: ``k_sae``). What makes a training step
quick is in :mod:`vaelab.sae.topk` and :mod:`vaelab.sae.kernels`.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vaelab.core.hub import find
from vaelab.core.io import atomic, read_json, write_json
from vaelab.core.validate import at_least, one_of
from vaelab.sae.kernels import Block, Decode, Encode, Entries, JumpReLU, SquaredNorm, Step, variance_of
from vaelab.sae.topk import Chosen, choose_above, choose_of_batch, choose_top, largest

FORMAT, VERSION = "vaelab.sae.model", 1
VARIANTS = ("topk", "k_sae", "batchtopk", "matryoshka", "jumprelu", "relu_l1")
SCREENED = 6
"""Candidates beyond k that are computed again in float32 where bfloat16 makes the choice."""
BLOCK_UP_TO = 16
"""k_aux times so many dead features are a dense block; of more, the k_aux chosen ones are summed."""


@dataclass(frozen=True)
class SAEConfig:
    """What a sparse autoencoder is, and what it is trained for."""

    d: int
    """Width of the vectors."""
    n_features: int
    """Size of the dictionary."""
    k: int = 10
    """Active features of a vector; their mean for ``batchtopk``, what ``jumprelu`` aims at, and what
    ``relu_l1`` begins with."""
    variant: str = "topk"
    """``topk``: the k largest, then ReLU (eq. 16). ``k_sae``: without ReLU (Revelio, eq. 3).
    ``batchtopk``: the k N largest of a batch of N (Bussmann et al., 2024). ``matryoshka``: topk whose
    first features must do without the later ones (Bussmann et al., 2025). ``jumprelu``: all above a
    learned threshold (Rajamanoharan et al., 2024). ``relu_l1``: all above 0, which costs."""
    aux_weight: float = 1 / 32
    """alpha of eq. 17."""
    k_aux: int = 256
    """Dead features that reconstruct what is left, for each vector (eq. 17)."""
    dead_after: int = 10_000_000
    """A feature that was silent for so many vectors is dead."""
    nested: tuple[float, ...] = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
    """``matryoshka``: the shares of the dictionary, from its beginning, that reconstruct by themselves."""
    sparsity_weight: float = 0.1
    """Of (L0 / k - 1)^2 for ``jumprelu``, of the mean L1 over the data's standard deviation for ``relu_l1``."""
    bandwidth: float = 0.5
    """``jumprelu``: around a threshold, the width in which it is felt, in units of the data's standard deviation."""

    def __post_init__(self) -> None:
        for name in ("d", "n_features", "k", "k_aux", "dead_after"):
            at_least(name, getattr(self, name), 1)
        for name in ("aux_weight", "sparsity_weight"):
            at_least(name, getattr(self, name), 0)
        at_least("bandwidth", self.bandwidth, 0, exclusive=True)
        one_of("variant", self.variant, VARIANTS)
        if self.k > self.n_features:
            raise ValueError(f"k: {self.k} active features of {self.n_features}; it must be n_features at most")
        object.__setattr__(self, "nested", tuple(self.nested))
        if not self.nested or sorted(set(self.nested)) != list(self.nested) or self.nested[-1] != 1:
            raise ValueError(f"nested: expected rising shares that end with 1.0, got {list(self.nested)}")
        at_least("nested", self.nested[0], 0, exclusive=True)

    @property
    def prefixes(self) -> list[int]:
        """How many features, from the first on, must reconstruct by themselves."""
        if self.variant != "matryoshka":
            return [self.n_features]
        return sorted({max(1, round(share * self.n_features)) for share in self.nested})


class Codes(NamedTuple):
    """What vectors (..., d) are made of. Where their counts differ, K is the largest and the others are
    padded: an entry whose value is 0 is not active, whatever its index."""

    values: Tensor
    """(..., K), in the units of the vectors."""
    indices: Tensor
    """(..., K) int64."""

    def l0(self) -> Tensor:
        """Active features of each vector: (...)."""
        return (self.values != 0).sum(-1)

    def dense(self, n_features: int) -> Tensor:
        """All activations, zeros included: (..., n_features)."""
        out = self.values.new_zeros(*self.values.shape[:-1], n_features)
        return out.scatter_add_(-1, self.indices, self.values)


class Losses(NamedTuple):
    """Of a batch; scalars."""

    loss: Tensor
    """What is minimised."""
    unexplained: Tensor
    """|x - x'|^2 over the batch's variance around its mean: 1 - explained variance."""
    auxiliary: Tensor
    """What the dead features leave of x - x', over its variance around its mean; 0 where none is dead."""
    l0: Tensor
    """Mean number of active features."""
    dead_fraction: Tensor
    """Share of the features that are dead."""


class SAE(nn.Module):
    """A sparse autoencoder. Its parameters are ``encoder`` and ``decoder`` (n_features, d), ``latent_bias``
    (n_features,), ``pre_bias`` (d,), and for ``jumprelu`` ``threshold`` (n_features,)."""

    def __init__(self, config: SAEConfig, seed: int = 0):
        """Untrained: random features of unit length, the encoder equal to the decoder (tied initialisation)."""
        super().__init__()
        self.config = config
        generator = torch.Generator().manual_seed(seed)
        features = F.normalize(torch.randn(config.n_features, config.d, generator=generator))
        self.encoder, self.decoder = nn.Parameter(features.clone()), nn.Parameter(features)
        self.latent_bias, self.pre_bias = nn.Parameter(torch.zeros(len(features))), nn.Parameter(torch.zeros(config.d))
        if config.variant == "jumprelu":
            self.threshold = nn.Parameter(torch.zeros(len(features)))
        elif config.variant == "batchtopk":
            self.register_buffer("threshold", torch.zeros(()))  # what stands for the batch where there is none
        self.register_buffer("silent", torch.zeros(len(features), dtype=torch.int64))

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.encoder.device

    @torch.no_grad()
    def encode(self, x: Tensor) -> Codes:
        """The active features of vectors (..., d), after the choice; keeps no graph.

        Raises:
            ValueError: another width, or a vector with NaN or infinity, which is named.
        """
        if not x.numel():
            return Codes(
                x.new_empty(*x.shape[:-1], 0), torch.empty(*x.shape[:-1], 0, dtype=torch.int64, device=x.device)
            )
        centred = self._centred(x.reshape(-1, x.shape[-1]))[0]
        chosen = self._chosen(centred)
        values = self._activated(chosen)
        indices, count = chosen.entries.indices, chosen.entries.counts
        if not isinstance(count, int):
            places = torch.arange(len(values), device=values.device) - chosen.entries.offsets[chosen.entries.rows]
            where, count = (chosen.entries.rows, places), int(count.max())
            values = values.new_zeros(len(centred), count).index_put_(where, values)
            indices = indices.new_zeros(len(centred), count).index_put_(where, indices)
        return Codes(values.view(*x.shape[:-1], count), indices.view(*x.shape[:-1], count))

    @torch.no_grad()
    def decode(self, codes: Codes) -> Tensor:
        """The vectors (..., d) that codes stand for (eq. 3); keeps no graph."""
        count = codes.indices.shape[-1]
        if not codes.indices.numel():
            return self.pre_bias.expand(*codes.indices.shape[:-1], -1).clone()
        entries = Entries(codes.indices.reshape(-1), count, codes.indices[..., 0].numel(), self.config.n_features)
        out = entries.times(codes.values.to(self.decoder).reshape(-1), self.decoder).add_(self.pre_bias)
        return out.view(*codes.indices.shape[:-1], self.config.d)

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction of vectors (..., d); keeps no graph."""
        return self.decode(self.encode(x))

    def features(self) -> Tensor:
        """The dictionary: (n_features, d), rows of unit length."""
        return F.normalize(self.decoder.detach())

    def losses(self, x: Tensor, *, screen: bool = False) -> Losses:
        """What training minimises, on a batch (N, d), which also tells which features are silent.

        Args:
            x: the batch.
            screen: let bfloat16 choose the candidates of the top-k, see :func:`choose_top`, and make
                the products of the auxiliary loss in it.

        Raises:
            ValueError: as :meth:`encode`.
        """
        config = self.config
        with torch.no_grad():
            centred, variance = self._centred(x)
            chosen = self._chosen(centred, training=True, screen=screen)
        entries = chosen.entries
        found = Encode.apply(self.pre_bias, self.encoder, self.latent_bias, centred, chosen.values, entries)
        values = self._activated(Chosen(found, entries))
        unexplained = 0
        for size in config.prefixes:
            nested = values if size == config.n_features else values * (entries.indices < size)
            error = Decode.apply(self.pre_bias, nested, self.decoder, centred, entries)
            unexplained = unexplained + SquaredNorm.apply(error) / variance / len(config.prefixes)
        dead = (self.silent >= config.dead_after).nonzero().flatten()
        auxiliary = self._auxiliary(centred, error.detach(), dead, screen) if len(dead) else torch.zeros_like(variance)
        with torch.no_grad():
            active = values != 0
            l0 = active.sum() / len(x)
            whole = SquaredNorm.apply(error) / variance if len(config.prefixes) > 1 else unexplained.detach()
            self.silent.add_(len(x)).mul_(entries.by_column(active.to(values.dtype)) == 0)
            if config.variant == "batchtopk" and len(values):
                self.threshold.lerp_(values.min(), 0.01)
        loss = unexplained + config.aux_weight * auxiliary
        if config.variant == "relu_l1":
            loss = loss + config.sparsity_weight * values.sum() / len(x) / (variance / len(x)).sqrt()
        if config.variant == "jumprelu":
            counted = Step.apply(chosen.values, self.threshold[entries.indices], config.bandwidth).sum() / len(x)
            loss = loss + config.sparsity_weight * (counted / config.k - 1).square()
        return Losses(loss, whole, auxiliary.detach(), l0, loss.new_tensor(len(dead) / config.n_features))

    def _auxiliary(self, centred: Tensor, error: Tensor, dead: Tensor, screen: bool) -> Tensor:
        """Eq. 17's second term: the k_aux most active of the dead features reconstruct what is left.

        As in Gao et al. and in the paper's code, what is left is x - x'; the equation as printed says x.
        """
        encoder, bias, k = self.encoder[dead], self.latent_bias[dead], min(self.config.k_aux, len(dead))
        with torch.no_grad():
            if len(dead) <= BLOCK_UP_TO * k:
                where = Block(torch.bfloat16 if screen else None)
                found = where.products(centred, encoder).add_(bias)
            else:
                found, where = choose_top(centred, encoder, bias, k)
        values = Encode.apply(self.pre_bias, encoder, bias, centred, found, where)
        if self.config.variant != "k_sae":
            values = values.relu()
        if isinstance(where, Block) and k < len(dead):
            values = values * largest(values.detach(), k, signed=self.config.variant == "k_sae")
        left = -error
        error = Decode.apply(None, values, self.decoder[dead], left, where)
        return SquaredNorm.apply(error) / variance_of(left).clamp_min(1e-30)

    def _centred(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x - pre_bias, and the sum of the squared distances from the mean."""
        refuse_other_width(x, self.config.d)
        centred = (x.to(self.encoder) - self.pre_bias).contiguous()
        variance = variance_of(centred)
        if not variance.isfinite():
            refuse_not_finite(centred)
            raise ValueError("x: vectors too long for their squares to be summed")
        return centred, variance

    def _chosen(self, centred: Tensor, *, training: bool = False, screen: bool = False) -> Chosen:
        config, given = self.config, (centred, self.encoder, self.latent_bias)
        if config.variant == "relu_l1":
            return choose_above(*given, centred.new_zeros(()))
        if config.variant == "jumprelu":
            return choose_above(*given, self.threshold - (config.bandwidth / 2 if training else 0))
        if config.variant == "batchtopk" and training:
            return choose_of_batch(*given, len(centred) * config.k)
        if config.variant == "batchtopk":
            return choose_above(*given, self.threshold)
        return choose_top(*given, config.k, extra=SCREENED if screen else 0)

    def _activated(self, chosen: Chosen) -> Tensor:
        if self.config.variant == "k_sae":
            return chosen.values
        if self.config.variant == "jumprelu":
            return JumpReLU.apply(chosen.values, self.threshold[chosen.entries.indices], self.config.bandwidth)
        return chosen.values.relu()

    @torch.no_grad()
    def rescale(self, factor: float | Tensor) -> None:
        """Make it the autoencoder of vectors that are ``factor`` times as long, with codes as much larger."""
        for name in ("pre_bias", "latent_bias", "threshold"):
            if hasattr(self, name):
                getattr(self, name).mul_(factor)

    @torch.no_grad()
    def normalise(self) -> None:
        """Scale the features back to unit length."""
        self.decoder.div_(torch.linalg.vector_norm(self.decoder, dim=1, keepdim=True))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``sae.safetensors`` to a folder."""
        told = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self.config)}
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        del tensors["silent"]
        with atomic(Path(folder, "sae.safetensors")) as draft:
            save_file(tensors, draft, metadata={"format": FORMAT})
        write_json(Path(folder, "config.json"), told)

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, device: str | torch.device = "cpu", revision: str | None = None, subfolder: str = ""
    ) -> "SAE":
        """What :meth:`save_pretrained` wrote, in evaluation mode.

        Args:
            name: a local folder, or an id on the hub (owner/name).
            device: where to put it.
            revision: a branch, tag or commit on the hub.
            subfolder: where in it the two files are.

        Raises:
            ValueError: no such folder, files of another kind, or of a newer version.
        """
        folder = find(name, revision=revision, subfolder=subfolder)
        if not (folder / "config.json").is_file():
            raise ValueError(f"{name}: no config.json; expected the folder of an autoencoder of this lab")
        told = read_json(folder / "config.json")
        if not isinstance(told, dict) or told.pop("format", None) != FORMAT:
            raise ValueError(f"{name}: config.json is not of an autoencoder of this lab; see vaelab.sae.formats.load")
        if told.pop("version") > VERSION:
            raise ValueError(f"{name} was written by a newer version of this lab; update it to read this")
        strange = set(told) - {field.name for field in dataclasses.fields(SAEConfig)}
        if strange:
            raise ValueError(f"{name}: config.json has {sorted(strange)[0]!r}, which this lab does not know")
        sae = cls(SAEConfig(**told))
        missing = sae.load_state_dict(load_file(folder / "sae.safetensors"), strict=False)
        if missing.unexpected_keys or set(missing.missing_keys) != {"silent"}:
            raise ValueError(f"{name}: sae.safetensors does not hold what its config.json says")
        return sae.to(device).eval()


def refuse_not_finite(x: Tensor) -> None:
    """Raise ValueError, naming the first row of x (N, d) that has NaN or infinity."""
    bad = (~x.isfinite()).any(1).nonzero().flatten()
    if len(bad):
        raise ValueError(f"x: row {int(bad[0])} of {len(x)} is not finite ({len(bad)} such rows)")


def refuse_other_width(x: Tensor, d: int) -> None:
    """Raise ValueError unless x is (..., d)."""
    if x.shape[-1] != d:
        raise ValueError(f"x: vectors of {x.shape[-1]} numbers; this autoencoder is for {d}")
