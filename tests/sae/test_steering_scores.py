"""Steering scored against the truth: the scores are what they say, and a direction that must work does."""

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from vaelab import activations, models
from vaelab.activations.denoiser import Sampling
from vaelab.models.conditioning import encode_pictures, encode_prompts
from vaelab.sae import steering_scores
from vaelab.sae.detection import LabelledVectors
from vaelab.sae.model import SAE, SAEConfig
from vaelab.sae.steering_scores import SteeringExperiment, SteeringSettings, Value
from vaelab.sae.truth import label_factors
from vaelab.world.scenes import Scene, Thing

STAR = Scene((Thing("star", "red", "small", "left"),), "plain", "grey")


class Pooled:
    """A picture model whose vectors are the picture's mean colours in four quarters."""

    name = "pooled"

    def embed_pictures(self, pixels):
        return F.normalize(F.adaptive_avg_pool2d(pixels, 2).flatten(1) + 2)


def with_things(*things, texture="plain", ground="grey"):
    return Scene(things, texture, ground)


def test_effect_and_selectivity_compare_the_objects_that_were_there():
    blue = with_things(Thing("star", "blue", "small", "left"))
    assert steering_scores.has_value(STAR, blue, Value("colour", "blue"))
    assert steering_scores.kept_share(STAR, blue, "colour") == 1
    other = with_things(Thing("star", "red", "small", "left"), Thing("ring", "blue", "small", "right"))
    assert not steering_scores.has_value(STAR, other, Value("colour", "blue"))
    assert steering_scores.kept_share(STAR, other, "colour") == pytest.approx(5 / 6)  # the number of objects changed
    gone = with_things(ground="pink")
    assert not steering_scores.has_value(STAR, gone, Value("colour", "blue"))
    assert steering_scores.has_value(STAR, gone, Value("ground", "pink"))
    assert steering_scores.kept_share(STAR, gone, "ground") == pytest.approx(1 / 6)  # only the texture stays


def test_a_value_is_written_where_the_factor_is():
    thing, ground = (
        steering_scores.factor_region(STAR, Value(*pair)) for pair in (("size", "large"), ("ground", "pink"))
    )
    assert torch.equal(thing + ground, torch.ones(64, 64)) and 0 < thing.sum() < 14**2
    place = steering_scores.factor_region(STAR, Value("position", "bottom right"))
    assert place.sum() == 20**2 and place[52, 52] == 1 and place[12, 12] == 0


