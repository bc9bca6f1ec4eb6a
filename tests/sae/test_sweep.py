"""A sweep of autoencoders: the grid, held-out vectors, tables, and a finished run read back beside its baselines."""

import re
import shutil

import pandas as pd
import pytest
import torch
from small_features import collect_small

from vaelab import models, store
from vaelab.activations import collect
from vaelab.activations.collect import CollectConfig
from vaelab.activations.denoiser import Sampling
from vaelab.core.io import write_json
from vaelab.data.prompts import Prompts, load_prompts
from vaelab.sae import baselines, sweep
from vaelab.sae.model import SAE
from vaelab.store.format import BlockShape

IDENTITY = {"kind": "pipeline", "name": "local", "variant": "", "precision": "float32", "sha256": "a1" * 32}
OTHER_WEIGHTS = IDENTITY | {"sha256": "b2" * 32}
SOURCE = {"identity": IDENTITY, "dataset": "world", "split": "train"}
BLOCK, OTHER, WIDTH = "up.1.1", "up.1.2", 16
SIZES = [(2, 8), (2, 24), (4, 8), (4, 24)]
LAYOUT = {"down.1.1": BlockShape((8, 8), 32), "up.0.1": BlockShape((8, 8), 16)}
ITEM = {"prompt": "a star", "seed": 0, "timestep": 9}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small_pipeline):
    """The folder of a run with two blocks and two seeds, as notebook 31 leaves it."""
    folder = tmp_path_factory.mktemp("run")
    pipeline = small_pipeline("sd2")
    stored = collect_small(pipeline, folder / "activations", (BLOCK, OTHER), 2, settings=SOURCE)
    others = sweep.held_out_prompts(stored.settings, "world", "train", 1)
    sweep.collect_held_out(stored, pipeline, IDENTITY, others, folder / "held_out", blocks=[BLOCK, OTHER], batch_size=1)
    specs = sweep.build_grid(stored.layout, [BLOCK, OTHER], [2, 4], [8, 24], [5, 6])
    saes = {name: SAE(one.config, one.seed) for name, one in specs.items()}
    sweep.save_sweep(saes, specs, stored, folder / "saes")
    rows = [{"block": one.block, "k": one.config.k, "n_features": one.config.n_features, "seed": one.seed, "name": name}
            for name, one in specs.items()]  # fmt: skip
    write_json(folder / "results.json", {"notebook": "31_train_sae", "tables": {"saes": rows}})
    return folder


@pytest.fixture
def found(finished, small_pipeline):
    return sweep.load_sweep(str(finished), IDENTITY, small_pipeline("sd2"))


def test_a_finished_run_is_read(found, finished):
    assert found.blocks == [BLOCK, OTHER] and found.sizes() == SIZES and found.source.items() >= SOURCE.items()
    assert found.widths == {BLOCK: WIDTH, OTHER: WIDTH} and found.held_out.rows(BLOCK) == 2 * 16 * 16
    chosen = found.dictionaries([OTHER], (4, 24), others=True, seed=1)
    assert list(chosen) == [(OTHER, "sae", *size) for size in [SIZES[3], *SIZES[:3]]] + [
        (OTHER, who, 4, 24) for who in ("zero", "mean", "random", "pca")
    ]
    first_seed = SAE(chosen[OTHER, "sae", 2, 8].config, seed=5)
    assert torch.equal(chosen[OTHER, "sae", 2, 8].features(), first_seed.features())
    stored = store.open(finished / "activations")
    measured = baselines.moments(sweep.iterate_vectors(stored, OTHER))
    pca, again = chosen[OTHER, "pca", 4, 24], baselines.PrincipalComponents(measured, 4)
    assert torch.equal(pca.features(), again.features()) and torch.equal(pca.mean, again.mean)
    assert len(found.dictionaries([BLOCK, OTHER], (4, 24), others=False, seed=1)) == 10


def test_one_size_and_some_names_are_selected(found):
    chosen = found.dictionaries([BLOCK], (2, 8), others=True, seed=1)
    assert list(sweep.select_methods(chosen, ["sae", "pca"], (2, 8))) == [(BLOCK, "sae", 2, 8), (BLOCK, "pca", 2, 8)]
    with pytest.raises(ValueError, match=r"by_step: unknown name 'zeros'.*zero"):
        sweep.select_methods(chosen, ["zeros"], (2, 8))


