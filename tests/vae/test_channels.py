import numpy as np
import pandas as pd
import pytest
import torch
from scipy import integrate, stats
from torch import nn

from vaelab.vae import channels
from vaelab.vae.channels import ActivityTracker, Moments, channel_moments, classify, groupnorms, merge_moments


@pytest.mark.parametrize("mean", [-2.0, -0.1, 0.0, 0.7, 5.0])
@pytest.mark.parametrize("std", [0.01, 0.5, 3.0])
def test_folded_normal_mean_equals_quadrature(mean, std):
    grid = np.linspace(mean - 12 * std, mean + 12 * std, 40001)
    expected = integrate.trapezoid(np.abs(grid) * stats.norm.pdf(grid, mean, std), grid)
    np.testing.assert_allclose(channels.folded_normal_mean(np.array(mean), np.array(std)), expected, rtol=1e-6)


@pytest.mark.filterwarnings("error")
def test_folded_normal_mean_without_deviation_is_the_magnitude():
    means = channels.folded_normal_mean(np.array([-2.0, 0.0, 3.0, -1e30]), np.zeros(4))
    np.testing.assert_allclose(means, [2, 0, 3, 1e30], rtol=1e-15, atol=1e-300)


def test_normal_channels_are_predicted_by_gamma_and_beta():
    rng = np.random.default_rng(0)
    gamma, beta = rng.uniform(-2, 2, 30), rng.uniform(-1, 1, 30)
    mean_abs = np.abs(rng.standard_normal((20000, 30)) * gamma + beta).mean(0)
    relation = channels.scale_relation(pd.DataFrame({"mean_abs": mean_abs, "gamma": gamma, "beta": beta}), 0.3)
    assert relation["predicted.r2"] > 0.999
    assert relation["spearman.gamma"] == pytest.approx(stats.spearmanr(mean_abs, np.abs(gamma))[0])
    assert relation["spearman.beta"] == pytest.approx(stats.spearmanr(mean_abs, np.abs(beta))[0])


def test_channels_that_gamma_does_not_explain():
    table = pd.DataFrame({"mean_abs": [3.0, 2.0, 1.0], "gamma": [0.1, 1.0, 4.0], "beta": [0.0, 0.0, 0.0]})
    relation = channels.scale_relation(table, 0.5)
    predicted = np.abs(table["gamma"]) * np.sqrt(2 / np.pi)
    assert relation["predicted.r2"] == pytest.approx(1 - ((table["mean_abs"] - predicted) ** 2).sum() / 2)
    assert relation["spearman.gamma"] == pytest.approx(-1)


def test_counts_below_the_threshold():
    table = pd.DataFrame(
        {"mean_abs": [0.1, 0.1, 0.5, 0.9], "gamma": [-0.2, 0.9, -0.1, 0.5], "beta": [0.0, 0.1, 0.2, 0.3]}
    )
    relation = channels.scale_relation(table, 0.5)
    assert (relation["low.activity"], relation["low.gamma"], relation["low.both"]) == (2, 2, 1)
    sentence = channels.describe_census(relation, 4, 0.5)
    assert "2 of 4 channels (50%) are suppressed" in sentence and "1 (50%) also have a scale" in sentence
    assert f"{relation['spearman.beta']:.2f} with the shift" in sentence
    assert channels.describe_census({**relation, "low.activity": 0}, 4, 0.5).startswith("None of 4 channels")
    del relation["spearman.beta"]
    assert "rank correlation" not in channels.describe_census(relation, 4, 0.5)


SHAPES = {"picture": (3, 6, 5, 4), "sequence": (3, 6, 7), "vector": (3, 6)}


def pictures(count, seed=1):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def naive_moments(activation):
    """Moments of (B, C, ...) in float64, a channel at a time."""
    a = activation.detach().double().numpy()
    rows = [a[:, channel].ravel() for channel in range(a.shape[1])]
    return (
        rows[0].size,
        np.array([np.abs(row).mean() for row in rows]),
        np.array([row.mean() for row in rows]),
        np.array([((row - row.mean()) ** 2).mean() for row in rows]),
    )


def assert_same(moments, expected):
    assert int(moments.count) == expected[0]
    for value, wanted in zip(moments[1:], expected[1:], strict=True):
        np.testing.assert_allclose(value.double().numpy(), wanted, rtol=2e-5, atol=1e-6)


def activity_of(mean_abs):
    values = torch.tensor(mean_abs)
    return Moments(10, values, torch.zeros_like(values), values**2)


def one_layer(channel_count):
    return nn.Sequential(nn.GroupNorm(1, channel_count))


