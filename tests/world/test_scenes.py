import itertools
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from vaelab import world
from vaelab.world.scenes import (
    CENTRES,
    COLOURS,
    FACTORS,
    GROUNDS,
    OMISSION_RATES,
    PHRASES,
    POSITIONS,
    SCENE_FACTORS,
    SHAPES,
    SIZES,
    SPLITS,
    TEXTURES,
    THING_FACTORS,
    Scene,
    Thing,
    allowed_combinations,
    background,
    sample,
)

STAR = Thing("star", "red", "large", "left")
TOUCHING = Thing("cross", "red", "large", "left", (1, 0)), Thing("cross", "blue", "large", "centre", (-1, 0))
OFFSETS = list(itertools.product((-1, 0, 1), repeat=2))


def scenes(split="train", count=200):
    return [sample(seed, split) for seed in range(count)]


class TestSplits:
    def test_counts(self):
        assert [len(allowed_combinations(split)) for split in SPLITS] == [896, 112, 144]

    def test_together_they_are_every_combination_once(self):
        together = Counter(combination for split in SPLITS for combination in allowed_combinations(split))
        assert together == Counter(itertools.product(*(FACTORS[factor] for factor in THING_FACTORS)))

    def test_unseen_shares_no_shape_and_colour_with_the_others(self):
        train, test, unseen = ({one[:2] for one in allowed_combinations(split)} for split in SPLITS)
        assert unseen.isdisjoint(train | test)
        assert test == train
        assert len(train) == 56

    @pytest.mark.parametrize("split", SPLITS)
    def test_every_value_of_every_factor_occurs(self, split):
        for factor, values in zip(THING_FACTORS, zip(*allowed_combinations(split), strict=True), strict=True):
            assert set(values) == set(FACTORS[factor])

    @pytest.mark.parametrize("split", SPLITS)
    def test_things_of_a_sample_are_of_its_split(self, split):
        combinations = set(allowed_combinations(split))
        things = [thing for scene in scenes(split) for thing in scene.things]
        assert {tuple(getattr(thing, factor) for factor in THING_FACTORS) for thing in things} <= combinations

    def test_unknown_split(self):
        for fails in (
            lambda: allowed_combinations("tran"),
            lambda: sample(0, "tran"),
            lambda: world.dataset("tran", 1),
        ):
            with pytest.raises(ValueError, match=r"^split: unknown name 'tran'.*: train"):
                fails()


class TestSample:
    def test_the_seed_and_the_split_fix_it(self):
        assert sample(5, "test") == sample(5, "test")
        assert sample(5) == sample(5, "train")
        assert len(set(scenes("train", 50)) | set(scenes("test", 50)) | set(scenes("unseen", 50))) == 150

    def test_it_stays_as_models_were_trained_on_it(self):
        assert [sample(0, split).prompt for split in SPLITS] == [
            "a purple heart in the centre and a small orange ring on the right, on a plain background",
            "a large square at the bottom and a large purple triangle, on a striped beige background",
            "a large purple ring in the top right, on a dotted pink background",
        ]
        star = Thing("star", "orange", "large", "left", (0, -1), ("shape", "size", "position"))
        heart = Thing("heart", "orange", "small", "bottom", (0, -1))
        assert sample(7) == Scene((star, heart), "checkered", "teal")

    def test_every_value_of_every_factor_is_drawn(self):
        drawn = scenes()
        for factor in THING_FACTORS:
            assert {getattr(thing, factor) for scene in drawn for thing in scene.things} == set(FACTORS[factor])
        for factor in SCENE_FACTORS:
            assert {getattr(scene, factor) for scene in drawn} == set(FACTORS[factor])
        assert {thing.offset for scene in drawn for thing in scene.things} == set(OFFSETS)

    def test_one_to_three_things(self):
        counts = Counter(len(scene.things) for scene in scenes(count=1000))
        assert set(counts) == {1, 2, 3}
        assert counts[1] > counts[2] > counts[3] > 200

    def test_factors_are_left_out_at_their_rates(self):
        drawn = scenes(count=2000)
        named = {factor: [factor in thing.named for s in drawn for thing in s.things] for factor in THING_FACTORS}
        named |= {factor: [factor in scene.named for scene in drawn] for factor in SCENE_FACTORS}
        assert set(OMISSION_RATES) == set(named)
        for factor, rate in OMISSION_RATES.items():
            assert np.mean(named[factor]) == pytest.approx(1 - rate, abs=0.03)


