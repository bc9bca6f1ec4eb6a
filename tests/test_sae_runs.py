"""Autoencoders that a run left, read again beside their baselines."""

import re
import shutil

import pytest
import torch

from vaelab import baselines, collect, models, prompts, sae_grid, sae_runs, store
from vaelab.collect import CollectConfig
from vaelab.denoise import Sampling
from vaelab.files import write_json
from vaelab.sae import SAE

SOURCE = {"model": "sd2", "dataset": "world", "split": "train"}
BLOCK, OTHER, WIDTH = "up.1.1", "up.1.2", 16
SIZES = [(2, 8), (2, 24), (4, 8), (4, 24)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small_pipeline):
    """The folder of a run with two blocks and two seeds, as notebook 31 leaves it."""
    folder = tmp_path_factory.mktemp("run")
    pipeline, asked = small_pipeline("sd2"), prompts.load_prompts("world", count=2)
    config = CollectConfig((BLOCK, OTHER), Sampling(1, 2.0), halves="both")
    layout, per_prompt, _ = collect.probe(pipeline, asked.texts, config)
    kept = collect.collect(
        pipeline, asked.texts, config, folder / "activations", layout=layout, items_per_prompt=per_prompt,
        settings=SOURCE,
    )  # fmt: skip
    others = sae_grid.other_prompts(kept.settings, "world", "train", 1)
    sae_grid.hold_out(kept, pipeline, "sd2", others, folder / "held_out", blocks=[BLOCK, OTHER], batch_size=1)
    wanted = sae_grid.grid(layout, [BLOCK, OTHER], [2, 4], [8, 24], [5, 6])
    saes = {name: SAE(one.config, one.seed) for name, one in wanted.items()}
    sae_runs.keep(saes, wanted, kept, folder / "saes")
    rows = [{"block": one.block, "k": one.config.k, "n_features": one.config.n_features, "seed": one.seed, "name": name}
            for name, one in wanted.items()]  # fmt: skip
    write_json(folder / "results.json", {"notebook": "31_train_sae", "tables": {"saes": rows}})
    return folder


@pytest.fixture
def found(finished, small_pipeline):
    return sae_runs.read(str(finished), "sd2", small_pipeline("sd2"))


def test_what_was_kept_is_read(found, finished):
    assert found.blocks == [BLOCK, OTHER] and found.sizes() == SIZES and found.source.items() >= SOURCE.items()
    assert found.widths == {BLOCK: WIDTH, OTHER: WIDTH} and found.held_out.rows(BLOCK) == 2 * 16 * 16
    chosen = found.dictionaries([OTHER], (4, 24), others=True, seed=1)
    assert list(chosen) == [(OTHER, "sae", *size) for size in [SIZES[3], *SIZES[:3]]] + [
        (OTHER, who, 4, 24) for who in ("zero", "mean", "random", "pca")
    ]
    first_seed = SAE(chosen[OTHER, "sae", 2, 8].config, seed=5)
    assert torch.equal(chosen[OTHER, "sae", 2, 8].features(), first_seed.features())
    kept = store.open(finished / "activations")
    measured = baselines.moments(sae_grid.vectors(kept, OTHER))
    pca, again = chosen[OTHER, "pca", 4, 24], baselines.PrincipalComponents(measured, 4)
    assert torch.equal(pca.features(), again.features()) and torch.equal(pca.mean, again.mean)
    assert len(found.dictionaries([BLOCK, OTHER], (4, 24), others=False, seed=1)) == 10


def test_one_size_and_some_names_are_selected(found):
    chosen = found.dictionaries([BLOCK], (2, 8), others=True, seed=1)
    assert list(sae_runs.select(chosen, ["sae", "pca"], (2, 8))) == [(BLOCK, "sae", 2, 8), (BLOCK, "pca", 2, 8)]
    with pytest.raises(ValueError, match=r"by_step: unknown name 'zeros'.*zero"):
        sae_runs.select(chosen, ["zeros"], (2, 8))


