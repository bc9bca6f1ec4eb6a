import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from vaelab.probing.pca import colours, colours_jointly, colours_separately, foreground_auc, principal_components


def maps(count=3, side=6, width=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) * torch.arange(1.0, width + 1)
    return torch.randn(count, side, side, width, generator=generator) @ mixing + 5


def test_components_are_those_of_scikit_learn_up_to_a_sign_that_is_fixed():
    found, reference = principal_components(maps()), PCA(3).fit(maps().reshape(-1, 7).double().numpy())
    np.testing.assert_allclose(found.shares, reference.explained_variance_ratio_, rtol=1e-9)
    cosines = (found.directions.numpy() * reference.components_).sum(1)
    np.testing.assert_allclose(np.abs(cosines), 1, rtol=1e-9)
    assert all(row[row.abs().argmax()] > 0 for row in found.directions)
    np.testing.assert_allclose(found.mean, reference.mean_, rtol=1e-9)


def test_planted_regions_have_a_colour_each_and_jointly_the_same_in_every_picture():
    """Three regions, whose vectors point into three directions; in the second picture they lie elsewhere."""
    regions = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 2, 2], [2, 2, 2, 2]])
    regions = torch.stack([regions, regions.flip(0).T])
    directions = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    planted = directions[regions] + 0.01 * torch.randn(2, 4, 4, 16, generator=torch.Generator().manual_seed(2))
    shown, share = colours_jointly(planted)
    assert shown.shape == (2, 3, 4, 4) and share > 0.99
    pixels = shown[:, :2].permute(0, 2, 3, 1)
    for region in range(3):
        assert pixels[regions == region].std(0).max() < 0.05
    centres = torch.stack([pixels[regions == region].mean(0) for region in range(3)])
    assert torch.pdist(centres).min() > 0.5


def planted_things(apart, where):
    """Vectors of two textures, and things that stand ``apart`` from them to either side."""
    generator = torch.Generator().manual_seed(3)
    sign = torch.tensor([1.0, -1, 1, -1]).reshape(4, 1, 1, 1)
    ground = torch.randn(4, 8, 8, 1, generator=generator).sign() * torch.eye(6)[0]
    noise = 0.1 * torch.randn(4, 8, 8, 6, generator=generator)
    return ground + noise + apart * sign * where[..., None] * torch.eye(6)[1]


def test_components_tell_planted_things_from_the_ground_on_either_side_and_noise_by_chance():
    where = torch.zeros(4, 8, 8)
    for picture in range(4):
        where[picture, picture : picture + 2, 2:5] = 1
    things = where.repeat_interleave(8, 1).repeat_interleave(8, 2).bool()
    assert foreground_auc(planted_things(2.0, where), things) > 0.99
    assert foreground_auc(planted_things(0.0, where), things) == pytest.approx(0.5, abs=0.2)
    elsewhere = things.roll(32, 2)
    assert foreground_auc(planted_things(2.0, where), elsewhere) < 0.8
    assert np.isnan(foreground_auc(planted_things(2.0, where), None))
    assert np.isnan(foreground_auc(planted_things(2.0, where), torch.zeros_like(things)))


def test_the_area_is_the_share_of_pairs_in_the_right_order():
    """Against all pairs, with the densities written out in float64."""
    where = torch.zeros(2, 4, 4)
    where[:, 1:3, 1:4] = 1
    planted = torch.randn(2, 4, 4, 5, generator=torch.Generator().manual_seed(0)) + where[..., None]
    seen = PCA(3).fit_transform(planted.reshape(-1, 5).double().numpy())
    marked = where.flatten().bool().numpy()

    def density(part):
        inverse, centred = np.linalg.inv(np.cov(part.T)), seen - part.mean(0)
        return 0.5 * (np.log(np.linalg.det(inverse)) - (centred @ inverse * centred).sum(1))

    ratio = density(seen[marked]) - density(seen[~marked])
    right = (ratio[marked][:, None] > ratio[~marked]).mean()
    things = where.repeat_interleave(2, 1).repeat_interleave(2, 2).bool()
    assert foreground_auc(planted, things) == pytest.approx(right, abs=1e-9)


def test_the_area_does_not_depend_on_the_covariances_divisor_of_a_library():
    """Few positions of things, where covariances divided by n (scikit-learn 1.9) give another area than those divided
    by n - 1, which are the reference; both are written out here in float64."""
    where = torch.zeros(2, 6, 6)
    where[0, 1:3, 1:3], where[1, 2, 2] = 1, 1
    planted = torch.randn(2, 6, 6, 5, generator=torch.Generator().manual_seed(4)) + 0.5 * where[..., None]
    seen, marked = PCA(3).fit_transform(planted.reshape(-1, 5).double().numpy()), where.flatten().bool().numpy()

    def area(bias):
        def density(part):
            inverse, centred = np.linalg.inv(np.cov(part.T, bias=bias)), seen - part.mean(0)
            return 0.5 * (np.linalg.slogdet(inverse)[1] - (centred @ inverse * centred).sum(1))

        ratio = density(seen[marked]) - density(seen[~marked])
        return (ratio[marked][:, None] > ratio[~marked]).mean()

    assert abs(area(bias=False) - area(bias=True)) > 1e-3
    assert foreground_auc(planted, where.bool()) == pytest.approx(area(bias=False), abs=1e-9)


def test_by_itself_a_picture_does_not_depend_on_the_others():
    whole, share = colours_separately(maps())
    for number in range(3):
        alone, own = colours_jointly(maps()[number : number + 1])
        assert torch.equal(whole[number], alone[0])
    assert 0 < share <= 1 and not torch.equal(whole, colours_jointly(maps())[0])
    assert -1 <= whole.min() < whole.max() <= 1 and own <= 1


def test_colours_keep_the_order_of_a_component_and_do_not_change_with_the_unit():
    found = principal_components(maps())
    shown, seen = colours(maps(), found), (maps().double() - found.mean) @ found.directions.T
    middle = shown[:, 0].flatten().abs() < 0.99
    order = seen[..., 0].flatten()[middle].argsort()
    assert (shown[:, 0].flatten()[middle][order].diff() >= 0).all()
    torch.testing.assert_close(colours_jointly(100 * maps())[0], colours_jointly(maps())[0], atol=1e-4, rtol=1e-4)
    assert colours_jointly(torch.ones(1, 2, 2, 4))[0].isfinite().all()


def test_too_little_is_refused():
    with pytest.raises(ValueError, match=r"^channels: "):
        principal_components(maps(width=2))
    with pytest.raises(ValueError, match=r"^positions: "):
        principal_components(maps(1, 1))