def test_methods_are_evaluated_on_the_held_out_vectors_of_their_block(found):
    chosen = found.dictionaries([BLOCK, OTHER], (2, 8), others=False, seed=1)
    table = sweep.evaluate_methods(chosen, found.held_out)
    assert table[sweep.METHOD_KEY].to_numpy().tolist() == [list(key) for key in chosen]
    metrics = sweep.methods_metrics(table.assign(lpips="not measured"), (2, 8))
    assert {f"{BLOCK}.explained_variance", f"{OTHER}.pca.l0", f"{BLOCK}.zero.dead_fraction"} <= metrics.keys()
    assert metrics[f"{OTHER}.pca.l0"] == 2 and metrics[f"{OTHER}.mean.l0"] == 0
    assert abs(metrics[f"{BLOCK}.mean.explained_variance"]) < 0.1
    assert not any("lpips" in name for name in metrics)
    assert sweep.methods_metrics(table, (4, 24)) == {}


def test_an_unfinished_run_another_model_size_block_or_side_is_refused(
    found, finished, small_pipeline, pipeline_folder, tmp_path
):
    pipeline, retrained = small_pipeline("sd2"), models.load_pipeline(str(pipeline_folder("sd2")), device="cpu")
    with torch.no_grad():
        for weight in retrained.unet.up_blocks.parameters():
            weight.mul_(1.5)
    with pytest.raises(ValueError, match="holds no finished run of 31_train_sae; run it first"):
        sweep.load_sweep("outputs/31_train_sae/never", IDENTITY, pipeline)
    write_json(tmp_path / "results.json", {"notebook": "30_collect_activations", "tables": {}})
    with pytest.raises(ValueError, match=r"^saes: .* holds no finished run of 31_train_sae"):
        sweep.load_sweep(str(tmp_path), IDENTITY, pipeline)
    message = r"saes: .* was collected from local \(a1a1a1a1a1a1\); the parameters .* say local \(b2b2b2b2b2b2\)"
    with pytest.raises(ValueError, match=message):
        sweep.load_sweep(str(finished), OTHER_WEIGHTS, pipeline)
    with pytest.raises(ValueError, match=re.escape("the run has none of 7 and 8; it has 2 and 8, 2 and 24")):
        found.dictionaries([BLOCK], (7, 8), others=False, seed=0)
    with pytest.raises(ValueError, match=r"blocks \(of the autoencoders\): unknown name 'up.1.0'.*up.1.1"):
        found.dictionaries(["up.1.0"], (2, 8), others=False, seed=0)
    opened = sweep.open_sweep(str(finished))  # without a model
    assert opened.validate([], (2, 8)) == [BLOCK, OTHER] and opened.validate([OTHER], (2, 24)) == [OTHER]
    with pytest.raises(ValueError, match=r"blocks \(of the autoencoders\): unknown name 'up.1.0'"):
        opened.validate(["up.1.0"], (2, 8))
    with pytest.raises(ValueError, match=r"saes: .*held_out was collected with other weights than local \(.* has now"):
        sweep.load_sweep(str(finished), IDENTITY, retrained)
    other_side = shutil.copytree(finished, tmp_path / "run")
    write_json(other_side / "saes" / "source.json", {**found.source, "side": "output"})
    with pytest.raises(ValueError, match="trained on the output of blocks; only an update"):
        sweep.load_sweep(str(other_side), IDENTITY, pipeline)


def test_a_reconstruction_goes_into_the_model(found, small_pipeline):
    from vaelab import activations
    from vaelab.sae import interventions

    prompts = load_prompts("world", count=2).texts
    chosen, sampling = found.dictionaries([BLOCK], (2, 8), others=False, seed=1), activations.Sampling(2, 2.0)
    pipeline = small_pipeline("sd2")
    made = {
        who: interventions.generate_with_replacement(
            pipeline, prompts, block, baselines.reconstruction_function(one), sampling
        )
        for (block, who, *_), one in chosen.items()
    }
    whole = activations.generate_all(pipeline, prompts, sampling)
    assert all(torch.isfinite(one).all() and not torch.equal(one, whole) for one in made.values())
    assert not torch.equal(made["zero"], made["mean"])
    every_component = baselines.PrincipalComponents(
        baselines.moments(sweep.iterate_vectors(found.held_out, BLOCK)), WIDTH
    )
    same = interventions.generate_with_replacement(
        pipeline, prompts, BLOCK, baselines.reconstruction_function(every_component), sampling
    )
    torch.testing.assert_close(same, whole, rtol=0, atol=1e-4)