def randomise_scales(model):
    generator = torch.Generator().manual_seed(2)
    for norm in groupnorms(model).values():
        nn.init.uniform_(norm.weight, 0.2, 1.5, generator=generator)
        nn.init.uniform_(norm.bias, -0.3, 0.3, generator=generator)


class TestMoments:
    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    def test_they_equal_their_formula_in_float64(self, shape):
        activation = torch.randn(shape) * 3 + 1
        assert_same(channel_moments(activation), naive_moments(activation))

    def test_std_is_the_root_of_the_variance(self):
        activation = torch.randn(4, 3, 50)
        np.testing.assert_allclose(channel_moments(activation).std, activation.std(dim=(0, 2), correction=0), rtol=1e-5)

    def test_bfloat16_is_accumulated_in_float32(self):
        activation = (torch.randn(8, 2, 64, 64) + 1).bfloat16()
        moments = channel_moments(activation)
        assert moments.mean_abs.dtype == torch.float32
        assert_same(moments, naive_moments(activation))

    def test_a_large_offset_does_not_cost_the_variance(self):
        activation = torch.randn(4, 2, 100) * 0.01 + 100
        expected = naive_moments(activation)[3]
        np.testing.assert_allclose(channel_moments(activation).variance.double(), expected, rtol=1e-2)

    def test_what_has_no_channels_is_refused(self):
        with pytest.raises(ValueError, match=r"activation: expected \(B, C, \.\.\.\), got \(3,\)"):
            channel_moments(torch.ones(3))

    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    @pytest.mark.parametrize("parts", [(1, 4), (4, 1), (2, 2, 1)])
    def test_merged_unequal_parts_equal_the_whole(self, shape, parts):
        whole = torch.randn(5, *shape[1:]) * torch.linspace(0.5, 9, 5).view(-1, *[1] * (len(shape) - 1)) + 2
        merged, *others = [channel_moments(part) for part in whole.split(parts)]
        for other in others:
            merged = merge_moments(merged, other)
        assert_same(merged, naive_moments(whole))


class TestGroupnorms:
    def test_all_of_them_the_attentions_too(self, tiny_vae):
        expected = [name for name, module in tiny_vae.named_modules() if isinstance(module, nn.GroupNorm)]
        assert list(groupnorms(tiny_vae)) == expected
        assert "encoder.mid_block.attentions.0.group_norm" in expected

    def test_only_the_requested_layers_are_tracked(self, tiny_vae):
        assert list(groupnorms(tiny_vae, "decoder.*_norm_out")) == ["decoder.conv_norm_out"]

    def test_a_norm_without_a_scale_is_left_out(self):
        model = nn.Sequential(nn.GroupNorm(1, 2, affine=False), nn.GroupNorm(1, 2))
        assert list(groupnorms(model)) == ["1"]

    def test_a_model_without_any_is_refused(self):
        with pytest.raises(ValueError, match="no GroupNorm with a scale among '\\*' of Sequential"):
            groupnorms(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))

    def test_a_tracker_refuses_such_a_model(self, tiny_vae):
        with pytest.raises(ValueError, match="no GroupNorm"):
            ActivityTracker(tiny_vae, "*.conv_in")


