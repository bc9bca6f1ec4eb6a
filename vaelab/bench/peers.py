"""One training step of a top-k autoencoder in other libraries (the peers), to be timed beside the lab's own.

Each library runs with its fastest settings: the fused Adam, and no more logging than its step needs. ``dense`` is the
step as in the papers' code, with dense matrix products throughout. ``make peers`` installs the libraries in a folder of
their own, because they pin other versions; nothing else in the lab needs them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaelab.core.validate import at_least, one_of

Step = Callable[[int], None]
"""A function of a step's index that takes one training step, on the batch with that index."""
AUX_WEIGHT, K_AUX = 1 / 32, 256
LONG_AGO = 10**8
"""A number of vectors; every library counts a feature as dead that was last active so many vectors ago."""


@dataclass(frozen=True)
class StepConfig:
    """The autoencoder and the random vectors of a timed step."""

    d: int = 1280
    """Width of the vectors."""
    n_features: int = 5120
    """Size of the dictionary."""
    k: int = 10
    """Number of active features per vector."""
    batch_size: int = 4096
    """Number of vectors per batch."""
    dead: int = 512
    """Number of features that count as dead in the steps with dead features."""
    seed: int = 0
    """Determines the vectors, the initial weights, and which features are dead."""
    device: str = "cpu"
    """The device on which the steps are taken."""

    def __post_init__(self) -> None:
        for name in ("d", "n_features", "k", "batch_size"):
            at_least(name, getattr(self, name), 1)
        at_least("dead", self.dead, 0)
        if self.dead >= self.n_features:
            raise ValueError(f"dead: {self.dead} of {self.n_features} features")

    @cached_property
    def batches(self) -> list[Tensor]:
        """Four batches (batch_size, d), on the device."""
        generator = torch.Generator().manual_seed(self.seed)
        return [torch.randn(self.batch_size, self.d, generator=generator).to(self.device) for _ in range(4)]

    @cached_property
    def dead_features(self) -> Tensor:
        """Indices (dead,) of the features that count as dead, on the device."""
        order = torch.randperm(self.n_features, generator=torch.Generator().manual_seed(self.seed))
        return order[: self.dead].to(self.device)

    def batch(self, number: int) -> Tensor:
        """Return the batch (batch_size, d) of the step with index ``number``; the four batches take turns."""
        return self.batches[number % len(self.batches)]


class Dense(nn.Module):
    """Equations 16 and 17 of Surkov et al. ("Unpacking SDXL Turbo") in dense products."""

    def __init__(self, setting: StepConfig):
        super().__init__()
        generator = torch.Generator().manual_seed(setting.seed)
        rows = F.normalize(torch.randn(setting.n_features, setting.d, generator=generator))
        self.encoder, self.decoder = nn.Parameter(rows.clone()), nn.Parameter(rows.T.clone())
        self.pre_bias, self.latent_bias = nn.Parameter(torch.zeros(setting.d)), nn.Parameter(torch.zeros(len(rows)))
        self.k = setting.k

    def forward(self, x: Tensor, dead: Tensor) -> Tensor:
        """Compute the loss on a batch (N, d); ``dead`` (n_features,) is 1 for dead features, else 0."""
        pre = F.linear(x - self.pre_bias, self.encoder, self.latent_bias)
        reconstruction = F.linear(_only_largest(pre, self.k), self.decoder) + self.pre_bias
        loss = _relative_error(reconstruction, x)
        if dead.any():
            of_dead = _only_largest(pre * dead, min(K_AUX, pre.shape[1]))
            loss = loss + AUX_WEIGHT * _relative_error(F.linear(of_dead, self.decoder), x - reconstruction.detach())
        return loss


def _only_largest(pre: Tensor, k: int) -> Tensor:
    values, indices = pre.topk(k, dim=1, sorted=False)
    return torch.zeros_like(pre).scatter_(1, indices, values.relu())


