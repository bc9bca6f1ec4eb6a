import re
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

import vaelab
from vaelab.hooks import capture, edit, find_layers, on_gradient, unwrap


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


class Giving(nn.Module):
    """Gives whatever ``form`` makes of its input."""

    def __init__(self, form):
        super().__init__()
        self.form = form

    def forward(self, x):
        return self.form(x)


class Outer(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def pictures(count=2):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def hook_count(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def doubled(tensor):
    return tensor * 2


def test_only_hooks_registers_hooks():
    package = Path(vaelab.__file__).parent
    registering = [
        path.name for path in package.rglob("*.py") if re.search(r"register_forward|register\w*_hook", path.read_text())
    ]
    assert registering == ["hooks.py"]


class TestFindLayers:
    def test_a_path_names_one_layer(self, tiny_vae):
        assert find_layers(tiny_vae, "encoder.conv_in") == {"encoder.conv_in": tiny_vae.encoder.conv_in}

    def test_a_glob_names_all_that_match_in_the_models_order(self, tiny_vae):
        expected = [name for name, _ in tiny_vae.named_modules() if re.fullmatch(r"decoder\..*\.norm1", name)]
        assert list(find_layers(tiny_vae, "decoder.*.norm1")) == expected
        assert len(expected) == 6

    def test_several_patterns_are_joined_without_repetition(self, tiny_vae):
        found = find_layers(tiny_vae, ["decoder.conv_in", "encoder.conv_*", "encoder.conv_in"])
        names = ["conv_in", "conv_norm_out", "conv_act", "conv_out"]
        assert list(found) == [*(f"encoder.{name}" for name in names), "decoder.conv_in"]

    def test_an_unknown_path_lists_the_nearest(self, tiny_vae):
        with pytest.raises(ValueError, match=r"layers: unknown name 'encoder.conv_im'.*: encoder\.conv_in,"):
            find_layers(tiny_vae, "encoder.conv_im")

    def test_one_unknown_among_known_is_refused(self, tiny_vae):
        with pytest.raises(ValueError, match=r"unknown name 'encoder\.\*\.norm9'"):
            find_layers(tiny_vae, ["encoder.conv_in", "encoder.*.norm9"])

    def test_asking_for_none_is_refused(self, tiny_vae):
        with pytest.raises(ValueError, match="layers: none given"):
            find_layers(tiny_vae, [])

    def test_wrappers_are_looked_through(self, tiny_vae):
        compiled = torch.compile(tiny_vae, backend="eager")
        for wrapped in (nn.DataParallel(tiny_vae), compiled, torch.compile(nn.DataParallel(tiny_vae), backend="eager")):
            assert unwrap(wrapped) is tiny_vae
            assert list(find_layers(wrapped, "*.conv_in")) == ["encoder.conv_in", "decoder.conv_in"]


class TestCapture:
    def test_output_and_input_are_what_flows_between_the_layers(self):
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        x = torch.randn(5, 3)
        with capture(model, "*") as outputs, capture(model, "*", side="input") as inputs:
            y = model(x)
        assert torch.equal(inputs["0"][0], x)
        assert torch.equal(outputs["0"][0], model[0](x))
        assert torch.equal(inputs["1"][0], outputs["0"][0])
        assert torch.equal(outputs["2"][0], y)

    def test_nothing_changes_by_watching(self, tiny_vae):
        before = tiny_vae(pictures()).sample
        with capture(tiny_vae, "*norm*"), capture(tiny_vae, "*conv*", side="input"):
            watched = tiny_vae(pictures()).sample
        assert torch.equal(watched, before)

    def test_input_given_by_keyword(self, tiny_vae):
        x = torch.randn(1, 8, 16, 16)
        with capture(tiny_vae, "encoder.conv_norm_out", side="input") as seen:
            tiny_vae.encoder.conv_norm_out(input=x.repeat(1, 2, 1, 1))
        assert torch.equal(seen["encoder.conv_norm_out"][0], x.repeat(1, 2, 1, 1))

    @pytest.mark.parametrize(
        "form",
        [
            lambda x: (x, x + 1),
            lambda x: [None, x],
            lambda x: {"label": "a", "value": x},
            lambda x: Pair(x, x + 1),
        ],
        ids=["tuple", "list", "dict", "namedtuple"],
    )
    def test_the_first_tensor_of_a_composite_output(self, form):
        model = nn.Sequential(Giving(form))
        x = torch.randn(2)
        with capture(model, "0") as seen:
            model(x)
        assert torch.equal(seen["0"][0], x)

    def test_the_first_tensor_of_a_diffusers_output(self, tiny_vae):
        with capture(Outer(tiny_vae), "inner") as seen:
            sample = tiny_vae(pictures()).sample
        assert torch.equal(seen["inner"][0], sample)

    def test_an_output_without_a_tensor_is_an_error(self):
        model = nn.Sequential(Giving(lambda x: ("a", None)))
        with pytest.raises(RuntimeError, match="0 returned a tuple with no tensor"), capture(model, "0"):
            model(torch.ones(1))
        assert hook_count(model) == 0

    def test_every_call_of_a_layer_is_kept_in_order(self):
        shared = nn.Tanh()
        model = nn.Sequential(shared, nn.Linear(2, 2), shared)
        x = torch.randn(3, 2)
        with capture(model, "0") as seen:
            model(x)
            model(x + 1)
        expected = [torch.tanh(x), model(x), torch.tanh(x + 1), model(x + 1)]
        assert len(seen["0"]) == 4
        assert all(torch.equal(one, other) for one, other in zip(seen["0"], expected, strict=True))

    def test_reduce_sees_the_tensor_without_gradient_and_its_result_is_kept(self, tiny_vae):
        states = []

        def reduce(tensor):
            states.append((torch.is_grad_enabled(), tensor.requires_grad))
            return tensor.mean(), tensor.shape

        with capture(tiny_vae, "decoder.conv_out", reduce=reduce) as seen:
            sample = tiny_vae(pictures()).sample
        assert states == [(False, False)]
        assert seen["decoder.conv_out"] == [(sample.mean(), sample.shape)]
        sample.mean().backward()
        assert tiny_vae.encoder.conv_in.weight.grad.abs().sum() > 0

    def test_without_grad_the_graph_is_dropped(self, tiny_vae):
        with capture(tiny_vae, "decoder.conv_in") as seen:
            tiny_vae(pictures())
        assert not seen["decoder.conv_in"][0].requires_grad

    def test_with_grad_the_graph_is_kept(self, tiny_vae):
        with capture(tiny_vae, "decoder.conv_in", grad=True) as seen:
            tiny_vae(pictures())
        seen["decoder.conv_in"][0].sum().backward()
        assert tiny_vae.encoder.conv_in.weight.grad.abs().sum() > 0
        assert tiny_vae.decoder.conv_out.weight.grad is None

    def test_grad_and_reduce_contradict(self, tiny_vae):
        with (
            pytest.raises(ValueError, match="grad"),
            capture(tiny_vae, "encoder.conv_in", grad=True, reduce=torch.mean),
        ):
            pass

    def test_nothing_is_copied_or_moved_unless_asked(self):
        given = []
        model = nn.Sequential(Giving(lambda x: given.append(x + 1) or given[-1]))
        with capture(model, "0") as here, capture(model, "0", to="meta") as elsewhere:
            model(torch.ones(3))
        assert here["0"][0].data_ptr() == given[0].data_ptr()
        assert here["0"][0].device == given[0].device
        assert elsewhere["0"][0].device.type == "meta"

    def test_what_is_reduced_is_moved_too(self):
        model = nn.Sequential(nn.Identity())
        with capture(model, "0", reduce=torch.sum, to="meta") as seen:
            model(torch.ones(3))
        assert seen["0"][0].device.type == "meta"

    def test_an_activation_dies_once_reduced(self):
        storages = []
        model = nn.Sequential(Giving(lambda x: noted(x + 1, storages)), nn.Tanh())
        with capture(model, "0", reduce=torch.sum), torch.no_grad():
            model(torch.ones(3))
            assert storages[0]() is None

    def test_an_activation_lives_as_long_as_what_captured_it(self):
        storages = []
        model = nn.Sequential(Giving(lambda x: noted(x + 1, storages)), nn.Tanh())
        with capture(model, "0") as seen, torch.no_grad():
            model(torch.ones(3))
        assert storages[0]() is not None
        del seen
        assert storages[0]() is None

    def test_clear_forgets_and_goes_on_watching(self):
        storages = []
        model = nn.Sequential(Giving(lambda x: noted(x + 1, storages)))
        with capture(model, "0") as seen:
            model(torch.ones(3))
            seen.clear()
            assert storages[0]() is None
            assert seen["0"] == []
            model(torch.zeros(3))
        assert torch.equal(seen["0"][0], torch.ones(3))
        assert len(seen["0"]) == 1

    def test_captured_is_a_mapping_in_the_models_order(self, tiny_vae):
        with capture(tiny_vae, ["decoder.conv_in", "encoder.conv_in"]) as seen:
            tiny_vae(pictures())
        assert isinstance(seen, Mapping)
        assert list(seen) == ["encoder.conv_in", "decoder.conv_in"]
        assert len(seen) == 2
        assert "encoder.conv_in" in seen
        assert "encoder.conv_out" not in seen
        with pytest.raises(KeyError, match=r"nearest.*encoder\.conv_in"):
            seen["encoder.conv_im"]

    def test_a_layer_that_never_ran_is_an_error_naming_it(self, tiny_vae):
        with (
            pytest.raises(RuntimeError, match=r"layers: decoder\.conv_in, decoder\.conv_out never ran"),
            capture(tiny_vae, ["encoder.conv_in", "decoder.conv_in", "decoder.conv_out"]),
        ):
            tiny_vae.encode(pictures())
        assert hook_count(tiny_vae) == 0

    def test_clearing_does_not_make_a_layer_count_as_silent(self, tiny_vae):
        with capture(tiny_vae, "encoder.conv_in") as seen:
            tiny_vae.encode(pictures())
            seen.clear()
        assert seen["encoder.conv_in"] == []

    @pytest.mark.parametrize("side", ["input", "output"])
    def test_hooks_are_there_inside_and_gone_after(self, tiny_vae, side):
        with capture(tiny_vae, "*.conv_in", side=side):
            assert hook_count(tiny_vae) == 2
            tiny_vae(pictures())
        assert hook_count(tiny_vae) == 0

    def test_hooks_are_gone_after_an_exception_and_it_comes_through(self, tiny_vae):
        with pytest.raises(KeyError, match="mine"), capture(tiny_vae, "*norm*"):
            raise KeyError("mine")
        assert hook_count(tiny_vae) == 0

    def test_hooks_are_gone_after_reduce_raised(self, tiny_vae):
        def reduce(tensor):
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError), capture(tiny_vae, "*norm*", reduce=reduce):
            tiny_vae(pictures())
        assert hook_count(tiny_vae) == 0

    def test_an_unknown_side_lists_the_sides(self, tiny_vae):
        with (
            pytest.raises(ValueError, match=r"side: unknown name 'outputs'.*output"),
            capture(tiny_vae, "*", side="outputs"),
        ):
            pass


class TestEdit:
    def test_identity_is_bit_for_bit_the_same(self, tiny_vae):
        before = tiny_vae(pictures()).sample
        with edit(tiny_vae, {"*norm*": lambda h: h}), edit(tiny_vae, {"*conv*": lambda h: h.clone()}, side="input"):
            after = tiny_vae(pictures()).sample
        assert torch.equal(before, after)

    @pytest.mark.parametrize("side", ["input", "output"])
    def test_the_replacement_is_what_flows_on(self, side):
        model = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
        x = torch.randn(3, 2)
        with edit(model, {"1": doubled}, side=side):
            y = model(x)
        assert torch.equal(y, torch.tanh(2 * model[0](x)) if side == "input" else 2 * torch.tanh(model[0](x)))

    def test_input_given_by_keyword_keeps_the_other_arguments(self):
        inner = nn.Module()
        inner.forward = lambda *, scale, hidden, mask: (scale, hidden, mask)
        mask = torch.zeros(2)
        with edit(Outer(inner), {"inner": doubled}, side="input"):
            scale, hidden, kept = inner(scale=3, hidden=torch.ones(2), mask=mask)
        assert scale == 3
        assert torch.equal(hidden, torch.full((2,), 2.0))
        assert kept is mask

    def test_positional_inputs_keep_the_others(self):
        inner = nn.Module()
        inner.forward = lambda flag, hidden, other=None: (flag, hidden, other)
        with edit(Outer(inner), {"inner": doubled}, side="input"):
            flag, hidden, other = inner("a", torch.ones(2), other=torch.ones(1))
        assert (flag, other) == ("a", torch.ones(1))
        assert torch.equal(hidden, torch.full((2,), 2.0))

    @pytest.mark.parametrize("side", ["input", "update"])
    def test_the_input_is_the_layers_first_parameter_in_whatever_order_keywords_are_given(self, side):
        inner = nn.Module()
        inner.forward = lambda hidden, context=None: hidden * 3 + 0 * context
        hidden, context = torch.ones(2), torch.full((2,), 7.0)
        with capture(Outer(inner), "inner", side=side) as seen:
            inner(context=context, hidden=hidden)
        assert torch.equal(seen["inner"][0], hidden if side == "input" else 2 * hidden)
        with edit(Outer(inner), {"inner": torch.zeros_like}, side=side):
            edited = inner(context=context, hidden=hidden)
        assert torch.equal(edited, torch.zeros(2) if side == "input" else hidden)

    @pytest.mark.parametrize("kind", [tuple, list])
    def test_a_sequence_keeps_its_type_and_other_entries(self, kind):
        other = torch.ones(1)
        model = nn.Sequential(Giving(lambda x: kind([None, x, other])))
        with edit(model, {"0": doubled}):
            y = model(torch.ones(2))
        assert type(y) is kind
        assert y[0] is None
        assert torch.equal(y[1], torch.full((2,), 2.0))
        assert y[2] is other

    def test_a_namedtuple_keeps_its_type_and_other_entries(self):
        other = torch.ones(1)
        model = nn.Sequential(Giving(lambda x: Pair(x, other)))
        with edit(model, {"0": doubled}):
            y = model(torch.ones(2))
        assert type(y) is Pair
        assert torch.equal(y.first, torch.full((2,), 2.0))
        assert y.second is other

    def test_a_diffusers_output_keeps_its_type(self, tiny_vae):
        model = Outer(tiny_vae)
        before = model(pictures())
        with edit(model, {"inner": doubled}):
            after = model(pictures())
        assert type(after) is type(before)
        assert torch.equal(after.sample, 2 * before.sample)
        assert torch.equal(after[0], after["sample"])

    def test_a_model_output_keeps_other_entries_empty_ones_included(self):
        from diffusers.utils import BaseOutput

        @dataclass
        class Output(BaseOutput):
            sample: torch.Tensor
            extra: torch.Tensor | None
            other: torch.Tensor | None = None

        other = torch.ones(1)
        model = nn.Sequential(Giving(lambda x: Output(sample=x, extra=None, other=other)))
        with edit(model, {"0": doubled}):
            y = model(torch.ones(2))
        assert type(y) is Output
        assert torch.equal(y.sample, torch.full((2,), 2.0))
        assert y.extra is None
        assert y.other is other

    def test_a_models_own_output_object_is_left_alone(self):
        mine = {"value": torch.ones(2)}
        model = nn.Sequential(Giving(lambda x: mine))
        with edit(model, {"0": doubled}):
            model(torch.ones(2))
        assert torch.equal(mine["value"], torch.ones(2))

    @pytest.mark.parametrize("side", ["input", "output"])
    def test_two_edits_of_a_layer_apply_in_the_order_given(self, side):
        model = nn.Sequential(nn.Identity())
        x = torch.ones(2)
        with edit(model, {"0": doubled, "*": lambda h: h + 1}, side=side):
            assert torch.equal(model(x), x * 2 + 1)
        with edit(model, {"*": lambda h: h + 1, "0": doubled}, side=side):
            assert torch.equal(model(x), (x + 1) * 2)

    def test_every_call_of_a_layer_is_edited(self):
        shared = nn.Identity()
        with edit(nn.Sequential(shared, shared), {"0": doubled}):
            assert torch.equal(nn.Sequential(shared, shared)(torch.ones(1)), torch.full((1,), 4.0))

    def test_gradients_flow_through_an_edit(self, tiny_vae):
        with edit(tiny_vae, {"decoder.conv_in": doubled}):
            tiny_vae(pictures()).sample.mean().backward()
        assert tiny_vae.encoder.conv_in.weight.grad.abs().sum() > 0

    def test_what_is_no_tensor_is_refused(self, tiny_vae):
        with (
            pytest.raises(TypeError, match=r"decoder\.conv_in returned NoneType"),
            edit(tiny_vae, {"decoder.conv_in": lambda h: None}),
        ):
            tiny_vae(pictures())
        assert hook_count(tiny_vae) == 0

    @pytest.mark.parametrize("side", ["input", "output"])
    def test_hooks_are_gone_after_the_edit_raised_and_the_next_call_is_as_before(self, tiny_vae, side):
        def broken(tensor):
            raise ZeroDivisionError

        before = tiny_vae(pictures()).sample
        with (
            pytest.raises(ZeroDivisionError),
            edit(tiny_vae, {"decoder.conv_in": broken, "decoder.conv_out": doubled}, side=side),
        ):
            tiny_vae(pictures())
        assert hook_count(tiny_vae) == 0
        assert torch.equal(tiny_vae(pictures()).sample, before)

    def test_hooks_are_gone_after_an_exception_in_the_block(self, tiny_vae):
        with pytest.raises(KeyError, match="mine"), edit(tiny_vae, {"*norm*": doubled}):
            raise KeyError("mine")
        assert hook_count(tiny_vae) == 0

    def test_one_unknown_layer_leaves_no_hook(self, tiny_vae):
        with (
            pytest.raises(ValueError, match="layers: unknown name 'nowhere'"),
            edit(tiny_vae, {"decoder.conv_in": doubled, "nowhere": doubled}),
        ):
            pass
        assert hook_count(tiny_vae) == 0

    def test_a_layer_that_never_ran_is_an_error_naming_it(self, tiny_vae):
        with (
            pytest.raises(RuntimeError, match=r"layers: decoder\.conv_in never ran inside `edit`"),
            edit(tiny_vae, {"decoder.conv_in": doubled, "encoder.conv_in": doubled}),
        ):
            tiny_vae.encode(pictures())

    def test_an_activation_dies_after_its_edit(self):
        storages = []
        model = nn.Sequential(Giving(lambda x: noted(x + 1, storages)))
        with edit(model, {"0": doubled}), torch.no_grad():
            model(torch.ones(3))
            assert storages[0]() is None


def rounding(dtype):
    """A layer whose update, added to its input again, is not its output, and an input of it."""
    model = nn.Sequential(Giving(lambda x: (x.double() * 1.3 + torch.sin(x.double() * 99) / 7).to(x.dtype)))
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = model(x)
    assert not torch.equal(x + (y - x), y)
    return model, x, y


class TestUpdate:
    def test_what_is_captured_is_output_minus_input(self, tiny_vae):
        layers = ["decoder.mid_block.resnets.?", "decoder.conv_norm_out"]
        with (
            capture(tiny_vae, layers, side="update") as updates,
            capture(tiny_vae, layers, side="input") as inputs,
            capture(tiny_vae, layers) as outputs,
        ):
            tiny_vae(pictures())
        assert len(updates) == 3
        for layer, (update,) in updates.items():
            assert torch.equal(update, outputs[layer][0] - inputs[layer][0])

    def test_input_and_output_together_are_captured_and_give_a_new_output(self, tiny_vae):
        layer = "decoder.mid_block.resnets.0"
        with capture(tiny_vae, layer, side="input_output") as both, capture(tiny_vae, layer, side="input") as inputs:
            tiny_vae(pictures())
        with capture(tiny_vae, layer) as outputs:
            tiny_vae(pictures())
        assert torch.equal(both[layer][0], torch.cat([inputs[layer][0], outputs[layer][0]], 1))
        with (
            edit(tiny_vae, {layer: lambda pair: pair.chunk(2, 1)[0] + 1}, side="input_output"),
            capture(tiny_vae, "decoder.mid_block.attentions.0", side="input") as after,
        ):
            tiny_vae(pictures())
        assert torch.equal(after["decoder.mid_block.attentions.0"][0], inputs[layer][0] + 1)
        tokens = nn.Sequential(Giving(lambda x: 2 * x))
        with capture(tokens, "0", side="input_output") as seen:
            tokens(torch.ones(1, 3, 4))
        assert seen["0"][0].tolist() == [[[1.0] * 4 + [2.0] * 4] * 3]
        wrong = edit(tokens, {"0": lambda pair: pair}, side="input_output")
        with (
            pytest.raises(RuntimeError, match=r"layers: the output of 0 has shape \(1, 3, 4\), not \(1, 3, 8\)"),
            wrong,
        ):
            tokens(torch.ones(1, 3, 4))

    def test_watching_it_changes_nothing(self):
        model, x, y = rounding(torch.bfloat16)
        with capture(model, "0", side="update") as seen:
            assert torch.equal(model(x), y)
        assert torch.equal(seen["0"][0], y - x)

    def test_of_an_input_given_by_keyword_and_a_composite_output(self):
        inner = nn.Module()
        inner.forward = lambda *, scale, hidden: ("a", hidden * 3, hidden)
        with capture(Outer(inner), "inner", side="update") as seen:
            inner(scale=2, hidden=torch.ones(2))
        assert torch.equal(seen["inner"][0], torch.full((2,), 2.0))
        with edit(Outer(inner), {"inner": doubled}, side="update"):
            name, edited, kept = inner(scale=2, hidden=torch.ones(2))
        assert name == "a"
        assert torch.equal(edited, torch.full((2,), 5.0))
        assert torch.equal(kept, torch.ones(2))

    def test_of_the_first_of_several_inputs(self):
        inner = nn.Module()
        inner.forward = lambda flag, hidden, other: hidden + other
        with capture(Outer(inner), "inner", side="update") as seen:
            inner("a", torch.ones(2), torch.full((2,), 4.0))
        assert torch.equal(seen["inner"][0], torch.full((2,), 4.0))

    def test_it_is_reduced_and_keeps_its_graph_like_any_other(self):
        model = nn.Sequential(nn.Linear(2, 2))
        x = torch.randn(3, 2)
        with capture(model, "0", side="update", reduce=torch.sum) as sums, capture(model, "0", side="update") as plain:
            model(x)
        assert torch.equal(sums["0"][0], plain["0"][0].sum())
        with capture(model, "0", side="update", grad=True) as seen:
            model(x)
        seen["0"][0].sum().backward()
        assert torch.allclose(model[0].bias.grad, torch.full((2,), 3.0))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("same", [lambda u: u, lambda u: u.clone(), lambda u: u * 1, lambda u: u / 1 + 0])
    def test_identity_is_bit_for_bit_the_same(self, same, dtype):
        model, x, y = rounding(dtype)
        with edit(model, {"0": same}, side="update"):
            assert torch.equal(model(x), y)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("zero", [torch.zeros_like, lambda u: u * 0])
    def test_zero_is_exactly_the_input(self, zero, dtype):
        model, x, _ = rounding(dtype)
        with edit(model, {"0": zero}, side="update"):
            assert torch.equal(model(x), x)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_what_is_not_edited_is_bit_for_bit_the_same(self, dtype):
        def first_hundred_doubled(update):
            update = update.clone()
            update[:100] *= 2
            return update

        model, x, y = rounding(dtype)
        with edit(model, {"0": first_hundred_doubled}, side="update"):
            edited = model(x)
        assert edited.dtype == dtype
        assert torch.equal(edited[100:], y[100:])
        assert torch.equal(edited[:100], (x + 2 * (y - x))[:100])

    def test_two_edits_of_a_layer_apply_in_the_order_given(self):
        model = nn.Sequential(Giving(lambda x: x + 3))
        with edit(model, {"0": doubled, "*": lambda u: u + 1}, side="update"):
            assert model(torch.ones(1)) == 1 + (3 * 2 + 1)
        with edit(model, {"*": lambda u: u + 1, "0": doubled}, side="update"):
            assert model(torch.ones(1)) == 1 + (3 + 1) * 2

    def test_gradients_flow_through_what_is_edited_and_what_is_not(self):
        model = nn.Sequential(nn.Linear(2, 2, bias=False))
        x = torch.ones(1, 2, requires_grad=True)
        with edit(model, {"0": lambda u: u * torch.tensor([1.0, 2.0])}, side="update"):
            model(x).sum().backward()
        assert torch.allclose(model[0].weight.grad, torch.tensor([[1.0, 1.0], [2.0, 2.0]]))
        weight = model[0].weight.detach()
        assert torch.allclose(x.grad, weight[0] + 2 * weight[1] - torch.tensor([0.0, 1.0]))

    def test_a_gate_that_is_open_has_a_gradient(self):
        gate = torch.ones(2, requires_grad=True)
        model = nn.Sequential(Giving(lambda x: x + 3))
        with edit(model, {"0": lambda u: u * gate}, side="update"):
            model(torch.ones(2)).sum().backward()
        assert torch.equal(gate.grad, torch.full((2,), 3.0))

    def test_in_mixed_precision_the_output_keeps_its_own(self):
        model = nn.Sequential(nn.Linear(8, 8))
        x = torch.randn(4, 8)
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
            with edit(model, {"0": lambda u: u * 1}, side="update"):
                edited = model(x)
        assert edited.dtype == y.dtype
        assert torch.equal(edited, y)

    def test_a_layer_that_changes_the_shape_is_refused_by_its_name(self, tiny_vae):
        message = r"layers: decoder\.conv_in takes \(2, 4, 8, 8\) in and gives \(2, 16, 8, 8\) out"
        with pytest.raises(RuntimeError, match=message), capture(tiny_vae, "decoder.conv_in", side="update"):
            tiny_vae(pictures())
        with pytest.raises(RuntimeError, match=message), edit(tiny_vae, {"decoder.conv_in": doubled}, side="update"):
            tiny_vae(pictures())
        assert hook_count(tiny_vae) == 0

    def test_a_shape_that_would_broadcast_is_refused_too(self):
        model = nn.Sequential(Giving(lambda x: x.mean(0, keepdim=True)))
        with pytest.raises(RuntimeError, match="layers: 0 takes"), capture(model, "0", side="update"):
            model(torch.ones(3, 2))

    def test_hooks_are_there_inside_and_gone_after(self, tiny_vae):
        layer = "decoder.conv_norm_out"
        with capture(tiny_vae, layer, side="update"), edit(tiny_vae, {layer: doubled}, side="update"):
            assert hook_count(tiny_vae) == 2
            tiny_vae(pictures())
        assert hook_count(tiny_vae) == 0


class TestCalls:
    def test_only_these_calls_are_kept(self):
        model = nn.Sequential(nn.Identity())
        with capture(model, "0", calls=(3, 1)) as seen:
            for call in range(5):
                model(torch.tensor(call))
        assert seen["0"] == [1, 3]

    def test_each_layer_counts_its_own_calls(self):
        shared, last = nn.Tanh(), nn.Sigmoid()
        model = nn.Sequential(shared, shared, last)
        x = torch.randn(3)
        with capture(model, "*", calls={1}) as seen:
            model(x)
            model(x + 1)
        assert torch.equal(seen["0"][0], torch.tanh(torch.tanh(x)))
        assert torch.equal(seen["2"][0], model(x + 1))
        assert {layer: len(kept) for layer, kept in seen.items()} == {"0": 1, "2": 1}

    def test_calls_that_are_not_kept_are_not_reduced(self):
        reduced = []
        model = nn.Sequential(nn.Identity())
        with capture(model, "0", calls=[2], reduce=reduced.append):
            for call in range(4):
                model(torch.tensor(call))
        assert reduced == [2]

    def test_clearing_does_not_begin_to_count_anew(self):
        model = nn.Sequential(nn.Identity())
        with capture(model, "0", calls=[0, 2]) as seen:
            for call in range(3):
                model(torch.tensor(call))
                if call == 0:
                    seen.clear()
        assert seen["0"] == [2]

    def test_not_run_often_enough_is_an_error_naming_the_layer(self):
        shared = nn.Tanh()
        model = nn.Sequential(shared, nn.Sigmoid(), shared)
        with (
            pytest.raises(RuntimeError, match="layers: 1 never ran 2 times inside `capture`"),
            capture(model, "*", calls=[0, 1]),
        ):
            model(torch.ones(1))
        assert hook_count(model) == 0

    @pytest.mark.parametrize("calls", [[], [-1], [0, -2]])
    def test_no_call_and_calls_before_the_first_are_refused(self, calls):
        with pytest.raises(ValueError, match="calls: expected"), capture(nn.Sequential(nn.Tanh()), "0", calls=calls):
            pass


class TestEntry:
    FORMS = {
        "tuple": lambda x: (x, x + 1),
        "list": lambda x: [None, x, "a", x + 1],
        "dict": lambda x: {"label": "a", "value": x, "other": x + 1},
        "namedtuple": lambda x: Pair(x, x + 1),
    }

    @pytest.mark.parametrize("entry", [1, -1])
    @pytest.mark.parametrize("form", FORMS)
    def test_the_second_tensor_is_captured(self, form, entry):
        model = nn.Sequential(Giving(self.FORMS[form]))
        x = torch.randn(2)
        with capture(model, "0", entry=entry) as seen, capture(model, "0", side="update", entry=entry) as updates:
            model(x)
        assert torch.equal(seen["0"][0], x + 1)
        assert torch.equal(updates["0"][0], x + 1 - x)

    @pytest.mark.parametrize("side", ["output", "update"])
    @pytest.mark.parametrize("entry", [1, -1])
    @pytest.mark.parametrize("form", FORMS)
    def test_the_second_tensor_is_edited_and_the_others_are_kept(self, form, entry, side):
        model = nn.Sequential(Giving(self.FORMS[form]))
        x = torch.ones(2)
        plain = model(x)
        with edit(model, {"0": doubled}, side=side, entry=entry):
            edited = model(x)
        assert type(edited) is type(plain)
        *others, last = edited.values() if form == "dict" else edited
        assert torch.equal(last, torch.full((2,), 4.0 if side == "output" else 3.0))
        assert [one for one in others if not isinstance(one, torch.Tensor)] == (
            {"list": [None, "a"], "dict": ["a"]}.get(form, [])
        )
        assert next(one for one in others if isinstance(one, torch.Tensor)) is x

    def test_the_second_tensor_of_a_diffusers_output(self, tiny_vae):
        from diffusers.utils import BaseOutput

        @dataclass
        class Output(BaseOutput):
            sample: torch.Tensor
            extra: torch.Tensor | None
            other: torch.Tensor | None = None

        model = nn.Sequential(Giving(lambda x: Output(sample=x, extra=None, other=x + 1)))
        x = torch.ones(2)
        with edit(model, {"0": doubled}, entry=1), capture(model, "0", entry=1) as seen:
            y = model(x)
        assert type(y) is Output
        assert y.sample is x
        assert y.extra is None
        assert torch.equal(y.other, torch.full((2,), 4.0))
        assert torch.equal(seen["0"][0], y["other"])

    @pytest.mark.parametrize("entry", [2, -3])
    @pytest.mark.parametrize("side", ["output", "update"])
    def test_one_that_is_not_there_is_an_error_naming_it(self, side, entry):
        model = nn.Sequential(Giving(lambda x: (x, "a", x + 1)))
        message = f"layers: 0 returned a tuple with 2 tensors, none with index {entry}"
        with pytest.raises(RuntimeError, match=message), capture(model, "0", side=side, entry=entry):
            model(torch.ones(1))
        with pytest.raises(RuntimeError, match=message), edit(model, {"0": doubled}, side=side, entry=entry):
            model(torch.ones(1))
        assert hook_count(model) == 0


class TestStop:
    def counting(self, count=4):
        """Layers that add 1, and the order in which they were called."""
        ran = []
        return nn.Sequential(*(Giving(lambda x, i=i: ran.append(i) or x + 1) for i in range(count))), ran

    def test_later_layers_do_not_run(self):
        model, ran = self.counting()
        with capture(model, "1", stop=True) as seen:
            model(torch.zeros(1))
            pytest.fail("the block goes on")
        assert ran == [0, 1]
        assert seen["1"] == [2]
        assert hook_count(model) == 0
        assert model(torch.zeros(1)) == 4

    def test_without_it_they_do(self):
        model, ran = self.counting()
        with capture(model, "1"):
            model(torch.zeros(1))
        assert ran == [0, 1, 2, 3]

    def test_after_the_last_of_several_layers(self):
        model, ran = self.counting()
        with capture(model, ["2", "0"], stop=True) as seen:
            model(torch.zeros(1))
        assert ran == [0, 1, 2]
        assert dict(seen) == {"0": [1], "2": [3]}
        assert hook_count(model) == 0

    def test_the_layer_itself_does_not_run_for_its_input(self):
        model, ran = self.counting()
        with capture(model, "2", side="input", stop=True) as seen:
            model(torch.zeros(1))
        assert ran == [0, 1]
        assert seen["2"] == [2]

    def test_after_the_last_of_the_calls(self):
        model, ran = self.counting(3)
        with capture(model, ["0", "1"], calls=[0, 2], stop=True) as seen:
            for call in range(9):
                model(torch.tensor(10 * call))
        assert ran == [0, 1, 2, 0, 1, 2, 0, 1]
        assert dict(seen) == {"0": [1, 21], "1": [2, 22]}

    def test_a_layer_that_does_not_run_is_still_an_error(self):
        model, ran = self.counting()
        spare = Outer(model)
        spare.spare = nn.Tanh()
        with (
            pytest.raises(RuntimeError, match="layers: spare never ran"),
            capture(spare, ["inner.1", "spare"], stop=True),
        ):
            spare(torch.zeros(1))
        assert ran == [0, 1, 2, 3]
        model, ran = self.counting()
        with (
            pytest.raises(RuntimeError, match="layers: 1 never ran 2 times"),
            capture(model, "1", calls=[1], stop=True),
        ):
            model(torch.zeros(1))
        assert ran == [0, 1, 2, 3]

    def test_other_exceptions_come_through(self):
        model, _ = self.counting()
        with pytest.raises(KeyError, match="mine"), capture(model, "1", stop=True):
            raise KeyError("mine")
        assert hook_count(model) == 0

    def test_an_edit_within_is_undone(self):
        model, ran = self.counting()
        with capture(model, "1", stop=True) as seen, edit(model, {"0": lambda h: h * 10}):
            model(torch.zeros(1))
        assert ran == [0, 1]
        assert seen["1"] == [11]
        assert hook_count(model) == 0

    def test_a_capture_within_does_not_take_the_stop_for_its_own(self):
        model, ran = self.counting()
        with capture(model, "2", stop=True) as outer:
            with capture(model, "0") as inner:
                model(torch.zeros(1))
            ran.append("went on")
        assert ran == [0, 1, 2]
        assert (inner["0"], outer["2"]) == ([1], [3])

    def test_gradients_of_what_was_seen(self, tiny_vae):
        with capture(tiny_vae, "decoder.conv_in", grad=True, stop=True) as seen:
            tiny_vae(pictures())
        seen["decoder.conv_in"][0].sum().backward()
        assert tiny_vae.encoder.conv_in.weight.grad.abs().sum() > 0


class TestModes:
    def check(self, model, layer, dtype=torch.float32):
        """Captures and edits ``layer`` and compares with the model run plainly."""
        plain = model(pictures()).sample
        with capture(model, layer) as seen, capture(model, layer, side="input") as given:
            assert torch.equal(model(pictures()).sample, plain)
        with edit(model, {layer: torch.zeros_like}), capture(model, layer) as edited:
            assert not torch.equal(model(pictures()).sample, plain)
        with edit(model, {layer: lambda h: h}):
            assert torch.equal(model(pictures()).sample, plain)
        assert seen[layer][0].dtype == dtype
        assert given[layer][0].shape[0] == 2
        assert edited[layer][0].abs().sum() == 0
        assert hook_count(unwrap(model)) == 0
        return seen[layer][0]

    def test_data_parallel(self, tiny_vae):
        self.check(nn.DataParallel(tiny_vae), "decoder.conv_in")

    def test_distributed_data_parallel(self, tiny_vae, tmp_path):
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
        try:
            self.check(nn.parallel.DistributedDataParallel(tiny_vae), "decoder.conv_in")
        finally:
            torch.distributed.destroy_process_group()

    def test_prepared_by_accelerate_in_mixed_precision(self, tiny_vae):
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            model = Accelerator(cpu=True, mixed_precision="bf16").prepare(tiny_vae)
            self.check(model, "decoder.conv_in", dtype=torch.bfloat16)
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)

    def test_autocast(self, tiny_vae):
        with torch.autocast("cpu", torch.bfloat16):
            self.check(tiny_vae, "decoder.conv_in", dtype=torch.bfloat16)

    def test_inference_mode(self, tiny_vae):
        with torch.inference_mode():
            kept = self.check(tiny_vae, "decoder.conv_in")
        assert kept.is_inference()

    def test_no_grad(self, tiny_vae):
        with torch.no_grad():
            self.check(tiny_vae, "decoder.conv_in")

    def test_train_mode(self, tiny_vae):
        self.check(tiny_vae.train(), "decoder.conv_in")
        assert tiny_vae.decoder.conv_in.training


def noted(tensor, storages):
    storages.append(weakref.ref(tensor.untyped_storage()))
    return tensor


def test_a_gradient_is_handed_over_when_it_has_been_made():
    weight, seen = nn.Parameter(torch.ones(3)), []
    handle = on_gradient(weight, lambda parameter: seen.append(parameter.grad.clone()))
    (weight * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    handle.remove()
    weight.sum().backward()
    assert [one.tolist() for one in seen] == [[1.0, 2.0, 3.0]]
