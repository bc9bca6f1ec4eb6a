"""The grid that is trained, the vectors that are held out, and the tables of both."""

import pandas as pd
import pytest
import torch

from vaelab import collect, models, prompts, sae_grid, store
from vaelab.collect import CollectConfig
from vaelab.denoise import Sampling
from vaelab.sae import SAE
from vaelab.store import BlockShape

LAYOUT = {"down.1.1": BlockShape((8, 8), 32), "up.0.1": BlockShape((8, 8), 16)}
BLOCK = "up.1.1"
ITEM = {"prompt": "a star", "seed": 0, "timestep": 9}


def test_the_grid_has_every_combination_once_of_each_blocks_width():
    wanted = sae_grid.grid(LAYOUT, list(LAYOUT), [2, 4], [8, 64], [0, 3], aux_weight=0.5)
    assert len(wanted) == 16
    one = wanted["up.0.1-k4-n64-s3"]
    assert (one.block, one.seed) == ("up.0.1", 3)
    assert (one.config.d, one.config.n_features, one.config.k, one.config.aux_weight) == (16, 64, 4, 0.5)
    assert wanted["down.1.1-k2-n8-s0"].config.d == 32


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((["up.0.2"], [2], [8], [0]), r"blocks \(of the activations\): unknown name 'up.0.2'.*up.0.1"),
        (([], [2], [8], [0]), "blocks: expected one or more different"),
        ((["up.0.1"], [2, 2], [8], [0]), r"k: expected one or more different values, got \[2, 2\]"),
        ((["up.0.1"], [2, 9], [8], [0]), "k: 9 active features of 8"),
        ((["up.0.1"], [2], [8], []), "seeds: expected one or more"),
        ((["up.0.1"], [2], [8], [0], "topkk"), "kind: unknown name 'topkk'.*batchtopk"),
    ],
)
def test_a_wrong_grid_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        sae_grid.grid(LAYOUT, *given)


def test_held_out_prompts_are_others():
    source = {"prompts": 5, "dataset": "world", "split": "train"}
    same_split = sae_grid.other_prompts(source, "world", "train", 3)
    assert same_split.rows == [5, 6, 7] and same_split.scenes == prompts.load_prompts("world", count=8).scenes[5:]
    assert sae_grid.other_prompts(source, "world", "test", 3).rows == [0, 1, 2]
    with pytest.raises(ValueError, match="max_images: must be at least 1"):
        sae_grid.other_prompts(source, "world", "test", 0)


def test_a_data_set_that_was_used_up_is_refused(tmp_path):
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    name = str(tmp_path / "prompts.txt")
    source = {"prompts": 2, "dataset": name, "split": "train"}
    with pytest.raises(ValueError, match="has no prompt of 'train' but those that"):
        sae_grid.other_prompts(source, name, "train", 3)


@pytest.fixture
def kept(tmp_path, small_pipeline):
    """A store of two prompts' updates at one step, both halves."""
    pipeline, asked = small_pipeline("sd2"), prompts.load_prompts("world", count=2)
    config = CollectConfig((BLOCK,), Sampling(2, 2.0), steps=(1,), halves="both", batch_size=2, precision="float32")
    layout, per_prompt, _ = collect.probe(pipeline, asked.texts, config)
    return collect.collect(
        pipeline, asked.texts, config, tmp_path / "kept", layout=layout, items_per_prompt=per_prompt, rows=asked.rows,
        settings={"model": "sd2", "dataset": "world", "split": "train"},
    )  # fmt: skip


def test_held_out_vectors_are_made_as_the_stores_were_of_other_prompts_and_noise(kept, tmp_path, small_pipeline):
    asked = sae_grid.other_prompts(kept.settings, "world", "train", 3)
    made = sae_grid.hold_out(
        kept, small_pipeline("sd2"), "sd2", asked, tmp_path / "held_out", blocks=[BLOCK], batch_size=3
    )
    assert made.layout == kept.layout and made.precision == "float32"
    told = [(item["row"], item["seed"], item["step"], item["guided"]) for item in made.items]
    assert told == [(row, row, 1, guided) for row in (2, 3, 4) for guided in (True, False)]
    again = collect.captures(small_pipeline("sd2"), asked.texts, CollectConfig(
        (BLOCK,), Sampling(2, 2.0), steps=(1,), halves="both", batch_size=3, seed=2))  # fmt: skip
    torch.testing.assert_close(made.maps(BLOCK, range(6)), next(again).maps[BLOCK], rtol=0, atol=0)


