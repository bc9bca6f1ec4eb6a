import numpy as np
import pytest
import torch
from torch import nn

from vaelab.vae.channels import ActivityTracker, Moments, Suppressed, channel_moments, classify
from vaelab.vae.nudge import Intervention, NudgeConfig, nudge_scales, random_active_channels

SCALES = [0.9, 0.0, -0.02, 1.95, 0.3, -1.99, 0.0004, -0.0]
TOUCHED = (1, 2, 3, 5, 6, 7)


def norm_of(scales, bias=None):
    norm = nn.GroupNorm(1, len(scales))
    norm.weight.data = torch.tensor(scales)
    norm.bias.data = torch.zeros(len(scales)) if bias is None else torch.tensor(bias)
    return norm


def target(indices, layer="norm"):
    return {layer: Suppressed(layer, f"{layer}.weight", tuple(indices), (0.0,) * len(indices))}


def after(scales, config, indices=TOUCHED):
    model = nn.ModuleDict({"norm": norm_of(scales)})
    nudge_scales(model, target(indices), config)
    return model["norm"].weight.detach()


def expected(formula, scales=SCALES, indices=TOUCHED):
    """The scales after ``formula`` of each touched one, in float64 and stored in float32."""
    stored = torch.tensor(scales).double().numpy()
    return torch.tensor([formula(g) if i in indices else g for i, g in enumerate(stored)], dtype=torch.float32)


def sign(gamma):
    return -1.0 if gamma < 0 else 1.0


def activity_of(mean_abs):
    values = torch.tensor(mean_abs)
    return Moments(100, values, torch.zeros_like(values), values**2)


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


class TestFormulas:
    def test_multiply(self):
        config = NudgeConfig("multiply", nudge_factor=1.25, gamma_max=2.0, gamma_floor=1e-3)
        assert torch.equal(after(SCALES, config), expected(lambda g: sign(g) * min(max(abs(g), 1e-3) * 1.25, 2.0)))

    def test_add(self):
        config = NudgeConfig("add", nudge_amount=0.03, gamma_max=2.0)
        assert torch.equal(after(SCALES, config), expected(lambda g: sign(g) * min(abs(g) + 0.03, 2.0)))

    def test_reset(self):
        assert torch.equal(after(SCALES, NudgeConfig("reset")), expected(lambda g: 1.0))

    def test_for_positive_scales_multiply_and_add_are_the_papers(self):
        scales = [0.5, 1.9, 0.01]
        multiplied = after(scales, NudgeConfig("multiply", nudge_factor=1.1), range(3))
        added = after(scales, NudgeConfig("add", nudge_amount=0.01), range(3))
        np.testing.assert_allclose(multiplied, [0.55, 2.0, 0.011], rtol=1e-6)
        np.testing.assert_allclose(added, [0.51, 1.91, 0.02], rtol=1e-6)

    @pytest.mark.parametrize("strategy", ["multiply", "add"])
    def test_the_cap_is_never_passed_however_often(self, strategy):
        model = nn.ModuleDict({"norm": norm_of(SCALES)})
        for _ in range(40):
            nudge_scales(
                model, target(TOUCHED), NudgeConfig(strategy, nudge_factor=1.5, nudge_amount=0.2, gamma_max=1.2)
            )
        reached = model["norm"].weight.detach()[list(TOUCHED)].abs()
        assert torch.equal(reached, torch.full((6,), 1.2))

    def test_a_scale_of_exactly_zero_comes_back_under_multiply(self):
        model = nn.ModuleDict({"norm": norm_of([0.0, 1.0])})
        for _ in range(100):
            nudge_scales(model, target([0]), NudgeConfig("multiply", nudge_factor=1.1))
        assert model["norm"].weight[0] > 1

    def test_without_a_floor_zero_stays_zero(self):
        assert after([0.0], NudgeConfig("multiply", gamma_floor=0.0), [0]) == 0

    def test_a_scale_in_bfloat16(self):
        model = nn.ModuleDict({"norm": norm_of([0.5, 0.25]).bfloat16()})
        (done,) = nudge_scales(model, target([0]), NudgeConfig("add", nudge_amount=0.25))
        assert model["norm"].weight.dtype == torch.bfloat16
        assert done == Intervention("norm", 0, 0.5, 0.75)