def test_the_grid_has_every_combination_once_of_each_blocks_width():
    specs = sweep.build_grid(LAYOUT, list(LAYOUT), [2, 4], [8, 64], [0, 3], aux_weight=0.5)
    assert len(specs) == 16
    one = specs["up.0.1-k4-n64-s3"]
    assert (one.block, one.seed) == ("up.0.1", 3)
    assert (one.config.d, one.config.n_features, one.config.k, one.config.aux_weight) == (16, 64, 4, 0.5)
    assert specs["down.1.1-k2-n8-s0"].config.d == 32


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
        sweep.build_grid(LAYOUT, *given)


def source_of(dataset, split, count, **options):
    """The settings of a store that was collected from the first prompts of a data set."""
    prompts = load_prompts(dataset, split=split, count=count, **options)
    digest = collect.prompts_digest(prompts.texts, prompts.rows)
    return {"prompts": len(prompts.texts), "prompts_sha256": digest, "dataset": dataset, "split": split}


def test_held_out_prompts_are_those_that_follow_the_stores():
    source = source_of("world", "train", 5)
    same_split = sweep.held_out_prompts(source, "world", "train", 3)
    assert same_split.rows == [5, 6, 7] and same_split.scenes == load_prompts("world", count=8).scenes[5:]
    assert sweep.held_out_prompts(source, "world", "test", 3).rows == [0, 1, 2]
    with pytest.raises(ValueError, match="max_images: must be at least 1"):
        sweep.held_out_prompts(source, "world", "test", 0)


def test_held_out_prompts_do_not_overlap_however_the_data_set_is_spelled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\nthree\nfour\n")
    (tmp_path / "link.txt").symlink_to("prompts.txt")
    shutil.copy(tmp_path / "prompts.txt", tmp_path / "copy.txt")
    source = source_of("prompts.txt", "train", 2)
    for name in ("prompts.txt", "./prompts.txt", str(tmp_path / "prompts.txt"), "link.txt", "copy.txt"):
        for split in ("train", "test"):  # a single file is one split
            held_out = sweep.held_out_prompts(source, name, split, 9)
            assert (held_out.texts, held_out.rows) == (["three", "four"], [3, 4]), (name, split)
    (tmp_path / "other.txt").write_text("five\nsix\nseven\n")
    assert sweep.held_out_prompts(source, "other.txt", "train", 2).texts == ["five", "six"]


def test_held_out_prompts_of_another_column_or_revision_of_the_stores_split_are_refused(tmp_path, monkeypatch):
    table = pd.DataFrame({"prompt": ["a", "", "c", "d"], "caption": ["A", "B", "C", "D"]})
    table.to_parquet(tmp_path / "prompts.parquet")
    name = str(tmp_path / "prompts.parquet")
    source = source_of(name, "train", 2)
    assert sweep.held_out_prompts(source, name, "train", 5, "prompt").texts == ["d"]
    with pytest.raises(
        ValueError, match=r"^column: .* not from its first 2 prompts with this column and dataset_revis"
    ):
        sweep.held_out_prompts(source, name, "train", 5, "caption")
    revisions = {None: list("abcde"), "v1": list("zabcd")}

    def on_the_hub(dataset, *, split, count, column, revision):
        texts = [f"{split} {text}" for text in revisions[revision]][:count]
        return Prompts(texts, list(range(len(texts))), dataset, split)

    monkeypatch.setattr(sweep, "load_prompts", on_the_hub)
    digest = collect.prompts_digest(["train a", "train b"], [0, 1])
    source = {"prompts": 2, "prompts_sha256": digest, "dataset": "some/prompts", "split": "train"}
    assert sweep.held_out_prompts(source, "some/prompts", "train", 2).texts == ["train c", "train d"]
    assert sweep.held_out_prompts(source, "some/prompts", "test", 2).texts == ["test a", "test b"]
    assert sweep.held_out_prompts(source, "other/prompts", "train", 2, revision="v1").texts == ["train z", "train a"]
    with pytest.raises(ValueError, match=r"^column: the activations were collected from 'some/prompts'"):
        sweep.held_out_prompts(source, "some/prompts", "train", 2, revision="v1")


