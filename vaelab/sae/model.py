"""Sparse autoencoders: vectors as sums of a few features of a learned dictionary.

With the features f_1 ... f_n (rows of ``decoder``, of unit length), for a vector x of width d::

    s  = act(encoder (x - pre_bias) + latent_bias)      few of the n entries are not 0
    x' = s_1 f_1 + ... + s_n f_n + pre_bias
    loss = |x - x'|^2 / variance + aux_weight |(x - x') - x'_dead|^2 / its variance + sparsity

From Surkov et al. ("Unpacking SDXL Turbo", equations 2, 3, 16 and 17 with appendix A), who follow
Gao et al. (2024), and Kim et al. ("Revelio", equations 3 and 4: ``k_sae``). :mod:`vaelab.sae.topk` and
:mod:`vaelab.sae.kernels` hold what makes a training step fast.
"""

import dataclasses
import hashlib
import json
import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vaelab.core import devices
from vaelab.core.finite import all_finite
from vaelab.core.hub import find_folder
from vaelab.core.io import atomic, read_json, write_json
from vaelab.core.validate import at_least, one_of
from vaelab.sae.kernels import (
    ActiveCount,
    Decode,
    DenseBlock,
    Encode,
    JumpReLU,
    SparseEntries,
    SquaredNorm,
    total_variance,
)
from vaelab.sae.topk import Selection, select_above, select_batch_topk, select_topk, topk_mask

FORMAT, VERSION = "vaelab.sae.model", 2
VARIANTS = ("topk", "k_sae", "batchtopk", "matryoshka", "jumprelu", "relu_l1")
INPUT_NORMS = ("none", "layer_norm", "constant_norm")
SCREEN_EXTRA = 6
"""If candidates for the top-k are found in bfloat16: the number of candidates beyond k. All candidates are computed
again in float32."""
DENSE_AUXILIARY_UP_TO = 16
"""With up to this many times k_aux dead features, the auxiliary loss uses dense products; with more, sums over the
selected features."""
LAYER_NORM_EPSILON = 1e-5
LEAST_THRESHOLD = torch.finfo(torch.float32).tiny
"""Stands for a JumpReLU threshold of 0, which has no logarithm."""