class TestTracker:
    def collected(self, model, batches):
        """Every GroupNorm's full maps over the batches, gathered by plain hooks."""
        maps = {name: [] for name in groupnorms(model)}
        handles = [
            module.register_forward_hook(lambda _, args, out, name=name: maps[name].append(out.detach().clone()))
            for name, module in groupnorms(model).items()
        ]
        for batch in batches:
            model(batch)
        for handle in handles:
            handle.remove()
        return {name: torch.cat(calls) for name, calls in maps.items()}

    def test_it_equals_a_collection_of_full_maps(self, tiny_vae):
        randomise_scales(tiny_vae)
        batches = [pictures(3, 1), pictures(1, 2), pictures(2, 3)]
        maps = self.collected(tiny_vae, batches)
        assert maps["decoder.mid_block.attentions.0.group_norm"].dim() == 3

        tracker = ActivityTracker(tiny_vae)
        with tracker.track():
            tiny_vae(batches[0])
            tiny_vae(batches[1])
        with tracker.track():
            tiny_vae(batches[2])
        activity = tracker.read()

        assert list(activity) == list(maps)
        for layer, moments in activity.items():
            assert_same(moments, naive_moments(maps[layer]))

    def test_measure_equals_the_tracker(self, tiny_vae):
        batches = [{"pixels": pictures(2, 1)}, {"pixels": pictures(1, 2)}]
        measured = channels.measure_activity(tiny_vae, tiny_vae, batches)
        maps = self.collected(tiny_vae, [batch["pixels"] for batch in batches])
        for layer, moments in measured.items():
            assert_same(moments, naive_moments(maps[layer]))

    def test_measure_feeds_the_models_own_precision(self, tiny_vae):
        dtypes = []
        model = tiny_vae.bfloat16()
        channels.measure_activity(model, lambda x: dtypes.append(x.dtype) or model(x), [{"pixels": pictures(1)}])
        assert dtypes == [torch.bfloat16]

    def test_hooks_exist_within_track_only(self, tiny_vae):
        norms = groupnorms(tiny_vae).values()
        tracker = ActivityTracker(tiny_vae)
        assert not any(norm._forward_hooks for norm in norms)
        with tracker.track():
            assert all(norm._forward_hooks for norm in norms)
            tiny_vae(pictures(1))
        assert not any(norm._forward_hooks for norm in norms)

    def test_what_runs_outside_track_does_not_count(self, tiny_vae):
        tracker = ActivityTracker(tiny_vae, "encoder.conv_norm_out")
        with tracker.track():
            tiny_vae(pictures(1))
        tiny_vae(pictures(5))
        assert tracker.read()["encoder.conv_norm_out"].count == 1 * 8 * 8

    def test_an_interrupted_track_adds_nothing(self, tiny_vae):
        tracker = ActivityTracker(tiny_vae)
        with pytest.raises(KeyError), tracker.track():
            tiny_vae(pictures(1))
            raise KeyError
        with pytest.raises(RuntimeError, match="nothing was tracked"):
            tracker.read()

    def test_reading_discards_the_moments_by_default(self, tiny_vae):
        tracker = ActivityTracker(tiny_vae, "encoder.conv_norm_out")
        with tracker.track():
            tiny_vae(pictures(2))
        kept, again = tracker.read(reset=False), tracker.read()
        assert torch.equal(kept["encoder.conv_norm_out"].mean_abs, again["encoder.conv_norm_out"].mean_abs)
        with pytest.raises(RuntimeError, match="nothing was tracked"):
            tracker.read()
        with tracker.track():
            tiny_vae(pictures(1))
        assert tracker.read()["encoder.conv_norm_out"].count == 1 * 8 * 8

    def test_gradients_of_a_tracked_step_are_those_of_an_untracked(self, tiny_vae):
        tiny_vae(pictures(1)).sample.square().mean().backward()
        expected = tiny_vae.encoder.conv_in.weight.grad.clone()
        tiny_vae.zero_grad()
        tracker = ActivityTracker(tiny_vae)
        with tracker.track():
            tiny_vae(pictures(1)).sample.square().mean().backward()
        assert torch.equal(tiny_vae.encoder.conv_in.weight.grad, expected)
        assert not any(moments.mean_abs.requires_grad for moments in tracker.read().values())

    def test_inference_mode_outside_it_goes_on(self, tiny_vae):
        tracker = ActivityTracker(tiny_vae, "encoder.conv_norm_out")
        with torch.inference_mode(), tracker.track():
            tiny_vae(pictures(2))
        with tracker.track():
            tiny_vae(pictures(1))
        assert tracker.read()["encoder.conv_norm_out"].count == 3 * 8 * 8

    def test_processes_are_merged(self, tiny_vae, monkeypatch):
        mine, other = ActivityTracker(tiny_vae), ActivityTracker(tiny_vae)
        for tracker, batch in ((mine, pictures(3, 1)), (other, pictures(1, 2))):
            with tracker.track():
                tiny_vae(batch)
        theirs = other.read()

        def gather(everyone, own):
            everyone[:] = [own, theirs]

        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
        maps = self.collected(tiny_vae, [pictures(3, 1), pictures(1, 2)])
        for layer, moments in mine.read().items():
            assert_same(moments, naive_moments(maps[layer]))


