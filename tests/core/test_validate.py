import pytest

from vaelab.core import validate

LAYERS = ["encoder.conv_in", "encoder.conv_out", "decoder.conv_in", "quant_conv"]


class TestNames:
    def test_the_nearest_come_best_first(self):
        assert validate.nearest("encoder.conv_im", LAYERS)[0] == "encoder.conv_in"

    def test_no_more_than_asked_for(self):
        assert len(validate.nearest("conv", [f"conv{i}" for i in range(30)], count=3)) == 3

    def test_where_nothing_is_near_the_first_in_order_are_given(self):
        assert validate.nearest("zzz", ["b", "a", "c"], count=2) == ["a", "b"]

    def test_repeated_choices_are_named_once(self):
        assert validate.nearest("conv", ["conv", "conv"]) == ["conv"]

    def test_unknown_says_parameter_name_and_neighbours(self):
        error = validate.unknown("layers", "encoder.conv_im", LAYERS)
        assert isinstance(error, ValueError)
        assert str(error).startswith("layers: unknown name 'encoder.conv_im'; the nearest of 4: encoder.conv_in, ")

    def test_unknown_where_nothing_exists(self):
        assert str(validate.unknown("dataset", "photos", iter(()))).endswith("the nearest of 0: none at all")

    def test_unknown_of_what_is_no_name(self):
        assert "unknown name 3" in str(validate.unknown("layers", 3, LAYERS))

    def test_one_of_accepts_a_choice_and_refuses_another(self):
        validate.one_of("side", "input", iter(("input", "output")))
        with pytest.raises(ValueError, match="side: unknown name 'inputs'; the nearest of 2: input, output"):
            validate.one_of("side", "inputs", ("input", "output"))


class TestAtLeast:
    @pytest.mark.parametrize("value", [2, 2.0, 2.5, float("inf")])
    def test_the_minimum_and_above_pass(self, value):
        validate.at_least("interval", value, 2)

    @pytest.mark.parametrize("value", [1.999, -3, float("nan"), float("-inf")])
    def test_below_and_nan_are_refused(self, value):
        with pytest.raises(ValueError, match=f"interval: must be at least 2, got {value}"):
            validate.at_least("interval", value, 2)

    @pytest.mark.parametrize("value", [0, float("nan")])
    def test_an_exclusive_minimum_is_refused_itself(self, value):
        with pytest.raises(ValueError, match="gamma_max: must be above 0"):
            validate.at_least("gamma_max", value, 0, exclusive=True)

    def test_above_an_exclusive_minimum_passes(self):
        validate.at_least("gamma_max", 1e-9, 0, exclusive=True)