def test_each_is_measured_on_its_blocks_held_out_vectors(found):
    chosen = found.dictionaries([BLOCK, OTHER], (2, 8), others=False, seed=1)
    table = sae_runs.measure_each(chosen, found.held_out)
    assert table[sae_runs.NAMES].to_numpy().tolist() == [list(key) for key in chosen]
    metrics = sae_runs.metrics(table.assign(lpips="not measured"), (2, 8))
    assert {f"{BLOCK}.explained_variance", f"{OTHER}.pca.l0", f"{BLOCK}.zero.dead_fraction"} <= metrics.keys()
    assert metrics[f"{OTHER}.pca.l0"] == 2 and metrics[f"{OTHER}.mean.l0"] == 0
    assert abs(metrics[f"{BLOCK}.mean.explained_variance"]) < 0.1
    assert not any("lpips" in name for name in metrics)
    assert sae_runs.metrics(table, (4, 24)) == {}


def test_what_does_not_fit_is_refused(found, finished, small_pipeline, pipeline_folder, tmp_path):
    pipeline, retrained = small_pipeline("sd2"), models.load_pipeline(str(pipeline_folder("sd2")), device="cpu")
    with torch.no_grad():
        for weight in retrained.unet.up_blocks.parameters():
            weight.mul_(1.5)
    with pytest.raises(ValueError, match="holds no finished run of 31_train_sae; run it first"):
        sae_runs.read("outputs/31_train_sae/never", "sd2", pipeline)
    write_json(tmp_path / "results.json", {"notebook": "30_collect_activations", "tables": {}})
    with pytest.raises(ValueError, match=r"^saes: .* holds no finished run of 31_train_sae"):
        sae_runs.read(str(tmp_path), "sd2", pipeline)
    with pytest.raises(ValueError, match="saes: of the model 'sd2'; expected 'embedded'"):
        sae_runs.read(str(finished), "embedded", pipeline)
    with pytest.raises(ValueError, match=re.escape("the run has none of 7 and 8; it has 2 and 8, 2 and 24")):
        found.dictionaries([BLOCK], (7, 8), others=False, seed=0)
    with pytest.raises(ValueError, match=r"blocks \(of the autoencoders\): unknown name 'up.1.0'.*up.1.1"):
        found.dictionaries(["up.1.0"], (2, 8), others=False, seed=0)
    with pytest.raises(ValueError, match=r"saes: .*held_out was made with other weights than 'sd2' has now"):
        sae_runs.read(str(finished), "sd2", retrained)
    other_side = shutil.copytree(finished, tmp_path / "run")
    write_json(other_side / "saes" / "source.json", {**found.source, "side": "output"})
    with pytest.raises(ValueError, match="trained on the output of blocks; only an update"):
        sae_runs.read(str(other_side), "sd2", pipeline)


def test_a_reconstruction_goes_into_the_model(found, small_pipeline):
    from vaelab import denoise, substitute

    asked = prompts.load_prompts("world", count=2).texts
    chosen, sampling = found.dictionaries([BLOCK], (2, 8), others=False, seed=1), denoise.Sampling(2, 2.0)
    pipeline = small_pipeline("sd2")
    made = {
        who: substitute.drawn(pipeline, asked, block, baselines.reconstruction(one), sampling)
        for (block, who, *_), one in chosen.items()
    }
    whole = denoise.generate_all(pipeline, asked, sampling)
    assert all(torch.isfinite(one).all() and not torch.equal(one, whole) for one in made.values())
    assert not torch.equal(made["zero"], made["mean"])
    every_component = baselines.PrincipalComponents(baselines.moments(sae_grid.vectors(found.held_out, BLOCK)), WIDTH)
    same = substitute.drawn(pipeline, asked, BLOCK, baselines.reconstruction(every_component), sampling)
    torch.testing.assert_close(same, whole, rtol=0, atol=1e-4)