@dataclass(frozen=True)
class SAEConfig:
    """The architecture and the loss of a sparse autoencoder."""

    d: int
    """Width of the vectors."""
    n_features: int
    """Size of the dictionary."""
    k: int = 10
    """Number of active features per vector: at most k for ``topk``, k on average for ``batchtopk``, the target for
    ``jumprelu``, the number at initialisation for ``relu_l1``."""
    variant: str = "topk"
    """``topk``: the k largest, then ReLU (eq. 16). ``k_sae``: without ReLU (Revelio, eq. 3).
    ``batchtopk``: the k N largest of a batch of N (Bussmann et al., 2024). ``matryoshka``: topk in which nested
    prefixes of the dictionary reconstruct by themselves (Bussmann et al., 2025). ``jumprelu``: all above a
    learned threshold (Rajamanoharan et al., 2024). ``relu_l1``: all above 0, with an L1 penalty."""
    aux_weight: float = 1 / 32
    """alpha of eq. 17, the weight of the auxiliary loss; 0 means that there is no auxiliary loss."""
    k_aux: int = 256
    """Number of dead features that reconstruct the error of each vector (eq. 17)."""
    dead_after: int = 10_000_000
    """A feature is dead if it was inactive for this many vectors."""
    nested: tuple[float, ...] = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
    """``matryoshka``: the nested prefixes, as rising fractions of the dictionary that end with 1."""
    sparsity_weight: float = 0.1
    """Weight of the sparsity loss: (L0 / k - 1)^2 for ``jumprelu``, and for ``relu_l1`` the mean L1 norm of the
    activations divided by the data's standard deviation."""
    bandwidth: float = 0.5
    """``jumprelu``: width of the window around a threshold in which values contribute to the threshold's gradient, in
    units of the data's standard deviation."""
    input_norm: str = "none"
    """Normalisation of each vector before the autoencoder, undone after it. ``layer_norm``: (x - mean) / (std + 1e-5),
    SAELens' ``layer_norm`` and SAeUron's ``input_unit_norm``. ``constant_norm``: sqrt(d) x / |x|, SAELens'
    ``constant_norm_rescale``. Autoencoders with a normalisation are read from other libraries, not trained here."""

    def __post_init__(self) -> None:
        kinds = {"int": numbers.Integral, "float": numbers.Real, "str": str}
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), kinds.get(getattr(field.type, "__name__", field.type))
            if kind and (isinstance(value, bool) or not isinstance(value, kind)):
                expected = "a whole number" if kind is numbers.Integral else "a number" if kind is not str else "text"
                raise ValueError(f"{field.name}: expected {expected}, got {value!r}")
        for name in ("d", "n_features", "k", "k_aux", "dead_after"):
            at_least(name, getattr(self, name), 1)
        for name in ("aux_weight", "sparsity_weight"):
            at_least(name, getattr(self, name), 0)
        at_least("bandwidth", self.bandwidth, 0, exclusive=True)
        one_of("variant", self.variant, VARIANTS)
        one_of("input_norm", self.input_norm, INPUT_NORMS)
        if self.k > self.n_features:
            raise ValueError(f"k: {self.k} active features of {self.n_features}; it must be n_features at most")
        object.__setattr__(self, "nested", tuple(self.nested))
        if not self.nested or sorted(set(self.nested)) != list(self.nested) or self.nested[-1] != 1:
            raise ValueError(f"nested: expected rising fractions that end with 1.0, got {list(self.nested)}")
        at_least("nested", self.nested[0], 0, exclusive=True)

    @property
    def width(self) -> int:
        """Width of the vectors that the autoencoder is trained and evaluated on."""
        return self.d

    def build(self, seed: int = 0) -> "SAE":
        """Make the autoencoder with its initial weights."""
        return SAE(self, seed)

    @property
    def prefixes(self) -> list[int]:
        """The sizes, in rising order, of the prefixes of the dictionary that reconstruct by themselves."""
        if self.variant != "matryoshka":
            return [self.n_features]
        return sorted({max(1, round(share * self.n_features)) for share in self.nested})


class Codes(NamedTuple):
    """Active features of vectors (..., d). K is the largest number of active features of a vector; vectors with fewer
    are padded: an entry whose value is 0 is not active, whatever its index."""

    values: Tensor
    """(..., K), in the units of the vectors; with ``input_norm``, of the normalised vectors."""
    indices: Tensor
    """(..., K) int64."""
    scale: Tensor | None = None
    """(..., 1): with ``input_norm``, the factor by which :meth:`SAE.decode` multiplies."""
    shift: Tensor | None = None
    """(..., 1): with ``input_norm``, the value that :meth:`SAE.decode` then adds; for a transcoder (..., d)."""

    def l0(self) -> Tensor:
        """Count the active features of each vector: (...)."""
        return (self.values != 0).sum(-1)

    def dense(self, n_features: int) -> Tensor:
        """Return all activations, zeros included: (..., n_features)."""
        out = self.values.new_zeros(*self.values.shape[:-1], n_features)
        return out.scatter_add_(-1, self.indices, self.values)


class Losses(NamedTuple):
    """The losses of a batch; scalars."""

    loss: Tensor
    """The sum that is minimised."""
    unexplained: Tensor
    """|x - x'|^2 over the batch's variance around its mean: 1 - explained variance."""
    auxiliary: Tensor
    """The squared error of the dead features' reconstruction of x - x', over the variance of x - x' around its mean; 0
    if no feature is dead or ``aux_weight`` is 0."""
    l0: Tensor
    """Mean number of active features."""
    dead_fraction: Tensor
    """Fraction of the features that are dead."""


