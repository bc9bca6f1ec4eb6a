"""Panels of the gallery: every column shows what its heading says."""

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from small_features import BLOCK, N

from vaelab import activations
from vaelab.sae import gallery
from vaelab.sae.steering import activate_alone, modulate

PROMPT = "a red circle on the left"


@pytest.fixture(scope="module")
def shown(lab):
    return gallery.FeatureGallery(lab.pipeline, BLOCK, lab.sae, lab.statistics, lab.pictures, top=0.5, batch_size=4)


def test_the_most_active_features_on_a_prompt(shown, lab):
    sampling = lab.pictures.sampling
    found = activations.from_prompts(lab.pipeline, [PROMPT], [0], BLOCK, sampling).maps[BLOCK][0][0].float()
    total = lab.sae.encode(found).dense(N).sum((0, 1))
    total[lab.statistics.mean_activation() == 0] = 0
    assert shown.most_active(PROMPT, 3) == total.topk(3).indices.tolist()


def test_a_prompt_is_shown_with_every_change(shown, lab):
    features = lab.statistics.most_active(2)
    panel = shown.on_prompt(PROMPT, features, betas=(-6.0, 6.0), gammas=(1.0,), examples=2)
    assert [name[0] for name, _ in panel.groups] == ["h", "A", "B", "C"]
    assert [len(pictures) for _, pictures in panel.rows] == [6, 6]
    feature, (_, down, up, alone, *top) = features[1], panel.rows[1][1]
    again = shown._generate([PROMPT], [[modulate(BLOCK, feature, 6.0)]])
    torch.testing.assert_close(up, again[0], rtol=1e-3, atol=1e-3)
    assert not torch.equal(up, down)
    again = shown._generate([""], [[activate_alone(BLOCK, feature, 1.0)]])
    torch.testing.assert_close(alone, again[0], rtol=1e-3, atol=1e-3)
    items = shown._sample(feature, 2)
    hot = gallery.heat(lab.pictures.pictures(items), shown._maps(items, feature))
    assert all(torch.equal(*pair) for pair in zip(top, hot, strict=False))


def test_features_on_their_own_pictures_and_turned_on(shown, lab):
    (feature,) = lab.statistics.most_active(1)
    panel = shown.on_examples([feature], betas=(6.0,), gammas=(1.0, 2.0), examples=2)
    assert [len(headings) for _, headings in panel.groups] == [3, 3, 2] and len(panel.rows[0][1]) == 8
    panel = shown.turned_on([feature], [PROMPT], 1.0, gallery.box_mask([0, 0.5, 1, 1]))
    (name, (plain, same)), (_, (everywhere, masked)) = panel.rows
    assert name == "nothing" and torch.equal(plain, same)
    assert not torch.equal(everywhere, plain) and not torch.equal(everywhere, masked)
    figure = gallery.draw_panel(panel, "a title with a $ sign")
    assert len(figure.axes) == 4
    plt.close(figure)


def test_heat_is_red_where_it_is_highest_and_grey_where_nothing_is():
    found = gallery.heat(torch.zeros(1, 3, 4, 4), torch.tensor([[[0.0, 1.0], [2.0, 9.0]]]))
    nothing, lowest, highest = found[0, :, 0, 0], found[0, :, 0, 3], found[0, :, 3, 3]
    assert nothing.tolist() == [0, 0, 0]
    assert highest[0] > highest[2] and lowest[2] > lowest[0]
    assert torch.equal(gallery.heat(torch.ones(1, 3, 4, 4), torch.zeros(1, 2, 2)), torch.ones(1, 3, 4, 4))


def test_masks_and_features_are_checked(lab, shown):
    mask = gallery.box_mask([0.0, 0.5, 0.25, 1.0], side=8)
    assert mask[:2, 4:].all() and mask.sum() == 8 and gallery.box_mask([]) is None
    for wrong in ([0, 0, 1], [0.5, 0, 0.5, 1], [0, 0, 2, 1]):
        with pytest.raises(ValueError, match=r"^mask: expected \[top, left, bottom, right\]"):
            gallery.box_mask(wrong)
    with pytest.raises(ValueError, match=r"^betas: expected finite numbers"):
        gallery.require_finite(gammas=[1.0], betas=[1.0, float("inf")])
    with pytest.raises(ValueError, match=rf"^features: up has features 0 to {N - 1}, got {N}"):
        gallery.require_features([3, N], {"up": lab.sae})
    with pytest.raises(ValueError, match=rf"^feature: {BLOCK} has features 0 to {N - 1}, got {N}"):
        shown.on_examples([N])


def test_the_locality_of_every_autoencoder_is_drawn():
    rows = [
        {"block": block, "who": who, "score": f"{area}_{beta}", "mean": mean}
        for block, mean in (("mid", 1.0), ("up", 50.0))
        for who in ("sae", "neurons")
        for area in ("inside", "outside")
        for beta in ("-5", "10")
    ]
    figure = gallery.draw_locality(pd.DataFrame([*rows, {"block": "up", "who": "sae", "score": "colour", "mean": 9.0}]))
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["-5", "10"]
    assert figure.axes[0].get_ylim()[1] > 50
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["sae", "neurons", "inside", "outside"]
    plt.close(figure)
