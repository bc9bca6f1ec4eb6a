import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from helpers import without_groupnorm
from skimage.metrics import structural_similarity

from vaelab.vae.objective import VAEObjective, evaluate_reconstruction, latent_scale


@pytest.fixture
def pictures():
    return torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def in_batches(pictures, sizes=(2, 2, 1)):
    return [{"pixels": part} for part in pictures.split(list(sizes))]


@torch.no_grad()
def in_float64(vae, pictures):
    """Mean and log variance of the latents and the reconstruction from the mean, as float64 arrays."""
    exact = copy.deepcopy(vae).double()
    mean, logvar = exact.quant_conv(exact.encoder(pictures.double())).chunk(2, dim=1)
    decoded = exact.decoder(exact.post_quant_conv(mean))
    return mean.numpy(), logvar.clamp(-30, 20).numpy(), decoded.numpy()


def kl_divergence(mean, logvar):
    return 0.5 * (mean**2 + np.exp(logvar) - 1 - logvar).sum(axis=(1, 2, 3))


def test_measures_equal_their_formulas(tiny_vae, pictures):
    mean, logvar, decoded = in_float64(tiny_vae, pictures)
    mse = np.mean((decoded - pictures.numpy()) ** 2)
    kl = kl_divergence(mean, logvar).mean()
    got = evaluate_reconstruction(tiny_vae, in_batches(pictures))
    assert got.mse == pytest.approx(mse, rel=1e-5)
    assert got.psnr == pytest.approx(10 * np.log10(4 / mse), rel=1e-5)
    assert got.kl == pytest.approx(kl, rel=1e-5)
    assert got.kl_per_entry == pytest.approx(kl / (4 * 8 * 8), rel=1e-5)


class Dimming(torch.nn.Module):
    """An autoencoder whose latent is the picture and whose decoder dims and shifts it."""

    def __init__(self):
        super().__init__()
        self.share = torch.nn.Parameter(torch.tensor(0.7))

    def encode(self, pixels):
        return SimpleNamespace(latent_dist=DiagonalGaussianDistribution(torch.cat([pixels, pixels * 0], dim=1)))

    def decode(self, latent):
        return SimpleNamespace(sample=latent * self.share + 0.1 * latent.roll(1, dims=3))


def test_ssim_is_scikit_images(pictures):
    options = {"data_range": 2, "channel_axis": 0, "gaussian_weights": True, "use_sample_covariance": False}
    decoded = Dimming().decode(pictures).sample.detach()
    # torchmetrics takes the border in, reflected; scikit-image leaves a border of 5 out
    border = ((0, 0), (0, 0), (5, 5), (5, 5))
    bordered = [np.pad(x.double().numpy(), border, mode="reflect") for x in (pictures, decoded)]
    expected = [structural_similarity(a, b, **options) for a, b in zip(*bordered, strict=True)]
    assert np.ptp(expected) > 0.001
    assert evaluate_reconstruction(Dimming(), in_batches(pictures)).ssim == pytest.approx(np.mean(expected), rel=1e-5)


def test_measures_do_not_depend_on_the_batches(tiny_vae, pictures):
    whole = evaluate_reconstruction(tiny_vae, in_batches(pictures, [5]))
    assert evaluate_reconstruction(tiny_vae, in_batches(pictures, [1, 4])) == pytest.approx(whole, rel=1e-5)


def test_evaluating_leaves_no_trace(tiny_vae, pictures):
    tiny_vae.train()
    before = {name: value.clone() for name, value in tiny_vae.state_dict().items()}
    state = torch.get_rng_state()
    evaluate_reconstruction(tiny_vae, in_batches(pictures))
    assert tiny_vae.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in tiny_vae.parameters())
    assert all(torch.equal(value, before[name]) for name, value in tiny_vae.state_dict().items())


def test_no_picture_is_an_error(tiny_vae):
    with pytest.raises(ValueError, match="no picture"):
        evaluate_reconstruction(tiny_vae, [])


def test_loss_is_mse_plus_weighted_kl(tiny_vae, pictures):
    exact = copy.deepcopy(tiny_vae).double()
    mean, logvar, _ = in_float64(tiny_vae, pictures)
    torch.manual_seed(3)
    losses = VAEObjective(exact, kl_weight=0.01)({"pixels": pictures.double()})
    torch.manual_seed(3)
    latent = torch.from_numpy(mean + np.exp(logvar / 2) * torch.randn(mean.shape, dtype=torch.float64).numpy())
    with torch.no_grad():
        decoded = exact.decoder(exact.post_quant_conv(latent)).numpy()
    mse, kl = np.mean((decoded - pictures.numpy()) ** 2), kl_divergence(mean, logvar).mean()
    assert losses["reconstruction"].item() == pytest.approx(mse, rel=1e-6)
    assert losses["kl"].item() == pytest.approx(kl, rel=1e-9)
    assert losses["loss"].item() == pytest.approx(mse + 0.01 * kl, rel=1e-6)


def test_loss_reaches_every_parameter(tiny_vae, pictures):
    objective = VAEObjective(tiny_vae, kl_weight=1.0)
    objective({"pixels": pictures})["loss"].backward()
    assert all(parameter.grad is not None for parameter in tiny_vae.parameters())


def test_negative_kl_weight_is_refused(tiny_vae):
    with pytest.raises(ValueError, match=r"^kl_weight:"):
        VAEObjective(tiny_vae, kl_weight=-1e-6)


def test_latent_scale_is_that_of_samples(tiny_vae, pictures):
    mean, logvar, _ = in_float64(tiny_vae, pictures)
    scale = latent_scale(tiny_vae, in_batches(pictures))
    assert scale == pytest.approx((mean.var(ddof=1) + np.exp(logvar).mean()) ** -0.5, rel=1e-5)
    samples = mean + np.exp(logvar / 2) * np.random.default_rng(0).normal(size=(200, *mean.shape))
    assert (samples * scale).std() == pytest.approx(1, abs=0.01)


def test_model_without_a_posterior_is_refused(pictures):
    tiny = without_groupnorm()
    with pytest.raises(ValueError, match=r"^model: AutoencoderTiny has no Gaussian posterior"):
        evaluate_reconstruction(tiny, in_batches(pictures))


def test_a_side_that_the_model_cannot_halve_is_refused(tiny_vae):
    with pytest.raises(ValueError, match="resolution: pictures of 17 x 17 come back as 16 x 16; take a multiple of 2"):
        evaluate_reconstruction(tiny_vae, [{"pixels": torch.zeros(1, 3, 17, 17)}])