def _relative_error(reconstruction: Tensor, x: Tensor) -> Tensor:
    return (reconstruction - x).square().mean() / (x - x.mean(0)).square().mean()


def dense(setting: StepConfig, *, dead: bool) -> Step:
    """Make a training step of :class:`Dense`."""
    sae = Dense(setting).to(setting.device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4, fused=True)
    dead_mask = torch.zeros(setting.n_features, device=setting.device)
    if dead:
        dead_mask[setting.dead_features] = 1

    def step(number: int) -> None:
        sae(setting.batch(number), dead_mask).backward()
        with torch.no_grad():
            sae.decoder.grad -= (sae.decoder.grad * sae.decoder).sum(0) * sae.decoder
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            sae.decoder /= sae.decoder.norm(dim=0)

    return step


def sparsify(setting: StepConfig, *, dead: bool) -> Step:
    """Make a training step of EleutherAI's ``eai-sparsify``, as in its trainer with ``optimizer="adam"``."""
    from sparsify.config import SparseCoderConfig
    from sparsify.sparse_coder import SparseCoder

    torch.manual_seed(setting.seed)
    sae = SparseCoder(setting.d, SparseCoderConfig(num_latents=setting.n_features, k=setting.k), setting.device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4, fused=True)
    since = torch.zeros(setting.n_features, dtype=torch.int64, device=setting.device)

    def step(number: int) -> None:
        x = setting.batch(number)
        if dead:
            since[setting.dead_features] = LONG_AGO
        out = sae(x, dead_mask=since > 10_000_000 if dead else None)
        (out.fvu + AUX_WEIGHT * out.auxk_loss).backward()
        since.add_(len(x)).index_fill_(0, out.latent_indices.flatten(), 0)
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        sae.set_decoder_norm_to_unit_norm()

    return step


def sae_lens(setting: StepConfig, *, dead: bool) -> Step:
    """Make a training step of ``sae-lens``'s TopKTrainingSAE, as in its trainer, without rescaling activations by the
    lengths of the decoder's rows."""
    from sae_lens.saes.sae import TrainStepInput
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

    torch.manual_seed(setting.seed)
    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(
            d_in=setting.d, d_sae=setting.n_features, k=setting.k, rescale_acts_by_decoder_norm=False,
            use_sparse_activations=False, aux_loss_coefficient=AUX_WEIGHT, device=setting.device,
        )
    )  # fmt: skip
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4, fused=True)
    mask = torch.zeros(setting.n_features, dtype=torch.bool, device=setting.device)
    if dead:
        mask[setting.dead_features] = True

    def step(number: int) -> None:
        given = TrainStepInput(setting.batch(number), {}, mask, number, is_logging_step=False)
        sae.training_forward_pass(given).loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def dictionary_learning(setting: StepConfig, *, dead: bool) -> Step:
    """Make a training step of ``dictionary-learning``'s TopKTrainer."""
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(
        10**6, setting.d, setting.n_features, setting.k, layer=0, lm_name="", lr=1e-4, seed=setting.seed,
        device=setting.device,
    )  # fmt: skip
    trainer.optimizer = torch.optim.Adam(trainer.ae.parameters(), lr=1e-4, fused=True)
    trainer.scheduler = torch.optim.lr_scheduler.ConstantLR(trainer.optimizer, factor=1.0)

    def step(number: int) -> None:
        if dead:
            trainer.num_tokens_since_fired[setting.dead_features] = LONG_AGO
        trainer.update(number + 1, setting.batch(number))

    return step


PEERS = {"dense": dense, "sparsify": sparsify, "sae_lens": sae_lens, "dictionary_learning": dictionary_learning}


def peer_step(name: str, setting: StepConfig, *, dead: bool = False) -> Step:
    """Make the training step of one of :data:`PEERS`.

    Raises:
        ValueError: the name is unknown.
        ImportError: the library is not installed.
    """
    one_of("peers", name, PEERS)
    return PEERS[name](setting, dead=dead)
