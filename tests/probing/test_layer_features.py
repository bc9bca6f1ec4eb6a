from dataclasses import replace

import numpy as np
import planted_pictures
import pytest
import torch
from helpers import picture_folder

from vaelab import models, store
from vaelab.activations import denoiser
from vaelab.data.labelled import load_labelled
from vaelab.models.block_names import find_denoiser
from vaelab.models.clip import load_clip
from vaelab.probing import dataset, layer_features
from vaelab.probing.clip import ZeroShotClip
from vaelab.probing.layer_features import LayerConfig, collect_layer_features, feature_batches
from vaelab.probing.linear import class_share

LAYERS = ("down.0.0", "bottleneck", "up_ft0", "up_ft1")
TIMES = (0, 25, 100, 200, 300, 500)


def config(**changes):
    return LayerConfig(**{"blocks": LAYERS[1:3], "timesteps": (25, 500), "batch_size": 4, "precision": "float32",
                          "items_per_shard": 4, **changes})  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Ten pictures, of which number 2 and 7 cannot be read."""
    folder = tmp_path_factory.mktemp("pictures")
    picture_folder(folder, [f"{kind}/{i}.png" for kind in ("cat", "dog") for i in range(5)])
    for broken in ("cat/2.png", "dog/2.png"):
        (folder / broken).write_bytes(b"no picture")
    return load_labelled(str(folder), resolution=32)


@pytest.fixture
def pipeline(small_pipeline):
    return small_pipeline("sd")


def assert_same(first, second, tolerance=1e-4):
    assert first.layout == second.layout and list(first.items) == list(second.items)
    for block in first.layout:
        everything = range(len(first.items))
        torch.testing.assert_close(
            first.maps(block, everything), second.maps(block, everything), atol=tolerance, rtol=tolerance
        )


def test_features_are_those_of_one_picture_alone_and_their_labels_lie_beside_them(pipeline, pictures, tmp_path):
    stored = collect_layer_features(pipeline, pictures, config(maps=True), tmp_path, settings={"model": "small"})
    assert [item["image"] for item in stored.items] == [0, 1, 3, 4, 5, 6, 8, 9]
    assert [item["labels"]["label"] for item in stored.items] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert stored.settings["classes"] == {"label": ["cat", "dog"]} and stored.settings["model"] == "small"
    shapes = models.blocks(pipeline)
    for block in LAYERS[1:3]:
        assert stored.layout[f"{block}.t25.maps"].positions == shapes[block].shape[:2]
        assert stored.layout[f"{block}.t25"] == store.BlockShape((), shapes[block].shape[2])
    for place, item in enumerate(stored.items):
        alone = denoiser.from_pictures(
            pipeline, pictures[item["image"]].pixels[None], [item["seed"]], [500], ["up_ft0"]
        ).maps["up_ft0"][0]
        torch.testing.assert_close(stored.maps("up_ft0.t500.maps", [place]), alone, atol=1e-4, rtol=1e-4)
        pooled = stored.maps("up_ft0.t500", [place])
        torch.testing.assert_close(pooled, alone.mean((1, 2)), atol=1e-4, rtol=1e-4)
    found = dataset.load_examples(stored)
    assert found.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1] and found.classes == ["cat", "dog"]


def test_neither_the_batch_nor_the_other_layers_nor_the_other_timesteps_matter(pipeline, pictures, tmp_path):
    whole = collect_layer_features(pipeline, pictures, config(), tmp_path / "whole")
    other = collect_layer_features(
        pipeline, pictures, config(batch_size=3, blocks=("up_ft0",), timesteps=(500,)), tmp_path / "other"
    )
    torch.testing.assert_close(
        whole.maps("up_ft0.t500", range(8)), other.maps("up_ft0.t500", range(8)), atol=1e-4, rtol=1e-4
    )
    assert [item["seed"] for item in whole.items] == [item["seed"] for item in other.items]


@pytest.mark.parametrize(("setting", "dies_at"), [
    ({"views": 2}, 4),  # a shard ends in the middle of a batch, since two pictures cannot be read
    ({"batch_size": 2, "items_per_shard": 2}, 5),  # of the batch that is begun again nothing is missing
])  # fmt: skip
def test_gone_on_from_a_kill_every_picture_is_there_once(pipeline, pictures, tmp_path, monkeypatch, setting, dies_at):
    whole = collect_layer_features(pipeline, pictures, config(**setting), tmp_path / "whole")
    add, calls = store.Writer.add, []

    def dying(self, maps, items):
        calls.append(len(items))
        if len(calls) == dies_at:
            raise KeyboardInterrupt
        add(self, maps, items)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(store.Writer, "add", dying)
        collect_layer_features(pipeline, pictures, config(**setting), tmp_path / "cut")
    assert 0 < len(store.open(tmp_path / "cut").items) < len(whole.items)
    assert_same(collect_layer_features(pipeline, pictures, config(**setting), tmp_path / "cut"), whole)
    assert_same(collect_layer_features(pipeline, pictures, config(**setting), tmp_path / "cut"), whole, 0)
    with pytest.raises(ValueError, match="made with other settings"):
        collect_layer_features(pipeline, pictures, config(**setting, seed=1), tmp_path / "cut")


def test_four_layers_at_six_timesteps_are_six_partial_passes_a_picture(pipeline, pictures):
    """The last of the layers ends the pass: what comes after it never runs."""
    few = replace(pictures, numbers=[0, 1, 3])
    unet, ran, finished = find_denoiser(pipeline), [], []
    handles = [
        unet.conv_in.register_forward_pre_hook(lambda module, args: ran.append(len(args[0]))),
        unet.conv_out.register_forward_pre_hook(lambda module, args: finished.append(1)),
    ]
    try:
        swept = next(feature_batches(pipeline, few, config(blocks=LAYERS, timesteps=TIMES)))
        assert sum(ran) == len(TIMES) * 3 and not finished
        assert len(swept.maps) == len(TIMES) * len(LAYERS)
        ran.clear()
        for block in LAYERS:
            for timestep in TIMES:
                alone = next(feature_batches(pipeline, few, config(blocks=(block,), timesteps=(timestep,))))
                name = layer_features.layer_name(block, timestep)
                torch.testing.assert_close(alone.maps[name], swept.maps[name], atol=1e-4, rtol=1e-4)
        assert sum(ran) == len(LAYERS) * len(TIMES) * 3
    finally:
        for handle in handles:
            handle.remove()


def test_views_are_the_picture_and_crops_of_it_each_with_its_own_noise(pipeline, pictures):
    made = next(feature_batches(pipeline, pictures, config(views=3, batch_size=6)))
    assert [(item["image"], item["view"]) for item in made.items] == [(i, v) for i in (0, 1) for v in range(3)]
    assert len({item["seed"] for item in made.items}) == 6
    plain = next(feature_batches(pipeline, pictures, config(batch_size=2)))
    torch.testing.assert_close(made.maps["up_ft0.t25"][[0, 3]], plain.maps["up_ft0.t25"], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(made.maps["up_ft0.t25"][1], made.maps["up_ft0.t25"][0], atol=1e-2)


def test_a_prompt_is_empty_the_same_for_all_or_names_the_truth(small_pipeline, pictures, monkeypatch):
    used_prompts = []
    plain = denoiser.from_pictures

    def noted(*args, **kwargs):
        used_prompts.append(kwargs["prompts"])
        return plain(*args, **kwargs)

    monkeypatch.setattr(layer_features.activations, "from_pictures", noted)
    for name, prompt, expected in (
        ("sd", "", None), ("sd", "a pet", ["a pet"] * 3), ("sd", "a {label}", ["a cat"] * 3), ("dit", "7", ["7"] * 3),
        ("dit", "{label}", ["0"] * 3),
    ):  # fmt: skip
        layer = "block1" if name == "dit" else "up_ft0"
        next(feature_batches(small_pipeline(name), pictures, config(blocks=(layer,), prompt=prompt)))
        assert used_prompts.pop() == expected
    monkeypatch.setattr(small_pipeline("dit"), "labels", {"dog": 0, "cat": 1})
    next(feature_batches(small_pipeline("dit"), pictures, config(blocks=("block1",), prompt="{label}")))
    assert used_prompts.pop() == ["cat"] * 3
    with pytest.raises(ValueError, match=r"^prompt .*unknown name 'breed'.*label"):
        next(feature_batches(small_pipeline("sd"), pictures, config(prompt="a {breed}")))


def test_with_clip_the_prompt_names_what_it_infers(small_pipeline, pictures, clip_folder, monkeypatch, tmp_path):
    used_prompts, plain = [], denoiser.from_pictures
    monkeypatch.setattr(
        layer_features.activations,
        "from_pictures",
        lambda *args, **kwargs: used_prompts.append(kwargs["prompts"]) or plain(*args, **kwargs),
    )
    told = config(prompt="a photo of a {label}", clip=str(clip_folder), timesteps=(25,), blocks=("up_ft0",), views=2)
    stored = collect_layer_features(small_pipeline("sd"), pictures, told, tmp_path)
    texts = {"label": ["a photo of a cat", "a photo of a dog"]}
    names = ZeroShotClip(load_clip(str(clip_folder), device="cpu"), texts)
    whole = {item["image"]: names.classify(pictures[item["image"]].pixels[None])[0] for item in stored.items}
    assert [item["inferred"] for item in stored.items] == [whole[item["image"]] for item in stored.items]
    said = [text for texts in used_prompts[1:] for text in texts]  # the first batch is seen twice, for its shapes
    assert said == [texts["label"][item["inferred"]["label"]] for item in stored.items]
    right = [item["inferred"] == item["labels"] for item in stored.items if item["view"] == 0]
    assert layer_features.clip_accuracies(stored) == {"label": sum(right) / 8}
    assert stored.settings["clip"] == str(clip_folder)
    with pytest.raises(ValueError, match=r"^prompt: with clip it must have one or more of label in braces"):
        collect_layer_features(small_pipeline("sd"), pictures, replace(told, prompt="a pet"), tmp_path / "other")
    assert layer_features.clip_accuracies(planted_pictures.fill(tmp_path / "plain", planted_pictures.labels(3))) == {}


def test_nothing_to_read_and_nonsense_are_refused(pipeline, tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "0.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"no picture of .* can be read"):
        collect_layer_features(
            pipeline, load_labelled(str(tmp_path), resolution=32, labels=False), config(), tmp_path / "stored"
        )
    for wrong in ({"blocks": ()}, {"timesteps": (5, 5)}, {"views": 0}, {"smallest_crop": 0.0}, {"side": "left"}):
        with pytest.raises(ValueError, match=f"^{next(iter(wrong))}"):
            config(**wrong)
    with pytest.raises(ValueError, match=r"^stored_precision: unknown name 'float8'"):
        config(precision="float8")


def test_names_of_layers_and_timesteps_come_apart_again():
    assert layer_features.layer_name("up_ft1", 25) == "up_ft1.t25"
    for block in ("up_ft1", "down.1.t", "up_blocks.1.attentions.0"):
        assert layer_features.split_layer_name(layer_features.layer_name(block, 500)) == (block, 500)


def test_other_pictures_or_another_model_than_a_stores_are_refused(pipeline, pictures, tmp_path):
    stored = collect_layer_features(pipeline, pictures, config(timesteps=(25,)), tmp_path, settings={"model": "small"})
    assert layer_features.pooled_layers(stored) == ["bottleneck.t25", "up_ft0.t25"]
    layer_features.require_same_source(stored, pictures, {"model": "small"}, "activations")
    for other, model, message in (
        (pictures, "large", "model: 'large', but activations was made with 'small'"),
        (replace(pictures, name="p"), "small", "activations: made with dataset .*, here it is 'p'"),
        (replace(pictures, resolution=8), "small", "resolution: 8, but activations was made with 32"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            layer_features.require_same_source(stored, other, {"model": model}, "activations")


def test_shares_are_those_of_the_planted_factor(tmp_path):
    truth = planted_pictures.labels(40)
    stored = planted_pictures.fill(tmp_path / "stored", truth)
    found = {factor: dataset.load_examples(stored, factor) for factor in planted_pictures.CLASSES}
    row = layer_features.class_shares(found, ["up.t25"]).iloc[0]
    assert row["layer"] == "up.t25" and row["shape"] > 0.8 and abs(row["colour"]) < 0.15
    assert row["shape"] == class_share(np.asarray(stored.maps("up.t25", range(40))), [one["shape"] for one in truth])


def test_whole_maps_of_a_few_pictures_are_those_of_the_store(pipeline, pictures, tmp_path):
    chosen = config(maps=True, timesteps=(25,), batch_size=3)
    images, maps = layer_features.maps_in_memory(pipeline, pictures, chosen)
    stored = collect_layer_features(pipeline, pictures, chosen, tmp_path)
    assert images == [item["image"] for item in stored.items] and list(maps) == layer_features.pooled_layers(stored)
    for layer, one in maps.items():
        assert torch.equal(one, stored.maps(layer + layer_features.MAPS, range(8)))


def test_the_estimate_is_what_is_then_written(pipeline, pictures, tmp_path):
    chosen = config(maps=True, views=2)
    plan, layout = layer_features.estimate(pipeline, pictures, chosen, tmp_path / "store")
    stored = collect_layer_features(pipeline, pictures, chosen, tmp_path / "store", layout=layout)
    assert stored.layout == layout and plan.items == 20 and plan.seconds > 0 and plan.memory > 0
    share = len(stored.items) / plan.items
    assert share == 0.8, "two of ten pictures cannot be read"
    assert {layer: round(share * rows) for layer, rows in plan.rows.items()} == {
        layer: stored.rows(layer) for layer in layout
    }
    assert plan.total_bytes == sum(20 * shape.count * shape.width * 4 for shape in layout.values())


def test_a_store_is_of_the_model_whose_files_made_it(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    model = {"name": "local", "sha256": layer_features.files_digest(tmp_path / "model"), "precision": "float32"}
    stored = planted_pictures.fill(tmp_path / "store", planted_pictures.labels(3), model=model)
    (tmp_path / "model").rename(tmp_path / "moved")
    layer_features.require_same_model(stored, str(tmp_path / "moved"), "activations")
    with pytest.raises(ValueError, match=r"^model: 'embedded', but activations was made with 'local'"):
        layer_features.require_same_model(stored, "embedded", "activations")
    (tmp_path / "moved" / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"^model: .*sha256"):
        layer_features.require_same_model(stored, str(tmp_path / "moved"), "activations")
    layer_features.require_same_setting(stored, "model", model, "activations")
    other = {**model, "precision": "float16"}
    with pytest.raises(
        ValueError, match=r"^model: {'precision': 'float16'}, but activations was made with {'precision': 'float32'}"
    ):
        layer_features.require_same_setting(stored, "model", other, "activations")


def test_maps_that_the_memory_cannot_hold_are_refused(pipeline, pictures):
    many = replace(pictures, numbers=range(10**12))
    with pytest.raises(ValueError, match=r"^max_images: their maps take [\d,.]+ GB of memory"):
        layer_features.maps_in_memory(pipeline, many, config(maps=True))
