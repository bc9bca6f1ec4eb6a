"""Features steered during generation: the paper's equations, and nothing changed where nothing is asked."""

import pytest
import torch
from small_sae import FEATURES, D, shaken, vectors

from vaelab import activations
from vaelab.activations.denoiser import Sampling
from vaelab.hooks import capture
from vaelab.models import block_names
from vaelab.sae import steering
from vaelab.sae.baselines import Moments, PrincipalComponents
from vaelab.sae.feature_statistics import FeatureStatistics
from vaelab.sae.model import SAE, SAEConfig
from vaelab.sae.steering import Directions, Steerer, Steering, activate_alone, modulate, steer_update, turn_on

PROMPTS, SEEDS = ["a red circle", "a large blue square", "a star"], [0, 1, 2]
SAMPLING = Sampling(steps=2, guidance_scale=2.0)
K = 3


def directions(sae=None, mean=2.0, largest=5.0):
    sae = sae or shaken()
    n = sae.config.n_features
    return Directions(sae, torch.full((n,), mean).double(), torch.full((n,), largest), K)


def plainly(map_, one, own):
    """The new update (d, h, w) by the module's table, position by position in float64."""
    sae, new = own.dictionary, map_.double().clone()
    f, mu, largest = sae.decoder[one.feature].detach().double(), float(own.mean[one.feature]), own.largest[one.feature]
    for y in range(map_.shape[1]):
        for x in range(map_.shape[2]):
            d = map_[:, y, x]
            seen = float(sae.encode(d[None]).dense(FEATURES)[0, one.feature])
            a = one.strength * {"activation": seen, "mean": mu, "k_mean": K * mu}[one.unit]
            kept = {"add": d, "replace": d - seen * f, "clamp": d - seen * f, "only": 0 * d}[one.way]
            new[:, y, x] = kept + (min(a, float(largest)) if one.way == "clamp" else a) * f
    return new


def active_feature(map_, sae):
    return int(sae.encode(map_.flatten(1).T).dense(FEATURES).sum(0).argmax())


@pytest.mark.parametrize("way", steering.WAYS)
@pytest.mark.parametrize("unit", steering.UNITS)
def test_an_update_is_steered_as_the_equations_say(way, unit):
    own, map_ = directions(), vectors(12).T.reshape(D, 3, 4).contiguous()
    one = Steering("up", active_feature(map_, own.dictionary), 1.7, way, unit)
    written = {one.feature: own.written_by(one.feature)}
    found = steer_update(map_, [one], own, written)
    torch.testing.assert_close(found.double(), plainly(map_, one, own), rtol=1e-4, atol=1e-5)
    tokens = steer_update(map_.flatten(1).T, [one], own, written, aspect=3 / 4)
    torch.testing.assert_close(tokens, found.flatten(1).T)


def test_a_replaced_amount_is_what_the_feature_writes_and_a_clamped_one_was_seen():
    own, map_ = directions(largest=0.5), vectors(12).T.reshape(D, 3, 4).contiguous()
    feature = active_feature(map_, own.dictionary)
    f = own.written_by(feature)
    seen = own.dictionary.encode(map_.flatten(1).T).dense(FEATURES)[:, feature]
    for way, amount in (("replace", 2 * 2.0), ("clamp", 0.5)):
        new = steer_update(map_, [turn_on("up", feature, 2.0, way)], own, {feature: f})
        rest = new.flatten(1).T - (map_.flatten(1).T - seen[:, None] * f)
        torch.testing.assert_close(rest, torch.full((12, 1), amount) * f, rtol=1e-4, atol=1e-5)