class TestPrompt:
    @pytest.mark.parametrize(
        ("thing", "phrase"),
        [
            (STAR, "a large red star on the left"),
            (replace(STAR, colour="orange", named=("shape", "colour")), "an orange star"),
            (replace(STAR, colour="orange", named=("size", "colour")), "a large orange thing"),
            (replace(STAR, named=("position",)), "a thing on the left"),
            (replace(STAR, position="top right", named=("shape", "position")), "a star in the top right"),
            (replace(STAR, named=()), "a thing"),
        ],
    )
    def test_a_thing(self, thing, phrase):
        assert thing.phrase == phrase
        assert Scene((thing,), "plain", "grey", ()).prompt == phrase

    @pytest.mark.parametrize(
        ("named", "end"),
        [
            (SCENE_FACTORS, ", on a striped teal background"),
            (("texture",), ", on a striped background"),
            (("ground",), ", on a teal background"),
            ((), ""),
        ],
    )
    def test_the_ground(self, named, end):
        assert Scene((STAR,), "striped", "teal", named).prompt == f"a large red star on the left{end}"

    def test_two_and_three_things_are_listed(self):
        ring = Thing("ring", "orange", "small", "top", named=("shape", "colour"))
        some = Thing("cross", "blue", "small", "bottom", named=("size", "position"))
        two = Scene((STAR, ring), "plain", "grey")
        assert two.prompt == "a large red star on the left and an orange ring, on a plain grey background"
        three = Scene((ring, some, STAR), "shaded", "pink", ("ground",))
        assert three.prompt == (
            "an orange ring, a small thing at the bottom and a large red star on the left, on a pink background"
        )

    def test_spelled_out_nothing_is_left_out_and_the_picture_is_the_same(self):
        scene = Scene((replace(STAR, offset=(1, 0), named=("size",)),), "plain", "grey", ())
        assert scene.spelled_out() == Scene((replace(STAR, offset=(1, 0)),), "plain", "grey")

    @pytest.mark.parametrize("position", POSITIONS)
    def test_the_phrase_of_a_position_has_its_words(self, position):
        assert PHRASES[position].split()[2:] == position.split()
        assert PHRASES[position].split()[:2] in (["in", "the"], ["at", "the"], ["on", "the"])

    @pytest.mark.parametrize("split", SPLITS)
    def test_it_says_what_is_named_and_nothing_else(self, split):
        for scene in scenes(split):
            things, ground = parsed(scene.prompt)
            assert things == [named_factors(thing, THING_FACTORS) for thing in scene.things]
            assert ground == named_factors(scene, SCENE_FACTORS)


def named_factors(thing, factors):
    return {factor: getattr(thing, factor) for factor in factors if factor in thing.named}


def parsed(prompt):
    """What a prompt names: of each thing, and of the ground."""
    one = {factor: "|".join(values) for factor, values in FACTORS.items()}
    where = "|".join(PHRASES.values())
    thing = rf"an?( (?P<size>{one['size']}))?( (?P<colour>{one['colour']}))?"
    thing += rf" (thing|(?P<shape>{one['shape']}))( (?P<position>{where}))?"
    ground = rf"(, on a(?P<texture> ({one['texture']}))?(?P<ground> ({one['ground']}))? background)?"
    listed, *factors = re.fullmatch(rf"(.*?){ground}", prompt).group(1, "texture", "ground")
    behind = {factor: word.strip() for factor, word in zip(SCENE_FACTORS, factors, strict=True) if word}
    phrases = [re.fullmatch(thing, phrase).groupdict() for phrase in re.split(", | and ", listed)]
    places = {phrase: position for position, phrase in PHRASES.items()}
    return [{name: places.get(word, word) for name, word in phrase.items() if word} for phrase in phrases], behind