def test_a_data_set_without_prompts_beyond_the_stores_is_refused(tmp_path):
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    name = str(tmp_path / "prompts.txt")
    with pytest.raises(ValueError, match="has no prompt in 'train' beyond those that the activations"):
        sweep.held_out_prompts(source_of(name, "train", 2), name, "train", 3)


@pytest.fixture
def stored(tmp_path, small_pipeline):
    """A store of two prompts' updates at one step, both halves."""
    pipeline, prompts = small_pipeline("sd2"), load_prompts("world", count=2)
    config = CollectConfig((BLOCK,), Sampling(2, 2.0), steps=(1,), halves="both", batch_size=2, precision="float32")
    layout, per_prompt, _ = collect.run_trial_batch(pipeline, prompts.texts, config)
    return collect.collect_prompts(
        pipeline, prompts.texts, config, tmp_path / "stored", layout=layout, items_per_prompt=per_prompt,
        rows=prompts.rows, settings=SOURCE,
    )  # fmt: skip


def test_held_out_vectors_have_the_stores_settings_other_prompts_and_other_noise(stored, tmp_path, small_pipeline):
    prompts = sweep.held_out_prompts(stored.settings, "world", "train", 3)
    made = sweep.collect_held_out(
        stored,
        small_pipeline("sd2"),
        IDENTITY,
        prompts,
        tmp_path / "held_out",
        blocks=[BLOCK],
        batch_size=3,
    )
    assert made.layout == stored.layout and made.precision == "float32"
    items = [(item["row"], item["seed"], item["step"], item["guided"]) for item in made.items]
    assert items == [(row, row, 1, guided) for row in (2, 3, 4) for guided in (True, False)]
    again = collect.capture_batches(small_pipeline("sd2"), prompts.texts, CollectConfig(
        (BLOCK,), Sampling(2, 2.0), steps=(1,), halves="both", batch_size=3, seed=2))  # fmt: skip
    torch.testing.assert_close(made.maps(BLOCK, range(6)), next(again).maps[BLOCK], rtol=0, atol=0)


def test_held_out_vectors_are_not_resumed_with_another_revision_or_precision(stored, tmp_path, small_pipeline):
    """A held-out store that was interrupted is resumed by the same model only; vectors of two models are not mixed."""
    pipeline, prompts = small_pipeline("sd2"), sweep.held_out_prompts(stored.settings, "world", "train", 3)
    given = {"blocks": [BLOCK], "batch_size": 1}
    whole = sweep.collect_held_out(stored, pipeline, IDENTITY, prompts, tmp_path / "whole", **given)

    class Interrupted(Exception):
        pass

    def collect_one(self, *batch, add=store.Writer.add):
        if self.items_done:
            raise Interrupted
        add(self, *batch)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(store.Writer, "add", collect_one)
        sweep.collect_held_out(stored, pipeline, IDENTITY, prompts, tmp_path / "held_out", **given)
    with pytest.raises(ValueError, match="identity"):
        sweep.collect_held_out(
            stored, pipeline, IDENTITY | {"precision": "bfloat16"}, prompts, tmp_path / "held_out", **given
        )
    stored.settings["identity"] = OTHER_WEIGHTS  # the training vectors were collected again, with another revision
    with pytest.raises(ValueError, match="identity"):
        sweep.collect_held_out(stored, pipeline, OTHER_WEIGHTS, prompts, tmp_path / "held_out", **given)
    stored.settings["identity"] = IDENTITY
    again = sweep.collect_held_out(stored, pipeline, IDENTITY, prompts, tmp_path / "held_out", **given)
    assert again.settings["identity"] == IDENTITY
    assert torch.equal(again.maps(BLOCK, range(6)), whole.maps(BLOCK, range(6)))


