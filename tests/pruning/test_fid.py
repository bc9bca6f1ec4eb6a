import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from vaelab.pruning import fid as pruning_fid


class Gaussian(nn.Module):
    """The denoiser of latents that are normal about ``mean`` with deviation ``scale``: nothing to learn."""

    def __init__(self, scheduler, mean, scale):
        super().__init__()
        self.here = nn.Parameter(torch.zeros(()))
        self.scheduler, self.mean, self.scale, self.asked = scheduler, mean, scale, []

    def forward(self, noisy, timestep):
        self.asked.append(int(timestep))
        abar = self.scheduler.alphas_cumprod[int(timestep)]
        wrong = noisy - abar.sqrt() * self.mean
        sample = (1 - abar).sqrt() * wrong / (abar * self.scale**2 + 1 - abar)
        return type("Output", (), {"sample": sample})


@pytest.mark.parametrize("steps", [1000, 100])
def test_samples_have_the_planted_mean_and_scale_and_the_schedule_is_whole(steps):
    scheduler = DDPMScheduler(clip_sample=False)
    denoiser = Gaussian(scheduler, 2.0, 0.5)
    found = pruning_fid.ancestral_samples(denoiser, scheduler, (2, 4, 4), 60, steps=steps, batch_size=32, seed=0)
    assert found.shape == (60, 2, 4, 4)
    assert float(found.mean()) == pytest.approx(2.0, abs=0.05)
    assert float(found.std()) == pytest.approx(0.5, rel=0.06)
    first = denoiser.asked[:steps]
    assert first[0] == 999 and first == sorted(first, reverse=True) and first[-1] < 1000 / steps
    again = pruning_fid.ancestral_samples(denoiser, scheduler, (2, 4, 4), 60, steps=steps, batch_size=32, seed=0)
    assert torch.equal(found, again)


def moments(rows):
    return rows.mean(0), np.cov(rows, rowvar=False)


def test_frechet_distance_is_torchmetrics_and_that_of_known_gaussians():
    from torchmetrics.image.fid import _compute_fid

    rng = np.random.default_rng(0)
    first, second = (moments(rng.normal(size=(80, 6)) @ rng.normal(size=(6, 6)) + shift) for shift in (0, 1))
    expected = _compute_fid(*(torch.from_numpy(one) for one in (*first, *second)))
    assert pruning_fid.frechet_distance(first, second) == pytest.approx(float(expected), rel=1e-8)
    assert pruning_fid.frechet_distance(first, first) == pytest.approx(0, abs=1e-8)
    one, other = (np.zeros(2), np.diag([4.0, 1.0])), (np.array([3.0, 0.0]), np.diag([1.0, 9.0]))
    assert pruning_fid.frechet_distance(one, other) == pytest.approx(9 + (2 - 1) ** 2 + (1 - 3) ** 2)


def test_the_reference_prefers_pictures_of_the_same_kind():
    generator = torch.Generator().manual_seed(0)
    real, same, other = (torch.rand(90, 3, 16, 16, generator=generator) for _ in range(3))
    reference = pruning_fid.fid_reference("embedded", [{"pixels": part} for part in real.split(30)], 90, "cpu")
    assert reference.distance(same) < 0.2 * reference.distance(0.3 * other)
    assert pruning_fid.fid_reference("embedded", [], 0) is None


def test_fewer_pictures_than_features_are_refused():
    with pytest.raises(ValueError, match="fid_images: 20 pictures for 64 features; take more than features"):
        pruning_fid.fid_reference("embedded", [{"pixels": torch.rand(20, 3, 16, 16)}], 20, "cpu")


def test_an_unknown_network_and_one_that_is_not_there_are_told(monkeypatch):
    with pytest.raises(ValueError, match=r"fid_features: unknown name 'inceptoin'.*inception"):
        pruning_fid.feature_network("inceptoin")
    import torchmetrics.image.fid as fid

    monkeypatch.setattr(fid, "_TORCH_FIDELITY_AVAILABLE", False)
    with pytest.raises(ValueError, match="fid_features: inception needs torch-fidelity"):
        pruning_fid.feature_network("inception", "cpu")
