import pytest
import torch

from vaelab.sae import topk
from vaelab.sae.topk import select_above, select_batch_topk, select_topk, topk_mask, two_stage_topk

N, FEATURES, D = 30, 640, 16


@pytest.fixture(params=["one tile", "many tiles"])
def tiles(request, monkeypatch):
    if request.param == "many tiles":
        monkeypatch.setattr(topk, "WIDEST", 150)
        monkeypatch.setattr(topk, "TILE", 150 * 7)


def given(n=N, features=FEATURES):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*shape, generator=generator) for shape in ((n, D), (features, D), (features,)))


def pairs(chosen):
    return set(zip(chosen.entries.rows.tolist(), chosen.entries.indices.tolist(), strict=True))


def dense(x, weight, bias):
    return x.double() @ weight.double().T + bias.double()


def assert_their_values(chosen, pre):
    torch.testing.assert_close(
        chosen.values.double(), pre[chosen.entries.rows, chosen.entries.indices], rtol=1e-5, atol=1e-5
    )
    assert (chosen.entries.rows.diff() >= 0).all()


@pytest.mark.parametrize("extra", [0, 8])
@pytest.mark.parametrize("k", [1, 5, 200, FEATURES])
def test_the_largest_of_every_example(tiles, k, extra):
    pre = dense(*given())
    chosen = select_topk(*given(), k, extra=extra)
    expected = {(row, column) for row, best in enumerate(pre.topk(k).indices.tolist()) for column in best}
    assert len(chosen.values) == N * k
    assert pairs(chosen) == expected
    assert_their_values(chosen, pre)


@pytest.mark.parametrize("count", [1, 90, 3000, N * FEATURES])
def test_the_largest_of_the_batch_that_are_positive(tiles, count):
    pre = dense(*given())
    chosen = select_batch_topk(*given(), count)
    expected = [place for place in pre.flatten().topk(count).indices.tolist() if pre.flatten()[place] > 0]
    assert pairs(chosen) == {divmod(place, FEATURES) for place in expected}
    assert_their_values(chosen, pre)


def test_all_that_are_above_a_number_or_each_features_own(tiles):
    pre = dense(*given())
    for least in (torch.tensor(2.0), torch.linspace(-1, 9, FEATURES), torch.tensor(1e9)):
        chosen = select_above(*given(), least)
        assert pairs(chosen) == set(map(tuple, (pre > least).nonzero().tolist()))
        assert_their_values(chosen, pre)


@pytest.mark.parametrize(("width", "k"), [(640, 3), (640, 10), (640, 11), (641, 3), (64, 64), (8, 2)])
def test_two_stages_find_what_one_finds(width, k):
    values = torch.randn(20, width, generator=torch.Generator().manual_seed(1))
    found, places = two_stage_topk(values, k)
    assert torch.equal(found.sort(1).values, values.topk(k).values.sort(1).values)
    assert torch.equal(values.gather(1, places), found)


def test_two_stages_with_all_the_largest_in_one_group_and_with_ties():
    values = torch.zeros(2, 640)
    values[:, ::40] = torch.arange(16.0)  # 640 / 16 apart: one group
    found, places = two_stage_topk(values, 10)
    assert found.sort(1).values.tolist() == [list(range(6, 16))] * 2
    assert all(len(set(row)) == 10 for row in places.tolist())
    found, places = two_stage_topk(torch.ones(3, 640), 10)
    assert (found == 1).all() and all(len(set(row)) == 10 for row in places.tolist())


def test_the_screen_is_exact_where_bfloat16_alone_is_not():
    pre = dense(*given(400, 5120))
    rounded = pre.bfloat16().topk(10).indices.sort(1).values
    screened = select_topk(*given(400, 5120), 10, extra=6).entries.indices.view(400, 10).sort(1).values
    exact = pre.topk(10).indices.sort(1).values
    assert (rounded != exact).any()
    assert torch.equal(screened, exact)


def test_a_mask_of_the_largest():
    values = torch.tensor([[3.0, 1.0, 2.0, -1.0], [5.0, -4.0, -3.0, -2.0]])
    assert topk_mask(values, 2, signed=True).tolist() == [[1, 0, 1, 0], [1, 0, 0, 1]]
    selected = topk_mask(values, 2, signed=False) * values.relu()
    assert selected.tolist() == [[3, 0, 2, 0], [5, 0, 0, 0]]