def test_a_store_of_another_model_or_of_unknown_origin_is_refused(stored, tmp_path, small_pipeline, pipeline_folder):
    given = {"blocks": [BLOCK], "batch_size": 2}
    prompts = load_prompts("world", count=1)
    for changes, words in (
        ({"sha256": "b2" * 32}, r"local \(b2b2b2b2b2b2\)"),
        ({"variant": "ema"}, r"local \(a1a1a1a1a1a1, variant ema\)"),
        ({"name": "some/model", "sha256": None, "commit": "c3" * 20}, r"some/model \(c3c3c3c3c3c3\)"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^activations: .* was collected from local .* and variant say {words}"):
            sweep.collect_held_out(
                stored, small_pipeline("sd2"), IDENTITY | changes, prompts, tmp_path / "out", **given
            )
    changed = models.load_pipeline(str(pipeline_folder("sd2")), device="cpu")
    with torch.no_grad():
        for weight in changed.unet.parameters():
            weight.mul_(1.5)
    with pytest.raises(ValueError, match=r"collected with other weights than local \(a1a1a1a1a1a1\) has now"):
        sweep.collect_held_out(stored, changed, IDENTITY, prompts, tmp_path / "out", **given)
    with store.create(tmp_path / "foreign", LAYOUT, settings={"identity": IDENTITY}) as writer:
        writer.add({name: torch.zeros(1, 8, 8, one.width) for name, one in LAYOUT.items()}, [ITEM])
    with pytest.raises(ValueError, match="does not say how it was collected"):
        sweep.collect_held_out(store.open(tmp_path / "foreign"), None, IDENTITY, prompts, tmp_path / "out", **given)


def test_vectors_are_iterated_once_each_up_to_a_number(stored):
    rows = stored.rows(BLOCK)
    whole = torch.cat(list(sweep.iterate_vectors(stored, BLOCK)))
    assert whole.shape == (rows, stored.layout[BLOCK].width)
    expected = stored.maps(BLOCK, range(len(stored.items))).flatten(0, -2)
    assert torch.equal(whole.sort(0).values, expected.sort(0).values)
    assert torch.equal(torch.cat(list(sweep.iterate_vectors(stored, BLOCK, 7))), whole[:7])


def test_autoencoders_are_measured_on_their_own_block_and_averaged_over_seeds(stored):
    specs = sweep.build_grid(stored.layout, [BLOCK], [2], [16, 32], [0, 1])
    saes = {name: SAE(one.config, one.seed) for name, one in specs.items()}
    table = sweep.evaluate_saes(saes, specs, stored)
    assert table["name"].tolist() == list(specs) and table["seed"].tolist() == [0, 1, 0, 1]
    name = f"{BLOCK}-k2-n32-s1"
    x = torch.cat(list(sweep.iterate_vectors(stored, BLOCK))).double()
    left = (x - saes[name](x.float()).double()).square().sum() / (x - x.mean(0)).square().sum()
    row = table.set_index("name").loc[name]
    assert row["explained_variance"] == pytest.approx(1 - left.item(), abs=1e-6) and row["l0"] <= 2
    means = sweep.mean_over_seeds(table, ["explained_variance", "l0", "dead_fraction"])
    assert means["seeds"].tolist() == [2, 2]
    first = table["explained_variance"][:2]
    assert means["explained_variance"][0] == pytest.approx(first.mean())
    assert means["spread"][0] == pytest.approx(first.max() - first.min())
    assert f"{BLOCK}.k2.n16.explained_variance" in sweep.sizes_metrics(means)


def test_a_history_gets_the_columns_of_its_autoencoders():
    specs = sweep.build_grid(LAYOUT, ["up.0.1"], [2], [8, 16], [0])
    history = pd.DataFrame({"step": [1, 1], "sae": list(specs), "loss": [1.0, 2.0]})
    labelled = sweep.label_history(history, specs)
    assert labelled[["block", "k", "n_features", "seed"]].to_numpy().tolist() == [
        ["up.0.1", 2, 8, 0],
        ["up.0.1", 2, 16, 0],
    ]