def test_a_store_of_another_model_or_of_nobody_knows_what_is_refused(kept, tmp_path, small_pipeline, pipeline_folder):
    given = {"blocks": [BLOCK], "batch_size": 2}
    asked = prompts.load_prompts("world", count=1)
    with pytest.raises(ValueError, match="activations: of the model 'sd2'; expected 'embedded'"):
        sae_grid.hold_out(kept, small_pipeline("sd2"), "embedded", asked, tmp_path / "out", **given)
    changed = models.load_pipeline(str(pipeline_folder("sd2")), device="cpu")
    with torch.no_grad():
        for weight in changed.unet.parameters():
            weight.mul_(1.5)
    with pytest.raises(ValueError, match="made with other weights than 'sd2' has now: its first item"):
        sae_grid.hold_out(kept, changed, "sd2", asked, tmp_path / "out", **given)
    with store.create(tmp_path / "foreign", LAYOUT, settings={"model": "sd2"}) as writer:
        writer.add({name: torch.zeros(1, 8, 8, one.width) for name, one in LAYOUT.items()}, [ITEM])
    with pytest.raises(ValueError, match="does not say how it was collected"):
        sae_grid.hold_out(store.open(tmp_path / "foreign"), None, "sd2", asked, tmp_path / "out", **given)


def test_so_many_vectors_and_each_once(kept):
    rows = kept.rows(BLOCK)
    whole = torch.cat(list(sae_grid.vectors(kept, BLOCK)))
    assert whole.shape == (rows, kept.layout[BLOCK].width)
    stored = kept.maps(BLOCK, range(len(kept.items))).flatten(0, -2)
    assert torch.equal(whole.sort(0).values, stored.sort(0).values)
    assert torch.equal(torch.cat(list(sae_grid.vectors(kept, BLOCK, 7))), whole[:7])


def test_autoencoders_are_measured_on_their_own_block_and_averaged_over_seeds(kept):
    wanted = sae_grid.grid(kept.layout, [BLOCK], [2], [16, 32], [0, 1])
    saes = {name: SAE(one.config, one.seed) for name, one in wanted.items()}
    table = sae_grid.measure(saes, wanted, kept)
    assert table["name"].tolist() == list(wanted) and table["seed"].tolist() == [0, 1, 0, 1]
    name = f"{BLOCK}-k2-n32-s1"
    x = torch.cat(list(sae_grid.vectors(kept, BLOCK))).double()
    left = (x - saes[name](x.float()).double()).square().sum() / (x - x.mean(0)).square().sum()
    row = table.set_index("name").loc[name]
    assert row["explained_variance"] == pytest.approx(1 - left.item(), abs=1e-6) and row["l0"] <= 2
    means = sae_grid.over_seeds(table, ["explained_variance", "l0", "dead_fraction"])
    assert means["seeds"].tolist() == [2, 2]
    first = table["explained_variance"][:2]
    assert means["explained_variance"][0] == pytest.approx(first.mean())
    assert means["spread"][0] == pytest.approx(first.max() - first.min())
    assert f"{BLOCK}.k2.n16.explained_variance" in sae_grid.by_size(means)


def test_a_history_is_told_apart():
    wanted = sae_grid.grid(LAYOUT, ["up.0.1"], [2], [8, 16], [0])
    history = pd.DataFrame({"step": [1, 1], "sae": list(wanted), "loss": [1.0, 2.0]})
    told = sae_grid.described(history, wanted)
    assert told[["block", "k", "n_features", "seed"]].to_numpy().tolist() == [["up.0.1", 2, 8, 0], ["up.0.1", 2, 16, 0]]