class _HostCopy:
    """Copies of tensors on the CPU that a GPU makes while the CPU goes on."""

    def __init__(self, *tensors: Tensor):
        on_gpu = tensors[0].device.type == "cuda"
        self._copies = [tensor.to("cpu", non_blocking=on_gpu) for tensor in tensors]
        self._made = torch.cuda.current_stream(tensors[0].device).record_event() if on_gpu else None

    def wait(self) -> list[Tensor]:
        """Return the copies when they are made."""
        if self._made is not None:
            self._made.synchronize()
        return self._copies


class SAE(nn.Module):
    """A sparse autoencoder.

    Its parameters are ``encoder`` and ``decoder`` (n_features, d), ``latent_bias`` (n_features,), ``pre_bias`` (d,),
    and for ``jumprelu`` ``log_threshold`` (n_features,). The buffer ``inactive_for`` (n_features,) counts the vectors
    since each feature was last active.
    """

    FORMAT = FORMAT
    """Name of the files' format."""
    CONFIG = SAEConfig
    """Class of the configuration."""

    def __init__(self, config: SAEConfig, seed: int = 0):
        """Initialise the features at random with unit length, and the encoder equal to the decoder."""
        super().__init__()
        self.config = config
        generator = torch.Generator().manual_seed(seed)
        features = F.normalize(torch.randn(config.n_features, config.d, generator=generator))
        self.encoder, self.decoder = nn.Parameter(features.clone()), nn.Parameter(features)
        self.latent_bias, self.pre_bias = nn.Parameter(torch.zeros(len(features))), nn.Parameter(torch.zeros(config.d))
        if config.variant == "jumprelu":
            self.log_threshold = nn.Parameter(torch.full((len(features),), math.log(1e-3)))
        elif config.variant == "batchtopk":
            self.register_buffer("threshold", torch.zeros(()))  # used outside training, where there is no batch
        self.register_buffer("inactive_for", torch.zeros(len(features), dtype=torch.int64))
        self._none_dead_for, self._counted_version = 0, -1
        self._inactivity: _HostCopy | None = None

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.encoder.device

    def thresholds(self) -> Tensor:
        """Return the thresholds; a feature is active if its pre-activation is above its threshold.

        For ``jumprelu`` they are (n_features,), exponentials of a parameter and therefore positive (Rajamanoharan et
        al., 2024); for ``batchtopk`` there is one scalar.

        Raises:
            ValueError: the variant has no thresholds.
        """
        if self.config.variant == "jumprelu":
            return self.log_threshold.exp()
        if self.config.variant == "batchtopk":
            return self.threshold
        raise ValueError(f"variant: {self.config.variant!r} has no thresholds")

    @torch.no_grad()
    def set_thresholds(self, value: float | Tensor) -> None:
        """Set the thresholds of ``jumprelu`` or ``batchtopk``; for ``jumprelu``, 0 becomes the least positive number.

        Raises:
            ValueError: a threshold is negative, or the variant has none.
        """
        value = devices.to_float64(value) if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float64)
        if not (value >= 0).all():
            raise ValueError(f"threshold: must not be negative, got {value.min().item()}")
        if self.config.variant == "jumprelu":
            self.log_threshold.copy_(value.clamp_min(LEAST_THRESHOLD).log())
        else:
            self.thresholds().copy_(value)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Codes:
        """Compute the active features of vectors (..., d), without an autograd graph.

        Raises:
            ValueError: the vectors have another width, or a vector has NaN or infinity; the error names its row.
        """
        if not x.numel():
            none = torch.empty(*x.shape[:-1], 0, dtype=torch.int64, device=x.device)
            norms = () if self.config.input_norm == "none" else (x.new_empty(*x.shape[:-1], 1),) * 2
            return Codes(x.new_empty(*x.shape[:-1], 0), none, *norms)
        require_width(x, self.config.d)
        normalised, *norms = self._normalised(x.reshape(-1, x.shape[-1]))
        centred = self._centred(normalised)[0]
        chosen = self._selected(centred)
        values = self._activated(chosen)
        indices, count = chosen.entries.indices, chosen.entries.counts
        if not isinstance(count, int):
            places = torch.arange(len(values), device=values.device) - chosen.entries.offsets[chosen.entries.rows]
            where, count = (chosen.entries.rows, places), int(count.max())
            values = values.new_zeros(len(centred), count).index_put_(where, values)
            indices = indices.new_zeros(len(centred), count).index_put_(where, indices)
        shape = x.shape[:-1]
        norms = [one if one is None else one.view(*shape, 1) for one in norms]
        return Codes(values.view(*shape, count), indices.view(*shape, count), *norms)

    @torch.no_grad()
    def decode(self, codes: Codes) -> Tensor:
        """Reconstruct vectors (..., d) from codes (eq. 3), without an autograd graph.

        Raises:
            ValueError: the codes have no scale and shift although ``input_norm`` needs them.
        """
        if self.config.input_norm != "none" and codes.scale is None:
            raise ValueError(
                f"codes: with input_norm {self.config.input_norm!r} they need the scale and shift of encode"
            )
        count = codes.indices.shape[-1]
        if codes.indices.numel():
            rows = codes.indices[..., 0].numel()
            entries = SparseEntries(codes.indices.reshape(-1), count, rows, self.config.n_features)
            out = entries.times(codes.values.to(self.decoder).reshape(-1), self.decoder).add_(self.output_bias)
            out = out.view(*codes.indices.shape[:-1], self.config.d)
        else:
            out = self.output_bias.expand(*codes.indices.shape[:-1], -1).clone()
        return out if codes.scale is None else out.mul_(codes.scale).add_(codes.shift)

    def forward(self, x: Tensor) -> Tensor:
        """Encode and reconstruct vectors (..., d), without an autograd graph."""
        return self.decode(self.encode(x))

    def features(self) -> Tensor:
        """Return the dictionary: (n_features, d), rows of unit length."""
        return F.normalize(self.decoder.detach())

    def source(self, x: Tensor) -> Tensor:
        """Return what is encoded of vectors (..., d): all of it."""
        return x

    def target(self, x: Tensor) -> Tensor:
        """Return what is reconstructed of vectors (..., d): all of it."""
        return x

    @property
    def output_bias(self) -> Tensor:
        """The bias (d,) of the reconstruction."""
        return self.pre_bias

    @torch.no_grad()
    def set_biases(self, centre: Tensor) -> None:
        """Set the biases such that the vector ``centre`` (d,) is reconstructed without active features."""
        self.pre_bias.copy_(centre)

    def _reconstructed(self, x: Tensor, centred: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is reconstructed of vectors (N, d) less ``output_bias``, and the sum of its squared distances
        from the mean, given those of what is encoded."""
        return centred, variance

    def _skipped(self, x: Tensor) -> Tensor | None:
        """Compute what a linear term adds to the reconstruction of what is encoded, x (N, d); None adds nothing."""
        return None

    def losses(self, x: Tensor, *, screen: bool = False) -> Losses:
        """Compute the losses of a batch (N, d), with an autograd graph, and update which features are dead.

        On a CPU a vector that is not finite raises an error. On a GPU this check would make the CPU wait for the device
        in every step; there such a vector makes the loss not finite.

        Args:
            x: the batch, as wide as :attr:`SAEConfig.width`.
            screen: whether the candidates of the top-k are found, and the dense products of the auxiliary loss made, in
                bfloat16; see ``extra`` in :func:`vaelab.sae.topk.select_topk`.

        Raises:
            ValueError: the vectors have another width, or on a CPU a vector has NaN or infinity.
        """
        config = self.config
        with torch.no_grad():
            require_width(x, config.width)
            normalised, *_ = self._normalised(self.source(x))
            centred, variance = self._centred(normalised, check=x.device.type == "cpu")
            chosen = self._selected(centred, training=True, screen=screen)
            target, variance = self._reconstructed(x, centred, variance)
        entries = chosen.entries
        found = Encode.apply(self.pre_bias, self.encoder, self.latent_bias, centred, chosen.values, entries)
        threshold = self.thresholds()[entries.indices] if config.variant == "jumprelu" else None
        values = self._activated(Selection(found, entries), threshold)
        skipped = self._skipped(normalised)
        unexplained = 0
        for size in config.prefixes:
            nested = values if size == config.n_features else values * (entries.indices < size)
            error = Decode.apply(self.output_bias, nested, self.decoder, target, entries)
            error = error if skipped is None else error + skipped
            unexplained = unexplained + SquaredNorm.apply(error) / variance / len(config.prefixes)
        auxiliary, dead_fraction = self._auxiliary(centred, error.detach(), screen)
        with torch.no_grad():
            active = values != 0
            l0 = active.sum() / len(x)
            whole = SquaredNorm.apply(error) / variance if len(config.prefixes) > 1 else unexplained.detach()
            self.inactive_for.add_(len(x)).mul_(entries.by_column(active.to(values.dtype)) == 0)
            self._none_dead_for -= len(x)
            if self._none_dead_for <= 0:
                self._read_inactivity()
            self._counted_version = self.inactive_for._version
            if config.variant == "batchtopk" and len(values):
                self.threshold.lerp_(values.min(), 0.01)
        loss = unexplained + config.aux_weight * auxiliary
        if config.variant == "relu_l1":
            loss = loss + config.sparsity_weight * values.sum() / len(x) / (variance / len(x)).sqrt()
        if config.variant == "jumprelu":
            counted = ActiveCount.apply(chosen.values, threshold, config.bandwidth).sum() / len(x)
            loss = loss + config.sparsity_weight * (counted / config.k - 1).square()
        return Losses(loss, whole, auxiliary.detach(), l0, dead_fraction)

    def _auxiliary(self, centred: Tensor, error: Tensor, screen: bool) -> tuple[Tensor, Tensor]:
        """Compute the auxiliary loss and the fraction of dead features."""
        none, dead = centred.new_zeros(()), self._dead_features()
        fraction = torch.full_like(none, len(dead) / self.config.n_features)
        if not len(dead) or not self.config.aux_weight:
            return none, fraction
        if centred.device.type == "cuda":
            dead = dead.pin_memory()
        return self._auxiliary_loss(centred, error, dead.to(centred.device, non_blocking=True), screen), fraction

    def _dead_features(self) -> Tensor:
        """Find the indices of the dead features, as a tensor on the CPU.

        ``inactive_for`` grows by at most the size of a batch in a step, so nothing is read from the device before a
        feature could have become dead. From then on a copy to the CPU is started at the end of each step's forward
        pass. The next step waits for that copy only, while a GPU is still busy with the backward pass.
        """
        if self._counted_version != self.inactive_for._version:  # something else has changed it
            self._none_dead_for = 0
            self._read_inactivity()
        if self._none_dead_for > 0:
            return torch.empty(0, dtype=torch.int64)
        is_dead, longest = self._inactivity.wait()
        dead = is_dead.nonzero().flatten()
        if not len(dead):
            self._none_dead_for = self.config.dead_after - int(longest)
        return dead

    def _read_inactivity(self) -> None:
        """Start to copy which features are dead, and the longest inactivity, to the CPU."""
        self._inactivity = _HostCopy(self.inactive_for >= self.config.dead_after, self.inactive_for.max())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_inactivity": None, "_counted_version": -1}  # a copy reads its own inactivity

    def _auxiliary_loss(self, centred: Tensor, error: Tensor, dead: Tensor, screen: bool) -> Tensor:
        """Compute the second term of eq. 17: the k_aux most active of the dead features reconstruct the error.

        As in Gao et al. and in the paper's code, the error is x - x'; the equation as printed says x.
        """
        encoder, bias, k = self.encoder[dead], self.latent_bias[dead], min(self.config.k_aux, len(dead))
        with torch.no_grad():
            if len(dead) <= DENSE_AUXILIARY_UP_TO * k:
                where = DenseBlock(torch.bfloat16 if screen else None)
                found = where.products(centred, encoder).add_(bias)
            else:
                found, where = select_topk(centred, encoder, bias, k)
        values = Encode.apply(self.pre_bias, encoder, bias, centred, found, where)
        if self.config.variant != "k_sae":
            values = values.relu()
        if isinstance(where, DenseBlock) and k < len(dead):
            values = values * topk_mask(values.detach(), k, signed=self.config.variant == "k_sae")
        left = -error
        error = Decode.apply(None, values, self.decoder[dead], left, where)
        return SquaredNorm.apply(error) / total_variance(left).clamp_min(1e-30)

    def _normalised(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Normalise vectors (N, d) by ``input_norm``; also return the scale and shift (N, 1) that undo it."""
        if self.config.input_norm == "none":
            return x, None, None
        x = x.to(self.encoder)
        if self.config.input_norm == "constant_norm":
            scale = torch.linalg.vector_norm(x, dim=1, keepdim=True) / self.config.d**0.5
            return x / scale.clamp_min(LEAST_THRESHOLD), scale, torch.zeros_like(scale)
        shift = x.mean(1, keepdim=True)
        scale = x.std(1, keepdim=True)
        return (x - shift) / (scale + LAYER_NORM_EPSILON), scale, shift

    def _centred(self, x: Tensor, *, check: bool = True) -> tuple[Tensor, Tensor]:
        """Compute x - pre_bias, and the sum of the squared distances from the mean."""
        centred = (x.to(self.encoder) - self.pre_bias).contiguous()
        variance = total_variance(centred)
        if check and not variance.isfinite():
            require_finite_vectors(centred)
            raise ValueError("x: vectors too long for their squares to be summed")
        return centred, variance

    def _selected(self, centred: Tensor, *, training: bool = False, screen: bool = False) -> Selection:
        config, given = self.config, (centred, self.encoder, self.latent_bias)
        if config.variant == "relu_l1":
            return select_above(*given, centred.new_zeros(()))
        if config.variant == "jumprelu":
            return select_above(*given, self.thresholds() - (config.bandwidth / 2 if training else 0))
        if config.variant == "batchtopk" and training:
            return select_batch_topk(*given, len(centred) * config.k)
        if config.variant == "batchtopk":
            return select_above(*given, self.threshold)
        return select_topk(*given, config.k, extra=SCREEN_EXTRA if screen else 0)

    def _activated(self, chosen: Selection, threshold: Tensor | None = None) -> Tensor:
        if self.config.variant == "k_sae":
            return chosen.values
        if self.config.variant == "jumprelu":
            threshold = self.thresholds()[chosen.entries.indices] if threshold is None else threshold
            return JumpReLU.apply(chosen.values, threshold, self.config.bandwidth)
        return chosen.values.relu()

    @torch.no_grad()
    def rescale(self, factor: float | Tensor) -> None:
        """Convert to an autoencoder of vectors that are ``factor`` times as long; its codes are larger by the same
        factor.

        Raises:
            ValueError: the autoencoder has an ``input_norm``.
        """
        if self.config.input_norm != "none":
            raise ValueError(f"input_norm: {self.config.input_norm!r} takes the length of the vectors away already")
        self.pre_bias.mul_(factor)
        self.latent_bias.mul_(factor)
        if self.config.variant == "jumprelu":
            self.log_threshold.add_(torch.as_tensor(factor, device=self.device).log())
        elif self.config.variant == "batchtopk":
            self.threshold.mul_(factor)

    @torch.no_grad()
    def normalise(self) -> None:
        """Scale the features back to unit length."""
        self.decoder.div_(torch.linalg.vector_norm(self.decoder, dim=1, keepdim=True))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``sae.safetensors`` to a folder; each file holds the checksum of the other."""
        config = json.loads(json.dumps(dataclasses.asdict(self.config)))
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        del tensors["inactive_for"]
        metadata = {"format": self.FORMAT, "config_sha256": config_checksum(config)}
        with atomic(Path(folder, "sae.safetensors")) as draft:
            save_file(tensors, draft, metadata=metadata)
        header = {"format": self.FORMAT, "version": VERSION, "weights_sha256": weights_checksum(tensors)}
        write_json(Path(folder, "config.json"), {**header, **config})

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, device: str | torch.device = "cpu", revision: str | None = None, subfolder: str = ""
    ) -> "SAE":
        """Read what :meth:`save_pretrained` wrote, in evaluation mode.

        Args:
            name: a local folder, or an id on the hub (owner/name).
            device: the device to put the autoencoder on.
            revision: a branch, tag or commit on the hub.
            subfolder: the part of the folder that holds the two files; empty means the folder itself.

        Raises:
            ValueError: there is no such folder; a file is of another kind or version, damaged or edited; the two files
                do not belong together; or a weight is not finite. The error names the file.
        """
        files = ("config.json", "sae.safetensors")
        folder = find_folder(name, revision=revision, subfolder=subfolder, files=files)
        path, weights = folder / "config.json", folder / "sae.safetensors"
        if not path.is_file():
            raise ValueError(f"{name}: no config.json; expected the folder of an autoencoder of this lab")
        stored = read_config_file(path)
        if stored.pop("format", None) != cls.FORMAT:
            raise ValueError(f"{path}: not of an autoencoder of this lab; see vaelab.sae.formats.load_sae")
        version = stored.pop("version", None)
        if version != VERSION:
            age = "a newer version" if isinstance(version, int) and version > VERSION else "an older version"
            raise ValueError(f"{path}: written by {age} of this lab ({version!r}; this one reads {VERSION})")
        checksum, names = stored.pop("weights_sha256", None), [field.name for field in dataclasses.fields(cls.CONFIG)]
        for key in stored:
            if key not in names:
                raise ValueError(f"{path}: has the key {key!r}, which this lab does not know")
        for key in names:
            if key not in stored:
                raise ValueError(f"{path}: has no {key!r}")
        try:
            sae = cls(cls.CONFIG(**stored))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
        try:
            with safe_open(weights, framework="pt", device="cpu") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{weights}: missing or damaged ({error})") from error
        shapes = {key: value.shape for key, value in sae.state_dict().items() if key != "inactive_for"}
        if {key: value.shape for key, value in tensors.items()} != shapes:
            raise ValueError(f"{weights}: does not hold the tensors of its config.json")
        require_finite_weights(weights, tensors)
        if metadata.get("config_sha256") != config_checksum(stored):
            raise ValueError(f"{path}: edited, or of other weights than {weights.name}; their checksums differ")
        if checksum != weights_checksum(tensors):
            raise ValueError(f"{weights}: changed, or of another config.json; their checksums differ")
        sae.load_state_dict(tensors, strict=False)
        return sae.to(device).eval()


def config_checksum(config: Mapping[str, Any]) -> str:
    """Compute the SHA-256 of a configuration as sorted JSON."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def weights_checksum(tensors: Mapping[str, Tensor]) -> str:
    """Compute the SHA-256 of tensors on the CPU: of their names, types, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(memoryview(value.view(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def read_config_file(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file; a damaged or missing file is a ValueError with its path."""
    try:
        value = read_json(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable JSON file ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def require_finite_weights(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError, naming the tensor, if a weight is NaN or infinite."""
    for name, value in tensors.items():
        if not all_finite(value):
            raise ValueError(f"{path}: {name} holds NaN or infinity")


def require_finite_vectors(x: Tensor) -> None:
    """Raise ValueError, naming the first row of x (N, d) that has NaN or infinity."""
    bad = (~x.isfinite()).any(1).nonzero().flatten()
    if len(bad):
        raise ValueError(f"x: row {int(bad[0])} of {len(x)} is not finite ({len(bad)} such rows)")


def require_width(x: Tensor, d: int) -> None:
    """Raise ValueError unless x is (..., d)."""
    if x.shape[-1] != d:
        raise ValueError(f"x: vectors of {x.shape[-1]} numbers; this autoencoder is for {d}")