class TestReach:
    @pytest.mark.parametrize("strategy", ["multiply", "add", "reset", "adaptive"])
    def test_only_the_reported_entries_change(self, tiny_vae, strategy):
        layers = {"encoder.conv_norm_out": (3, 7), "decoder.mid_block.attentions.0.group_norm": (0, 15)}
        for layer, indices in layers.items():
            tiny_vae.get_submodule(layer).weight.data[list(indices)] = 1e-4
        before = snapshot(tiny_vae)
        tracker = ActivityTracker(tiny_vae)
        with tracker.track(), torch.no_grad():
            tiny_vae(torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
        activity = tracker.read()
        found = classify(tiny_vae, activity, threshold=1e-3)
        assert {layer: one.indices for layer, one in found.items()} == layers

        log = nudge_scales(tiny_vae, found, NudgeConfig(strategy), activity=activity, threshold=1e-3)

        touched = {(f"{one.layer}.weight", one.channel) for one in log}
        assert len(touched) == len(log) == 4
        changed = {
            (name, int(index[0]))
            for name, value in tiny_vae.state_dict().items()
            for index in torch.nonzero(value != before[name])
        }
        assert changed == touched

    def test_the_log_says_what_was_and_what_is(self):
        model = nn.ModuleDict({"norm": norm_of(SCALES)})
        before = model["norm"].weight.detach().clone()
        log = nudge_scales(model, target(TOUCHED), NudgeConfig("multiply"))
        assert [one.layer for one in log] == ["norm"] * 6
        assert tuple(one.channel for one in log) == TOUCHED
        assert [one.before for one in log] == before[list(TOUCHED)].tolist()
        assert [one.after for one in log] == model["norm"].weight[list(TOUCHED)].tolist()

    def test_no_targets_do_nothing(self, tiny_vae):
        before = snapshot(tiny_vae)
        assert nudge_scales(tiny_vae, {}, NudgeConfig()) == []
        assert all(torch.equal(value, before[name]) for name, value in tiny_vae.state_dict().items())

    @pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
    def test_wrapped_models_are_reached(self, wrap):
        model = nn.Sequential(norm_of([0.5, 0.25]))
        nudge_scales(wrap(model), target([1], "0"), NudgeConfig("reset"))
        assert model[0].weight.tolist() == [0.5, 1.0]

    def test_training_goes_on(self):
        model = nn.ModuleDict({"norm": norm_of([0.5, 0.25])})
        nudge_scales(model, target([1]), NudgeConfig("reset"))
        model["norm"](torch.randn(2, 2, 4)).square().sum().backward()
        assert model["norm"].weight.grad.abs().min() > 0

    def test_a_target_without_a_parameter_is_refused(self, tiny_vae):
        with pytest.raises(ValueError, match=r"targets: the model has no parameter 'norm\.weight'"):
            nudge_scales(tiny_vae, target([0]), NudgeConfig())


class TestAdaptive:
    SIZE = 16

    def inputs(self, shape="normal"):
        x = torch.randn(8, self.SIZE, 32, 32, generator=torch.Generator().manual_seed(4))
        return x.sign() * x.abs() ** 3 if shape == "heavy" else x

    def measured(self, model, x):
        with torch.no_grad():
            return {"norm": channel_moments(model["norm"](x))}

    def run(self, scales, bias, threshold, x, config=None):
        model = nn.ModuleDict({"norm": norm_of(scales, bias)})
        activity = self.measured(model, x)
        found = classify(model, activity, threshold=threshold)
        log = nudge_scales(model, found, config or NudgeConfig("adaptive"), activity=activity, threshold=threshold)
        return model["norm"].weight.detach(), log, activity["norm"].mean_abs, self.measured(model, x)["norm"].mean_abs

    def test_suppressed_channels_reach_the_threshold_and_hardly_pass_it(self):
        scales = np.linspace(-0.08, 0.4, self.SIZE).tolist()
        bias = np.linspace(0.04, -0.04, self.SIZE).tolist()
        _, log, before, now = self.run(scales, bias, 0.2, self.inputs())
        touched = [one.channel for one in log]
        assert 5 < len(touched) < self.SIZE
        assert (before[touched] < 0.2).all()
        assert (now[touched] >= 0.2).all()
        assert (now[touched] < 0.2 * 1.04).all()

    @pytest.mark.parametrize("shape", ["normal", "heavy"])
    def test_without_a_shift_the_inputs_distribution_does_not_matter(self, shape):
        scales = [0.002, -0.03] * (self.SIZE // 2)
        _, log, _, now = self.run(scales, [0.0] * self.SIZE, 0.1, self.inputs(shape))
        assert len(log) == self.SIZE
        assert (now >= 0.1).all()
        assert (now < 0.1 * 1.02).all()

    def test_heavy_tails_and_a_shift_reach_it_in_a_few_interventions(self):
        x, threshold = self.inputs("heavy"), 4e-3
        model = nn.ModuleDict({"norm": norm_of([5e-3] * self.SIZE, [1e-3] * self.SIZE)})
        for _ in range(6):
            activity = self.measured(model, x)
            found = classify(model, activity, threshold=threshold)
            nudge_scales(model, found, NudgeConfig("adaptive"), activity=activity, threshold=threshold)
        assert classify(model, self.measured(model, x), threshold=threshold) == {}
        assert self.measured(model, x)["norm"].mean_abs.max() < threshold * 1.02

    def test_a_scale_of_exactly_zero_comes_back(self):
        _, _, before, now = self.run([0.0] * self.SIZE, [0.0] * self.SIZE, 0.1, self.inputs())
        assert (before == 0).all()
        assert (now >= 0.1 * 0.97).all()
        assert (now < 0.1 * 1.05).all()

    def test_signs_are_kept(self):
        scales = [-0.01] * 8 + [0.01] * 8
        weight, *_ = self.run(scales, [0.0] * self.SIZE, 0.1, self.inputs())
        assert (weight[:8] < -0.1).all()
        assert (weight[8:] > 0.1).all()

    @pytest.mark.parametrize("shape", ["normal", "heavy"])
    def test_active_channels_are_left_alone(self, shape):
        x = self.inputs(shape)
        model = nn.ModuleDict({"norm": norm_of([-0.3, 0.5, 2.5, 0.9] * 4, [0.2, -0.2, 0.0, 0.1] * 4)})
        activity = self.measured(model, x)
        before = snapshot(model)
        threshold = activity["norm"].mean_abs.min().item()
        nudge_scales(model, target(range(self.SIZE)), NudgeConfig("adaptive"), activity=activity, threshold=threshold)
        assert torch.equal(model["norm"].weight, before["norm.weight"])

    def test_out_of_reach_it_stops_at_the_cap(self):
        config = NudgeConfig("adaptive", gamma_max=0.5)
        weight, _, _, now = self.run([0.1] * self.SIZE, [0.0] * self.SIZE, 0.9, self.inputs(), config)
        assert torch.equal(weight, torch.full((self.SIZE,), 0.5))
        assert (now < 0.9).all()

    def test_it_never_lowers_a_scale(self):
        config = NudgeConfig("adaptive", gamma_max=0.5)
        weight, log, *_ = self.run([0.75] * self.SIZE, [0.0] * self.SIZE, 0.9, self.inputs(), config)
        assert len(log) == self.SIZE
        assert torch.equal(weight, torch.full((self.SIZE,), 0.75))

    def test_a_channel_with_a_constant_input_is_not_sent_to_the_cap(self):
        x = torch.zeros(4, self.SIZE, 8, 8)
        weight, _, _, now = self.run([0.01] * self.SIZE, [0.02] * self.SIZE, 0.1, x)
        assert (now < 0.1).all()
        assert (weight < 0.2).all()

    @pytest.mark.parametrize("missing", [{"threshold": 0.1}, {"activity": {"norm": activity_of(SCALES)}}, {}])
    def test_without_activity_or_threshold_it_is_refused(self, missing):
        model = nn.ModuleDict({"norm": norm_of(SCALES)})
        with pytest.raises(ValueError, match="strategy: adaptive needs"):
            nudge_scales(model, target(TOUCHED), NudgeConfig("adaptive"), **missing)


class TestMoments:
    def trained(self, optimizer_class=torch.optim.AdamW, **options):
        torch.manual_seed(0)
        model = nn.ModuleDict({"norm": norm_of(SCALES), "conv": nn.Conv1d(8, 8, 1)})
        optimizer = optimizer_class(model.parameters(), lr=1e-3, **options)
        for _ in range(3):
            optimizer.zero_grad()
            model["conv"](model["norm"](torch.randn(4, 8, 6))).square().sum().backward()
            optimizer.step()
        return model, optimizer

    def moments(self, model, optimizer):
        return {
            (name, key): value.clone()
            for name, parameter in model.named_parameters()
            for key, value in optimizer.state[parameter].items()
        }

    def test_keep_leaves_all_of_them(self):
        model, optimizer = self.trained()
        before = self.moments(model, optimizer)
        nudge_scales(model, target(TOUCHED), NudgeConfig(moments="keep"), optimizer=optimizer)
        now = self.moments(model, optimizer)
        assert before.keys() == now.keys()
        assert all(torch.equal(value, before[key]) for key, value in now.items())

    def test_reset_zeroes_those_of_the_touched_entries_only(self):
        model, optimizer = self.trained()
        before = self.moments(model, optimizer)
        assert all((before["norm.weight", key] != 0).all() for key in ("exp_avg", "exp_avg_sq"))
        nudge_scales(model, target(TOUCHED), NudgeConfig(moments="reset"), optimizer=optimizer)
        for (name, key), value in self.moments(model, optimizer).items():
            wanted = before[name, key]
            if name == "norm.weight" and key in ("exp_avg", "exp_avg_sq"):
                wanted[list(TOUCHED)] = 0
            assert torch.equal(value, wanted), (name, key)

    def test_reset_of_an_optimizer_before_its_first_step(self):
        model = nn.ModuleDict({"norm": norm_of(SCALES)})
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        nudge_scales(model, target(TOUCHED), NudgeConfig(moments="reset"), optimizer=optimizer)
        model["norm"](torch.randn(4, 8, 6)).square().sum().backward()
        optimizer.step()
        assert (optimizer.state[model["norm"].weight]["exp_avg"] != 0).all()

    def test_reset_where_there_are_no_moments(self):
        model, optimizer = self.trained(torch.optim.SGD)
        assert len(nudge_scales(model, target(TOUCHED), NudgeConfig(moments="reset"), optimizer=optimizer)) == 6


class TestRandomActive:
    ACTIVITY = {"a": activity_of([0.01 * i for i in range(40)]), "b": activity_of([1.0] * 10)}
    SUPPRESSED = {**target((0, 1, 2, 3, 7), "a"), **target((9,), "b")}

    def test_as_many_in_each_layer_and_none_that_is_suppressed(self):
        seen = set()
        for seed in range(60):
            drawn = random_active_channels(self.ACTIVITY, self.SUPPRESSED, np.random.default_rng(seed))
            assert list(drawn) == ["a", "b"]
            for layer, one in drawn.items():
                assert len(set(one.indices)) == len(one.indices) == len(self.SUPPRESSED[layer].indices)
                assert not set(one.indices) & set(self.SUPPRESSED[layer].indices)
                assert (one.layer, one.parameter) == (layer, f"{layer}.weight")
            seen |= set(drawn["a"].indices)
        assert seen == set(range(40)) - set(self.SUPPRESSED["a"].indices)

    def test_values_are_those_of_the_drawn_channels(self):
        drawn = random_active_channels(self.ACTIVITY, self.SUPPRESSED, np.random.default_rng(0))["a"]
        np.testing.assert_allclose(drawn.values, [0.01 * i for i in drawn.indices], rtol=1e-6)

    def test_the_generator_decides(self):
        drawn = [
            random_active_channels(self.ACTIVITY, self.SUPPRESSED, np.random.default_rng(seed)) for seed in (3, 3, 4)
        ]
        assert drawn[0] == drawn[1]
        assert drawn[0] != drawn[2]

    def test_a_layer_with_too_few_gives_all_it_has(self):
        activity = {"a": activity_of([0.0, 0.0, 0.0, 5.0]), "b": activity_of([0.0, 0.0])}
        suppressed = {**target((0, 1, 2), "a"), **target((0, 1), "b")}
        drawn = random_active_channels(activity, suppressed, np.random.default_rng(0))
        assert {layer: one.indices for layer, one in drawn.items()} == {"a": (3,)}

    def test_what_a_layer_lacks_is_drawn_from_the_others(self):
        activity = {"a": activity_of([0.0, 0.0, 0.0, 5.0]), "b": activity_of([5.0] * 3), "c": activity_of([5.0] * 3)}
        suppressed = target((0, 1, 2), "a")
        drawn = [random_active_channels(activity, suppressed, np.random.default_rng(seed)) for seed in range(8)]
        assert all(one["a"].indices == (3,) and one["a"].parameter == "a.weight" for one in drawn)
        assert all(sum(len(layer.indices) for layer in one.values()) == 3 for one in drawn)
        assert {layer for one in drawn for layer in one} == {"a", "b", "c"}

    def test_nothing_suppressed_nothing_drawn(self):
        assert random_active_channels(self.ACTIVITY, {}, np.random.default_rng(0)) == {}

    def test_the_nudge_takes_them(self):
        model = nn.ModuleDict({"b": norm_of([0.5] * 10)})
        drawn = random_active_channels(self.ACTIVITY, target((9,), "b"), np.random.default_rng(0))
        (done,) = nudge_scales(model, drawn, NudgeConfig("multiply", nudge_factor=1.5))
        assert done == Intervention("b", drawn["b"].indices[0], 0.5, 0.75)
        assert model["b"].weight[9] == 0.5


class TestConfig:
    @pytest.mark.parametrize(
        ("parameter", "value"),
        [
            ("strategy", "multipy"),
            ("moments", "forget"),
            ("nudge_factor", 0.9),
            ("nudge_factor", float("nan")),
            ("nudge_amount", -0.01),
            ("gamma_max", 0.0),
            ("gamma_max", -1.0),
            ("gamma_floor", -1e-3),
            ("interval", 0),
            ("interval", -200),
        ],
    )
    def test_nonsense_is_refused_naming_the_parameter(self, parameter, value):
        with pytest.raises(ValueError, match=f"^{parameter}: "):
            NudgeConfig(**{parameter: value})

    def test_an_unknown_strategy_lists_the_nearest(self):
        with pytest.raises(ValueError, match=r"multipy.*: multiply"):
            NudgeConfig("multipy")

    def test_the_default_is_the_papers(self):
        config = NudgeConfig()
        assert (config.strategy, config.nudge_factor, config.gamma_max, config.moments) == (
            "multiply",
            1.1,
            2.0,
            "keep",
        )