def test_a_mask_confines_the_change_and_half_of_it_makes_half():
    own, map_ = directions(), vectors(16).T.reshape(D, 4, 4).contiguous()
    mask = torch.zeros(8, 8)
    mask[:4] = 1  # the upper two rows
    mask[4:6, :2] = 0.5
    one = turn_on("up", 7, 3.0, mask=mask)
    change = steer_update(map_, [one], own, {7: own.written_by(7)}) - map_
    whole = 3.0 * 2.0 * own.written_by(7)
    torch.testing.assert_close(change[:, 0, 3], whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(change[:, 2, 0], whole / 2, rtol=1e-4, atol=1e-5)
    assert not change[:, 3].any() and not change[:, 2, 1:].any()


def test_several_features_add_up():
    own, map_ = directions(), vectors(4).T.reshape(D, 2, 2).contiguous()
    written = {feature: own.written_by(feature) for feature in (3, 9)}
    ones = [turn_on("up", 3, 1.0), turn_on("up", 9, -2.0)]
    apart = [steer_update(map_, [one], own, written) - map_ for one in ones]
    torch.testing.assert_close(steer_update(map_, ones, own, written) - map_, sum(apart))


def test_what_a_feature_writes_is_its_vector_for_any_dictionary_and_in_the_vectors_units():
    sae = shaken()
    torch.testing.assert_close(directions(sae).written_by(5), sae.decoder[5].detach())
    pca = PrincipalComponents(Moments(9, torch.ones(4).double(), torch.diag(torch.tensor([4.0, 3, 2, 1])).double()), 2)
    written = Directions(pca, torch.ones(2), torch.ones(2), 2).written_by(1)
    torch.testing.assert_close(written, pca.rows[1])
    normed = directions(shaken(input_norm="layer_norm"))
    map_ = vectors(4).T.reshape(D, 2, 2).contiguous()
    feature = active_feature(map_, normed.dictionary)
    codes = normed.dictionary.encode(map_.flatten(1).T)
    off = steer_update(map_, [modulate("up", feature, -1)], normed, {feature: normed.written_by(feature)})
    silent = codes._replace(values=codes.values * (codes.indices != feature))
    expected = normed.dictionary.decode(codes) - normed.dictionary.decode(silent)
    torch.testing.assert_close((map_ - off).flatten(1).T, expected, rtol=1e-3, atol=1e-4)


@pytest.fixture
def steered(small_pipeline):
    """A small pipeline, one of its blocks, and a steerer with an autoencoder for this block."""
    pipeline = small_pipeline("sd")
    block, width = next((name, b.shape[-1]) for name, b in block_names.blocks(pipeline).items() if "up.1" in name)
    sae = SAE(SAEConfig(width, 40, K))
    return pipeline, block, Steerer(pipeline, {block: directions(sae)})


def test_nothing_asked_is_nothing_changed_bit_for_bit(steered):
    pipeline, block, steerer = steered
    plain = activations.generate(pipeline, PROMPTS, SEEDS, SAMPLING)
    off = torch.zeros(4, 4)
    nothing = [[], [modulate(block, 3, 0.0)], [turn_on(block, 5, 4.0, mask=off)]]
    assert torch.equal(steerer.generate(PROMPTS, nothing, SAMPLING, SEEDS), plain)
    never = [[modulate(block, 3, 0.0), turn_on(block, 5, 0.0)], [], []]
    assert torch.equal(steerer.generate(PROMPTS, never, SAMPLING, SEEDS), plain)


def test_each_picture_has_its_own_steering(steered):
    pipeline, block, steerer = steered
    plain = activations.generate(pipeline, PROMPTS, SEEDS, SAMPLING)
    found = steerer.generate(PROMPTS, [[], [turn_on(block, 5, 4.0)], []], SAMPLING, SEEDS)
    assert [torch.equal(*pair) for pair in zip(found, plain, strict=True)] == [True, False, True]
    alone = steerer.generate(PROMPTS, [[activate_alone(block, 5, 1.0)], [turn_on(block, 5, 4.0)], []], SAMPLING, SEEDS)
    assert torch.equal(alone[1], found[1]) and not torch.equal(alone[0], found[0])


@pytest.mark.parametrize("half", steering.HALVES)
@pytest.mark.parametrize("step", [0, 1])
def test_the_chosen_step_and_half_are_steered_and_no_others(steered, half, step):
    pipeline, block, steerer = steered
    one = turn_on(block, 5, 3.0, steps=(step,), half=half)
    updates = []
    for asked in ([], [one]):
        with capture(pipeline.unet, "conv_out", side="input") as seen:
            steerer.generate(PROMPTS[:1], [asked], SAMPLING, SEEDS[:1])
        updates.append([call.clone() for call in seen["conv_out"]])
    first_changed = [not torch.equal(a, b) for a, b in zip(updates[0][step], updates[1][step], strict=True)]
    assert first_changed == {"both": [True, True], "guided": [False, True], "unguided": [True, False]}[half]
    assert step == 0 or torch.equal(updates[0][0], updates[1][0])


def test_alone_the_block_writes_only_the_feature(steered):
    pipeline, block, steerer = steered
    path = block_names.find_blocks(pipeline, block)[block]
    change = Steerer._function(steerer, block, [[activate_alone(block, 5, 0.5)]], 1.0)
    with capture(pipeline.unet, path, side="update", calls=[0], stop=True) as captured:
        activations.generate(pipeline, [""], [0], SAMPLING)
    seen = change(captured[path][0])
    expected = 0.5 * K * 2.0 * steerer._directions[block].written_by(5)
    torch.testing.assert_close(seen, expected[None, :, None, None].expand_as(seen), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": "up.9.9"}, r"^block \(with an autoencoder\): unknown name 'up.9.9'"),
        ({"feature": 40}, r"^feature: .* has features 0 to 39, got 40"),
        ({"feature": 0}, r"^feature: 0 of .* was never active"),
        ({"steps": (3,)}, r"^steps: expected numbers from 0 to 2, got \[3\]"),
        ({"strength": 1e38}, r"^strength: the update of .* is not finite \(strengths: 1e\+38\)"),
        ({"strength": float("inf")}, r"^strength: expected a finite number"),
        ({"way": "multiply"}, r"^way: unknown name 'multiply'"),
        ({"unit": "mu"}, r"^unit: unknown name 'mu'"),
        ({"half": "left"}, r"^half: unknown name 'left'"),
        ({"feature": -1}, r"^feature: expected a whole number, at least 0"),
        ({"mask": torch.full((4, 4), 2.0)}, r"^mask: expected"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_requests_are_one_plain_error(steered, change, message):
    _, block, steerer = steered
    steerer._directions[block].mean[0] = 0
    with pytest.raises(ValueError, match=message):
        request = Steering(**{"block": block, "feature": 5, "strength": 1.0, "unit": "k_mean", **change})
        steerer.generate(PROMPTS[:1], [[request]], SAMPLING, [0])


def test_other_wrong_input_is_refused(steered):
    pipeline, block, steerer = steered
    with pytest.raises(ValueError, match=r"^saes: the autoencoder of .* is for vectors of 24 numbers"):
        Steerer(pipeline, {block: directions()})
    with pytest.raises(ValueError, match=r"^statistics: of 7 features, but the autoencoder has 5"):
        Directions.of(SAE(SAEConfig(4, 5, 2)), FeatureStatistics(7, 2))
    with pytest.raises(ValueError, match=r"^half: 'guided' needs guidance"):
        steerer.validate([modulate(block, 5, 1.0, half="guided")], Sampling(1, 0.0))
    with pytest.raises(ValueError, match=r"^way: 'only' replaces the whole update"):
        steerer.validate([modulate(block, 5, 1.0), activate_alone(block, 5, 1.0)], SAMPLING)
    with pytest.raises(ValueError, match=r"^steerings: got 1, with 2 prompts and 2 seeds"):
        steerer.generate(PROMPTS[:2], [[]], SAMPLING, [0, 1])