class TestClassify:
    def test_absolute(self):
        found = classify(one_layer(4), {"0": activity_of([0.5, 0.01, 0.2, 0.0])}, threshold=0.1)
        assert found["0"].layer == "0"
        assert found["0"].parameter == "0.weight"
        assert found["0"].indices == (1, 3)
        np.testing.assert_allclose(found["0"].values, [0.01, 0.0])

    @pytest.mark.parametrize("threshold", [0.25, 1e-3])
    def test_a_value_equal_to_the_threshold_is_not_below_it(self, threshold):
        just_below = float(np.nextafter(np.float32(threshold), np.float32(0)))
        found = classify(one_layer(2), {"0": activity_of([threshold, just_below])}, threshold=threshold)
        assert found["0"].indices == (1,)

    def test_relative_to_the_layers_median(self):
        model = nn.Sequential(nn.GroupNorm(1, 4), nn.GroupNorm(1, 4))
        activity = {"0": activity_of([1.0, 1.0, 3.0, 3.0]), "1": activity_of([10.0, 30.0, 30.0, 30.0])}
        found = classify(model, activity, threshold=0.6, relative=True)
        assert {layer: one.indices for layer, one in found.items()} == {"0": (0, 1), "1": (0,)}

    def test_relative_agrees_with_the_tables_column(self, tiny_vae):
        randomise_scales(tiny_vae)
        activity = channels.measure_activity(tiny_vae, tiny_vae, [{"pixels": pictures(2)}])
        found = classify(tiny_vae, activity, threshold=0.7, relative=True)
        table = channels.channel_table(tiny_vae, activity)
        low = table[table["relative"] < 0.7]
        assert [(layer, index) for layer, one in found.items() for index in one.indices] == list(
            zip(low["layer"], low["channel"], strict=True)
        )
        assert 0 < len(low) < len(table)

    def test_by_the_scales_magnitude_alone(self):
        model = one_layer(4)
        model[0].weight.data = torch.tensor([0.5, -0.01, 0.0, -0.5])
        found = classify(model, {"0": activity_of([0.0, 1.0, 1.0, 0.0])}, threshold=0.1, by="gamma")
        assert found["0"].indices == (1, 2)
        np.testing.assert_allclose(found["0"].values, [0.01, 0.0])

    def test_a_layer_without_such_channels_has_no_entry(self):
        assert classify(one_layer(2), {"0": activity_of([1.0, 2.0])}, threshold=0.5) == {}

    @pytest.mark.parametrize("threshold", [-1e-9, float("nan")])
    def test_a_threshold_below_zero_is_refused(self, threshold):
        with pytest.raises(ValueError, match="threshold: must be at least 0"):
            classify(one_layer(2), {"0": activity_of([1.0, 2.0])}, threshold=threshold)

    def test_an_unknown_measure_lists_the_known(self):
        with pytest.raises(ValueError, match=r"by: unknown name 'gama'.*gamma"):
            classify(one_layer(2), {"0": activity_of([1.0, 2.0])}, by="gama")

    def test_layers_of_another_model_are_refused(self, tiny_vae):
        with pytest.raises(ValueError, match="layers: unknown name 'nowhere'"):
            classify(tiny_vae, {"nowhere": activity_of([1.0, 2.0])})


class TestPlanted:
    LAYERS = (
        "encoder.down_blocks.0.resnets.0.norm1",
        "encoder.mid_block.attentions.0.group_norm",
        "encoder.conv_norm_out",
        "decoder.up_blocks.0.resnets.1.norm2",
        "decoder.up_blocks.1.resnets.0.norm1",
    )

    @pytest.fixture
    def planted(self, tiny_vae):
        rng = np.random.default_rng(5)
        silent = set()
        for layer, many in zip(self.LAYERS, (3, 6, 4, 5, 2), strict=True):
            norm = tiny_vae.get_submodule(layer)
            chosen = rng.choice(norm.num_channels, many, replace=False)
            norm.weight.data[chosen] = 0
            norm.bias.data[chosen] = 0
            silent |= {(layer, int(channel)) for channel in chosen}
        return silent

    @pytest.mark.parametrize("how", [{}, {"threshold": 0.05, "relative": True}, {"by": "gamma"}], ids=str)
    def test_exactly_the_twenty_silenced_channels_are_found(self, tiny_vae, planted, how):
        activity = channels.measure_activity(tiny_vae, tiny_vae, [{"pixels": pictures(4)}])
        found = classify(tiny_vae, activity, **how)
        assert {(layer, index) for layer, one in found.items() for index in one.indices} == planted
        assert channels.count_suppressed(found) == len(planted) == 20
        assert all(set(one.values) == {0.0} for one in found.values())

    def test_their_rows_of_the_table(self, tiny_vae, planted):
        activity = channels.measure_activity(tiny_vae, tiny_vae, [{"pixels": pictures(4)}])
        found = classify(tiny_vae, activity)
        rows = channels.suppressed_channel_rows(channels.channel_table(tiny_vae, activity), found)
        assert set(zip(rows["layer"], rows["channel"], strict=True)) == planted
        assert len(rows) == 20
        assert (rows[["mean_abs", "gamma", "beta"]] == 0).all(axis=None)

    def test_the_layer_with_the_most(self, tiny_vae, planted):
        activity = channels.measure_activity(tiny_vae, tiny_vae, [{"pixels": pictures(4)}])
        table = channels.channel_table(tiny_vae, activity)
        assert channels.most_suppressed_layer(table, classify(tiny_vae, activity)) == self.LAYERS[1]

    def test_with_none_the_layer_of_the_faintest_channel(self, tiny_vae):
        tiny_vae.decoder.conv_norm_out.weight.data[3] = 0.01
        activity = channels.measure_activity(tiny_vae, tiny_vae, [{"pixels": pictures(4)}])
        table = channels.channel_table(tiny_vae, activity)
        assert channels.most_suppressed_layer(table, {}) == "decoder.conv_norm_out"