def labelled(count=400, d=6):
    """Vectors with a direction for red, blue, and the pink ground."""
    rng = np.random.default_rng(0)
    labels = np.zeros((count, 3), bool)
    labels[np.arange(count), rng.integers(0, 3, count)] = True
    x = torch.randn(count, d, generator=torch.Generator().manual_seed(0)) + torch.from_numpy(labels).float() @ (
        3 * torch.eye(3, d)
    )
    covered = labels.astype(np.float32).reshape(count // 4, 4, 3)
    return LabelledVectors(x.view(-1, 4, d), covered, ("colour: red", "colour: blue", "ground: pink"))


def test_directions_have_the_same_length_and_the_mean_difference_is_between_values_of_the_factor():
    vectors, values = labelled(), [Value("colour", "red"), Value("colour", "blue")]
    x, labels = vectors.flat, torch.from_numpy(vectors.labels)
    expected = x[labels[:, 0]].mean(0) - x[labels[:, 1]].mean(0)
    torch.testing.assert_close(
        steering_scores.factor_differences(vectors, values), torch.stack([expected, -expected]), rtol=1e-4, atol=1e-5
    )
    sae = SAE(SAEConfig(6, 12, 3))
    made = steering_scores.steering_directions(sae, {"colour: red": 4, "colour: blue": 7}, vectors, values)
    assert made["sae"].features == {values[0]: 4, values[1]: 7}
    for own in made.values():
        assert own.lengths[values[0]] == pytest.approx(expected.norm().item(), rel=1e-4)
        for value in values:
            written = own.directions.written_by(own.features[value])
            assert written.norm().item() == pytest.approx(1, abs=1e-4)
    unit, codes = F.normalize(expected, dim=0), sae.encode(x).dense(12)
    largest = made["mean_difference"].directions.largest[0]
    assert largest.item() == pytest.approx(((x - x.mean(0)) @ unit).max().item(), rel=1e-4)
    assert torch.equal(made["sae"].directions.largest, codes.amax(0))
    with pytest.raises(ValueError, match=r"^steered_values: no patch shows ground: pink, or none shows another ground"):
        steering_scores.factor_differences(vectors, [Value("ground", "pink")])


@pytest.mark.parametrize("name", ["sd", "sd2"])
def test_the_loss_is_that_of_a_plain_computation(small_pipeline, name):
    pipeline, timesteps = small_pipeline(name), (50, 700)
    pictures = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    found = steering_scores.denoising_losses(pipeline, pictures, timesteps, batch_size=2, seed=5)
    for picture, loss in zip(pictures, found, strict=True):
        latents, errors = encode_pictures(pipeline, picture[None]), []
        for timestep in timesteps:
            generator = torch.Generator().manual_seed(5 * 1_000_003 + timestep)
            noise = torch.randn(latents.shape[1:], generator=generator)[None]
            signal = pipeline.scheduler.alphas_cumprod[timestep].double()
            noisy = signal.sqrt() * latents.double() + (1 - signal).sqrt() * noise.double()
            states = encode_prompts(pipeline, [""], 1, (32, 32))["encoder_hidden_states"]
            with torch.no_grad():
                predicted = pipeline.unet(noisy.float(), timestep, encoder_hidden_states=states).sample.double()
            velocity = signal.sqrt() * noise.double() - (1 - signal).sqrt() * latents.double()
            errors.append((predicted - (noise if name == "sd" else velocity)).square().mean().item())
        assert loss.item() == pytest.approx(np.mean(errors), rel=1e-4)


def planted_table():
    """A strength of 1 does nothing, 2 works, 3 works and destroys; the scenes of the second half have a little less."""
    rows = []
    for scene in range(8):
        late = scene >= 4
        for strength, effect, selectivity, loss in (
            (1.0, 0, 1.0, 1.0),
            (2.0, 1, 0.8 - 0.1 * late, 3.0),
            (3.0, 1, 0.2, 9.0),
        ):
            rows.append({
                "block": "up", "direction": "sae", "way": "add", "strength": strength, "factor": "colour",
                "value": "red", "scene": scene, "prompt": "open", "effect": effect == 1 and scene != 5,
                "selectivity": selectivity,
                "loss": loss * (scene + 1), "loss_before": scene + 1.0, "distance": 0.1 * strength,
            })  # fmt: skip
    return pd.DataFrame(rows)


def test_strengths_are_chosen_on_one_half_and_reported_on_the_other():
    table = planted_table()
    (row,) = steering_scores.steering_summary(table, resamples=200).to_dict("records")
    assert row["effect"] == 7 / 8 and row["selectivity"] == pytest.approx(0.75) and row["damage"] == pytest.approx(3)
    assert row["distance"] == pytest.approx(0.2) and row["pictures"] == 8
    assert 0.25 <= row["effect_low"] < 7 / 8 < row["effect_high"] <= 1
    assert row["damage_low"] == pytest.approx(3) == row["damage_high"]  # the same ratio in every scene
    curve = steering_scores.steering_curve(table, resamples=50).set_index("strength")
    assert curve["effect"].tolist() == [0, 7 / 8, 7 / 8] and curve["damage"].tolist() == pytest.approx([1, 3, 9])
    metrics = steering_scores.steering_metrics(pd.DataFrame([row]))
    assert metrics["up.steer.add.effect.sae"] == 7 / 8
    assert set(metrics) == {f"up.steer.add.{name}.sae" for name in steering_scores.MEASURES}
    late = (table["scene"] >= 4) == (table["strength"] == 2)
    (luck,) = steering_scores.steering_summary(table.assign(effect=late), resamples=20).to_dict("records")
    assert luck["effect"] == 0 < steering_scores.steering_curve(table.assign(effect=late), resamples=20)["effect"].min()


def test_blocks_are_summarised_together_and_the_best_way_is_told():
    weak = planted_table().assign(block="low", way="replace", effect=False)
    prompt = planted_table().assign(direction="prompt", way="prompt", effect=True, selectivity=1.0)
    summary = steering_scores.steering_summary(pd.concat([planted_table(), weak, prompt]), resamples=20)
    assert summary["block"].tolist() == ["up", "low", "up", "all", "all", "all"]
    best = steering_scores.best_ways(summary)
    assert best.loc["sae", "way"] == "add" and best.loc["sae", "effect"] == 7 / 8 and best.loc["sae", "pictures"] == 8
    sentence = steering_scores.change_sentence(summary)
    assert sentence.startswith("Steered in up, the value that was asked for appears in 88 % of pictures (feature of")
    assert "damage 3.00) and 100 % of pictures (the prompt" in sentence
    assert sentence.endswith("In low no direction gives it to more than 0 %.")


def test_finding_and_changing_stand_in_one_table():
    found = pd.DataFrame({"method": ["sae", "pca"], "f1": [0.4, 0.5], "f1_low": [0.3, 0.4], "f1_high": [0.5, 0.6],
                          "coverage": [0.1, 0.2]})  # fmt: skip
    summary = pd.DataFrame([
        {"direction": "sae", "way": "add", "effect": 0.5, "selectivity": 0.5, "damage": 1.2},
        {"direction": "sae", "way": "replace", "effect": 0.6, "selectivity": 0.9, "damage": 1.1},
        {"direction": "random", "way": "add", "effect": 0.0, "selectivity": 1.0, "damage": 1.0},
    ])  # fmt: skip
    table = steering_scores.find_or_change(found, summary).set_index("method")
    assert table.loc["sae", "way"] == "replace" and table.loc["sae", "changes"] == pytest.approx(0.54)
    assert np.isnan(table.loc["pca", "effect"]) and np.isnan(table.loc["random", "f1"])


@pytest.fixture(scope="module")
def experiment():
    """Two scenes of the embedded model to be steered to a pink ground."""
    pipeline = models.load_pipeline("embedded", device="cpu")
    scenes = steering_scores.single_scenes(2, "test", first_seed=40)
    settings = SteeringSettings(Sampling(1, 3.0), timesteps=(300,))
    return SteeringExperiment(pipeline, scenes, [Value("ground", "pink")], Pooled(), settings)


@pytest.fixture(scope="module")
def candidates(experiment):
    scenes = steering_scores.single_scenes(16, "train")
    prompts, sampling = [scene.prompt for scene in scenes], experiment.settings.sampling
    maps = activations.maps_at_step(experiment.pipeline, prompts, range(16), ["up.1.2"], sampling)["up.1.2"]
    halves, value = label_factors(maps, scenes), Value("ground", "pink")
    sae = SAE(SAEConfig(maps.shape[-1], 32, 4))
    return steering_scores.steering_directions(sae, {value.concept: 3}, halves.choosing, [value])


def test_the_difference_of_means_changes_the_ground_and_a_random_direction_does_not(experiment, candidates):
    own = {name: candidates[name] for name in ("mean_difference", "random")}
    table = experiment.score("up.1.2", own, [8.0], ["add"])
    effect = table.groupby("direction")["effect"].mean()
    assert effect["mean_difference"] == 1 and effect["random"] == 0
    assert set(table["prompt"]) <= {"other", "open"} and (table["loss"] > 0).all()
    ceiling = experiment.ceiling()
    assert ceiling["effect"].all() and (ceiling["distance"].abs() < 1e-5).all()
    assert len(ceiling) == len(table) / 2 == len(experiment.usable[Value("ground", "pink")])


def test_clamping_at_the_largest_activation_is_replacing_by_it(experiment, candidates):
    own = candidates["mean_difference"]
    value = experiment.values[0]
    largest = float(own.directions.largest[own.features[value]]) / own.lengths[value]
    table = experiment.score("up.1.2", {"mean_difference": own}, [0.9 * largest, 2 * largest], ["replace", "clamp"])
    pictures = {key[2:4]: each for key, each in experiment.pictures.items() if key[1] == "mean_difference"}
    low, high = 0.9 * largest, 2 * largest
    assert torch.equal(pictures["clamp", low], pictures["replace", low])
    assert not torch.equal(pictures["clamp", high], pictures["replace", high])
    assert len(table) == 4 * len(experiment.usable[value])


def test_wrong_input_is_one_plain_error_before_the_pictures(experiment, candidates, monkeypatch):
    own = {"sae": candidates["sae"]}
    with pytest.raises(ValueError, match=r"^strength: the (update|picture) of .* is not finite"):
        experiment.score("up.1.2", own, [1.0, 1e38])
    with pytest.raises(ValueError, match=r"^strengths: expected different numbers above 0, got \[2.0, 0.0\]"):
        experiment.score("up.1.2", own, [2.0, 0.0])
    with pytest.raises(ValueError, match=r"^steered_ways: unknown name 'only'"):
        experiment.score("up.1.2", own, [2.0], ["only"])
    with pytest.raises(ValueError, match=r"^saes: the autoencoder of up.0.0 is for vectors of 64 numbers; it has 128"):
        experiment.score("up.0.0", own, [2.0])
    silent = own["sae"].directions._replace(mean=torch.zeros(32))
    with pytest.raises(ValueError, match=r"^feature: 3 of up.1.2 was never active"):
        experiment.score("up.1.2", {"sae": own["sae"]._replace(directions=silent)}, [2.0])
    with pytest.raises(ValueError, match=r"^steered_values: unknown name 'colr'"):
        Value.of("colr: red")
    with pytest.raises(ValueError, match=r"^steered_where: unknown name"):
        SteeringSettings(Sampling(1), where="left")