class TestThing:
    AREAS = {
        "circle": np.pi / 4,
        "square": 0.88**2,
        "triangle": 0.93 / 2,
        "star": 5 * 0.22 * 0.52 * np.sin(np.pi / 5),
        "ring": np.pi * (0.5**2 - 0.23**2),
        "cross": 1 - 4 * 0.34**2,
        "diamond": 0.9 / 2,
        "heart": 180 * np.pi / (32 * 29),
    }

    @pytest.mark.parametrize("shape", SHAPES)
    def test_its_area_is_the_shapes(self, shape):
        for size, side in SIZES.items():
            covered = Thing(shape, "red", size, "centre").coverage()
            assert covered.dtype == np.float32
            assert covered.sum() == pytest.approx(self.AREAS[shape] * side**2, rel=0.05)

    @pytest.mark.parametrize("shape", SHAPES)
    def test_a_large_one_is_a_small_one_enlarged(self, shape):
        large, small = (Thing(shape, "red", size, "centre").coverage() for size in ("large", "small"))
        assert large.sum() / small.sum() == pytest.approx((SIZES["large"] / SIZES["small"]) ** 2, rel=0.05)

    @pytest.mark.parametrize("shape", SHAPES)
    def test_edges_are_antialiased(self, shape):
        covered = Thing(shape, "red", "large", "centre").coverage()
        assert covered.min() == 0
        assert covered.max() == 1
        assert len(np.unique(covered)) > 6
        assert 40 < ((covered > 0) & (covered < 1)).sum() < 90

    def test_shapes_differ(self):
        stamps = [Thing(shape, "red", "small", "centre").coverage() for shape in SHAPES]
        for one, other in itertools.combinations(stamps, 2):
            assert np.abs(one - other).sum() > 10

    @pytest.mark.parametrize("shape", SHAPES)
    def test_left_and_right_are_alike(self, shape):
        covered = Thing(shape, "red", "large", "centre").coverage()
        assert np.abs(covered - covered[:, ::-1]).max() < 0.2

    def test_which_way_up(self):
        upper = {}
        for shape in SHAPES:
            covered = Thing(shape, "red", "large", "centre").coverage()
            upper[shape] = covered[:32].sum() / covered.sum()
        assert upper["triangle"] < 0.35
        wide = {shape: Thing(shape, "red", "large", "centre").coverage().sum(1) for shape in ("heart", "star")}
        assert wide["heart"][24:30].min() > 16
        assert 0 < wide["heart"][38:42].max() < 4
        assert wide["star"].argmax() == 29
        for shape in ("circle", "square", "ring", "cross", "diamond"):
            assert upper[shape] == pytest.approx(0.5, abs=0.01)

    @pytest.mark.parametrize("position", POSITIONS)
    def test_it_stands_where_its_position_says(self, position):
        y, x = np.mgrid[:64, :64] + 0.5
        covered = Thing("circle", "red", "small", position).coverage()
        column, row = (int((covered * axis).sum() / covered.sum() // (64 / 3)) for axis in (x, y))
        assert {0: "left", 1: "", 2: "right"}[column] == re.sub("top|bottom|centre", "", position).strip()
        assert {0: "top", 1: "", 2: "bottom"}[row] == re.sub("left|right|centre", "", position).strip()

    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("shape", SHAPES)
    def test_it_is_inside_the_picture_wherever_it_stands(self, shape, size):
        whole = Thing(shape, "red", size, "centre").coverage()
        for (position, cells), offset in itertools.product(POSITIONS.items(), OFFSETS):
            covered = Thing(shape, "red", size, position, offset).coverage()
            right, down = (CENTRES[cell] - 32 + shift for cell, shift in zip(cells, offset, strict=True))
            np.testing.assert_array_equal(covered, np.roll(whole, (down, right), (0, 1)))

    @pytest.mark.parametrize(
        ("factor", "wrong", "near"),
        [("shape", "stars", "star"), ("colour", "read", "red"), ("size", "larg", "large"), ("position", "lef", "left")],
    )
    def test_unknown_factors(self, factor, wrong, near):
        with pytest.raises(ValueError, match=rf"^{factor}: unknown name '{wrong}'.*: {near}"):
            replace(STAR, **{factor: wrong})


class TestPicture:
    @pytest.mark.parametrize("split", SPLITS)
    def test_rendered_it_is_in_range(self, split):
        pictures = world.render(scenes(split, 100))
        assert pictures.shape == (100, 3, 64, 64)
        assert pictures.dtype == torch.float32
        assert pictures.is_contiguous()
        assert pictures.min() >= -1
        assert pictures.max() <= 1
        assert pictures.max() - pictures.min() > 1.8

    def test_rendered_it_is_the_picture(self):
        drawn = scenes(count=3)
        for picture, scene in zip(world.render(scene for scene in drawn), drawn, strict=True):
            np.testing.assert_allclose(picture.permute(1, 2, 0), scene.picture() * 2 - 1, atol=1e-6)

    @pytest.mark.parametrize("colour", COLOURS)
    def test_a_thing_has_its_colour_and_its_edge_a_mixture(self, colour):
        thing = Thing("circle", colour, "large", "bottom left")
        picture = Scene((thing,), "plain", "grey").picture()
        covered = thing.coverage()[..., None]
        expected = covered * np.array(COLOURS[colour]) / 255 + (1 - covered) * 150 / 255
        np.testing.assert_allclose(picture, expected, atol=1e-6)

    def test_a_later_thing_is_drawn_over_an_earlier_one(self):
        for things in (TOUCHING, TOUCHING[::-1]):
            picture = Scene(things, "plain", "grey").picture()
            np.testing.assert_allclose(picture[32, 21] * 255, COLOURS[things[1].colour], atol=1e-3)

    def test_colours_and_grounds_can_be_told_apart(self):
        grounds = [level for value in GROUNDS.values() for level in (value, [0.72 * channel for channel in value])]
        for one, other in itertools.combinations(COLOURS.values(), 2):
            assert np.linalg.norm(np.subtract(one, other)) > 70
        for one, other in itertools.product(COLOURS.values(), grounds):
            assert np.linalg.norm(np.subtract(one, other)) > 70
        for one, other in itertools.combinations(GROUNDS.values(), 2):
            assert np.linalg.norm(np.subtract(one, other)) > 30

    def test_two_things_do_not_share_a_position(self):
        with pytest.raises(ValueError, match="things: two of them share a position"):
            Scene((STAR, replace(STAR, shape="ring", offset=(1, 1))), "plain", "grey")

    def test_unknown_grounds(self):
        for fails in (lambda: Scene((STAR,), "stripes", "grey"), lambda: background("stripes", "grey")):
            with pytest.raises(ValueError, match=r"^texture: unknown name 'stripes'.*: striped"):
                fails()
        for fails in (lambda: Scene((STAR,), "plain", "gray"), lambda: background("plain", "gray")):
            with pytest.raises(ValueError, match=r"^ground: unknown name 'gray'.*: grey"):
                fails()


class TestBackground:
    @pytest.mark.parametrize("ground", GROUNDS)
    def test_textures_darken_its_colour(self, ground):
        colour = np.array(GROUNDS[ground]) / 255
        np.testing.assert_allclose(background("plain", ground), np.broadcast_to(colour, (64, 64, 3)), rtol=1e-6)
        for texture in TEXTURES:
            share = background(texture, ground) / colour
            assert share.shape == (64, 64, 3)
            np.testing.assert_allclose(share.min(2), share.max(2), rtol=1e-5)
            assert share.max() == pytest.approx(1, abs=0.01)
            assert share.min() == pytest.approx(1 if texture == "plain" else 0.72, abs=0.01)

    def test_textures_are_what_they_are_called(self):
        pink = {texture: background(texture, "pink")[..., 0] for texture in TEXTURES}
        assert (pink["striped"] == pink["striped"][:1]).all()
        assert (np.diff(pink["shaded"], axis=0) < 0).all()
        assert (pink["shaded"] == pink["shaded"][:, :1]).all()
        np.testing.assert_allclose(pink["checkered"], pink["checkered"].T)
        np.testing.assert_allclose(pink["checkered"][:56] + pink["checkered"][8:], 1.72 * 215 / 255, rtol=1e-5)
        assert len(np.unique(pink["dotted"])) > 2
        for texture, period in (("striped", 8), ("checkered", 16), ("dotted", 8)):
            np.testing.assert_array_equal(pink[texture][:, period:], pink[texture][:, :-period])

    def test_nobody_can_draw_on_it(self):
        before = background("dotted", "teal").copy()
        Scene((STAR,), "dotted", "teal").picture()
        np.testing.assert_array_equal(background("dotted", "teal"), before)
        with pytest.raises(ValueError, match="read-only"):
            background("dotted", "teal")[0, 0] = 0


class TestMasks:
    @pytest.mark.parametrize("split", SPLITS)
    def test_every_pixel_is_of_one_thing_or_of_the_ground(self, split):
        for scene in scenes(split):
            masks = scene.masks()
            assert masks.dtype == bool
            assert masks.shape == (len(scene.things) + 1, 64, 64)
            assert (masks.sum(0) == 1).all()

    @pytest.mark.parametrize("order", [1, -1])
    def test_where_things_overlap_the_pixel_is_of_the_one_on_top(self, order):
        masks = Scene(TOUCHING[::order], "plain", "grey").masks()
        assert (masks.sum(0) == 1).all()
        assert masks[1, 32, 21]

    def test_they_are_where_the_picture_differs_from_its_background(self):
        for scene in scenes(count=50):
            differs = (scene.picture() != background(scene.texture, scene.ground)).any(2)
            *things, ground = scene.masks()
            covered = np.sum([thing.coverage() for thing in scene.things], axis=0)
            assert differs[~ground].all()
            assert ground[~differs].all()
            assert not differs[covered == 0].any()
            assert (covered[ground & differs] < 1).all()
            for thing, mask in zip(scene.things, things, strict=True):
                assert (thing.coverage()[mask] >= 0.5).all()
                assert not ground[thing.coverage() >= 0.5].any()


class TestDataset:
    def test_its_rows_are_the_scenes(self):
        table = world.dataset("test", 12, first_seed=30)
        drawn = [sample(seed, "test") for seed in range(30, 42)]
        assert table["seed"] == list(range(30, 42))
        assert table["prompt"] == [scene.prompt for scene in drawn]
        for row, scene in zip(table, drawn, strict=True):
            np.testing.assert_array_equal(row["masks"], scene.masks())
            np.testing.assert_allclose(np.asarray(row["image"]) / 255, scene.picture(), atol=0.51 / 255)
            for factor in THING_FACTORS:
                labels = table.features[factor].feature.int2str(row[factor])
                assert labels == [getattr(thing, factor) for thing in scene.things]
            for factor in SCENE_FACTORS:
                assert table.features[factor].int2str(row[factor]) == getattr(scene, factor)

    def test_its_columns(self):
        table = world.dataset("train", 2)
        assert table.column_names == ["image", "prompt", "seed", "masks", *FACTORS]
        assert table["seed"] == [0, 1]
        for factor in THING_FACTORS:
            assert table.features[factor].feature.names == list(FACTORS[factor])
        for factor in SCENE_FACTORS:
            assert table.features[factor].names == list(FACTORS[factor])

    def test_an_empty_one_is_refused(self):
        with pytest.raises(ValueError, match="count: must be at least 1, got 0"):
            world.dataset("train", 0)


class TestRefused:
    @pytest.mark.parametrize(("position", "offset"), [("left", (-30, 0)), ("left", (-3, 0)), ("bottom", (0, 3))])
    def test_a_thing_that_is_not_inside_the_picture(self, position, offset):
        """With an offset of -30 it would wrap around and be drawn on the other side."""
        with pytest.raises(ValueError, match=r"^offset: .* off the picture"):
            replace(STAR, position=position, offset=offset)

    def test_named_factors_that_do_not_exist(self):
        """A misspelt factor would be left out of the prompt without a word."""
        with pytest.raises(ValueError, match=r"^named: unknown name 'color'.*: colour"):
            replace(STAR, named=("color",))
        with pytest.raises(ValueError, match=r"^named: unknown name 'textures'.*: texture"):
            Scene((STAR,), "plain", "grey", ("textures",))

    def test_seeds_before_the_first(self):
        with pytest.raises(ValueError, match=r"^seed: must be at least 0, got -1"):
            sample(-1)


def test_a_scene_without_things_has_a_prompt_a_picture_and_a_mask():
    empty = Scene((), "dotted", "teal")
    assert empty.prompt == "nothing, on a dotted teal background"
    assert empty.masks().shape == (1, 64, 64) and empty.masks().all()
    np.testing.assert_array_equal(empty.picture(), background("dotted", "teal"))
    assert world.render([]).shape == (0, 3, 64, 64)
