import itertools
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from vaelab.world import oracle
from vaelab.world.oracle import accuracy_by_factor, check_prompts, read_scenes
from vaelab.world.scenes import (
    COLOURS,
    FACTORS,
    POSITIONS,
    SCENE_FACTORS,
    SHAPES,
    SIZES,
    SPLITS,
    THING_FACTORS,
    Scene,
    Thing,
    background,
    render,
    sample,
)

STAR = Thing("star", "red", "large", "left")
RING = Thing("ring", "blue", "small", "right")
SHIFTS = {0: range(-1, 4), 1: range(-2, 3), 2: range(-3, 2)}
"""By column or row: five offsets within the picture."""


def scenes(split="test", count=20):
    return [sample(seed, split).spelled_out() for seed in range(count)]


def noise(*shape, std=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * std


def wrong(judged):
    return {(row.thing, row.factor): row.recognised for row in judged.itertuples() if not row.correct}


class TestRead:
    @pytest.mark.parametrize("split", SPLITS)
    def test_every_factor_and_the_count_of_rendered_scenes(self, split):
        asked = scenes(split, 300)
        pictures = render(asked)
        clean, noisy = check_prompts(asked, pictures), check_prompts(asked, pictures + noise(*pictures.shape, std=0.1))
        assert len(clean) == sum(4 * len(scene.things) + 3 for scene in asked)
        assert clean["correct"].all()
        assert list(accuracy_by_factor(noisy)["factor"]) == [*FACTORS, "count"]
        assert (accuracy_by_factor(noisy)["accuracy"] >= 0.98).all()

    @pytest.mark.parametrize("offset", [(-1, -1), (-1, 1), (1, -1), (1, 1)])
    @pytest.mark.parametrize("position", POSITIONS)
    def test_where_a_thing_stands_to_the_pixel(self, position, offset):
        scene = Scene((Thing("heart", "green", "large", position, offset),), "dotted", "beige")
        assert read_scenes(render([scene])) == [scene]

    def test_a_thing_further_out_than_any_that_is_sampled(self):
        scene = Scene((replace(STAR, position="centre", offset=(2, -2)),), "plain", "grey")
        assert read_scenes(render([scene])) == [scene]

    @pytest.mark.parametrize("texture", FACTORS["texture"])
    def test_large_dark_things_do_not_darken_the_ground(self, texture):
        things = tuple(Thing("square", "black", "large", position) for position in ("top left", "top right", "bottom"))
        scene = Scene(things, texture, "grey")
        assert read_scenes(render([scene])) == [scene]

    def test_what_it_reads_can_be_drawn_and_is_the_picture(self):
        pictures = render(scenes("train", 50))
        torch.testing.assert_close(render(read_scenes(pictures)), pictures)

    def test_things_are_in_the_order_of_the_positions(self):
        (seen,) = read_scenes(render([Scene((RING, STAR), "plain", "grey")]))
        assert seen.things == (STAR, RING)

    @pytest.mark.parametrize("texture", FACTORS["texture"])
    @pytest.mark.parametrize("ground", FACTORS["ground"])
    def test_an_empty_ground_has_no_things(self, texture, ground):
        empty = Scene((), texture, ground)
        assert read_scenes(render([empty])) == [empty]
        assert read_scenes(render([empty]) + noise(1, 3, 64, 64, std=0.1)) == [empty]

    @pytest.mark.parametrize(
        "picture", [noise(3, 64, 64), noise(3, 64, 64, std=9), torch.ones(3, 64, 64), -torch.ones(3, 64, 64)]
    )
    def test_what_is_no_scene_is_read_as_one_all_the_same(self, picture):
        (seen,) = read_scenes(picture[None])
        assert seen.picture().shape == (64, 64, 3)
        assert (check_prompts([sample(0).spelled_out()], picture[None])["factor"] == "count").sum() == 1

    def test_what_is_too_bright_or_dark_is_cut(self):
        pictures = noise(5, 3, 64, 64, std=2)
        assert read_scenes(pictures) == read_scenes(pictures.clamp(-1, 1))

    def test_other_precisions_and_graphs(self):
        asked = scenes(count=3)
        pictures = render(asked)
        kept = pictures.clone().requires_grad_()
        assert read_scenes(kept) == read_scenes(pictures.double()) == read_scenes(pictures)
        assert wrong(check_prompts(asked, pictures.bfloat16())) == {}
        assert torch.equal(kept, pictures)

    def test_batches_make_no_difference(self, monkeypatch):
        pictures = torch.cat([render(scenes(count=8)) + noise(8, 3, 64, 64, std=0.3), noise(2, 3, 64, 64)])
        whole = read_scenes(pictures)
        assert [read_scenes(picture[None])[0] for picture in pictures] == whole
        monkeypatch.setattr(oracle, "CHUNK", 3)
        assert read_scenes(pictures) == whole

    def test_no_pictures(self):
        assert read_scenes(torch.zeros(0, 3, 64, 64)) == []

    @pytest.mark.parametrize("shape", [(3, 64, 64), (1, 1, 64, 64), (1, 3, 32, 64), (1, 64, 64, 3)])
    def test_other_shapes_are_refused(self, shape):
        with pytest.raises(ValueError, match=r"pictures: expected \(N, 3, 64, 64\), got \(" + str(shape)[1:-1]):
            read_scenes(torch.zeros(shape))

    def test_whole_numbers_are_refused(self):
        """Levels from 0 to 255 would all be cut to white."""
        with pytest.raises(ValueError, match="pictures: expected floating point values"):
            read_scenes(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_what_is_not_finite_is_refused(self, value):
        pictures = torch.zeros(2, 3, 64, 64)
        pictures[1, 2, 3, 4] = value
        with pytest.raises(ValueError, match="pictures: not all values are finite"):
            read_scenes(pictures)


WHITE = Scene((Thing("circle", "white", "small", "right"),), "plain", "grey")


class TestLikelihood:
    """What is read is what a search through all drawings finds."""

    PICTURES = {
        "noisy": render([sample(3, "test")])[0] + noise(3, 64, 64, std=0.5),
        "mixture": (render([sample(0)])[0] + render([sample(1)])[0]) / 2,
        "noise": noise(3, 64, 64),
        "faint": render([WHITE])[0] * 0.45 + render([replace(WHITE, things=())])[0] * 0.55,
        "too faint": render([WHITE])[0] * 0.3 + render([replace(WHITE, things=())])[0] * 0.7,
    }

    @pytest.mark.parametrize("name", PICTURES)
    def test_of_a_thing(self, name):
        picture = self.PICTURES[name]
        (seen,) = read_scenes(picture[None])
        found = {thing.position: thing for thing in seen.things}
        behind = background(seen.texture, seen.ground).astype(np.float64)
        target = levels(picture)
        for position in ("top left", "centre", "right"):
            assert found.get(position) == nearest_thing(position, target, behind)

    def test_of_a_ground(self):
        kept = int(0.65 * 64**2)
        for picture in self.PICTURES.values():
            errors = {}
            for names in itertools.product(*(FACTORS[factor] for factor in SCENE_FACTORS)):
                squared = ((levels(picture) - background(*names)) ** 2).sum(2)
                errors[names] = np.sort(squared.ravel())[:kept].sum()
            (seen,) = read_scenes(picture[None])
            assert (seen.texture, seen.ground) == min(errors, key=errors.get)


def levels(picture):
    """(64, 64, 3) float64 in [0, 1]."""
    return ((picture.permute(1, 2, 0).double() + 1) / 2).clamp(0, 1).numpy()


def nearest_thing(position, target, behind):
    """Of all things at ``position``, and none, the one whose drawing is nearest to ``target``."""
    best, least = None, ((target - behind) ** 2).sum()
    column, row = POSITIONS[position]
    for shape, size, offset in itertools.product(SHAPES, SIZES, itertools.product(SHIFTS[column], SHIFTS[row])):
        covered = Thing(shape, "red", size, position, offset).coverage().astype(np.float64)[..., None]
        inside = covered[..., 0] > 0
        outside = ((target - behind)[~inside] ** 2).sum()
        for colour, value in COLOURS.items():
            drawn = (1 - covered[inside]) * behind[inside] + covered[inside] * np.array(value) / 255
            error = ((target[inside] - drawn) ** 2).sum() + outside
            if error < least:
                best, least = Thing(shape, colour, size, position, offset), error
    return best


class TestJudge:
    SCENE = Scene((STAR,), "plain", "grey")

    @pytest.mark.parametrize(
        ("factor", "value"),
        [("shape", "heart"), ("colour", "blue"), ("size", "small"), ("position", "top"), ("texture", "dotted"),
         ("ground", "pink")],
    )  # fmt: skip
    def test_a_planted_swap_is_found_and_nothing_else(self, factor, value):
        if factor in SCENE_FACTORS:
            shown, thing = replace(self.SCENE, **{factor: value}), -1
        else:
            shown, thing = replace(self.SCENE, things=(replace(STAR, **{factor: value}),)), 0
        assert wrong(check_prompts([self.SCENE], render([shown]))) == {(thing, factor): value}

    def test_the_picture_of_another_scene_is_right_where_they_agree(self):
        asked = [scene for scene in scenes(count=60) if len(scene.things) == 1]
        shown = asked[1:] + asked[:1]
        judged = check_prompts(asked, render(shown))
        assert 0.1 < judged["correct"].mean() < 0.9
        for row in judged.itertuples():
            if row.factor == "count":
                continue
            one, other = asked[row.picture], shown[row.picture]
            if row.factor in THING_FACTORS:
                (one,), (other,) = one.things, other.things
            assert (row.expected, row.recognised) == (getattr(one, row.factor), getattr(other, row.factor))
            assert row.correct == (row.expected == row.recognised)

    def test_rows(self):
        scene = Scene((replace(STAR, named=("colour", "position")),), "plain", "grey", ("ground",))
        judged = check_prompts([scene, scene], render([scene, replace(scene, ground="teal")]))
        assert judged.values.tolist() == [
            [0, 0, "colour", "red", "red", True],
            [0, 0, "position", "left", "left", True],
            [0, -1, "ground", "grey", "grey", True],
            [0, -1, "count", 1, 1, True],
            [1, 0, "colour", "red", "red", True],
            [1, 0, "position", "left", "left", True],
            [1, -1, "ground", "grey", "teal", False],
            [1, -1, "count", 1, 1, True],
        ]
        assert list(judged.columns) == ["picture", "thing", "factor", "expected", "recognised", "correct"]

    def test_what_is_not_named_is_not_judged(self):
        asked = Scene((replace(STAR, named=()),), "plain", "grey", ())
        shown = Scene((Thing("heart", "blue", "small", "top"),), "dotted", "pink")
        judged = check_prompts([asked], render([shown]))
        assert list(judged["factor"]) == ["count"]
        assert judged["correct"].all()

    def test_colours_of_two_things_swapped(self):
        asked = Scene((STAR, RING), "plain", "grey")
        shown = Scene((replace(STAR, colour="blue"), replace(RING, colour="red")), "plain", "grey")
        assert wrong(check_prompts([asked], render([shown]))) == {(0, "colour"): "blue", (1, "colour"): "red"}

    @pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
    @pytest.mark.parametrize("named", [THING_FACTORS, ("shape",), ("colour", "size")])
    def test_things_asked_for_in_any_order(self, order, named):
        things = [replace(thing, named=named) for thing in (STAR, RING, Thing("cross", "white", "large", "top"))]
        asked = Scene(tuple(things[i] for i in order), "plain", "grey")
        assert wrong(check_prompts([asked], render([asked]))) == {}

    @pytest.mark.parametrize("order", [1, -1])
    @pytest.mark.parametrize("swapped", [False, True])
    def test_the_assignment_is_the_one_in_which_most_agrees(self, order, swapped):
        any_red, red_star = (
            replace(STAR, position="right", named=("colour",)),
            replace(STAR, named=("shape", "colour")),
        )
        asked = Scene((any_red, red_star)[::order], "plain", "grey")
        things = (STAR, replace(RING, colour="red"))
        if swapped:
            things = tuple(replace(t, position=o.position) for t, o in zip(things, things[::-1], strict=True))
        assert wrong(check_prompts([asked], render([Scene(things, "plain", "grey")]))) == {}

    def test_a_thing_that_is_missing_has_no_factor_right(self):
        asked = Scene((STAR, replace(RING, named=("shape", "size"))), "plain", "grey")
        judged = check_prompts([asked], render([self.SCENE]))
        assert wrong(judged) == {(1, "shape"): None, (1, "size"): None, (-1, "count"): 1}

    def test_no_thing_at_all(self):
        asked = Scene((STAR, RING), "plain", "grey")
        judged = check_prompts([asked], render([Scene((), "plain", "grey")]))
        expected = {(i, factor): None for i in (0, 1) for factor in THING_FACTORS} | {(-1, "count"): 0}
        assert wrong(judged) == expected

    def test_one_thing_too_many_is_a_wrong_count(self):
        judged = check_prompts([self.SCENE], render([Scene((RING, STAR), "plain", "grey")]))
        assert wrong(judged) == {(-1, "count"): 2}

    def test_as_many_scenes_as_pictures(self):
        with pytest.raises(ValueError, match="expected one for each of the 2 scenes, got 1"):
            check_prompts([self.SCENE] * 2, render([self.SCENE]))


class TestAccuracy:
    def test_against_a_count_by_hand(self):
        rows = [
            (0, 0, "colour", True), (0, 1, "colour", False), (0, -1, "count", True), (0, -1, "ground", True),
            (1, 0, "colour", True), (1, 1, "colour", True), (1, 2, "colour", True), (1, -1, "count", False),
            (2, 0, "shape", False), (2, -1, "count", True), (2, -1, "ground", False),
            (3, 0, "colour", False), (3, 0, "shape", False), (3, -1, "count", True),
        ]  # fmt: skip
        table = accuracy_by_factor(pd.DataFrame(rows, columns=["picture", "thing", "factor", "correct"]))
        assert list(table.columns) == ["factor", "pictures", "accuracy", "thing_accuracy"]
        assert [list(row) for row in table.itertuples(index=False)] == [
            ["shape", 2, 0, 0],
            ["colour", 3, pytest.approx(1 / 3), pytest.approx(4 / 6)],
            ["ground", 2, 0.5, 0.5],
            ["count", 4, 0.75, 0.75],
        ]

    def test_of_what_was_judged(self):
        asked = Scene((STAR, RING), "plain", "grey")
        shown = Scene((STAR, replace(RING, colour="green")), "plain", "grey")
        table = accuracy_by_factor(check_prompts([asked, asked], render([asked, shown]))).set_index("factor")
        assert (table["pictures"] == 2).all()
        assert table.loc["colour", ["accuracy", "thing_accuracy"]].tolist() == [0.5, 0.75]
        assert (table.drop("colour")[["accuracy", "thing_accuracy"]] == 1).all(axis=None)