class TestTable:
    def test_columns_and_values(self):
        model = nn.Sequential(nn.GroupNorm(1, 2), nn.GroupNorm(1, 3))
        model[1].weight.data = torch.tensor([0.5, -0.25, 2.0])
        model[1].bias.data = torch.tensor([0.0, 0.125, -1.0])
        x = torch.randn(4, 3, 6)
        activity = {"0": activity_of([1.0, 3.0]), "1": channel_moments(x)}
        table = channels.channel_table(model, activity)

        assert list(table) == ["layer", "channel", "mean_abs", "mean", "std", "gamma", "beta", "relative"]
        assert list(table["layer"]) == ["0", "0", "1", "1", "1"]
        assert list(table["channel"]) == [0, 1, 0, 1, 2]
        np.testing.assert_allclose(table["relative"][:2], [0.5, 1.5])
        last = table[table["layer"] == "1"]
        count, mean_abs, mean, variance = naive_moments(x)
        assert count == 24
        np.testing.assert_allclose(last["mean_abs"], mean_abs, rtol=1e-5)
        np.testing.assert_allclose(last["mean"], mean, atol=1e-6)
        np.testing.assert_allclose(last["std"], np.sqrt(variance), rtol=1e-5)
        np.testing.assert_allclose(last["gamma"], [0.5, -0.25, 2.0])
        np.testing.assert_allclose(last["beta"], [0.0, 0.125, -1.0])
        np.testing.assert_allclose(last["relative"], mean_abs / np.median(mean_abs), rtol=1e-5)

    def test_a_silent_layer_has_relative_values_without_nan(self):
        table = channels.channel_table(one_layer(3), {"0": activity_of([0.0, 0.0, 0.0])})
        assert list(table["relative"]) == [0, 0, 0]


class TestAsMap:
    def test_a_sequence_is_laid_out_row_by_row(self):
        maps = torch.randn(2, 4, 4)
        assert torch.equal(channels.activation_map(maps.flatten(1)), maps)

    def test_a_map_stays(self):
        maps = torch.randn(2, 4, 5)
        assert channels.activation_map(maps) is maps

    def test_a_sequence_that_is_no_square_is_refused(self):
        with pytest.raises(ValueError, match="activation: 5 positions"):
            channels.activation_map(torch.ones(2, 5))


class TestNearZeroWeights:
    def naive(self, weight, bound):
        values = weight.detach().double().abs().numpy().ravel()
        return sum(value < bound for value in values) / len(values)

    def test_absolute(self, tiny_vae):
        found = channels.near_zero_weights(tiny_vae, 0.05)
        layers = [n for n, m in tiny_vae.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        assert list(found) == layers
        for layer, fraction in found.items():
            assert fraction == pytest.approx(self.naive(tiny_vae.get_submodule(layer).weight, 0.05), abs=1e-6)
        assert len(set(found.values())) > 10

    def test_relative_to_the_layers_mean_magnitude(self, tiny_vae):
        layer = "decoder.conv_in"
        weight = tiny_vae.get_submodule(layer).weight
        bound = 0.2 * weight.detach().double().abs().mean().item()
        expected = channels.near_zero_weights(tiny_vae, 0.2, relative=True)[layer]
        weight.data *= 1000
        assert expected == pytest.approx(self.naive(weight / 1000, bound), abs=1e-6)
        assert channels.near_zero_weights(tiny_vae, 0.2, relative=True)[layer] == pytest.approx(expected, abs=1e-6)

    def test_a_weight_equal_to_the_threshold_is_not_near_zero(self):
        model = nn.Sequential(nn.Linear(4, 1))
        model[0].weight.data = torch.tensor([[0.25, -0.25, 0.125, -0.125]])
        assert channels.near_zero_weights(model, 0.25) == {"0": 0.5}

    def test_a_model_without_such_layers_has_none(self):
        assert channels.near_zero_weights(one_layer(2)) == {}

    def test_a_threshold_below_zero_is_refused(self, tiny_vae):
        with pytest.raises(ValueError, match="near_zero_threshold: must be at least 0"):
            channels.near_zero_weights(tiny_vae, -1e-8)
